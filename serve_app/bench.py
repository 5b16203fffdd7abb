"""`rayseek bench`: what a user gets, in-process and over HTTP, side by side in one run.

A point is (streams, prompt tokens). Every stream sends one request after another; prompts are
random token ids, so no prefix is shared. Nothing here is asserted: it measures and prints.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rayseek.cluster.config import (
    ApiSettings,
    Config,
    EngineSettings,
    IngressSettings,
    ModelSettings,
)
from rayseek.serve_app.bench_figures import Clock, Point, Result, print_table, summarise
from rayseek.serve_app.conformance import open_endpoint

if TYPE_CHECKING:
    from rayseek.cluster.engine import Engine

FIRST_ORDINARY_ID = 3  # below: begin, end, pad


def random_prompt(rng: random.Random, length: int, vocab: int) -> tuple[int, ...]:
    return tuple(rng.randrange(FIRST_ORDINARY_ID, vocab) for _ in range(length))


# ---- in-process ----


def engine_results(model: Path, settings: EngineSettings, points: list[Point]) -> list[Result]:
    """The engine alone, stepped in this process; with drafts and without in turn, if it drafts."""
    import torch

    from rayseek.cluster.build import build_engine

    torch.set_num_threads(1)
    vocab = ordinary_ids(model)
    drafting = build_engine(model, settings)
    plain = build_engine(model, settings.model_copy(update={"draft_tokens": 0}))
    name, results = "engine in-process", []
    engine_result(name, drafting, vocab, Point(2, 32, 8))  # warms up
    for point in points:
        without = engine_result("engine, no drafts", plain, vocab, point)
        if drafting.meter.most:
            result = engine_result(name, drafting, vocab, point)
            results.append(replace(result, gain=result.tokens_per_s / without.tokens_per_s))
        results.append(without)
    return results


def engine_result(system: str, engine: Engine, vocab: int, point: Point) -> Result:
    from rayseek.cluster.request import Request, SamplingParams

    rng = random.Random(point.streams * point.prompt)
    clocks: dict[str, Clock] = {}
    left = dict.fromkeys(range(point.streams), point.rounds)

    def submit(stream: int) -> None:
        left[stream] -= 1
        name = f"{stream}:{left[stream]}"
        sampling = SamplingParams(point.output, temperature=0.3, seed=stream)
        clocks[name] = Clock(time.perf_counter())
        engine.submit(Request(name, random_prompt(rng, point.prompt, vocab), sampling))

    began = time.perf_counter()
    for stream in left:
        submit(stream)
    while engine.busy:
        for delta in engine.step():
            clock = clocks[delta.request_id]
            clock.arrived(len(delta.tokens))
            clock.accepted += sum(token.drafted for token in delta.tokens)
            clock.rejected += sum(token.rejected for token in delta.tokens)
            stream = int(delta.request_id.split(":")[0])
            if delta.finish and left[stream]:
                submit(stream)
    return summarise(system, point, list(clocks.values()), time.perf_counter() - began)


def transformers_results(model: Path, points: list[Point]) -> list[Result]:
    """`generate` of transformers on the same weights, float32, one thread."""
    import torch
    from transformers import DeepseekV3ForCausalLM

    torch.set_num_threads(1)
    hf = DeepseekV3ForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    vocab = ordinary_ids(model)
    rng = random.Random(0)
    results = []
    for point in points:
        prompts = [random_prompt(rng, point.prompt, vocab) for _ in range(point.streams)]
        ids = torch.tensor(prompts)
        clock = Clock(time.perf_counter())
        with torch.inference_mode():
            hf.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=1,
                        min_new_tokens=point.output, max_new_tokens=point.output)  # fmt: skip
        clock.arrived(point.streams * point.output)
        seconds = clock.arrivals[0][0] - clock.sent
        rate = point.streams * point.output / seconds
        results.append(
            Result("transformers.generate", point.streams, point.prompt,
                   point.streams * point.output, rate, 0.0, 1e3 * point.streams / rate)
        )  # fmt: skip
    return results


def ordinary_ids(model: Path) -> int:
    """Ids below this are ordinary tokens: the base vocabulary."""
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    return len(tokenizer["model"]["vocab"])


def in_own_process(work: Callable[..., list[Result]], *arguments: object) -> list[Result]:
    """Run `work` in a fresh process, so that measurements do not inherit each other's state."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


# ---- over HTTP ----


async def http_stream(url: str, key: str, body: dict[str, Any]) -> Clock:
    """One streamed completion over a connection of its own; a client that costs little itself."""
    parts = urlsplit(url)
    payload = json.dumps(body).encode()
    head = (
        f"POST {parts.path.rstrip('/')}/v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        f"Authorization: Bearer {key}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=2**20)
    clock = Clock(time.perf_counter())
    writer.write(head.encode() + payload)
    status = await reader.readline()
    if b" 200 " not in status:
        raise ValueError(f"{url} answered {status!r}: {(await reader.read(2000)).decode()}")
    pending, last = b"", b""
    while data := await reader.read(2**16):
        events = (pending + data).split(b"\n\n")
        pending = events.pop()
        tokens = [e for e in events if b'"text":' in e and b'"text":""' not in e]
        if tokens:
            clock.arrived(len(tokens))
        last = next((e for e in reversed(events) if b'"usage":{' in e), last)
    writer.close()
    usage = json.loads(last.removeprefix(b"data: "))["usage"]
    exact = usage["completion_tokens"]
    drafts = usage.get("completion_tokens_details") or {}
    clock.accepted = drafts.get("accepted_prediction_tokens") or 0
    clock.rejected = drafts.get("rejected_prediction_tokens") or 0
    if not clock.arrivals:
        clock.arrived(exact)
    at, _ = clock.arrivals[-1]  # texts may hold several tokens, or none; the usage counts them
    first = clock.arrivals[0][0]
    clock.arrivals = [(first, 1), (at, exact)] if exact > 1 else [(first, exact)]
    return clock


async def http_point(
    system: str, url: str, key: str, name: str, vocab: int, point: Point
) -> Result:
    rng = random.Random(point.streams)
    clocks: list[Clock] = []

    async def client() -> None:
        for _ in range(point.rounds):
            body = {
                "model": name,
                "prompt": list(random_prompt(rng, point.prompt, vocab)),
                "max_tokens": point.output,
                "temperature": 1.0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            clocks.append(await http_stream(url, key, body))

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(point.streams)))
    return summarise(system, point, clocks, time.perf_counter() - began)


def http_results(
    system: str, url: str, key: str, name: str, vocab: int, points: list[Point]
) -> list[Result]:
    asyncio.run(http_point(system, url, key, name, vocab, Point(2, 32, 8)))
    return [asyncio.run(http_point(system, url, key, name, vocab, p)) for p in points]


def served_results(model: Path, settings: EngineSettings, points: list[Point]) -> list[Result]:
    """The whole service on a free port, started and stopped here."""
    from rayseek.model.config import ModelConfig
    from rayseek.serve_app.ingress import api_settings
    from rayseek.serve_app.local import free_port, running

    key = "sk-bench"
    config = Config(
        model=ModelSettings(path=model),
        api=ApiSettings(keys=(key,)),
        engine=settings,
        ingress=IngressSettings(host="127.0.0.1", port=free_port()),
    )
    context = ModelConfig.from_pretrained(model).max_position_embeddings
    with running(config, model, api_settings(config, context, None, key)) as service:
        return in_own_process(http_results, "Rayseek over HTTP", service.address, key,
                              config.model.name, ordinary_ids(model), points)  # fmt: skip


# ---- the command ----


def run(arguments: argparse.Namespace) -> None:
    """Measure what the arguments ask for, print a table, end with the figures as JSON."""
    points = [
        Point(streams, prompt, arguments.output)
        for prompt in arguments.prompt
        for streams in arguments.streams
    ]
    from rayseek.model.maker import BENCH
    from rayseek.serve_app.start import cache_folder, made_model

    results: list[Result] = []
    if arguments.url:
        vocab = ordinary_ids(arguments.model) if arguments.model else 1000
        at = open_endpoint(arguments.url, arguments.key, arguments.name)
        results += http_results(arguments.url, at.base, arguments.key, at.model, vocab, points)
    else:
        model = arguments.model or made_model(cache_folder() / "models" / "bench-random-v1", BENCH)
        settings = EngineSettings(kv_dtype=arguments.kv_dtype)
        if arguments.threads:
            settings = settings.model_copy(update={"threads": arguments.threads})
        results += in_own_process(engine_results, model, settings, points)
        if not arguments.no_http:
            results += served_results(model.absolute(), settings, points)
        if arguments.transformers:
            results += in_own_process(transformers_results, model, points)
    print_table(results)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(r) for r in results]) + "\n")
