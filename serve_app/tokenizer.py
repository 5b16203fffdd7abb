"""V3's tokenizer: text to ids without control tokens, ids to exact bytes (spec section 5.1).

Control tokens are found by name, because their ids differ between checkpoints. Text is encoded
with a tokenizer from which every added token has been removed, so that no text, whoever wrote it,
can become a control id.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from enum import Enum
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer as BpeTokenizer


class Control(Enum):
    """The control tokens that prompts and tool calls are made of. Deliberately not strings."""

    BOS = "<｜begin▁of▁sentence｜>"
    EOS = "<｜end▁of▁sentence｜>"
    USER = "<｜User｜>"
    ASSISTANT = "<｜Assistant｜>"
    FIM_BEGIN = "<｜fim▁begin｜>"
    FIM_HOLE = "<｜fim▁hole｜>"
    FIM_END = "<｜fim▁end｜>"
    CALLS_BEGIN = "<｜tool▁calls▁begin｜>"
    CALLS_END = "<｜tool▁calls▁end｜>"
    CALL_BEGIN = "<｜tool▁call▁begin｜>"
    CALL_END = "<｜tool▁call▁end｜>"
    OUTPUTS_BEGIN = "<｜tool▁outputs▁begin｜>"
    OUTPUTS_END = "<｜tool▁outputs▁end｜>"
    OUTPUT_BEGIN = "<｜tool▁output▁begin｜>"
    OUTPUT_END = "<｜tool▁output▁end｜>"
    TOOL_SEP = "<｜tool▁sep｜>"


# Control tokens and the text between them. No two pieces of text stand side by side.
Prompt = tuple[Control | str, ...]


SLICE = 2**16  # characters of a long text that are tokenised at a time, to see whether it fits
ACROSS = 64  # more than the tokens that a cut between two slices adds (measured: 1)


@lru_cache(maxsize=1)
def _byte_of_char() -> dict[str, int]:
    """GPT-2's byte-level alphabet: printable Latin-1 stands for itself, the rest from U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in set(plain)]
    return {chr(b): b for b in plain} | {chr(0x100 + i): b for i, b in enumerate(rest)}


def without_surrogates(text: str) -> str:
    """Replace lone surrogates (JSON's `\\ud800`), which UTF-8 cannot carry, by U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Tokenizer:
    """Immutable after loading; safe to use from several threads."""

    def __init__(self, description: dict[str, object]) -> None:
        """`description` is the parsed `tokenizer.json`; it is changed. Raises ValueError."""
        added, model = description.get("added_tokens"), description.get("model")
        if not isinstance(added, list) or not isinstance(model, dict) or "vocab" not in model:
            raise ValueError("tokenizer.json has no 'added_tokens' or no 'model.vocab'")
        names: dict[str, int] = {token["content"]: token["id"] for token in added}
        missing = [control.value for control in Control if control.value not in names]
        if missing:
            raise ValueError(f"tokenizer.json lacks DeepSeek's control tokens: {missing}")
        words: dict[str, int] = {w: i for w, i in model["vocab"].items() if w not in names}

        self.special_ids = frozenset(token["id"] for token in added if token["special"])
        self.control_ids = frozenset(names.values())
        self._id_of = {control: names[control.value] for control in Control}
        self.bos_id, self.eos_id = self._id_of[Control.BOS], self._id_of[Control.EOS]
        self._bytes = {i: _word_bytes(word) for word, i in words.items()}
        self._bytes.update((i, name.encode()) for name, i in names.items())
        self.num_ids = len(self._bytes)

        # Without their names no merge and no lookup can lead to a control token.
        description["added_tokens"] = []
        model["vocab"] = words
        self._bpe = BpeTokenizer.from_str(json.dumps(description, ensure_ascii=False))

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Tokenizer:
        """Load `tokenizer.json` from a checkpoint folder (or that file itself)."""
        file = Path(path)
        if file.is_dir():
            file = file / "tokenizer.json"
        try:
            return cls(json.loads(file.read_bytes()))
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot load a tokenizer from {file}: {error}") from error

    def id_of(self, control: Control) -> int:
        return self._id_of[control]

    def is_defined(self, token_id: int) -> bool:
        return token_id in self._bytes

    def encode_text(self, text: str) -> list[int]:
        """Ids of untrusted text: never a control id."""
        return self.encode_prompt((text,))

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Ids of a prompt: each piece of text is encoded on its own. Releases the GIL."""
        spans = iter(self.encode_texts([piece for piece in prompt if isinstance(piece, str)]))
        ids: list[int] = []
        for piece in prompt:
            if isinstance(piece, Control):
                ids.append(self._id_of[piece])
            else:
                ids += next(spans)
        return ids

    def is_longer(self, prompt: Prompt, limit: int) -> bool:
        """Whether a prompt is certainly longer than so many tokens, told without making many more.
        No: it may be, by a little."""
        texts = [piece for piece in prompt if isinstance(piece, str)]
        if sum(map(len, texts)) <= limit:
            return False
        count = 0
        for text in texts:
            for start in range(0, len(text), SLICE):
                count += len(self.encode_text(text[start : start + SLICE])) - (start and ACROSS)
                if count > limit:
                    return True
        return False

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text on its own. Releases the GIL."""
        clean = [without_surrogates(text) for text in texts]
        # Unlike `encode`, the batch call lets other threads run meanwhile.
        spans = self._bpe.encode_batch_fast(clean, add_special_tokens=False)
        return [span.ids for span in spans]

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes of a token; the literal name of a control token; b"" if undefined."""
        return self._bytes.get(token_id, b"")

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, control tokens as their names, broken UTF-8 as U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")


def _word_bytes(word: str) -> bytes:
    table = _byte_of_char()
    try:
        return bytes([table[char] for char in word])
    except KeyError:  # not written in the byte-level alphabet: stands for itself
        return word.encode()
