"""Our tokenizer in Hugging Face's terms: `tokenizer.json`, its configuration, and the chat template.

The ids are ours for every text (`tests/test_export_tokenizer.py`), which rests on three facts.

Merges. tiktoken joins any two neighbours whose bytes together are a token, the lowest rank first, the leftmost of equal
ones. Hugging Face joins listed pairs in their order. Each token is listed with the one pair that it can come from:
when its rank is reached, all lower ones have been joined, so what stands on its bytes is what the same merging makes of
these bytes alone. That is two parts, or the token could not have been learned.

Pieces. Oniguruma, the regular expressions under `tokenizers`, reads our split pattern as Rust's does, possessive
quantifiers and the tables of letters, numbers and spaces included.

Special tokens. Hugging Face finds `<|bos|>` in text and makes it the special token; a chat message must not be able
to do that. So the chat template writes ESCAPE into every `<|` of a message, behind which nothing looks like a special
token any more, and the tokenizer takes it out again after it has looked for them. Both ESCAPE and CUT, which keeps two
parts of a message from sharing a token, are pairs of noncharacters: code points that Unicode keeps free of any meaning
in text. Only text that holds such a pair has other ids than ours; it cannot make special tokens either.
"""

import base64
import importlib.resources
import json
from typing import Any

from nanochat_ray.errors import UserError
from nanochat_ray.tokenizer import SPECIAL_TOKENS, Tokenizer

ESCAPE, CUT = "\ufdd7\ufdd1", "\ufdd7\ufdd3"


def hf_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of `tokenizer.json`, for `tokenizers.Tokenizer.from_str`.

    Raises:
        UserError: a token is not made of two others, so that no list of merges gives it.
    """
    tokens = [base64.b64decode(line.split(b" ")[0]) for line in tokenizer.ranks.splitlines()]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    names = [_printable(token) for token in tokens]
    merges = [list(map(_printable, _halves(token, ranks))) for token in tokens if len(token) > 1]
    specials = [f"<|{name}|>" for name in SPECIAL_TOKENS]
    vocabulary = {name: number for number, name in enumerate(names + specials)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": len(tokens) + number,
                "content": content,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,  # looked for before the normalizer takes the escapes out
                "special": True,
            }
            for number, content in enumerate(specials)
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": ESCAPE}, "content": ""},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"String": CUT}, "behavior": "Removed", "invert": False},
                {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated", "invert": False},
                byte_level,
            ],
        },
        "post_processor": None,  # no token is put in front: the ids of a text are ours
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a piece that is a token is that token, as in tiktoken
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def tokenizer_config(context: int, end: str) -> dict[str, Any]:
    """The content of `tokenizer_config.json`.

    Args:
        context: positions the model has.
        end: the name of the special token that ends what the model writes.
    """
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": f"<|{end}|>",
        "pad_token": "<|assistant_end|>",
        "model_max_length": context,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
    }


def special_tokens_map(end: str) -> dict[str, str]:
    """The content of `special_tokens_map.json`, which older readers want."""
    config = tokenizer_config(0, end)
    return {name: config[name] for name in ("bos_token", "eos_token", "pad_token")}


def chat_template() -> str:
    """The Jinja template that renders messages as nanochat_ray/chat.py does."""
    template = importlib.resources.files("nanochat_ray.exchange").joinpath("hf/chat_template.jinja").read_text("utf-8")
    return template.replace("ESCAPE", ESCAPE).replace("CUT", CUT)


def in_json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _halves(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two parts that merging by lower ranks alone leaves of a token's bytes."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(parts[i] + parts[i + 1], len(ranks)) for i in range(len(parts) - 1)]
        lowest = min(pairs)
        if lowest >= ranks[token]:
            raise UserError(
                f"the tokenizer cannot be exported: its token {token!r} of rank {ranks[token]} is not made of two "
                "tokens of lower rank, so Hugging Face's merges cannot give it; train a tokenizer with jobs.tokenizer"
            )
        at = pairs.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _printable(token: bytes) -> str:
    return "".join(_CHARACTERS[byte] for byte in token)


def _byte_characters() -> list[str]:
    """GPT-2's convention: a byte that prints in Latin-1 stands for itself, the others follow from U+0100 on."""
    shown = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(hidden)) for byte in range(256)]


_CHARACTERS = _byte_characters()
