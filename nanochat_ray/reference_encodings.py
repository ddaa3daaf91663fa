"""GPT-2's and GPT-4's encodings to compare with, only where tiktoken's cache already holds them: nothing is downloaded.

Put the public files into $TIKTOKEN_CACHE_DIR, each under the SHA-1 of its URL (tiktoken does so when it downloads).
"""

import hashlib
import os
import tempfile
from pathlib import Path

import tiktoken

_BLOBS = "https://openaipublic.blob.core.windows.net"

# The files each encoding is made of, with their SHA-256. tiktoken deletes and downloads again what does not match, so
# every file is checked before tiktoken gets to see it.
REFERENCE_FILES = {
    "gpt2": {
        f"{_BLOBS}/gpt-2/encodings/main/vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        f"{_BLOBS}/gpt-2/encodings/main/encoder.json": (
            "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
        ),
    },
    "cl100k_base": {
        f"{_BLOBS}/encodings/cl100k_base.tiktoken": "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
    },
}


def reference_encoding(name: str) -> tiktoken.Encoding | None:
    """The encoding `gpt2` or `cl100k_base` (GPT-4), or None when its files are not all in tiktoken's cache, intact."""
    folder = _cache_folder()
    for url, digest in REFERENCE_FILES[name].items():
        path = folder / hashlib.sha1(url.encode()).hexdigest()
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            return None
    return tiktoken.get_encoding(name)


def _cache_folder() -> Path:
    """Where tiktoken looks, by its rules: the first variable that is set counts, even when it is empty."""
    for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        if variable in os.environ:
            return Path(os.environ[variable] or os.devnull)
    return Path(tempfile.gettempdir()) / "data-gym-cache"
