"""What is held when nothing runs: as much after a storm of requests, cancels and deaths as before.

A short storm in the suite; `pytest --full` makes the one of 2,000 requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import os
import re
import threading
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from rayseek.cluster.dispatch import Dispatcher, JournalEntry
from rayseek.cluster.group import Group
from tests.cluster.company import SETTINGS, Company, answer, dispatcher, is_idle, unit
from tests.cluster.test_same_tokens import pass_by, some_requests

CALM = SETTINGS.model_copy(update={"step_timeout_s": 30})
CROWD = 25
SPARE_FILES = 8  # gRPC keeps a few for its polling, now more and now less
POOLS = {"copies": 4, "grammar": 1, "grammar-mask": 1}  # of a process; made when there is work


def held(to: Dispatcher, units: list[Company]) -> Counter[str]:
    """Whatever a request or a process may leave behind."""
    gc.collect()
    found: Counter[str] = Counter()
    for thing in gc.get_objects():
        found["journal entries"] += type(thing) is JournalEntry
        found["groups"] += type(thing) is Group and thing._group is not None
    for channel in to._channels.values():
        found["connections of the ingress"] += 1
        found["requests of the ingress"] += len(channel._inboxes)
        found["prompts thought to be computed"] += channel.prefilling
    for rank in [rank for company in units for rank in company.ranks]:
        loop = rank.server.engine_loop
        found["streams of ranks"] += len(rank.server._streams)
        found["listeners of ranks"] += len(loop._listeners) + len(loop._outboxes)
    for company in units:
        found["processes"] += len(company._company.hands)
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the folder's own
            found["sockets" if "socket:" in os.readlink(f"/proc/self/fd/{fd}") else "files"] += 1
    for thread in threading.enumerate():
        name = re.sub(r"[0-9.:]+", "", thread.name).rstrip("_")
        if name != "asyncio":  # the tests' own loop's
            found[f"threads {name}"] += 1
    for name, most in POOLS.items():
        found[f"threads {name}"] -= min(found[f"threads {name}"], most * found["processes"])
    for task in asyncio.all_tasks():
        found[f"tasks {task.get_coro().__qualname__}"] += 1  # type: ignore[union-attr]
    return found


async def crowd(to: Dispatcher, random: Random) -> None:
    """Requests at once, a third of which is left in the middle."""
    asked = []
    for request in some_requests(random, CROWD, grammars=True):
        if random.random() < 1 / 3:
            asked.append(pass_by(to, request, random.randrange(20)))
        else:
            asked.append(answer(to, request))
    await asyncio.gather(*asked)


async def kill(role: str, decode: Company, prefill: Company, random: Random) -> None:
    """Soon; returns when somebody has taken the dead one's place."""
    await asyncio.sleep(random.uniform(0.05, 0.3))
    company = prefill if role == "prefill" else decode
    await company.kill("expert" if role == "expert" else "attention", random)
    if role == "expert":
        await company.hire()
    async with asyncio.timeout(300):
        while company._problems:
            await asyncio.sleep(0.1)
    company.bury()


async def settled(to: Dispatcher, units: list[Company]) -> Counter[str]:
    """What is held when nothing has changed any more for a while."""
    for company in units:
        company.bury()  # also whom the leader killed, which happens where processes starve
    for rank in [rank for company in units for rank in company.ranks]:
        async with asyncio.timeout(300):
            while not await asyncio.to_thread(is_idle, rank.server):
                await asyncio.sleep(0.05)
    last: list[Counter[str]] = []
    async with asyncio.timeout(300):
        while len(last) < 4 or any(counts != last[-1] for counts in last[-4:]):
            await asyncio.sleep(0.5)
            last.append(held(to, units))
    return last[-1]


async def test_a_storm_leaves_nothing_behind(tiny_path: Path, pytestconfig: pytest.Config) -> None:
    full = pytestconfig.getoption("--full")
    random = Random(pytestconfig.getoption("--seed"))
    async with (
        unit(tiny_path, settings=CALM) as prefill,
        unit(tiny_path, settings=CALM, attention=2, experts=2) as decode,
        dispatcher(decode, prefill) as to,
    ):
        units = [decode, prefill]
        victims = itertools.cycle(["expert", "attention", "prefill", "nobody"])

        async def storm(crowds: int) -> Counter[str]:
            for victim in itertools.islice(victims, crowds):
                dying = [] if victim == "nobody" else [kill(victim, decode, prefill, random)]
                async with asyncio.timeout(600):
                    await asyncio.gather(crowd(to, random), *dying)
            return await settled(to, units)

        before = await storm(4)  # what is made when it is first needed is there now
        after = await storm(2000 // CROWD if full else 4)
        before["files"] += SPARE_FILES
        left = after - before
        assert not left
