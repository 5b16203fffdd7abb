"""The `rayseek` command: serve, config, doctor, k8s, keys, inspect, make-model, make-corpus, train,
bench, eval, replay, conformance, plan, chaos.

Only messages; arguments stand in `arguments.py`, every command's work is elsewhere and imported
when needed.
"""

from __future__ import annotations

import argparse
import logging
import os
import select
import signal
import sys
from pathlib import Path
from typing import NoReturn
from urllib.parse import quote

from rayseek.serve_app.arguments import parser
from rayseek.serve_app.local import StartError
from rayseek.serve_app.start import config_folder, configured, key_file, started


def main(argv: list[str] | None = None) -> None:
    """A command that returns False has told what is not well; the exit status says so too."""
    arguments = parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    command = {
        "serve": serve, "config": configure, "doctor": examine, "k8s": kubernetes,
        "keys": keys, "plan": plan, "inspect": inspect, "make-model": make_model,
        "make-corpus": make_corpus, "train": train, "bench": bench,
        "conformance": conformance, "eval": evaluate, "replay": replay,
        "chaos": torment,
    }[arguments.command]  # fmt: skip
    try:
        well = command(arguments)
        sys.stdout.flush()
    except (ValueError, OSError, StartError) as error:
        if isinstance(error, BrokenPipeError) and reader_left():
            sys.exit(1)
        print(f"rayseek: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    if well is False:
        sys.exit(1)


def reader_left() -> bool:
    """Whether nobody reads what we print any more: `head` has seen enough."""
    output = sys.stdout.fileno()
    ends = select.poll()
    ends.register(output, 0)
    if not ends.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)  # for Python's last flush
    return True


def serve(arguments: argparse.Namespace) -> None:
    """Start, print where everything is, wait for Ctrl-C or SIGTERM, stop."""
    end_in_order()
    config = configured(arguments)
    if config.hardware.accelerator != "cpu":
        raise StartError(
            f"this config is for a cluster of {config.hardware.accelerator} nodes: rayseek config "
            f"render {arguments.config} > serve.yaml, then `serve deploy serve.yaml` there"
        )
    try:
        with started(config) as service:
            shown = service.shown_key
            print(
                f"\n  Rayseek serves {config.model.name}\n"
                f"  API        {service.address}/v1\n"
                f"  API key    {shown or f'one of those in {key_file(config)}'}\n"
                f"  Pages      {service.address}/{f'#key={quote(shown)}' if shown else ''}\n"
                f"  Dashboard  {service.dashboard}  (token {service.dashboard_token})\n"
                f"  Logs       {service.logs}\n"
                "  Stop with Ctrl-C.\n",
                flush=True,
            )
            signal.pause()
    except KeyboardInterrupt:
        print("\nStopped.", flush=True)


def end_in_order() -> None:
    """On Ctrl-C and SIGTERM, also where a shell set SIGINT to be ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)


def interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def torment(arguments: argparse.Namespace) -> bool:
    """Whether no stream failed or had another text."""
    from rayseek.serve_app.chaos import chaos

    end_in_order()
    return chaos(arguments, configured(arguments))


def configure(arguments: argparse.Namespace) -> bool:
    """Whether the config fits."""
    from rayseek.serve_app import config_command

    if arguments.action == "check":
        return config_command.check(arguments)
    print(config_command.render(arguments), end="")
    return True


def examine(arguments: argparse.Namespace) -> bool:
    """Whether there is no problem."""
    from rayseek.serve_app.doctor_command import doctor

    return doctor(arguments)


def kubernetes(arguments: argparse.Namespace) -> bool:
    """Whether there is no problem."""
    from rayseek.serve_app.k8s import command

    if arguments.action == "check":
        return command.verify(arguments)
    command.render(arguments)
    return True


def plan(arguments: argparse.Namespace) -> None:
    from rayseek.serve_app.plan_command import plan as hardware

    print(hardware(arguments), end="")


def keys(arguments: argparse.Namespace) -> None:
    """A running server takes changes over within a second of its next request."""
    from rayseek.serve_app.keys import add_key, first_key, read_keys, revoke_key

    file: Path = arguments.file or config_folder() / "keys.yaml"
    plain = config_folder() / "api_key"
    limits = ("requests_per_minute", "tokens_per_minute", "concurrent", "models")
    if arguments.action == "add":
        given = {name: getattr(arguments, name) for name in limits}
        if arguments.file is None and not file.exists() and plain.exists():
            first_key(file, plain)  # the key of a service that has run already stays valid
        key = add_key(file, arguments.name, **{k: v for k, v in given.items() if v is not None})
        print(key)
        print("Keep it: only its digest is stored.", file=sys.stderr)
    elif arguments.action == "revoke":
        revoke_key(file, arguments.name, plain)
        print(f"{arguments.name} is revoked.")
    else:
        for key_entry in read_keys(file):
            fields = key_entry.model_dump(exclude_none=True, exclude={"sha256", "name"})
            if key_entry.models is not None:
                fields["models"] = ",".join(key_entry.models)
            print(key_entry.name, *(f"{name}={value}" for name, value in fields.items()), sep="  ")


def inspect(arguments: argparse.Namespace) -> None:
    from rayseek.kernels.select import choose_ops, device_for
    from rayseek.model.checkpoint import Checkpoint
    from rayseek.model.config import ModelConfig
    from rayseek.model.ledger import make_ledger, render

    path: Path = arguments.path
    if path.is_file():
        config = ModelConfig.from_pretrained(path.parent)
    else:
        config = Checkpoint.open(path).config
    print(render(make_ledger(config, arguments.ranks, arguments.redundant, arguments.device_gib)))
    choice = choose_ops(device_for())
    print(f"Kernels on this machine: {choice.ops.name} ({choice.reason})")


def make_model(arguments: argparse.Namespace) -> None:
    from rayseek.model.config import ModelConfig
    from rayseek.model.maker import BENCH, SMALL, make_checkpoint

    named = {"small": SMALL, "bench": BENCH}
    config = named.get(arguments.config) or ModelConfig.from_pretrained(arguments.config)
    fp8 = True if arguments.fp8 else False if arguments.bf16 else None
    make_checkpoint(arguments.path, config, arguments.seed, fp8, arguments.shards)
    print(f"wrote {arguments.path}")


def make_corpus(arguments: argparse.Namespace) -> None:
    from rayseek.model.maker import SMALL
    from rayseek.serve_app.corpus import make_corpus, make_tokenizer
    from rayseek.serve_app.tasks.catalogue import CATALOGUE, weighted

    tasks = weighted(arguments.weights)
    folder, seed, tokens = arguments.folder, arguments.seed, int(arguments.shard_tokens)
    if arguments.tokenizer is None:
        make_tokenizer(folder, CATALOGUE, SMALL.vocab_size)
    shards = max(1, round(arguments.tokens / tokens))
    make_corpus(folder, arguments.tokenizer or folder, tasks, tokens, shards, seed,
                arguments.chinese, arguments.longest,
                "held-out" if arguments.held_out else "train")  # fmt: skip
    print(f"wrote {shards} shards and corpus.json to {folder}")


def train(arguments: argparse.Namespace) -> None:
    from rayseek.model.training import command

    workers = arguments.ray_workers or arguments.workers
    config = command.load(arguments.config, arguments.steps, workers)
    if arguments.export is not None:
        command.export_run(config, arguments.out, arguments.export)
    elif arguments.evaluate is not None:
        from rayseek.cluster.final_evaluation import evaluate_run

        evaluate_run(config, arguments.out, arguments.evaluate, arguments.documents)
    elif arguments.plot is not None:
        print(f"wrote {command.plot(arguments.out, arguments.plot)}")
    elif arguments.ray_workers is not None:
        from rayseek.cluster.training import train_on_ray

        train_on_ray(config, arguments.out)
    else:
        command.run(config, arguments.out)


def bench(arguments: argparse.Namespace) -> None:
    if arguments.exchange:
        from rayseek.cluster.exchange_bench import run as bench_exchange

        bench_exchange()
    elif arguments.kernels:
        from rayseek.kernels.bench import main as bench_kernels

        folder = [f"--out={arguments.out}"] if arguments.out else []
        bench_kernels([f"--only={arguments.only}", *folder])
    elif arguments.slice is not None:
        from rayseek.cluster.slice_bench import run as bench_slice
        from rayseek.kernels.select import device_for
        from rayseek.model.official import DEEPSEEK_V3

        device_for("cuda")  # says what is missing
        bench_slice(DEEPSEEK_V3, arguments.slice, arguments.kv_dtype)
    else:
        from rayseek.serve_app.bench import run

        run(arguments)


def evaluate(arguments: argparse.Namespace) -> None:
    from rayseek.serve_app.evaluate import run

    run(arguments)


def replay(arguments: argparse.Namespace) -> bool:
    """Whether the answer is the same."""
    from rayseek.serve_app.replay import replay

    return replay(arguments.request, arguments.response, arguments.url, arguments.key)


def conformance(arguments: argparse.Namespace) -> bool:
    """Whether everything passed."""
    from rayseek.serve_app.conformance import conformance

    return conformance(arguments.url, arguments.key, arguments.model)
