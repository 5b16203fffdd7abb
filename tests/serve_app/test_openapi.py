"""The OpenAPI document tells the truth: generated requests, judged by schemathesis."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import BaseModel
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    negative_data_rejection,
    positive_data_acceptance,
)

from rayseek.serve_app.openapi import ChatChunk, TextChunk
from rayseek.serve_app.settings import ApiSettings
from rayseek.serve_app.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def document(api: Any, small: Tokenizer) -> Any:
    limits = ApiSettings("deepseek-v3", 4096, (api.KEY,), body_limit_bytes=2**20)
    app = api.build_app(limits, small, api.saying(small, "ab", cached=1))
    return schemathesis.openapi.from_asgi("/openapi.json", app)


OPERATIONS = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model_id}"),
    ("GET", "/health"),
    ("GET", "/ready"),
]
CHUNKS: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatChunk,
    "/v1/completions": TextChunk,
}
PLAIN = {"model": "deepseek-v3", "messages": [{"role": "user", "content": "Hi"}]}


def test_every_operation_is_tried(document: Any) -> None:
    described = {(op.ok().method.upper(), op.ok().path) for op in document.get_all_operations()}
    assert described == set(OPERATIONS)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
@given(data=st.data())
@hypothesis_settings(suppress_health_check=list(HealthCheck))
def test_no_server_error_and_no_word_against_the_document(
    api: Any, document: Any, method: str, path: str, data: st.DataObject
) -> None:
    """Rules between fields, and which model is served, no schema can say: bodies that fit the
    schema may be refused, always in the documented way."""
    operation = document[path][method]
    mode = data.draw(st.sampled_from(GenerationMode))
    case = data.draw(operation.as_strategy(generation_mode=mode))
    unjudged = [positive_data_acceptance]
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = "deepseek-v3"  # or nearly every case would end at an unknown model
        if data.draw(st.booleans()):  # one field alone is often served, many together hardly ever
            kept = data.draw(st.sampled_from(sorted(case.body)))
            case.body = {**PLAIN, kept: case.body[kept], "stream": data.draw(st.booleans())}
            unjudged.append(negative_data_rejection)  # what was wrong may be gone
    reply = case.call_and_validate(
        headers={"Authorization": f"Bearer {api.KEY}"}, excluded_checks=unjudged
    )
    if "text/event-stream" in reply.headers["content-type"][0]:
        *chunks, last = reply.content.decode().split("\n\n")  # long streams are cut
        assert chunks and last == ""
        for chunk in chunks:
            if chunk != "data: [DONE]":
                CHUNKS[path].model_validate_json(chunk.removeprefix("data: "))
