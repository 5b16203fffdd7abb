"""What the `rayseek` command takes: its subcommands and their options."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from rayseek.cluster.config import shipped_configs

N = TypeVar("N", int, float)
T = TypeVar("T")


def _number(
    kind: Callable[[str], N], what: str, least: float, most: float = sys.float_info.max
) -> Callable[[str], N]:
    """A type of argparse: a number from `least` to `most`, which `what` says in words."""

    def parse(text: str) -> N:
        try:
            value = kind(text)
        except ValueError:
            value = kind("-1")
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not {what}")
        return value

    return parse


def _several(of: Callable[[str], T]) -> Callable[[str], list[T]]:
    """A type of argparse: values with commas between."""

    def parse(text: str) -> list[T]:
        return [of(part.strip()) for part in text.split(",") if part.strip()]

    return parse


_COUNT = _number(int, "a whole number from 1", 1)
_WHOLE = _number(int, "a whole number from 0", 0)
_PORT = _number(int, "a port from 1 to 65535", 1, 65535)
_SHARE = _number(float, "a share from 0 to 1", 0, 1)
_POSITIVE = _number(float, "a number above 0", sys.float_info.min)
_FROM_0 = _number(float, "a number from 0", 0)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="rayseek", description="Serve DeepSeek-V3 from a Ray cluster."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="start Ray, the engine and the API on this machine")
    serve.add_argument("config", nargs="?", help="a .yaml file, or a shipped one's name")
    serve.add_argument("--model", type=Path, help="checkpoint folder in the official layout")
    serve.add_argument("--port", type=_PORT, help="port of the API (default 8000)")
    serve.add_argument("--host", help="address to listen on (default 0.0.0.0: every interface)")

    _add_keys(commands.add_parser("keys", help="who may use the API: add, list, revoke"))

    _add_config(commands.add_parser("config", help="does a config fit, and how is it deployed?"))

    doctor = commands.add_parser("doctor", help="is this machine ready for a config?")
    doctor.add_argument("config", nargs="?", help="a .yaml file, or a shipped one's name")
    doctor.add_argument("--model", type=Path, help="checkpoint folder, instead of the config's")
    doctor.add_argument(
        "--without-ranks", action="store_true", help="of a node without ranks: head or ingress"
    )
    doctor.add_argument("--json", action="store_true", help="the findings as one JSON object")

    _add_k8s(commands.add_parser("k8s", help="manifests for KubeRay: render, check"))

    _add_plan(commands.add_parser("plan", help="how many GPUs does a load need?"))

    inspect = commands.add_parser("inspect", help="where a checkpoint's bytes go, on N ranks")
    inspect.add_argument("path", type=Path, help="checkpoint folder, or a config.json alone")
    inspect.add_argument(
        "--ranks", type=_COUNT, default=1, help="expert-parallel ranks (default 1)"
    )
    inspect.add_argument("--redundant", type=_WHOLE, default=0, help="redundant experts a layer")
    inspect.add_argument("--device-gib", type=_POSITIVE, help="memory of one device, in GiB")

    make = commands.add_parser("make-model", help="write a random checkpoint, official layout")
    make.add_argument("path", type=Path)
    make.add_argument("--config", default="small", help="small, bench, or a config.json")
    make.add_argument("--seed", type=int, default=0)
    make.add_argument("--shards", type=_COUNT, default=4)
    dtype = make.add_mutually_exclusive_group()
    dtype.add_argument("--fp8", action="store_true", help="block-FP8 weights")
    dtype.add_argument("--bf16", action="store_true", help="bfloat16 weights")

    _add_corpus(
        commands.add_parser("make-corpus", help="write text that a small model learns from")
    )

    _add_train(commands.add_parser("train", help="train a small model, or go on with a run"))

    conform = commands.add_parser("conformance", help="does an endpoint speak the V3 dialect?")
    conform.add_argument("url", metavar="URL", help="of any OpenAI-compatible V3 endpoint")
    conform.add_argument("--key", default=os.environ.get("OPENAI_API_KEY", ""), help="its API key")
    conform.add_argument("--model", help="model name to ask for; default: the server's first")

    _add_eval(commands.add_parser("eval", help="how many questions an endpoint answers right"))

    _add_replay(commands.add_parser("replay", help="ask again; what differs from a kept answer?"))

    _add_chaos(commands.add_parser("chaos", help="kill processes under load: nothing may be lost"))
    _add_bench(
        commands.add_parser("bench", help="throughput and latency, in-process and over HTTP")
    )
    return top


def _add_bench(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("--model", type=Path, help="checkpoint folder; default: the bench model")
    bench.add_argument("--url", help="measure this running server only, as http://host:port")
    bench.add_argument("--key", default=os.environ.get("OPENAI_API_KEY", ""), help="its API key")
    bench.add_argument("--name", help="model name to ask for; default: the server's first")
    bench.add_argument(
        "--streams", type=_several(_COUNT), default="1,8,32", help="numbers of concurrent streams"
    )
    bench.add_argument(
        "--prompt", type=_several(_COUNT), default="32", help="prompt lengths in tokens"
    )
    bench.add_argument("--output", type=_COUNT, default=128, help="tokens of each answer")
    bench.add_argument(
        "--threads", type=_COUNT, help="engine.threads; default: the config's default"
    )
    bench.add_argument("--no-http", action="store_true", help="in-process only")
    bench.add_argument("--transformers", action="store_true", help="also time transformers")
    bench.add_argument(
        "--kernels", action="store_true", help="the kernels alone; on a Hopper GPU at V3's shapes"
    )
    bench.add_argument(
        "--exchange", action="store_true", help="rows to experts and back, beside bare transfers"
    )
    bench.add_argument("--only", default="", help="of the GPU's kernels, those so named")
    bench.add_argument("--out", type=Path, help="folder for the kernels' table, plot and figures")
    bench.add_argument(
        "--slice",
        type=_COUNT,
        metavar="N",
        help="N layers of V3's true dimensions on one Hopper GPU",
    )
    bench.add_argument(
        "--kv-dtype",
        choices=["auto", "fp8"],
        default="auto",
        help="engine.kv_dtype; with --slice too",
    )
    bench.add_argument("--json", type=Path, help="write the figures there")


def _add_config(config: argparse.ArgumentParser) -> None:
    source = argparse.ArgumentParser(add_help=False)
    source.add_argument("config", help=f"a .yaml file, or one of {', '.join(shipped_configs())}")
    source.add_argument("--model", type=Path, help="checkpoint folder, instead of model.path")
    actions = config.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = actions.add_parser("check", parents=[source], help="memory, contradictions, all ranks")
    spec = "plan for this model, without its files"
    check.add_argument("--spec", choices=["671b", "small"], help=spec)
    render = actions.add_parser("render", parents=[source], help="the file for `serve deploy`")
    render.add_argument("--key-file", type=Path, help="instead of api.key_file")


def _add_plan(plan: argparse.ArgumentParser) -> None:
    plan.add_argument("config", help="whose units are counted: a .yaml file, or a shipped one")
    plan.add_argument("--requests-per-second", type=_POSITIVE, metavar="N")
    plan.add_argument("--prompt", type=_COUNT, default=4000, help="tokens, in the mean (4000)")
    plan.add_argument("--output", type=_COUNT, default=800, help="tokens, in the mean (800)")
    plan.add_argument("--cached", type=_SHARE, default=0.5, help="part of prompts in a cache (0.5)")
    plan.add_argument("--accepted", type=_SHARE, default=0.85, help="drafts that come true (0.85)")
    plan.add_argument("--first-token", type=_POSITIVE, default=3, help="target, in seconds (3)")
    plan.add_argument("--between-tokens", type=_POSITIVE, default=100, help="target, in ms (100)")
    plan.add_argument("--price", type=_FROM_0, help="of a GPU hour")
    virtual = plan.add_argument_group("in virtual time")
    virtual.add_argument(
        "--simulate", type=_POSITIVE, metavar="HOURS", help="let them pass, and tell"
    )
    virtual.add_argument(
        "--shape",
        choices=("even", "poisson", "wave", "burst"),
        default="poisson",
        help="how requests come (poisson)",
    )
    virtual.add_argument(
        "--peak", type=_POSITIVE, default=1.5, help="of a wave or burst, over the mean (1.5)"
    )
    virtual.add_argument(
        "--spread", type=_FROM_0, default=0.5, help="deviation of lengths over their mean (0.5)"
    )
    virtual.add_argument("--trace", type=Path, help="recorded requests instead, as JSON lines")
    virtual.add_argument(
        "--scale", action="store_true", help="by the policies, beside a fixed fleet of that size"
    )
    virtual.add_argument(
        "--start-seconds", type=_FROM_0, default=300, help="until a new unit works (300)"
    )
    virtual.add_argument(
        "--unit-life", type=_POSITIVE, metavar="HOURS", help="in the mean, to a death"
    )
    virtual.add_argument(
        "--part", type=_COUNT, help="one of so many ranks; default: as time allows"
    )
    virtual.add_argument("--seed", type=int, default=0)
    virtual.add_argument("--plot", type=Path, help="of units and latencies, as .svg or .png")
    plan.add_argument(
        "--fit", type=Path, metavar="BENCH.json", help="a CPU engine's step times, from a bench"
    )
    plan.add_argument(
        "--hold-out",
        type=_several(_COUNT),
        default="1,8,32",
        help="streams that are predicted, not fitted to (1,8,32)",
    )


def _add_k8s(k8s: argparse.ArgumentParser) -> None:
    actions = k8s.add_subparsers(dest="action", required=True, metavar="ACTION")
    render = actions.add_parser("render", help="a config's RayService, and what stands around it")
    render.add_argument("config", help=f"a .yaml file, or one of {', '.join(shipped_configs())}")
    render.add_argument("--out", type=Path, metavar="FOLDER", help="write the overlay there")
    check = actions.add_parser("check", help="every problem of manifests, without a cluster")
    check.add_argument("files", nargs="+", type=Path, metavar="FILE", help="or a folder, or -")
    check.add_argument("--released", type=Path, metavar="FILE", help="what runs now: judge edits")


def _add_replay(again: argparse.ArgumentParser) -> None:
    again.add_argument("request", type=Path, help="the request's body, with a seed")
    again.add_argument("response", type=Path, help="the response, a document or an event stream")
    again.add_argument("--url", default="http://127.0.0.1:8000", help="default: %(default)s")
    again.add_argument("--key", default=os.environ.get("OPENAI_API_KEY", ""), help="its API key")


def _add_keys(keys: argparse.ArgumentParser) -> None:
    file = argparse.ArgumentParser(add_help=False)
    file.add_argument("--file", type=Path, help="default: ~/.config/rayseek/keys.yaml")
    actions = keys.add_subparsers(dest="action", required=True, metavar="ACTION")
    add = actions.add_parser("add", parents=[file], help="make a key; it is shown this once")
    add.add_argument("name", help="who it is for")
    add.add_argument("--requests-per-minute", type=_COUNT, metavar="N")
    add.add_argument("--tokens-per-minute", type=_COUNT, metavar="N", help="prompts and answers")
    add.add_argument(
        "--concurrent", type=_COUNT, metavar="N",
        help="requests at one time, at least one for each ingress replica",
    )  # fmt: skip
    add.add_argument("--models", nargs="+", metavar="NAME", help="only these")
    actions.add_parser("list", parents=[file], help="names and limits")
    revoke = actions.add_parser("revoke", parents=[file], help="make a key invalid")
    revoke.add_argument("name")


def _add_train(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", type=Path, help="YAML config, as model/training/small.yaml")
    command.add_argument("--out", type=Path, default=Path("run"), help="run folder (default run)")
    command.add_argument(
        "--steps", type=_COUNT, help="schedule.steps; may change when a run goes on"
    )
    command.add_argument("--workers", type=_COUNT, help="processes that share each step")
    command.add_argument(
        "--export",
        type=Path,
        metavar="FOLDER",
        help="write the run's checkpoints FOLDER-bf16 and FOLDER-fp8, then stop",
    )
    command.add_argument(
        "--evaluate",
        type=Path,
        nargs="+",
        metavar="CHECKPOINT",
        help="perplexity, balance and drafts of exported checkpoints on the held-out documents",
    )
    command.add_argument(
        "--documents", type=_COUNT, default=1000, help="most that --evaluate reads (default 1000)"
    )
    command.add_argument(
        "--plot",
        type=Path,
        nargs="*",
        metavar="RUN",
        help="draw plots.svg of the run; with other run folders, balance.svg of all of them",
    )
    command.add_argument(
        "--ray-workers", type=_COUNT, metavar="N", help="train with N workers of a Ray cluster"
    )


def _add_corpus(corpus: argparse.ArgumentParser) -> None:
    corpus.add_argument("folder", type=Path)
    corpus.add_argument(
        "--tokens", type=_POSITIVE, default=40e6, help="about so many (default 40e6)"
    )
    corpus.add_argument(
        "--shard-tokens", type=_POSITIVE, default=2e6, help="of one file (default 2e6)"
    )
    corpus.add_argument("--seed", type=int, default=0)
    corpus.add_argument(
        "--chinese", type=_SHARE, default=0.35, metavar="SHARE", help="default 0.35"
    )
    corpus.add_argument("--longest", type=_COUNT, default=512, help="tokens of a document at most")
    corpus.add_argument("--held-out", action="store_true", help="of held-out questions: to measure")
    corpus.add_argument(
        "--tokenizer", type=Path, help="folder of its files; default: learn one, kept in FOLDER"
    )
    corpus.add_argument(
        "--weights", default="", help="of tasks, as sort=12,tools=7; a task not named keeps its own"
    )


def _add_eval(command: argparse.ArgumentParser) -> None:
    command.add_argument("--url", default="http://127.0.0.1:8000/v1", help="default: %(default)s")
    command.add_argument("--key", default=os.environ.get("OPENAI_API_KEY", ""), help="its API key")
    command.add_argument("--model", help="model name to ask for; default: the server's first")
    command.add_argument("--tasks", help="names with commas between; default: all")
    command.add_argument("--languages", default="en,zh", help="default: %(default)s")
    command.add_argument("--questions", type=_COUNT, help="of each task and language; default 100")
    command.add_argument("--concurrency", type=_COUNT, default=16, help="requests at one time")
    command.add_argument("--temperature", type=_FROM_0, help="default: none is sent")
    command.add_argument(
        "--max-tokens", type=_COUNT, default=512, help="of an answer (default 512)"
    )
    command.add_argument("--seed", type=int, default=0, help="of the questions and the sampling")
    command.add_argument("--json-mode", action="store_true", help="send response_format")
    command.add_argument("--out", type=Path, help="write scores and failed questions there")
    command.add_argument(
        "--harness", metavar="TASKS", help="run these tasks of lm-eval instead, as mmlu_pro,aime24"
    )


def _add_chaos(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", nargs="?", default="laptop-split", help="default: laptop-split")
    command.add_argument("--port", type=_PORT, help="port of the API (default 8000)")
    command.add_argument("--streams", type=_COUNT, default=32, help="at the same time (default 32)")
    command.add_argument("--prompts", type=_COUNT, default=24, help="different ones (default 24)")
    command.add_argument("--kills", type=_WHOLE, default=60, help="default 60")
    command.add_argument("--every", type=_FROM_0, default=3, help="seconds between kills, at least")
    command.add_argument(
        "--kinds",
        type=_several(str),
        default="rank,expert,leader,expert leader",
        metavar="K,...",
        help="also prefill leader, node, update, scale (default %(default)s)",
    )
    command.add_argument("--stop", action="store_true", help="SIGSTOP instead of SIGKILL")
    command.add_argument("--nodes", type=_COUNT, default=1, help="Ray nodes, all on this machine")
    command.add_argument("--seed", type=int, default=0)
