"""What a trained checkpoint is worth, by the engine that serves it.

Beside perplexity and balance (model/training/assess.py): how many drafts of the MTP module come
true when answers to held-out prompts are written greedily.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rayseek.cluster.engine import Engine, EngineLimits
from rayseek.cluster.pages import pages_for
from rayseek.cluster.request import Request, SamplingParams
from rayseek.cluster.scheduler import Limits
from rayseek.cluster.speculation import Choice
from rayseek.kernels.select import Choice as Kernels
from rayseek.kernels.select import Device, choose_ops, device_for
from rayseek.model.training.assess import Text, assess, load_model, read_texts
from rayseek.model.training.report import readable
from rayseek.model.training.run_config import RunConfig
from rayseek.model.vocabulary import undefined_ids

ANSWER_TOKENS = 200  # most of an answer
STEP = Limits(max_batch=16, step_tokens=1024, chunk_tokens=256)


@dataclass(frozen=True, slots=True)
class Drafting:
    """Answers written greedily with one draft a step, and what became of the drafts."""

    written: int  # tokens
    drafted: int
    accepted: int

    @property
    def acceptance(self) -> float:
        return self.accepted / max(self.drafted, 1)


def measure_drafts(
    checkpoint: Path, prompts: Iterable[list[int]], kernels: Kernels, device: Device
) -> Drafting:
    """Answer every prompt at temperature 0, always drafting the token after the next."""
    todo = list(prompts)
    context = max(map(len, todo)) + ANSWER_TOKENS
    pages = STEP.max_batch * pages_for(context)
    model = load_model(checkpoint, kernels.ops, device, pages, context)
    config = model.transformer.config
    undefined = undefined_ids(checkpoint, config.vocab_size)
    limits = EngineLimits(pages, context, len(todo), STEP, draft_tokens=1)
    engine = Engine(
        model, limits, undefined, depth_policy=lambda *_: Choice(1), sampler=kernels.sampler
    )
    greedy = SamplingParams(ANSWER_TOKENS, 0.0, stop_token_ids=(config.eos_token_id,))
    for number, prompt in enumerate(todo):
        engine.submit(Request(str(number), tuple(prompt), greedy))
    tokens = 0
    while engine.busy:
        for delta in engine.step():
            if delta.error is not None:
                raise RuntimeError(f"prompt {delta.request_id} of {checkpoint}: {delta.error}")
            tokens += len(delta.tokens)
    return Drafting(tokens, engine.load.drafted[0], engine.load.accepted[0])


def evaluate_run(config: RunConfig, folder: Path, checkpoints: list[Path], count: int) -> None:
    """Evaluate checkpoints on the first `count` held-out documents; print, and keep the results
    in the run folder's evaluation.json.

    Raises ValueError if the config names no held-out documents.
    """
    if config.data.held_out is None:
        raise ValueError("the config has no data.held_out to evaluate on")
    texts = [text for text in read_texts(config.data.held_out) if len(text.ids) > 1][:count]
    device = device_for()
    kernels = choose_ops(device)
    path = folder / "evaluation.json"
    found = json.loads(path.read_text("utf-8")) if path.exists() else {}
    for checkpoint in checkpoints:
        results = evaluate_checkpoint(checkpoint, texts, kernels, device)
        print(f"{checkpoint.name}: {readable(results)}", flush=True)
        found[checkpoint.name] = results
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=2) + "\n", "utf-8")


def evaluate_checkpoint(
    checkpoint: Path, texts: list[Text], kernels: Kernels, device: Device
) -> dict[str, Any]:
    """The fields of `Assessment` and of `Drafting`, and the acceptance."""
    assessment = assess(checkpoint, texts, kernels.ops, device)
    prompts = [text.prompt for text in texts if 0 < len(text.prompt) < len(text.ids)]
    drafting = measure_drafts(checkpoint, prompts, kernels, device)
    return asdict(assessment) | asdict(drafting) | {"acceptance": drafting.acceptance}
