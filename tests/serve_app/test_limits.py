"""Token buckets as functions of time, and limits as callers meet them."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayseek.cluster.request import Request, SamplingParams
from rayseek.serve_app.errors import ApiError
from rayseek.serve_app.keys import Key, add_key
from rayseek.serve_app.limits import Bucket, Limiter, level, take, wait_for
from rayseek.serve_app.settings import ApiSettings
from rayseek.serve_app.tokenizer import Tokenizer
from rayseek.serve_app.transport import Document, EventStream

CHAT = "/v1/chat/completions"
BODY = {"model": "deepseek-v3", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture
def configured(request: pytest.FixtureRequest) -> ApiSettings:
    """The fixture `settings`: here that name is hypothesis's."""
    value: ApiSettings = request.getfixturevalue("settings")
    return value


rates = st.floats(0.01, 1e6)
times = st.floats(0, 1e6)
steps = st.lists(st.tuples(st.floats(0, 300), st.floats(0, 1e5)), max_size=30)


@given(rates, times, st.floats(-1e6, 1e6), st.floats(0, 1e5), st.floats(0, 1e5))
def test_a_bucket_does_not_care_how_time_is_cut(
    rate: float, at: float, start: float, first: float, second: float
) -> None:
    bucket = Bucket(min(start, rate), at)
    halfway = take(bucket, rate, 0, at + first)
    end = at + first + second
    assert level(halfway, rate, end) == pytest.approx(level(bucket, rate, end), abs=1e-4, rel=1e-6)
    assert level(bucket, rate, at - 1) == bucket.level  # a clock that steps back gives nothing


@given(rates, st.floats(-1e5, 1e5), st.floats(0, 1e6))
def test_the_wait_is_exactly_long_enough(rate: float, start: float, amount: float) -> None:
    bucket = Bucket(min(start, rate), 5.0)
    wait = wait_for(bucket, rate, amount, 5.0)
    if amount > max(1, rate):
        assert wait == math.inf
    else:
        assert level(bucket, rate, 5.0 + wait) >= amount - rate / 1e4
        if wait > 1:
            assert level(bucket, rate, 5.0 + wait - 1) < amount


@given(st.integers(1, 60), st.lists(st.floats(0, 30), min_size=1, max_size=60))
def test_no_minute_sees_more_than_twice_the_limit(limit: int, pauses: list[float]) -> None:
    now = [0.0]
    limiter = Limiter(clock=lambda: now[0])
    key = Key(name="a", sha256="0" * 64, requests_per_minute=limit)
    admitted: list[float] = []
    for pause in pauses:
        now[0] += pause
        try:
            for _ in range(limit):
                limiter.admit(key)
                admitted.append(now[0])
        except ApiError as error:
            wait = int(error.headers["Retry-After"])
            assert 1 <= wait <= 61
            now[0] += wait
            limiter.admit(key)  # what was promised
            admitted.append(now[0])
    for begin in admitted:
        assert sum(begin <= t < begin + 60 for t in admitted) <= 2 * limit
    span = admitted[-1] - admitted[0]
    assert len(admitted) <= limit + span * limit / 60 + 1


@given(st.integers(1, 10**6), st.lists(st.integers(1, 10**5), min_size=1, max_size=30))
def test_tokens_are_paid_as_used_and_debt_is_waited_for(limit: int, answers: list[int]) -> None:
    now = [100.0]
    limiter = Limiter(clock=lambda: now[0])
    key = Key(name="a", sha256="0" * 64, tokens_per_minute=limit)
    used = 0
    for index, tokens in enumerate(answers):
        request = Request("r", tuple(range(index + 1)), SamplingParams(max_tokens=1))
        while True:
            try:
                lease = limiter.admit(key)
                break
            except ApiError as error:
                assert error.status == 429 and error.kind == "rate_limit_error"
                now[0] += int(error.headers["Retry-After"])
        assert used <= limit + (now[0] - 100) * limit / 60 + 1
        lease.paid_prompt(request)
        lease.paid_prompt(request)  # another choice of the same prompt
        lease.paid_tokens(tokens)
        used += index + 1 + tokens
        lease.release()


def test_choices_of_one_prompt_pay_it_once() -> None:
    limiter = Limiter(clock=lambda: 0.0)
    key = Key(name="a", sha256="0" * 64, tokens_per_minute=100)
    request = Request("r", tuple(range(60)), SamplingParams(max_tokens=1))
    lease = limiter.admit(key)
    lease.paid_prompt(request)
    lease.paid_prompt(replace(request, id="s"))
    limiter.admit(key).paid_prompt(request)  # 40 were left; another request pays for itself
    with pytest.raises(ApiError):
        limiter.admit(key)


def test_replicas_share_a_limit_between_them() -> None:
    key = Key(name="a", sha256="0" * 64, requests_per_minute=9, concurrent=6)
    limiters = [Limiter(3, clock=lambda: 0.0) for _ in range(3)]
    admitted = 0
    for limiter in limiters:
        for _ in range(2):
            limiter.admit(key)
            admitted += 1
        with pytest.raises(ApiError, match="6 requests at one time"):
            limiter.admit(key)
    assert admitted == 6
    small = Limiter(3, clock=lambda: 0.0)
    small.admit(Key(name="b", sha256="1" * 64, concurrent=1)).release()  # never none at all


@given(st.integers(1, 40), st.integers(1, 22), st.integers(2, 30))
def test_over_time_replicas_never_allow_more_together(
    limit: int, replicas: int, minutes: int
) -> None:
    now = [0.0]
    limiters = [Limiter(replicas, clock=lambda: now[0]) for _ in range(replicas)]
    key = Key(name="a", sha256="0" * 64, requests_per_minute=limit)
    admitted = 0
    for now[0] in range(0, 60 * minutes, 6):
        for limiter in limiters:
            with contextlib.suppress(ApiError):
                while True:
                    limiter.admit(key).release()
                    admitted += 1
    assert admitted <= max(limit, replicas) + limit * minutes
    assert admitted >= 0.8 * limit * (minutes - 1)  # they ask every 6 s


def test_edited_limits_apply_and_what_is_spent_stays_spent() -> None:
    limiter = Limiter(clock=lambda: 0.0)
    key = Key(name="a", sha256="0" * 64, requests_per_minute=3)
    for _ in range(3):
        limiter.admit(key)
    with pytest.raises(ApiError):
        limiter.admit(key)
    with pytest.raises(ApiError):
        limiter.admit(key.model_copy(update={"requests_per_minute": 100}))
    for _ in range(10):
        limiter.admit(key.model_copy(update={"requests_per_minute": None}))


async def test_the_api_says_429_and_when_to_come_again(
    api: Any, small: Tokenizer, configured: ApiSettings, tmp_path: Path
) -> None:
    file = tmp_path / "keys.yaml"
    few = add_key(file, "few", requests_per_minute=2)
    narrow = add_key(file, "narrow", concurrent=1)
    talker = add_key(file, "talker", tokens_per_minute=6)
    picky = add_key(file, "picky", models=("deepseek-chat",))
    engine = api.ScriptedEngine(
        lambda r: [0.2, *api.deltas_of(r, [*small.encode_text("Hello"), small.eos_id])]
    )
    app = api.build_app(replace(configured, key_file=file), small, engine)
    async with api.client_of(app, key=few) as client:
        statuses = [(await client.post(CHAT, json=BODY)).status_code for _ in range(2)]
        reply = await client.post(CHAT, json=BODY)
        assert statuses == [200, 200] and reply.status_code == 429
        assert 25 <= int(reply.headers["retry-after"]) <= 30
        error = reply.json()["error"]
        assert error["type"] == "rate_limit_error" and "'few'" in error["message"]
        assert (await client.get("/v1/models")).status_code == 200  # costs nothing
    async with api.client_of(app, key=narrow) as client:
        for stream in (False, True):  # both give their place back
            body = {**BODY, "stream": stream}
            both = await asyncio.gather(*(client.post(CHAT, json=body) for _ in range(2)))
            assert sorted(reply.status_code for reply in both) == [200, 429]
            assert (await client.post(CHAT, json={**body, "top_p": 7})).status_code == 400
            assert (await client.post(CHAT, json={**body, "logprobs": 1})).status_code == 400
            too_long = {**body, "max_tokens": 5000}
            assert (await client.post(CHAT, json=too_long)).status_code == 400
    async with api.client_of(app, key=talker) as client:
        assert (await client.post(CHAT, json=BODY)).status_code == 200
        reply = await client.post(CHAT, json=BODY)
        assert reply.status_code == 429 and int(reply.headers["retry-after"]) > 10
    async with api.client_of(app, key=picky) as client:
        reply = await client.post(CHAT, json=BODY)
        assert reply.status_code == 403 and reply.json()["error"]["code"] == "model_not_allowed"
        assert (await client.post(CHAT, json={**BODY, "model": "no"})).status_code == 404
        chat = {**BODY, "model": "deepseek-chat"}
        assert (await client.post(CHAT, json=chat)).status_code == 200
        listed = (await client.get("/v1/models")).json()["data"]
        assert [entry["id"] for entry in listed] == ["deepseek-chat"]
        assert (await client.get("/v1/models/deepseek-v3")).status_code == 403


async def test_the_sdk_understands_the_limit(
    api: Any, small: Tokenizer, configured: ApiSettings, tmp_path: Path
) -> None:
    key = add_key(tmp_path / "keys.yaml", "few", requests_per_minute=1)
    configured = replace(configured, key_file=tmp_path / "keys.yaml")
    app = api.build_app(configured, small, api.saying(small))
    async with (
        api.client_of(app, key=None) as http,
        openai.AsyncOpenAI(
            api_key=key, base_url="http://test/v1", http_client=http, max_retries=0
        ) as client,
    ):
        await client.chat.completions.create(**BODY)  # type: ignore[call-overload]
        with pytest.raises(openai.RateLimitError):
            await client.chat.completions.create(**BODY)  # type: ignore[call-overload]


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_request_cancelled_twice_is_counted_out(streamed: bool) -> None:
    """The client leaves, and while the engine is told, the server cancels the exchange too."""
    limiter, left = Limiter(), asyncio.Event()
    key = Key(name="a", sha256="0" * 64, concurrent=1)
    lease = limiter.admit(key)

    async def document() -> dict[str, Any]:
        try:
            return await asyncio.sleep(60, {})
        finally:
            await asyncio.sleep(60)

    async def events() -> AsyncGenerator[bytes, None]:
        yield b"data: {}\n\n"
        await document()

    async def receive() -> dict[str, Any]:
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(_: object) -> None: ...

    response = EventStream(events(), 10, lease) if streamed else Document(document(), 10, lease)
    exchange = asyncio.create_task(response({}, receive, send))
    await asyncio.sleep(0.01)
    left.set()
    await asyncio.sleep(0.01)
    exchange.cancel()
    await asyncio.gather(exchange, return_exceptions=True)
    limiter.admit(key)


async def test_an_error_beside_a_keep_alive_begins_the_answer_once() -> None:
    """Both are due while the loop is busy, the error first."""

    async def events() -> AsyncGenerator[bytes, None]:
        await asyncio.sleep(0.009)
        raise ValueError("broken")
        yield b""

    async def receive() -> dict[str, Any]:
        return await asyncio.sleep(60, {})

    async def send(message: Any) -> None:
        sent.append(message)

    sent: list[Any] = []
    asyncio.get_running_loop().call_later(0.001, time.sleep, 0.05)
    lease = Limiter().admit(Key(name="a", sha256="0" * 64))
    await EventStream(events(), 0.01, lease)({"type": "http"}, receive, send)
    assert [message.get("status") for message in sent] == [500, None]
