"""The `rayseek` command: serve, keys, inspect, make-model, make-corpus, bench, eval, conformance.

Only argument parsing and messages; every command's work is elsewhere and imported when needed.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn
from urllib.parse import quote

from rayseek.cluster.config import Config, ConfigFileError, load_config


def cache_folder() -> Path:
    """Where models made on first start are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rayseek"


def config_folder() -> Path:
    """Where API keys are kept."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "rayseek"


def key_file(config: Config) -> Path | None:
    """The file of keys. None: the config has keys of its own and no such file is there."""
    file = config_folder() / "keys.yaml"
    if config.api.key_file is not None:
        return config.api.key_file.absolute()
    return file if file.exists() or not config.api.keys else None


def fail(message: object) -> NoReturn:
    print(f"rayseek: {message}", file=sys.stderr)
    sys.exit(1)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="rayseek", description="Serve DeepSeek-V3 from a Ray cluster."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="start Ray, the engine and the API on this machine")
    serve.add_argument("config", nargs="?", type=Path, help="YAML config; default: all defaults")
    serve.add_argument("--model", type=Path, help="checkpoint folder in the official layout")
    serve.add_argument("--port", type=int, help="port of the API (default 8000)")
    serve.add_argument("--host", help="address to listen on (default 0.0.0.0: every interface)")

    _add_keys(commands.add_parser("keys", help="who may use the API: add, list, revoke"))

    inspect = commands.add_parser("inspect", help="where a checkpoint's bytes go, on N ranks")
    inspect.add_argument("path", type=Path, help="checkpoint folder, or a config.json alone")
    inspect.add_argument("--ranks", type=int, default=1, help="expert-parallel ranks (default 1)")
    inspect.add_argument("--redundant", type=int, default=0, help="redundant experts a layer")
    inspect.add_argument("--device-gib", type=float, help="memory of one device, in GiB")

    make = commands.add_parser("make-model", help="write a random checkpoint, official layout")
    make.add_argument("path", type=Path)
    make.add_argument("--config", default="small", help="small, bench, or a config.json")
    make.add_argument("--seed", type=int, default=0)
    make.add_argument("--shards", type=int, default=4)
    dtype = make.add_mutually_exclusive_group()
    dtype.add_argument("--fp8", action="store_true", help="block-FP8 weights")
    dtype.add_argument("--bf16", action="store_true", help="bfloat16 weights")

    corpus = commands.add_parser("make-corpus", help="write text that a small model learns from")
    corpus.add_argument("folder", type=Path)
    corpus.add_argument("--tokens", type=float, default=40e6, help="about so many (default 40e6)")
    corpus.add_argument("--shard-tokens", type=float, default=2e6, help="of one file (default 2e6)")
    corpus.add_argument("--seed", type=int, default=0)
    corpus.add_argument("--chinese", type=float, default=0.35, metavar="SHARE", help="default 0.35")
    corpus.add_argument("--longest", type=int, default=512, help="tokens of a document at most")
    corpus.add_argument(
        "--tokenizer", type=Path, help="folder of its files; default: learn one, kept in FOLDER"
    )

    conform = commands.add_parser("conformance", help="does an endpoint speak the V3 dialect?")
    conform.add_argument("url", metavar="URL", help="of any OpenAI-compatible V3 endpoint")
    conform.add_argument("--key", default=os.environ.get("OPENAI_API_KEY", ""), help="its API key")
    conform.add_argument("--model", help="model name to ask for; default: the server's first")

    _add_eval(commands.add_parser("eval", help="how many questions an endpoint answers right"))

    bench = commands.add_parser("bench", help="throughput and latency, in-process and over HTTP")
    bench.add_argument("--model", type=Path, help="checkpoint folder; default: the bench model")
    bench.add_argument("--url", help="measure this running server only, as http://host:port")
    bench.add_argument("--key", default=os.environ.get("OPENAI_API_KEY", ""), help="its API key")
    bench.add_argument("--name", help="model name to ask for; default: the server's first")
    bench.add_argument("--streams", default="1,8,32", help="numbers of concurrent streams")
    bench.add_argument("--prompt", default="32", help="prompt lengths in tokens")
    bench.add_argument("--output", type=int, default=128, help="tokens of each answer")
    bench.add_argument("--threads", type=int, help="engine.threads; default: the config's default")
    bench.add_argument("--no-http", action="store_true", help="in-process only")
    bench.add_argument("--transformers", action="store_true", help="also time transformers")
    bench.add_argument("--json", type=Path, help="write the figures there")
    return top


def _add_keys(keys: argparse.ArgumentParser) -> None:
    file = argparse.ArgumentParser(add_help=False)
    file.add_argument("--file", type=Path, help="default: ~/.config/rayseek/keys.yaml")
    actions = keys.add_subparsers(dest="action", required=True, metavar="ACTION")
    add = actions.add_parser("add", parents=[file], help="make a key; it is shown this once")
    add.add_argument("name", help="who it is for")
    add.add_argument("--requests-per-minute", type=int, metavar="N")
    add.add_argument("--tokens-per-minute", type=int, metavar="N", help="prompts and answers")
    add.add_argument("--concurrent", type=int, metavar="N", help="requests at one time")
    add.add_argument("--models", nargs="+", metavar="NAME", help="only these")
    actions.add_parser("list", parents=[file], help="names and limits")
    revoke = actions.add_parser("revoke", parents=[file], help="make a key invalid")
    revoke.add_argument("name")


def _add_eval(command: argparse.ArgumentParser) -> None:
    command.add_argument("--url", default="http://127.0.0.1:8000/v1", help="default: %(default)s")
    command.add_argument("--key", default=os.environ.get("OPENAI_API_KEY", ""), help="its API key")
    command.add_argument("--model", help="model name to ask for; default: the server's first")
    command.add_argument("--tasks", help="names with commas between; default: all")
    command.add_argument("--languages", default="en,zh", help="default: %(default)s")
    command.add_argument("--questions", type=int, help="of each task and language; default 100")
    command.add_argument("--concurrency", type=int, default=16, help="requests at one time")
    command.add_argument("--temperature", type=float, help="default: none is sent")
    command.add_argument("--max-tokens", type=int, default=512, help="of an answer (default 512)")
    command.add_argument("--seed", type=int, default=0, help="of the questions and the sampling")
    command.add_argument("--json-mode", action="store_true", help="send response_format")
    command.add_argument("--out", type=Path, help="write scores and failed questions there")
    command.add_argument(
        "--harness", metavar="TASKS", help="run these tasks of lm-eval instead, as mmlu_pro,aime24"
    )


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        {
            "serve": serve, "keys": keys, "inspect": inspect, "make-model": make_model,
            "make-corpus": make_corpus,
            "bench": bench, "conformance": conformance, "eval": evaluate,
        }[arguments.command](arguments)  # fmt: skip
    except (ConfigFileError, ValueError, FileExistsError, FileNotFoundError) as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)


def serve(arguments: argparse.Namespace) -> None:
    """Start, print where everything is, wait for Ctrl-C or SIGTERM, stop."""
    from rayseek.serve_app.ingress import api_settings
    from rayseek.serve_app.keys import KeyRing, first_key
    from rayseek.serve_app.local import StartError, check_port, running

    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell set SIGINT to be ignored
        signal.signal(number, interrupt)
    config = with_overrides(
        load_config(arguments.config) if arguments.config else Config(), arguments
    )
    try:
        check_port(config.ingress.host, config.ingress.port)
        model = served_model(config)
        from rayseek.cluster.build import engine_limits
        from rayseek.model.checkpoint import Checkpoint

        checkpoint = Checkpoint.open(model)  # every problem is told now, not by a dying rank
        context = engine_limits(checkpoint.config, config.engine).context
        file = key_file(config)
        shown = config.api.keys[0] if config.api.keys else None
        if shown is None and file == config_folder() / "keys.yaml":
            shown = first_key(file, config_folder() / "api_key")
        if not len(KeyRing(config.api.keys, file)):
            fail(f"{file} has no keys: rayseek keys add NAME --file {file}")
        settings = api_settings(config, context, file, shown)
        print(f"Starting Ray and the engine for {model} ...", flush=True)
        with running(config, model, settings) as service:
            print(
                f"\n  Rayseek serves {config.model.name}\n"
                f"  API        {service.address}/v1\n"
                f"  API key    {shown or f'one of those in {file}'}\n"
                f"  Pages      {service.address}/{f'#key={quote(shown)}' if shown else ''}\n"
                f"  Dashboard  {service.dashboard}  (token {service.dashboard_token})\n"
                f"  Logs       {service.logs}\n"
                "  Stop with Ctrl-C.\n",
                flush=True,
            )
            signal.pause()
    except StartError as error:
        fail(error)
    except KeyboardInterrupt:
        print("\nStopped.", flush=True)


def interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def with_overrides(config: Config, arguments: argparse.Namespace) -> Config:
    """The command line's words on top of the file's, checked like the file's."""
    data = config.model_dump()
    if arguments.model is not None:
        data["model"]["path"] = arguments.model
    if arguments.port is not None:
        data["ingress"]["port"] = arguments.port
    if arguments.host is not None:
        data["ingress"]["host"] = arguments.host
    return Config.model_validate(data)


def served_model(config: Config) -> Path:
    """The configured checkpoint, or the small random one, made now if it is not there yet."""
    if config.model.path is not None:
        return config.model.path.absolute()
    from rayseek.model.maker import SMALL

    return made_model(cache_folder() / "models" / "small-random-v1", SMALL)


def made_model(path: Path, config: object) -> Path:
    """A random checkpoint of this config at `path`; several processes may ask for it at once."""
    from rayseek.model.config import ModelConfig
    from rayseek.model.maker import make_checkpoint

    assert isinstance(config, ModelConfig)
    if not path.exists():
        print(f"Making a random-weight model in {path} (once) ...", flush=True)
        try:
            make_checkpoint(path, config)
        except (FileExistsError, OSError):
            if not path.exists():
                raise
    return path


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
            print(key_entry.name, *(f"{name}={value}" for name, value in fields.items()), sep="  ")


def inspect(arguments: argparse.Namespace) -> None:
    from rayseek.kernels.select import choose_ops
    from rayseek.model.checkpoint import Checkpoint
    from rayseek.model.config import ModelConfig
    from rayseek.model.ledger import make_ledger, render

    path: Path = arguments.path
    if path.is_file():
        config = ModelConfig.from_pretrained(path.parent)
    else:
        config = Checkpoint.open(path).config
    print(render(make_ledger(config, arguments.ranks, arguments.redundant, arguments.device_gib)))
    choice = choose_ops()
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
    from rayseek.serve_app.tasks.catalogue import CATALOGUE

    folder, seed, tokens = arguments.folder, arguments.seed, int(arguments.shard_tokens)
    if arguments.tokenizer is None:
        make_tokenizer(folder, CATALOGUE, SMALL.vocab_size)
    shards = max(1, round(arguments.tokens / tokens))
    make_corpus(folder, arguments.tokenizer or folder, CATALOGUE, tokens, shards, seed,
                arguments.chinese, arguments.longest)  # fmt: skip
    print(f"wrote {shards} shards and corpus.json to {folder}")


def bench(arguments: argparse.Namespace) -> None:
    from rayseek.serve_app.bench import run

    run(arguments)


def evaluate(arguments: argparse.Namespace) -> None:
    from rayseek.serve_app.evaluate import run

    run(arguments)


def conformance(arguments: argparse.Namespace) -> None:
    """Exit code 0 only if everything passed."""
    from rayseek.serve_app.conformance import conformance

    sys.exit(0 if conformance(arguments.url, arguments.key, arguments.model) else 1)
