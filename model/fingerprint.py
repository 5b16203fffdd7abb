"""Which model answers, as a short name: its weights, its files, and how its sums are ordered.

Two services with the same fingerprint give the same tokens for the same request and seed. Reading
671 billion parameters again would take minutes, so of a large file only its header, its size and
blocks spread over it are read; two trainings of one architecture differ everywhere.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

NUMERICS = 2  # one more whenever a change of code changes tokens of the same weights
SMALL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
WHOLE = 64 << 20  # bytes of a file that is read whole
BLOCKS, BLOCK = 32, 16 << 10  # of a larger one


def fingerprint(path: Path, arithmetic: str) -> str:
    """fp_ and 16 hex digits for the checkpoint at `path`. arithmetic: of `kernels/select.py`."""
    how = f"{NUMERICS} {arithmetic} torch {torch.__version__}"  # torch may draw
    digest = hashlib.blake2b(how.encode(), digest_size=8)
    files = [path / name for name in SMALL_FILES if (path / name).exists()]
    for file in [*files, *sorted(path.glob("*.safetensors"))]:
        digest.update(f"{file.name} {file.stat().st_size}".encode())
        digest.update(_sample(file))
    return f"fp_{digest.hexdigest()}"


def _sample(file: Path) -> bytes:
    """Digest of a small file, or of a large one's header and spread blocks."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        if size <= WHOLE:
            return hashlib.file_digest(opened, "blake2b").digest()
        digest = hashlib.blake2b()
        header = int.from_bytes(opened.read(8), "little")  # safetensors: the length of its JSON
        digest.update(opened.read(min(header, WHOLE)))
        for number in range(BLOCKS):
            opened.seek((size - BLOCK) * number // (BLOCKS - 1))
            digest.update(opened.read(BLOCK))
        return digest.digest()
