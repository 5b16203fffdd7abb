"""Which of the model's vocabulary ids have a token.

The embedding is padded (129,280 rows for 128,815 tokens in V3); the rest has logits but no text
and must never be sampled (spec section 5.1). Only the ids are read here; text is not the model's
business.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def undefined_ids(model_path: Path, vocab_size: int) -> list[int]:
    """Ids below vocab_size that `tokenizer.json` does not define. Raises ValueError if unusable."""
    path = model_path / "tokenizer.json"
    try:
        tokenizer: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        defined = set(tokenizer["model"]["vocab"].values())
        defined |= {token["id"] for token in tokenizer["added_tokens"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: cannot read the vocabulary ({error!r})") from None
    beyond = sorted(i for i in defined if i >= vocab_size)
    if beyond:
        raise ValueError(
            f"{path}: defines ids up to {beyond[-1]}, but the model has vocab_size {vocab_size}: "
            "tokenizer and weights do not belong together"
        )
    return [i for i in range(vocab_size) if i not in defined]
