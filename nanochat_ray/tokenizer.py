"""Text to token ids and back: a byte-level BPE that rustbpe trains and tiktoken runs, stored as data.

    tokenizer = train_tokenizer(texts, vocab_size=32768)
    tokenizer.decode(tokenizer.encode("any text at all")) == "any text at all"
    tokenizer.save(folder)        # tokenizer.json + ranks.tiktoken; Tokenizer.load(folder) verifies both

Ids 0 … vocab_size−10 are BPE tokens in order of their merge rank, the last nine are the special tokens. No text ever
encodes to a special token: `<|bos|>` typed by a user is seven characters like any others.
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import rustbpe
import tiktoken

from nanochat_ray.errors import UsageError, UserError
from nanochat_ray.storage import Folder

SPECIAL_TOKENS = (
    "bos",  # begins every document and every conversation
    "user_start",
    "user_end",
    "assistant_start",
    "assistant_end",
    "python_start",  # the assistant calls its tool …
    "python_end",
    "output_start",  # … and reads what the tool answered
    "output_end",
)
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)  # every byte is a token, so that every text has an encoding

# How text is cut into pieces before merging; no token crosses a cut. GPT-4's rule (public in tiktoken), two changes.
# Numbers are cut into pairs of digits instead of triples: a small vocabulary has no thousand tokens to spare for them.
# Runs of white space are taken at most 50,000 at a time: the regex engine under tiktoken and rustbpe keeps one
# backtrack entry per character of that alternative and panics at a million, which one padded document would reach.
SPLIT_PATTERN = "|".join(
    (
        r"'(?i:[sdmt]|ll|ve|re)",  # English contractions
        r"[^\r\n\p{L}\p{N}]?+\p{L}+",  # a word with the space or sign in front of it
        r"\p{N}{1,2}",
        r" ?[^\s\p{L}\p{N}]++[\r\n]*",  # punctuation with the line breaks after it
        r"\s*[\r\n]",
        r"\s{1,50000}(?!\S)",  # leaves the last space to the word that follows
        r"\s+",
    )
)

FORMAT = 1
_FACTS_FILE = "tokenizer.json"
_RANKS_FILE = "ranks.tiktoken"


@dataclass(frozen=True)
class Tokenizer:
    """Plain data, so that it pickles small and fast; each process compiles it once, on first use.

    Attributes:
        ranks: the content of ranks.tiktoken: per line a token in base64, a space and its rank, ranks 0, 1, 2, ….
        pattern: regular expression that cuts text into pieces before merging.
        training: what it was trained on and how well it compresses; for people and for re-runs, not part of identity.
    """

    ranks: bytes = field(repr=False)
    pattern: str = SPLIT_PATTERN
    training: dict[str, Any] = field(default_factory=dict, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"ranks": self.ranks, "pattern": self.pattern, "training": self.training}

    @cached_property
    def _encoding(self) -> tiktoken.Encoding:
        return _compile(self.ranks, self.pattern)

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self._encoding.n_vocab

    @property
    def fingerprint(self) -> str:
        """64 hex digits; equal exactly when every text has equal ids and every id has equal meaning."""
        facts = [self.pattern, hashlib.sha256(self.ranks).hexdigest(), *SPECIAL_TOKENS]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @property
    def bos(self) -> int:
        return self.special("bos")

    def special(self, name: str) -> int:
        """The id of a special token by its name in SPECIAL_TOKENS, without `<|` and `|>`."""
        return self.vocab_size - len(SPECIAL_TOKENS) + SPECIAL_TOKENS.index(name)

    def encode(self, text: str) -> list[int]:
        """Ids of the text, never special ones.

        A lone surrogate, which is not a character, is encoded as U+FFFD; all else round-trips exactly.

        Raises:
            TypeError: `text` is not a string.
        """
        return self._encoding.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Ids of each text, as `encode` gives them. Threads run in parallel: tiktoken releases the GIL."""
        if threads == 1:
            return [self.encode(text) for text in texts]
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=threads)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids. Special tokens read `<|bos|>`; bytes that are not UTF-8 become U+FFFD.

        Raises:
            KeyError: an id is not in the vocabulary.
        """
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of the ids, which may begin or end within a character.

        Raises:
            KeyError: an id is not in the vocabulary.
        """
        return self._encoding.decode_bytes(ids)

    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: how many bytes of text each id stands for; 0 for special tokens, which are no text."""
        ordinary = range(self.vocab_size - len(SPECIAL_TOKENS))
        tokens = self._encoding.decode_tokens_bytes(ordinary)
        return np.array([len(token) for token in tokens] + [0] * len(SPECIAL_TOKENS), dtype=np.int32)

    def save(self, folder: Folder) -> None:
        """Write ranks.tiktoken, then tokenizer.json, which vouches for it.

        Raises:
            OSError: the folder cannot be written.
        """
        facts = {
            "format": FORMAT,
            "vocab_size": self.vocab_size,
            "pattern": self.pattern,
            "special_tokens": list(SPECIAL_TOKENS),
            "ranks": {"file": _RANKS_FILE, "bytes": len(self.ranks), "sha256": hashlib.sha256(self.ranks).hexdigest()},
            "fingerprint": self.fingerprint,
            "training": self.training,
        }
        folder.write(_RANKS_FILE, self.ranks)
        folder.write_json(_FACTS_FILE, facts)

    @staticmethod
    def load(folder: Folder) -> "Tokenizer":
        """The tokenizer saved in a folder, verified.

        Raises:
            UserError: there is none, or a file is missing, damaged or of another format; names the file.
        """
        facts = _read_facts(folder)
        ranks = _read(folder, _RANKS_FILE)
        size, digest = facts["ranks"]["bytes"], facts["ranks"]["sha256"]
        if len(ranks) != size:
            raise _damaged(folder, _RANKS_FILE, f"{len(ranks)} bytes instead of {size}")
        if hashlib.sha256(ranks).hexdigest() != digest:
            raise _damaged(folder, _RANKS_FILE, "its sha256 is not the one in tokenizer.json")
        tokenizer = Tokenizer(ranks, facts["pattern"], facts["training"])
        if tokenizer.fingerprint != facts["fingerprint"]:
            raise _damaged(folder, _FACTS_FILE, "its fingerprint does not fit pattern, ranks and special tokens")
        return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn merges from the texts, which are read once and not kept; same texts, same tokenizer.

    Args:
        texts: documents. Lone surrogates count as U+FFFD, as in `encode`.
        vocab_size: number of ids, the nine special tokens included.

    Raises:
        UsageError: `vocab_size` is below MIN_VOCAB_SIZE.
        UserError: a document is not a string, or the texts hold too few distinct pairs for so many merges.
    """
    check_vocab_size(vocab_size)
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(_checked(texts), vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
    tokens = [bytes(token) for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])]
    supported = len(tokens) + len(SPECIAL_TOKENS)
    if supported < vocab_size:
        raise UserError(
            f"vocabulary of {vocab_size} is larger than the text supports: it yields {supported} ids; "
            f"pass --vocab-size {supported} or less, or give more text"
        )
    return Tokenizer(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)))


def check_vocab_size(vocab_size: int) -> None:
    """Complain before any text is read.

    Raises:
        UsageError: `vocab_size` is below MIN_VOCAB_SIZE.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UsageError(
            f"--vocab-size {vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} special tokens "
            f"need at least {MIN_VOCAB_SIZE}"
        )


def _checked(texts: Iterable[str]) -> Iterator[str]:
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"document {number} of the tokenizer's training text is {type(text).__name__}, not text")
        yield text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@lru_cache(maxsize=4)  # 40 ms at 32,768 tokens; Ray unpickles a tokenizer for every task of a process
def _compile(ranks: bytes, pattern: str) -> tiktoken.Encoding:
    lines = (line.split(b" ") for line in ranks.splitlines())
    mergeable = {base64.b64decode(token): int(rank) for token, rank in lines}
    specials = {f"<|{name}|>": len(mergeable) + i for i, name in enumerate(SPECIAL_TOKENS)}
    return tiktoken.Encoding("nanochat_ray", pat_str=pattern, mergeable_ranks=mergeable, special_tokens=specials)


def _read_facts(folder: Folder) -> dict[str, Any]:
    try:
        facts = json.loads(_read(folder, _FACTS_FILE))
        written = facts["format"], facts["special_tokens"]
        _ = facts["pattern"], facts["fingerprint"], facts["training"], facts["ranks"]["bytes"], facts["ranks"]["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, _FACTS_FILE, f"{type(error).__name__}: {error}") from error
    if written != (FORMAT, list(SPECIAL_TOKENS)):
        raise UserError(
            f"{folder / _FACTS_FILE} has format {written[0]} and special tokens {written[1]}; "
            f"this version reads format {FORMAT} with {list(SPECIAL_TOKENS)}"
        )
    return facts


def _read(folder: Folder, name: str) -> bytes:
    try:
        return folder.read(name)
    except FileNotFoundError:
        raise UserError(
            f"no tokenizer: {folder / name} does not exist; train one with `python -m jobs.tokenizer`"
        ) from None
    except OSError as error:
        raise UserError(f"{folder / name} cannot be read ({error})") from error


def _damaged(folder: Folder, name: str, what: str) -> UserError:
    return UserError(
        f"{folder / name} is damaged ({what}); restore it from a copy, or train anew with "
        "`python -m jobs.tokenizer --fresh` (models made with the old tokenizer do not fit a new one)"
    )
