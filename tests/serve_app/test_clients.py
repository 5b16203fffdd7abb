"""Clients that people use, over a real uvicorn: OpenAI's SDK in all its ways, and LangChain."""

from __future__ import annotations

import asyncio
import contextlib
import operator
import time
from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any, Literal

import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, SecretStr

from rayseek.serve_app.settings import ApiSettings
from rayseek.serve_app.tokenizer import Control, Tokenizer

TEXT = "I am DeepSeek-V3. 你好！😀"
USER: list[Any] = [{"role": "user", "content": "Weather? Answer in json."}]
ARGUMENTS = '{"city": "Paris", "unit": "c"}'


class Weather(BaseModel):
    city: str
    unit: Literal["c", "f"]


def call_ids(tokenizer: Tokenizer, *names: str) -> list[int]:
    """What the model writes to call functions."""
    pieces: list[Control | str] = [Control.CALLS_BEGIN]
    for index, name in enumerate(names):
        pieces += ["\n"] if index else []
        pieces += [Control.CALL_BEGIN, "function", Control.TOOL_SEP]
        pieces += [f"{name}\n```json\n{ARGUMENTS}\n```", Control.CALL_END]
    return tokenizer.encode_prompt((*pieces, Control.CALLS_END, Control.EOS))


class Server:
    def __init__(self, url: str, engine: Any, key: str) -> None:
        self.url, self.engine, self.key = url, engine, key

    def sdk(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(api_key=self.key, base_url=self.url, **options)

    def async_sdk(self, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(api_key=self.key, base_url=self.url, **options)

    def langchain(self, **options: Any) -> ChatOpenAI:
        return ChatOpenAI(
            model="deepseek-chat", api_key=SecretStr(self.key), base_url=self.url, **options
        )

    def wait_until_idle(self) -> None:
        deadline = time.monotonic() + 120
        while self.engine.live:
            assert time.monotonic() < deadline
            time.sleep(0.005)


@pytest.fixture
def serve(api: Any, small: Tokenizer, settings: ApiSettings) -> Iterator[Callable[..., Server]]:
    """Starts a server whose engine says text or ids, or plays a script."""
    with contextlib.ExitStack() as stack:

        def start(says: Any) -> Server:
            if isinstance(says, str):
                says = [*small.encode_text(says), small.eos_id]
            script = says if callable(says) else lambda r: api.deltas_of(r, says, range(0, 999, 2))
            engine = api.ScriptedEngine(script)
            app = api.build_app(settings, small, engine)
            return Server(f"{stack.enter_context(api.serving(app))}/v1", engine, api.KEY)

        yield start


def test_parse_gives_a_model(serve: Any) -> None:
    with serve(ARGUMENTS).sdk() as client:
        done = client.chat.completions.parse(
            model="deepseek-v3", messages=USER, response_format=Weather
        )
        assert done.choices[0].message.parsed == Weather(city="Paris", unit="c")
        with client.chat.completions.stream(
            model="deepseek-v3", messages=USER, response_format=Weather
        ) as stream:
            kinds = {event.type for event in stream}
            final = stream.get_final_completion()
        assert {"content.delta", "content.done"} <= kinds
        assert final.choices[0].message.parsed == Weather(city="Paris", unit="c")


def test_tools_round_trip(serve: Any, api: Any, small: Tokenizer) -> None:
    """The SDK's own accumulation of a stream, its parsing, and the answer sent back."""
    calls = call_ids(small, "Weather", "Weather")
    text = [*small.encode_text(TEXT), small.eos_id]
    results = small.id_of(Control.OUTPUTS_END)

    def script(request: Any) -> Any:
        answered = request.prompt_ids[-1] == results
        return api.deltas_of(request, text if answered else calls, range(0, 999, 3))

    tools = [openai.pydantic_function_tool(Weather)]
    server = serve(script)
    with server.sdk() as client:
        whole = client.chat.completions.parse(model="deepseek-v3", messages=USER, tools=tools)
        with client.chat.completions.stream(
            model="deepseek-v3", messages=USER, tools=tools
        ) as stream:
            for _ in stream:
                pass
            told = stream.get_final_completion()
        for done in (whole, told):
            assert done.choices[0].finish_reason == "tool_calls"
            made = done.choices[0].message.tool_calls or []
            parsed = [call.function.parsed_arguments for call in made]
            assert parsed == [Weather(city="Paris", unit="c")] * 2
            assert len({call.id for call in made}) == 2
        asked = whole.choices[0].message
        answers: list[Any] = [
            {"role": "tool", "tool_call_id": call.id, "content": "18"}
            for call in reversed(asked.tool_calls or [])
        ]
        after = client.chat.completions.create(
            model="deepseek-v3", messages=[*USER, asked, *answers], tools=tools
        )
        assert after.choices[0].message.content == TEXT


async def test_async_and_side_by_side(serve: Any) -> None:
    async with serve(TEXT).async_sdk() as client:

        async def streamed() -> str:
            stream = await client.chat.completions.create(
                model="deepseek-v3", messages=USER, stream=True
            )
            return "".join([c.choices[0].delta.content or "" async for c in stream])

        assert await asyncio.gather(*(streamed() for _ in range(8))) == [TEXT] * 8
        fim = await client.completions.create(model="deepseek-v3", prompt="a", suffix="b")
        assert fim.choices[0].text == TEXT


def test_timeout_frees_the_request(serve: Any) -> None:
    server = serve(lambda request: [60.0])
    with server.sdk(timeout=1.0, max_retries=0) as client:
        for stream in (False, True):
            with pytest.raises(openai.APITimeoutError):
                client.chat.completions.create(model="deepseek-v3", messages=USER, stream=stream)
            server.wait_until_idle()
            assert len(server.engine.cancelled) == 1 + stream


async def test_cancel_frees_the_request(serve: Any, api: Any, small: Tokenizer) -> None:
    first = small.encode_text("ab")
    server = serve(lambda r: [*api.deltas_of(r, [*first, 1], [1, 2])[:2], 60.0])
    async with server.async_sdk(max_retries=0) as client:
        stream = await client.chat.completions.create(
            model="deepseek-v3", messages=USER, stream=True
        )
        said = ""
        async for chunk in stream:
            said += chunk.choices[0].delta.content or ""
            if said == "ab":
                break
        await stream.close()
        await asyncio.to_thread(server.wait_until_idle)
        waiting = asyncio.create_task(
            client.chat.completions.create(model="deepseek-v3", messages=USER)
        )
        while not server.engine.live:
            await asyncio.sleep(0.005)
        waiting.cancel()
        await asyncio.to_thread(server.wait_until_idle)
        with pytest.raises(asyncio.CancelledError):
            await waiting
    assert len(server.engine.cancelled) == 2


def test_langchain_text(serve: Any) -> None:
    model = serve(TEXT).langchain(temperature=1.3, stream_usage=True)
    messages = [SystemMessage("Be brief."), HumanMessage("Hi")]
    whole = model.invoke(messages)
    assert whole.content == TEXT and whole.response_metadata["finish_reason"] == "stop"
    chunks = list(model.stream(messages))
    assert "".join(str(chunk.content) for chunk in chunks) == TEXT
    assert model.batch(["a", "b"])[1].content == TEXT
    added = reduce(operator.add, chunks)  # as LangChain's own users do it
    assert isinstance(whole, AIMessage) and added.usage_metadata == whole.usage_metadata
    assert asyncio.run(model.ainvoke("Hi")).content == TEXT


def test_langchain_tools_and_structured_output(serve: Any, small: Tokenizer) -> None:
    @tool
    def get_weather(city: str, unit: str) -> str:
        """The weather of a city."""
        return f"18 {unit} in {city}"

    model = serve(call_ids(small, "get_weather")).langchain()
    bound = model.bind_tools([get_weather])
    message = bound.invoke("Weather?")
    assert [(c["name"], c["args"]) for c in message.tool_calls] == [
        ("get_weather", {"city": "Paris", "unit": "c"})
    ]
    result = get_weather.invoke(message.tool_calls[0])
    assert isinstance(result, ToolMessage) and result.content == "18 c in Paris"
    again = bound.invoke([HumanMessage("Weather?"), message, result])
    assert isinstance(again, AIMessage)
    for method in ("json_schema", "json_mode"):
        structured = serve(ARGUMENTS).langchain().with_structured_output(Weather, method=method)
        assert structured.invoke("Weather? Answer in json.") == Weather(city="Paris", unit="c")
    named = serve(call_ids(small, "Weather")).langchain()
    called = named.with_structured_output(Weather, method="function_calling")
    assert called.invoke("Weather?") == Weather(city="Paris", unit="c")
