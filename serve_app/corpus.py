"""Training text: the tasks' examples, rendered and tokenised exactly as the server would.

A document is one request's prompt and the answer as the model is to write it, up to its EOS. Each
token has a weight in the loss: whole for what an assistant wrote, small for what was given.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from random import Random

from rayseek.model.small_tokenizer import learn_tokenizer
from rayseek.model.training.corpus import FULL_WEIGHT, Document, shard_path, write_shard
from rayseek.serve_app.prompt import render_chat, render_fim
from rayseek.serve_app.tasks.example import Example, Fill, Language, Split, Task, draw
from rayseek.serve_app.tokenizer import Control, Prompt, Tokenizer

GIVEN_WEIGHT = 30  # prompts are not what is to be written, but they teach the language
TOOLS_WEIGHT = 8  # of a system text with tools: long and much the same
LONGEST = 512  # tokens; a longer document is left out
BATCH = 1000  # examples that are encoded together

Weighted = list[tuple[Control | str, int]]


def prompt_of(example: Example) -> Prompt:
    """What the server makes of the request that asks this."""
    if isinstance(example, Fill):
        return render_fim(example.prefix, example.suffix)
    return render_chat(example.messages, tools=example.tools, json_mode=example.json_mode)


def weighted_pieces(example: Example) -> Weighted:
    """Prompt and answer, each piece with the weight of predicting its tokens (0 to 255)."""
    pieces: Weighted = [(Control.BOS, 0)]
    if isinstance(example, Fill):
        pieces += [(piece, GIVEN_WEIGHT) for piece in prompt_of(example)[1:]]
        return [*pieces, (example.middle, FULL_WEIGHT), (Control.EOS, FULL_WEIGHT)]
    rendered = render_chat(
        (*example.messages, example.answer),
        tools=example.tools,
        json_mode=example.json_mode,
        generation_prompt=False,
    )
    written = False  # by the assistant
    for index, piece in enumerate(rendered[1:], start=1):
        if piece is Control.USER:  # two users in a row: the assistant between them said nothing
            written = False
        given = TOOLS_WEIGHT if example.tools and index == 1 else GIVEN_WEIGHT
        pieces.append((piece, FULL_WEIGHT if written else given))
        if piece in (Control.ASSISTANT, Control.OUTPUTS_END):
            written = True
        elif piece is Control.EOS:
            written = False
    return pieces


def encode_documents(examples: Sequence[Example], tokenizer: Tokenizer) -> list[Document]:
    """The examples as ids and weights; each distinct piece of text is encoded once."""
    rendered = [weighted_pieces(example) for example in examples]
    texts = list(dict.fromkeys(p for pieces in rendered for p, _ in pieces if isinstance(p, str)))
    spans = dict(zip(texts, tokenizer.encode_texts(texts), strict=True))
    documents: list[Document] = []
    for pieces in rendered:
        ids: list[int] = []
        weights: list[int] = []
        for piece, weight in pieces:
            span = spans[piece] if isinstance(piece, str) else [tokenizer.id_of(piece)]
            ids += span
            weights += [weight] * len(span)
        documents.append((ids, weights))
    return documents


def mixed_examples(
    tasks: Sequence[Task], random: Random, chinese_share: float, split: Split
) -> Iterator[tuple[Task, Example]]:
    """Without end: tasks by their weights, and so many of a task's documents Chinese."""
    weights = [task.weight for task in tasks]
    while True:
        (task,) = random.choices(tasks, weights)
        language: Language = "zh" if random.random() < chinese_share else "en"
        if language not in task.languages:
            (language,) = task.languages
        yield task, draw(task, split, random, language)


@dataclass(slots=True)
class Count:
    """Of one task. tokens: of the documents taken; answer_tokens: those of full weight."""

    documents: int = 0
    tokens: int = 0
    answer_tokens: int = 0
    too_long: int = 0


@dataclass(slots=True)
class Tally:
    """What went into a corpus: per task, and documents by length, up to powers of two."""

    tasks: dict[str, Count] = field(default_factory=dict)
    lengths: Counter[int] = field(default_factory=Counter)

    def note(self, task: str, document: Document, longest: int) -> bool:
        """Count this document. False: it is longer than `longest` tokens and must stay out."""
        count = self.tasks.setdefault(task, Count())
        ids, weights = document
        if len(ids) > longest:
            count.too_long += 1
            return False
        count.documents += 1
        count.tokens += len(ids)
        count.answer_tokens += weights.count(FULL_WEIGHT)
        self.lengths[1 << (len(ids) - 1).bit_length()] += 1
        return True


def shard_documents(
    examples: Iterator[tuple[Task, Example]],
    tokenizer: Tokenizer,
    tokens: int,
    longest: int,
    tally: Tally,
) -> list[Document]:
    """Documents of `tokens` tokens together, or a few more. What is taken is noted in `tally`."""
    documents: list[Document] = []
    while True:
        batch = list(islice(examples, BATCH))
        encoded = encode_documents([example for _, example in batch], tokenizer)
        for (task, _), document in zip(batch, encoded, strict=True):
            if tally.note(task.name, document, longest):
                documents.append(document)
                tokens -= len(document[0])
                if tokens <= 0:
                    return documents


def make_corpus(
    folder: str | Path,
    tokenizer_folder: str | Path,
    tasks: Sequence[Task],
    tokens_per_shard: int,
    shards: int,
    seed: int = 0,
    chinese_share: float = 0.35,
    longest: int = LONGEST,
    split: Split = "train",
) -> None:
    """Write shards and, after each, `corpus.json`: how it was made, digests, counts.

    A shard depends on tasks, tokenizer, seed and its number alone, so a corpus that is made again
    with more shards begins with the same ones. Raises ValueError for a folder without a tokenizer.
    """
    folder, tokenizer_file = Path(folder), Path(tokenizer_folder) / "tokenizer.json"
    tokenizer = Tokenizer.from_pretrained(tokenizer_file)
    tally = Tally()
    digests: dict[str, str] = {}
    for number in range(shards):
        random = Random(f"{seed}|{number}")
        path = shard_path(folder, number)
        examples = mixed_examples(tasks, random, chinese_share, split)
        write_shard(path, shard_documents(examples, tokenizer, tokens_per_shard, longest, tally))
        digests[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        manifest = {
            "split": split,
            "seed": seed,
            "chinese_share": chinese_share,
            "tokens_per_shard": tokens_per_shard,
            "longest": longest,
            "tokenizer_sha256": hashlib.sha256(tokenizer_file.read_bytes()).hexdigest(),
            "tasks": {name: asdict(count) for name, count in sorted(tally.tasks.items())},
            "documents_up_to": dict(sorted(tally.lengths.items())),
            "shards_sha256": digests,
        }
        (folder / "corpus.json").write_text(json.dumps(manifest, indent=2) + "\n")


def make_tokenizer(
    folder: str | Path, tasks: Sequence[Task], vocab_size: int, seed: int = 0, each: int = 1000
) -> None:
    """Learn a tokenizer from `each` examples of every task and language; write its two files."""
    random = Random(f"{seed}|tokenizer")
    texts = [
        piece
        for task in tasks
        for language in task.languages
        for _ in range(each)
        for piece, _ in weighted_pieces(draw(task, "train", random, language))
        if isinstance(piece, str)
    ]
    tokenizer, settings = learn_tokenizer(texts, vocab_size)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer)
    (folder / "tokenizer_config.json").write_text(settings)
