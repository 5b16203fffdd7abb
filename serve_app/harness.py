"""The field's benchmarks against an endpoint: EleutherAI's lm-eval, run as a program of its own.

It asks over chat completions, so only its tasks that generate text can run. The V3-0324 model card
has 81.2 for MMLU-Pro (`mmlu_pro`), 68.4 for GPQA Diamond (`gpqa_diamond_cot_zeroshot`) and 59.4 for
AIME (`aime24`); its prompts differ from DeepSeek's, so expect the scores near, not equal.
LiveCodeBench, the card's fourth, is not among lm-eval's tasks.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping

from rayseek.serve_app.conformance import Endpoint, open_endpoint

MISSING = "--harness runs EleutherAI's lm-eval, which is not installed: pip install 'rayseek[eval]'"
TIMEOUT_S = 3600  # of one request: a long answer while many others run
MAX_TOKENS = 8192  # the API's limit; lm-eval's own default, 256, cuts a reasoned answer off


def harness_command(
    at: Endpoint,
    tasks: str,
    *,
    concurrency: int,
    temperature: float | None,
    questions: int | None,
    out: str | None,
) -> list[str]:
    """The command line. questions: of each task, None for all; lm-eval's temperature is 0."""
    sampling: dict[str, object] = {"max_gen_toks": MAX_TOKENS}
    if temperature is not None:
        sampling |= {"temperature": temperature, "do_sample": temperature > 0}
    model = {
        "model": at.model,
        "base_url": f"{at.base}/v1/chat/completions",
        "num_concurrent": concurrency,
        "max_retries": 3,
        "timeout": TIMEOUT_S,
        "tokenizer_backend": "none",  # else it would look for the model's tokenizer on a hub
    }
    return [
        *(sys.executable, "-m", "lm_eval", "run"),
        *("--model", "local-chat-completions", "--model_args", _pairs(model)),
        *("--tasks", tasks, "--apply_chat_template", "--gen_kwargs", _pairs(sampling)),
        *(("--limit", str(questions)) if questions is not None else ()),
        *(("--output_path", out, "--log_samples") if out is not None else ()),
    ]


def _pairs(values: Mapping[str, object]) -> str:
    return ",".join(f"{name}={value}" for name, value in values.items())


def run_harness(arguments: argparse.Namespace) -> None:
    """Run it; its exit code becomes ours. Raises ValueError where it is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(MISSING)
    at = open_endpoint(arguments.url, arguments.key, arguments.model)
    command = harness_command(
        at,
        arguments.harness,
        concurrency=arguments.concurrency,
        temperature=arguments.temperature,
        questions=arguments.questions,
        out=None if arguments.out is None else str(arguments.out),
    )
    done = subprocess.run(command, env=os.environ | {"OPENAI_API_KEY": arguments.key}, check=False)
    if done.returncode:
        sys.exit(done.returncode)
