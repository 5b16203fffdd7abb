"""Fair queueing by key: the policy as properties, and the engine behind it."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayseek.cluster.request import Delta, FinishReason, Request, SamplingParams, Token
from rayseek.cluster.request import RequestRefused as Refused
from rayseek.serve_app import fairness
from rayseek.serve_app.fairness import PRESENT_S, FairEngine, FairQueue, Ticket
from rayseek.serve_app.keys import Key, add_key
from rayseek.serve_app.limits import Lease, Limiter
from rayseek.serve_app.settings import ApiSettings
from rayseek.serve_app.tokenizer import Tokenizer

CHAT = "/v1/chat/completions"
BODY = {"model": "deepseek-v3", "messages": [{"role": "user", "content": "Hi"}]}


# ---- the policy ----


def test_more_places_are_used_and_fewer_are_kept() -> None:
    queue = FairQueue(4, crowd=0.5)
    tickets = [Ticket("a", 1, 10) for _ in range(20)]
    for ticket in tickets:
        queue.push(ticket, 0.0)

    def started() -> int:
        count = 0
        while queue.pop(0.0, several_keys=False):
            count += 1
        return count

    assert started() == 4
    queue.resize(9)
    assert started() == 5
    queue.resize(2)
    assert started() == 0
    for ticket in tickets[:8]:
        queue.remove(ticket, 1, whole=True)
    assert started() == 1
    queue.push(Ticket("b", 1, 10), 0.0)
    queue.resize(8)
    assert started() == 3, "one of b, and of a no more than makes half"


@settings(max_examples=200)
@given(st.integers(1, 9), st.booleans(), st.integers(0, 2**32))
def test_slots_are_kept_and_used(slots: int, several: bool, seed: int) -> None:
    """Never too many, never one too few, whatever comes, ends and is cancelled."""
    chance, queue, now = random.Random(seed), FairQueue(slots, crowd=0.5), 0.0
    asked: dict[str, float] = {}
    waiting: list[Ticket] = []
    running: list[Ticket] = []
    for _ in range(150):
        now += chance.random() * 3
        match chance.randrange(4):
            case 0 | 1:
                ticket = Ticket(chance.choice("abc"), chance.randrange(1, 999), 500)
                queue.push(ticket, now, chance.randrange(-1, 2))
                asked[ticket.key] = now
                waiting.append(ticket)
            case 2 if running:
                ticket = running.pop(chance.randrange(len(running)))
                queue.remove(ticket, chance.randrange(500), chance.random() < 0.8)
            case 3 if waiting:
                ticket = waiting.pop(chance.randrange(len(waiting)))
                queue.remove(ticket, 0, whole=False)
        while True:
            wanting = {ticket.key for ticket in waiting}
            modest = [k for k, at in asked.items() if now - at < PRESENT_S and k not in wanting]
            most = max(1, slots * 3 // 4) if several else slots
            most = min(most, max(1, slots // 2)) if modest else most
            held = Counter(ticket.key for ticket in running)
            popped = queue.pop(now, several)
            may = [ticket for ticket in waiting if held[ticket.key] < most]
            assert (popped is not None) == (len(running) < slots and may != [])
            if popped is None:
                break
            assert popped in may
            waiting.remove(popped)
            running.append(popped)
        for key in "abc":
            assert queue.running(key) == held[key]
            assert queue.waiting(key) == sum(ticket.key == key for ticket in waiting)


@settings(max_examples=100)
@given(st.integers(1, 8), st.integers(0, 2**32))
def test_keys_that_always_wait_get_equal_work(slots: int, seed: int) -> None:
    """In tokens, not in requests: one key's are ten times as large. Guesses are put right."""
    chance, queue = random.Random(seed), FairQueue(slots)
    size = {"small": 30, "large": 300}
    for key, tokens in size.items():
        for _ in range(3000):
            queue.push(Ticket(key, tokens // 3, 4096), 0.0)
    served: Counter[str] = Counter()
    running: list[Ticket] = []
    for _ in range(1500):
        while (ticket := queue.pop(0.0, several_keys=False)) is not None:
            running.append(ticket)
        ticket = running.pop(chance.randrange(len(running)))
        made = chance.randrange(1, size[ticket.key])
        queue.remove(ticket, made, whole=True)
        served[ticket.key] += ticket.prompt + made
    # The classic bound: a largest request of each, times what may run at once.
    assert abs(served["small"] - served["large"]) <= 2 * (slots + 1) * (100 + 4096)
    assert served["small"] == pytest.approx(served["large"], rel=0.15, abs=(slots + 1) * 500)


def test_a_key_pays_what_it_used_not_what_was_guessed() -> None:
    queue = FairQueue(1)
    order = []
    for key in ("short", "long", "short", "long", "short"):
        queue.push(Ticket(key, 10, 4096), 0.0)
    for _ in range(5):
        ticket = queue.pop(0.0, several_keys=True)
        assert ticket is not None
        order.append(ticket.key)
        queue.remove(ticket, 1 if ticket.key == "short" else 256, whole=True)
    assert order == ["short", "long", "short", "short", "long"]


def test_a_pause_earns_nothing_and_priorities_hold_within_a_key() -> None:
    queue = FairQueue(1)
    for _ in range(50):
        queue.push(Ticket("busy", 100, 100), 0.0)
    for _ in range(40):
        ticket = queue.pop(0.0, True)
        assert ticket is not None
        queue.remove(ticket, 100, whole=True)
    for number, priority in enumerate((5, -5, 0, 0)):
        queue.push(Ticket("late", 100, 100 + number), 0.0, priority)
    order = []
    for _ in range(8):
        ticket = queue.pop(0.0, True)
        assert ticket is not None
        order.append(ticket)
        queue.remove(ticket, 100, whole=True)
    assert [t.limit for t in order if t.key == "late"] == [101, 102, 103, 100]
    assert [t.key for t in order].count("late") == 4
    assert order[:4] != [t for t in order if t.key == "late"]  # it takes turns from the start


# ---- the engine ----


class Manual:
    """An engine whose requests make a token each time they are told to."""

    fingerprint = "fp_manual"

    def __init__(self) -> None:
        self.live: dict[str, asyncio.Queue[Delta]] = {}
        self.order: list[str] = []
        self.requests: list[Request] = []

    async def generate(self, request: Request) -> Any:
        self.order.append(request.id)
        self.requests.append(request)
        self.live[request.id] = asyncio.Queue()
        try:
            while True:
                delta = await self.live[request.id].get()
                yield delta
                if delta.finish:
                    return
        finally:
            del self.live[request.id]

    def finish(self, name: str) -> None:
        self.live[name].put_nowait(Delta(name, (Token(5),), FinishReason.STOP))
        (request,) = (r for r in self.requests if r.id == name)
        if request.on_end:
            request.on_end(self.live[name].qsize())


def lease_of(name: str) -> Lease:
    digest = format(abs(hash(name)) % 2**64, "064x")
    return Limiter().admit(Key(name="k", sha256=digest))


def ask(fair: FairEngine, name: str, lease: Lease, **more: Any) -> asyncio.Task[list[Delta]]:
    async def collect() -> list[Delta]:
        request = Request(name, (1, 2), SamplingParams(max_tokens=9), **more)
        return [delta async for delta in fair.of(lease).generate(request)]

    return asyncio.create_task(collect())


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_flood_leaves_room_for_others() -> None:
    engine = Manual()
    fair = FairEngine(engine, 8, 1000, several_keys=lambda: True)
    flooder, other = lease_of("flood"), lease_of("other")
    flood = [ask(fair, f"f{i}", flooder) for i in range(500)]
    await settle()
    assert len(engine.live) == 6 and not flooder.admitted and flooder.waiting == 494
    calm = [ask(fair, f"c{i}", other) for i in range(3)]
    await settle()
    assert engine.order[6:] == ["c0", "c1"] and other.waiting == 1
    for name in ("f0", "f1", "f2", "f3", "f4"):  # they take turns, by work
        engine.finish(name)
        await settle()
    assert "c2" in engine.order[8:] and other.admitted
    for task in flood:
        task.cancel()
    await settle()
    for name in ("c0", "c1", "c2"):
        engine.finish(name)
    assert all(deltas[-1].finish for deltas in await asyncio.gather(*calm))
    assert not engine.live and flooder.waiting == 0 and len(engine.order) == 13
    again = ask(fair, "again", flooder)
    await settle()
    engine.finish("again")
    await again  # nothing was lost of the queue's count
    await asyncio.gather(*flood, return_exceptions=True)


async def test_places_kept_for_a_modest_key_are_given_out_when_it_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also while no request comes or ends."""
    engine = Manual()
    fair = FairEngine(engine, 8, 1000, several_keys=lambda: False, crowd=0.25)
    modest = ask(fair, "modest", lease_of("modest"))
    await settle()
    crowd = [ask(fair, f"c{i}", lease_of("crowd")) for i in range(8)]
    await settle()
    engine.finish("modest")
    await modest
    assert len(engine.live) == 2
    monkeypatch.setattr(fairness, "PRESENT_S", 0.0)
    fair.resize(8)
    await settle()
    assert len(engine.live) == 8
    for task in crowd:
        task.cancel()
    await asyncio.gather(*crowd, return_exceptions=True)


async def test_priorities_are_among_a_keys_own_and_end_here() -> None:
    engine = Manual()
    fair = FairEngine(engine, 1, 1000, several_keys=lambda: True)
    one, other = lease_of("one"), lease_of("other")
    tasks = [ask(fair, f"one{p}", one, priority=p) for p in (0, 3, -(2**31))]
    tasks.append(ask(fair, "other", other))
    for _ in tasks:
        await settle()
        engine.finish(*engine.live)
    await asyncio.gather(*tasks)
    assert engine.order == ["one0", "other", f"one{-(2**31)}", "one3"]
    assert [request.priority for request in engine.requests] == [0] * 4


@pytest.mark.parametrize("shared", [False, True])
async def test_cached_prompts_are_a_keys_own_unless_shared(shared: bool) -> None:
    engine = Manual()
    fair = FairEngine(engine, 99, 1000, several_keys=lambda: False, shared_cache=shared)
    leases = {name: lease_of(name) for name in "ab"}
    asked = list(itertools.product(leases, ("", "salt"), (1, 2)))
    tasks = [ask(fair, f"{who}{n}", leases[who], cache_salt=salt) for who, salt, n in asked]
    await settle()
    salts = [request.cache_salt for request in engine.requests]
    groups = {(None if shared else who, salt) for who, salt, _ in asked}
    assert len(set(salts)) == len(groups) == (2 if shared else 4)
    assert salts[::2] == salts[1::2]  # of the same key and salt
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_cancelled_at_every_moment_no_place_is_lost() -> None:
    chance = random.Random(1)
    engine = Manual()
    fair = FairEngine(engine, 3, 1000, several_keys=lambda: True)
    leases = [lease_of(name) for name in "abc"]
    tasks: list[asyncio.Task[Any]] = []
    for index in range(300):
        tasks.append(ask(fair, f"r{index}", chance.choice(leases)))
        for _ in range(chance.randrange(4)):
            await asyncio.sleep(0)
        if chance.random() < 0.6:
            chance.choice(tasks).cancel()
        if engine.live and chance.random() < 0.5:
            engine.finish(chance.choice(list(engine.live)))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert not engine.live and all(lease.waiting == 0 for lease in leases)
    last = [ask(fair, f"last{i}", leases[i]) for i in range(3)]
    await settle()
    assert len(engine.live) == 3
    for name in list(engine.live):
        engine.finish(name)
    await asyncio.gather(*last)


async def test_who_does_not_read_keeps_no_place_once_the_engine_is_done() -> None:
    engine = Manual()
    fair = FairEngine(engine, 2, 1000, several_keys=lambda: False)
    leases = [lease_of("deaf"), lease_of("other")]
    request = Request("deaf", (1, 2), SamplingParams(max_tokens=9))
    deaf = fair.of(leases[0]).generate(request)
    reading = asyncio.ensure_future(anext(aiter(deaf)))
    await settle()
    engine.live["deaf"].put_nowait(Delta("deaf", (Token(5),)))
    await reading  # and nothing more
    other = [ask(fair, f"o{i}", leases[1]) for i in range(2)]
    await settle()
    assert engine.order == ["deaf", "o0"] and fair.load == (2, 1)
    paid = mock.patch.object(leases[0], "paid_tokens").start()
    engine.finish("deaf")
    assert paid.call_args_list == [mock.call(1)]  # and not once more when it is read
    await settle()
    assert engine.order == ["deaf", "o0", "o1"] and fair.load == (2, 0)
    for name in ("o0", "o1"):
        engine.finish(name)
    await asyncio.gather(*other)
    assert fair.load == (0, 0)
    assert [delta.finish async for delta in deaf] == [FinishReason.STOP]
    assert fair.load == (0, 0) and paid.call_count == 1


async def test_a_full_queue_refuses_with_a_time() -> None:
    engine = Manual()
    fair = FairEngine(engine, 1, 2, several_keys=lambda: False)
    lease, other = lease_of("a"), lease_of("b")
    tasks = [ask(fair, f"r{i}", lease) for i in range(4)]
    await settle()
    with pytest.raises(Refused, match="2 requests of this key") as refused:
        await tasks[3]
    assert refused.value.retryable and refused.value.retry_after_s > 0
    others = ask(fair, "b", other)  # the limit is each key's own
    await settle()
    assert not others.done()
    for task in (*tasks, others):
        task.cancel()
    await asyncio.gather(*tasks, others, return_exceptions=True)


# ---- as callers see it ----


async def body_of(
    app: Any, key: str, stream: bool, until: int, sent: list[Any] | None = None
) -> list[Any]:
    """The first `until` messages that the application sends for a chat request; added to `sent`."""
    sent = [] if sent is None else sent
    enough = asyncio.Event()
    messages = [{"type": "http.request", "body": json.dumps({**BODY, "stream": stream}).encode()}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await enough.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) >= until:
            enough.set()

    headers = [(b"authorization", f"Bearer {key}".encode())]
    scope = {
        "type": "http", "method": "POST", "path": CHAT, "headers": headers, "query_string": b"",
    }  # fmt: skip
    await app(scope, receive, send)
    return sent


async def test_blank_lines_come_only_after_admission(
    api: Any, small: Tokenizer, settings: ApiSettings
) -> None:
    gate = asyncio.Event()

    class Slow(api.ScriptedEngine):  # type: ignore[misc,name-defined]
        async def generate(self, request: Request) -> Any:
            await gate.wait()
            async for delta in super().generate(request):
                yield delta

    engine = Slow(lambda r: [0.3, *api.deltas_of(r, [*small.encode_text("Yes"), small.eos_id])])
    app = api.build_app(replace(settings, keep_alive_s=0.02, in_flight=1), small, engine)
    at_the_engine: list[Any] = []
    first = asyncio.create_task(body_of(app, api.KEY, False, 999, at_the_engine))
    while not at_the_engine:
        await asyncio.sleep(0.01)
    queued: list[Any] = []
    second = asyncio.create_task(body_of(app, api.KEY, False, 999, queued))
    opened = await body_of(app, api.KEY, True, 2)  # a stream's comments may come while it is queued
    assert opened[1]["body"] == b": keep-alive\n\n"
    while len(at_the_engine) < 10:
        await asyncio.sleep(0.01)
    assert not queued and not second.done()
    gate.set()
    for messages in (await first, await second):
        start, *bodies = messages
        assert start["status"] == 200
        text = b"".join(message["body"] for message in bodies)
        assert text.startswith(b"\n\n") and not bodies[-1].get("more_body")
        assert json.loads(text)["choices"][0]["message"]["content"] == "Yes"


async def test_refusals_and_late_failures(
    api: Any, small: Tokenizer, settings: ApiSettings, tmp_path: Path
) -> None:
    key = add_key(tmp_path / "keys.yaml", "a")
    configured = replace(
        settings, keep_alive_s=0.02, in_flight=1, max_waiting=1, key_file=tmp_path / "keys.yaml"
    )
    engine = api.ScriptedEngine(lambda r: [0.5, ValueError("broken")])
    app = api.build_app(configured, small, engine)
    async with api.client_of(app, key=key) as client:

        async def post() -> httpx.Response:
            return await client.post(CHAT, json=BODY)

        replies = await asyncio.gather(*(post() for _ in range(3)))
        statuses = [reply.status_code for reply in replies]
        assert sorted(statuses) == [200, 200, 503]
        full = replies[statuses.index(503)]
        assert int(full.headers["retry-after"]) >= 1
        assert full.json()["error"]["code"] == "overloaded"
        late = replies[statuses.index(200)]  # blank lines had been sent: the body tells
        assert late.text.startswith("\n") and late.json()["error"]["type"] == "server_error"
    engine.script = lambda r: [ValueError("broken")]
    app = api.build_app(replace(configured, keep_alive_s=60), small, engine)
    async with api.client_of(app, key=key) as client:
        assert (await client.post(CHAT, json=BODY)).status_code == 500  # early: a proper status
