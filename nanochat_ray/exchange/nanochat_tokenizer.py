"""Reads a tokenizer folder of the public nanochat, or one of ours, without running what is in it.

    tokenizer.pkl      a pickled tiktoken.Encoding: pattern, ranks and special tokens
    token_bytes.pt     int32, how many bytes each id stands for; checked against the ranks where it is there

Ours has tokenizer.json and ranks.tiktoken instead.
"""

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from nanochat_ray.errors import UserError
from nanochat_ray.exchange.pickled_data import NotPlainData, read_object
from nanochat_ray.storage import Folder
from nanochat_ray.tokenizer import SPECIAL_TOKENS, Tokenizer

PICKLE, TOKEN_BYTES, OURS = "tokenizer.pkl", "token_bytes.pt", "tokenizer.json"
MAX_BYTES = 2**26  # of either file; 65,536 tokens take 1 MB
MAX_PATTERN = 10_000
WAY_OUT = (
    "On a machine where you trust that file, write it as data, from the root of this repository: python -c "
    '"import pickle; from nanochat_ray.exchange.nanochat_tokenizer import tokenizer_of; '
    "from nanochat_ray.storage import Folder; encoding = pickle.load(open('tokenizer.pkl', 'rb')); "
    "tokenizer_of(vars(encoding)).save(Folder.at('tokenizer_data'))\", and give --tokenizer tokenizer_data"
)


def read_tokenizer(folder: Folder) -> Tokenizer:
    """The tokenizer of a folder, with the ids of its source for every text.

    Raises:
        UserError: there is none, it is damaged, its pickle is more than the data of an Encoding, or its special tokens
            are not the nine of the chat format behind the ranks.
        OSError: the storage failed.
    """
    if folder.exists(OURS):
        return Tokenizer.load(folder)
    data = _read(folder, PICKLE)
    if data is None:
        raise UserError(
            f"no tokenizer in {folder}: there is neither {PICKLE} nor {OURS}; give the folder of the tokenizer "
            "that the model was trained with"
        )
    try:
        state = read_object(data, "tiktoken.core", "Encoding")
    except NotPlainData as why:
        raise UserError(f"{folder / PICKLE} is not the plain data of a tiktoken.Encoding: {why}. {WAY_OUT}") from why
    if isinstance(state, str):
        raise UserError(f"{folder / PICKLE} is tiktoken's own {state[:40]!r}, which has no tokens for chats")
    tokenizer = tokenizer_of(state, str(folder / PICKLE))
    _check_token_bytes(folder, tokenizer)
    return tokenizer


def tokenizer_of(state: Any, source: str = "the encoding") -> Tokenizer:
    """The tokenizer with the pattern, ranks and special tokens of a tiktoken.Encoding.

    Args:
        state: what the Encoding pickles, or its `vars`: pat_str, mergeable_ranks, special_tokens, with or without a
            leading underscore.
        source: for messages.

    Raises:
        UserError: it cannot be one of ours; says why.
    """
    if not isinstance(state, Mapping):
        raise UserError(f"{source} holds {type(state).__name__} where a tiktoken.Encoding has its parts")
    pattern, ranks, special = (
        state.get(name, state.get("_" + name)) for name in ("pat_str", "mergeable_ranks", "special_tokens")
    )
    if not isinstance(pattern, str) or not 0 < len(pattern) <= MAX_PATTERN:
        raise UserError(f"{source} has no pattern of 1 to {MAX_PATTERN:,} characters that cuts text into pieces")
    if not _numbered(ranks, bytes):
        raise UserError(f"{source} has no ranks: not a dictionary of bytes to numbers")
    if not _numbered(special, str):
        raise UserError(f"{source} has no special tokens: not a dictionary of texts to numbers")
    tokens = sorted(ranks, key=ranks.__getitem__)
    if [ranks[token] for token in tokens] != list(range(len(tokens))) or b"" in ranks:
        raise UserError(f"{source} has {len(tokens):,} tokens whose ranks are not 0 to {len(tokens) - 1:,}, each once")
    absent = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if absent:
        raise UserError(f"{source} has no token for {len(absent)} of the 256 bytes, so that some texts have no ids")
    wanted = {f"<|{name}|>": len(tokens) + number for number, name in enumerate(SPECIAL_TOKENS)}
    if special != wanted:
        found = ", ".join(f"{name[:40]} {special[name]}" for name in sorted(special, key=special.__getitem__)[:12])
        raise UserError(
            f"{source} has other special tokens than the chat format here needs: {found or 'none'} instead of "
            f"{', '.join(f'{name} {id}' for name, id in wanted.items())}"
        )
    lines = (b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))
    tokenizer = Tokenizer(b"".join(lines), pattern, {"imported_from": source})
    try:
        tokenizer.encode("a")
    except ValueError as error:  # of tiktoken, which compiles the pattern at first use
        raise UserError(f"{source} has a pattern that is no regular expression ({str(error)[:200]})") from error
    return tokenizer


def _numbered(value: Any, kind: type) -> bool:
    if not isinstance(value, dict):
        return False
    return all(type(key) is kind and type(number) is int for key, number in value.items())


def _check_token_bytes(folder: Folder, tokenizer: Tokenizer) -> None:
    """Raises UserError when token_bytes.pt is there and belongs to other tokens.

    The public trainer counted the bytes of a token's text, in which bytes that are no whole characters read U+FFFD, so
    such tokens have two lengths that are right. Ours is that of the raw bytes.
    """
    data = _read(folder, TOKEN_BYTES)
    if data is None:
        return
    try:
        stored = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        lengths = np.asarray(stored.to(torch.int64).tolist()) if stored.numel() <= len(data) else None
    except Exception as error:  # whatever a damaged or hostile file makes of the reader
        raise UserError(
            f"{folder / TOKEN_BYTES} cannot be read as a tensor ({type(error).__name__}); copy it again, or leave it "
            "out: it is only a check"
        ) from error
    if lengths is None or lengths.shape != (tokenizer.vocab_size,):
        raise UserError(
            f"{folder / TOKEN_BYTES} is not one number for each of the {tokenizer.vocab_size:,} ids: it belongs to "
            "another tokenizer; give the folder as it was written"
        )
    raw = tokenizer.token_bytes()
    as_text = [len(tokenizer.decode([id]).encode()) if raw[id] else 0 for id in range(len(raw))]
    odd = np.flatnonzero((lengths != raw) & (lengths != np.array(as_text)))
    if odd.size:
        id = int(odd[0])
        raise UserError(
            f"{folder / TOKEN_BYTES} belongs to another tokenizer: of {odd.size:,} ids the length differs, the first "
            f"is {id}, {tokenizer.decode([id])!r}, of {lengths[id]} bytes; give the folder as it was written"
        )


def _read(folder: Folder, name: str) -> bytes | None:
    """A small file; None when it is not there."""
    size = folder.size(name)
    if size is None:
        return None
    if size > MAX_BYTES:
        raise UserError(f"{folder / name} has {size:,} bytes, more than any tokenizer; is it the right file?")
    return folder.read(name)
