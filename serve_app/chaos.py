"""`rayseek chaos`: kill processes under load, and compare every stream with the undisturbed one.

First each prompt is answered in peace. Then many streams ask the same prompts with the same seeds
over and over, while every few seconds one process is killed or stopped, or a deployment is updated
or gets another number of replicas (changes.py). Not one stream may fail, and not one byte may
differ; what it costs is a pause, which is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import random
import re
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import psutil
from rich.console import Console
from rich.table import Table

from rayseek.cluster.config import Config
from rayseek.serve_app.changes import Changes, ServeApi
from rayseek.serve_app.conformance import Endpoint
from rayseek.serve_app.local import StartError, add_node
from rayseek.serve_app.start import started

VICTIMS = {  # what dies -> how Ray titles such processes
    "rank": re.compile(r"ray::Rank\b"),
    "expert": re.compile(r"ray::ExpertRank\b"),
    "leader": re.compile(r"ray::ServeReplica:rayseek:Decode"),
    "prefill leader": re.compile(r"ray::ServeReplica:rayseek:Prefill"),
    "expert leader": re.compile(r"ray::ServeReplica:rayseek:Experts"),
    "node": re.compile(r".*/raylet$"),
}
CHANGES = ("update", "scale")
KINDS = (*VICTIMS, *CHANGES)
CHANGE_S = 1800.0  # for a change to be over
ON_ITS_WAY_S = 0.5  # what comes so soon after a kill was sent before it
CALM_S = 1.0  # after every stream has moved again
GIVE_UP_S = 180.0  # for a stream to move


@dataclass(frozen=True, slots=True)
class Blow:
    """A kill or a change. kind: of process, or which change; at: seconds on the streams' clock."""

    kind: str
    at: float


@dataclass(slots=True)
class Watch:
    """What the streams saw. arrivals: of each stream, when something came."""

    arrivals: list[list[float]]
    finished: int = 0
    failed: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def pause_after(self, blow: Blow, until: float) -> float:
        """The longest silence of any stream between the blow and `until`."""
        longest = 0.0
        for times in self.arrivals:
            for before, after in zip(times, times[1:], strict=False):
                if after > blow.at and before < until:
                    longest = max(longest, min(after, until) - max(before, blow.at))
        return longest


def prompts(count: int, seed: int) -> list[dict[str, object]]:
    """Requests of different lengths and settings, each with its own seed."""
    rng = random.Random(seed)
    words = [
        "count", "sort", "the", "numbers", "please", "tell", "me", "about", "experts", "from",
        "one", "to", "nine",
    ]  # fmt: skip
    return [
        {
            "prompt": " ".join(rng.choices(words, k=rng.choice([4, 12, 60, 200]))),
            "max_tokens": rng.randrange(80, 200),
            "temperature": rng.choice([0.0, 1.0, 1.5]),
            "frequency_penalty": rng.choice([0.0, 0.0, 0.7]),
            "seed": rng.randrange(2**31),
            "stream": True,
        }
        for _ in range(count)
    ]


def stream(at: Endpoint, request: dict[str, object]) -> Iterator[str]:
    """A completion's pieces. Raises RuntimeError if it fails or ends without its end mark."""
    body = json.dumps(request | {"model": at.model}).encode()
    with at.opened("POST", "/beta/completions", body) as answer:
        if answer.status != 200:
            raise RuntimeError(f"status {answer.status}: {answer.read()[:200]!r}")
        for line in answer:
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                return
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(f"error event: {event['error']}")
            yield "".join(choice["text"] for choice in event["choices"])
        raise RuntimeError("the stream ended without [DONE]")


def run_stream(endpoint: Endpoint, watch: Watch, number: int, asked: Sequence[dict[str, object]],
               expected: Sequence[str], seed: int) -> None:  # fmt: skip
    """Ask one prompt after the other until told to stop; note everything that is not as it was."""
    rng = random.Random(f"{seed}/{number}")
    times = watch.arrivals[number]
    while not watch.stop.is_set():
        which, text = rng.randrange(len(asked)), ""
        try:
            for piece in stream(endpoint, asked[which]):
                text += piece
                times.append(time.monotonic())
            if text != expected[which]:
                watch.differing.append(f"prompt {which}: {text!r} instead of {expected[which]!r}")
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            watch.failed.append(f"prompt {which} after {len(text)} characters: {error!r}")
            time.sleep(0.2)
        watch.finished += 1


def victims(root: psutil.Process, kind: str) -> list[psutil.Process]:
    """The processes of a kind under `root` that run; of the nodes, all but the first."""
    found = []
    for process in root.children(recursive=True):
        try:
            title = process.cmdline()[0]
            if process.status() == psutil.STATUS_STOPPED or not VICTIMS[kind].match(title):
                continue
            parent = process.parent()
            if kind != "node" or (parent is not None and "start" in parent.cmdline()):
                found.append(process)
        except (psutil.Error, IndexError):  # it ended meanwhile
            continue
    return found


def strike(process: psutil.Process, number: signal.Signals, whole: bool = False) -> None:
    """Send a process a signal; `whole`: and all that it has started. A node is all that runs on it:
    of a raylet that is stopped alone, leaders and ranks go on for nobody.

    Raises psutil.Error if the process is gone.
    """
    below = process.children(recursive=True) if whole else []
    process.send_signal(number)
    for child in below:
        with contextlib.suppress(psutil.Error):
            child.send_signal(number)


def disturb(
    watch: Watch, arguments: argparse.Namespace, changes: Changes | None, gcs_address: str
) -> list[tuple[Blow, float]]:
    """One kill or change after the other; wait each time until every stream has moved again.

    A killed node is followed by a new one.
    """
    rng, root = random.Random(arguments.seed), psutil.Process()
    number = signal.SIGSTOP if arguments.stop else signal.SIGKILL
    done: list[tuple[Blow, float]] = []
    found = time.monotonic()
    while len(done) < arguments.kills:
        present = [kind for kind in arguments.kinds if kind in CHANGES or victims(root, kind)]
        if not present:
            if time.monotonic() > found + GIVE_UP_S:
                raise StartError(f"no process of the kinds {', '.join(arguments.kinds)} runs here")
            time.sleep(0.2)
            continue
        found = time.monotonic()
        kind, began = rng.choice(present), time.monotonic()
        if kind in CHANGES:
            assert changes is not None
            make = changes.update if kind == "update" else changes.scale
            kind = make(CHANGE_S)
        else:
            try:
                strike(rng.choice(victims(root, kind)), number, whole=kind == "node")
            except (psutil.Error, IndexError):
                continue
            if kind == "node":
                add_node(gcs_address)
        over = time.monotonic()
        while time.monotonic() < over + GIVE_UP_S:
            if all(times and times[-1] > over + ON_ITS_WAY_S for times in watch.arrivals):
                break
            time.sleep(0.05)
        time.sleep(max(CALM_S, began + arguments.every - time.monotonic()))
        done.append((Blow(kind, began), time.monotonic()))
        print(f"{kind}: {time.monotonic() - began:.0f} s, {len(watch.failed)} failed", flush=True)
    return done


def torment(
    endpoint: Endpoint,
    gcs_address: str,
    changes: Changes | None,
    arguments: argparse.Namespace,
    console: Console,
) -> bool:
    """The whole experiment against a running service below this process; whether it held."""
    asked = prompts(arguments.prompts, arguments.seed)
    console.print(f"Answering {len(asked)} prompts in peace ...")
    expected = ["".join(stream(endpoint, request)) for request in asked]
    watch = Watch([[] for _ in range(arguments.streams)])
    threads = [
        threading.Thread(
            target=run_stream, args=(endpoint, watch, i, asked, expected, arguments.seed)
        )
        for i in range(arguments.streams)
    ]
    for thread in threads:
        thread.start()
    try:
        time.sleep(2 * CALM_S)
        done = disturb(watch, arguments, changes, gcs_address)
    finally:
        watch.stop.set()
        for thread in threads:
            thread.join()
    report(watch, done, console)
    return not watch.failed and not watch.differing


def report(watch: Watch, done: Sequence[tuple[Blow, float]], console: Console) -> None:
    table = Table("what", "times", "pause p50 s", "pause p99 s")
    pauses: dict[str, list[float]] = {}
    for blow, until in done:
        pauses.setdefault(blow.kind, []).append(watch.pause_after(blow, until))
    for kind, found in pauses.items():
        worst = sorted(found)[min(len(found) - 1, int(len(found) * 0.99))]
        table.add_row(kind, str(len(found)), f"{statistics.median(found):.2f}", f"{worst:.2f}")
    console.print(table)
    console.print(
        f"{watch.finished} streams, {len(watch.failed)} failed, "
        f"{len(watch.differing)} with other text"
    )
    for problem, count in Counter(watch.failed + watch.differing).most_common(5):
        console.print(f"  {count} x {problem[:300]}", highlight=False)


def chaos(arguments: argparse.Namespace, config: Config) -> bool:
    """Start the config's service here, and see whether it holds.

    Raises ValueError for a kind that there is not.
    """
    for kind in arguments.kinds:
        if kind not in KINDS:
            raise ValueError(f"--kinds: {kind} is none of {', '.join(KINDS)}")
    console = Console()
    changing = bool(set(arguments.kinds) & set(CHANGES))
    with started(config, arguments.nodes, deployed=changing) as service:
        if service.shown_key is None:
            raise StartError("the config's keys are not known here; set api.keys")
        endpoint = Endpoint(service.address, service.shown_key, config.model.name, GIVE_UP_S)
        changes = None
        if service.file is not None:
            api = ServeApi(service.dashboard, service.dashboard_token)
            changes = Changes(api, config, service.file)
        return torment(endpoint, service.gcs_address, changes, arguments, console)
