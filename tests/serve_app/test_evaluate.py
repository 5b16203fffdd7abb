"""`rayseek eval` against a scripted endpoint: it can give 100 %, 0 %, and tell errors apart."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayseek.serve_app.cli import main
from rayseek.serve_app.conformance import Endpoint
from rayseek.serve_app.corpus import prompt_of
from rayseek.serve_app.evaluate import (
    Asking,
    Question,
    Score,
    ask_all,
    chosen_tasks,
    held_out,
    request_of,
    scores,
)
from rayseek.serve_app.harness import harness_command
from rayseek.serve_app.prompt import Message, ToolCall, render_chat, render_fim
from rayseek.serve_app.protocol import ChatRequest, CompletionRequest
from rayseek.serve_app.tasks.catalogue import CATALOGUE
from rayseek.serve_app.tasks.example import Answer, Chat, Example, Fill, Language, Task, is_held_out

Json = dict[str, Any]
Script = Callable[[str, Json], tuple[int, Json]]  # path and body to status and document


@contextlib.contextmanager
def endpoint(script: Script) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(200, {"data": [{"id": "scripted"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.answer(*script(self.path, body))

        def answer(self, status: int, document: Json) -> None:
            data = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        finally:
            server.shutdown()
            thread.join()


def answered(example: Example) -> Json:
    """A document that says what the example's model answer says."""
    if isinstance(example, Fill):
        return {"choices": [{"text": example.middle, "finish_reason": "stop"}]}
    calls = [
        {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
        for c in example.answer.tool_calls
    ]
    message = {"role": "assistant", "content": example.answer.content, "tool_calls": calls or None}
    return {"choices": [{"message": message, "finish_reason": "tool_calls" if calls else "stop"}]}


def said(text: str) -> Json:
    message = {"role": "assistant", "content": text}
    return {"choices": [{"message": message, "text": text, "finish_reason": "stop"}]}


def knowing(asked: Sequence[Question], asking: Asking) -> Script:
    """Answers each of these requests with its model answer."""
    known = {json.dumps(request_of(q, asking), sort_keys=True): q.example for q in asked}

    def script(path: str, body: Json) -> tuple[int, Json]:
        body.pop("model")
        return 200, answered(known[json.dumps([path, body], sort_keys=True)])

    return script


def test_the_model_answers_of_every_task_are_right() -> None:
    asked = held_out(CATALOGUE, ["en", "zh"], 4, seed=3)
    assert {q.task for q in asked} == {task.name for task in CATALOGUE}
    asking = Asking(seed=3)
    with endpoint(knowing(asked, asking)) as url:
        outcomes = ask_all(asked, Endpoint(url, ""), asking, 4)
    assert [o.question for o in outcomes if not o.right] == []
    assert all(is_held_out(o.question.task, o.question.example.key) for o in outcomes)


@pytest.mark.parametrize("text", ["", "I like turtles.", "```json\n[1]\n```"])
def test_nonsense_is_hardly_ever_right(text: str) -> None:
    asked = held_out(CATALOGUE, ["en", "zh"], 4, seed=3)
    with endpoint(lambda path, body: (200, said(text))) as url:
        outcomes = ask_all(asked, Endpoint(url, ""), Asking(), 4)
    assert all(outcome.answer is not None for outcome in outcomes)
    wrong = {o.question.task for o in outcomes if not o.right}
    assert wrong >= {task.name for task in CATALOGUE} - {"decline"}


def say(word: str) -> Callable[[Answer], bool]:
    return lambda answer: answer.text == word


def make(random: Random, language: Language) -> Example:
    n = random.randrange(1000)
    if random.random() < 0.3:
        return Fill(f"{n}", f"{n}(", ")", "yes", say("yes"), language)
    message = Message("user", f"{language} {n}")
    return Chat(f"{n}", (message,), Message("assistant", "yes"), say("yes"), language=language)


TASK = Task("parrot", make, 1.0)


def test_right_wrong_and_errors_are_counted_apart() -> None:
    asked = held_out([TASK], ["en", "zh"], 40, seed=0)
    replies = [
        (200, said("yes")),
        (200, said("no")),
        (429, {"error": {"message": "slow down"}}),
        (200, {"choices": []}),
        (200, {"choices": [{"message": {"content": "yes"}}]}),  # no finish_reason
    ]
    with endpoint(lambda path, body: replies[body["seed"] % 5]) as url:
        outcomes = ask_all(asked, Endpoint(url, ""), Asking(), 8)
    assert [o.question for o in outcomes] == asked
    assert scores(outcomes) == [Score("parrot", "en", 8, 16, 24), Score("parrot", "zh", 8, 16, 24)]
    assert "slow down" in outcomes[2].error and "429" in outcomes[2].error


def test_an_endpoint_that_goes_away_is_an_error() -> None:
    with endpoint(lambda path, body: (200, said("yes"))) as url:
        at = Endpoint(url, "")
    (outcome,) = ask_all(held_out([TASK], ["en"], 1, 0), at, Asking(), 1)
    assert outcome.answer is None and "connection" in outcome.error


def test_the_servers_prompt_is_the_one_that_was_learnt() -> None:
    """Each request, read by the API's own types, renders to the training document's prompt."""
    for question in held_out(CATALOGUE, ["en", "zh"], 10, seed=1):
        example = question.example
        for asking in (Asking(), Asking(json_mode=True)):
            path, body = request_of(question, asking)
            if isinstance(example, Fill):
                fim = CompletionRequest.model_validate({"model": "m", **body})
                assert path == "/beta/completions"
                shown = render_fim(str(fim.prompt[0]), fim.suffix or "")
            else:
                chat = ChatRequest.model_validate({"model": "m", **body})
                chat.check()
                shown = render_chat(
                    chat.template_messages(date(2025, 3, 24)),
                    tools=chat.template_tools(),
                    json_mode=chat.response_format is not None,
                )
                if example.json_mode and example.tools and not asking.json_mode:
                    continue  # the instruction stands before the tools
            assert shown == prompt_of(example)


def test_only_what_was_asked_for_is_sent() -> None:
    (question,) = held_out([TASK], ["en"], 1, 0)
    assert "temperature" not in request_of(question, Asking())[1]
    _, body = request_of(question, Asking(temperature=0.0, seed=5, max_tokens=7))
    assert (body["temperature"], body["seed"], body["max_tokens"]) == (0.0, 5, 7)

    chat = Chat(
        "key",
        (
            Message("system", "Be brief."),
            Message("user", "?"),
            Message("assistant", None, (ToolCall("a", "f", "{}"),)),
            Message("tool", "1", tool_call_id="a"),
        ),
        Message("assistant", "{}"),
        say("{}"),
        ({"name": "f", "description": "", "parameters": {}},),
        json_mode=True,
    )
    _, body = request_of(Question("t", "en", 0, chat), Asking())
    assert body["messages"][0]["content"].startswith("Be brief.\n\n## Response Format")
    assert body["messages"][2]["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
    assert body["messages"][3]["tool_call_id"] == "a"
    assert body["tools"][0]["type"] == "function" and "response_format" not in body
    _, body = request_of(Question("t", "en", 0, chat), Asking(json_mode=True))
    assert body["response_format"] == {"type": "json_object"}
    assert body["messages"][0]["content"] == "Be brief."


@given(st.integers(1, 2000), st.data())
def test_the_interval_is_wilsons(answered: int, data: st.DataObject) -> None:
    """Its ends p are where the observed share lies 1.96 standard errors of p away."""
    right = data.draw(st.integers(0, answered))
    score = Score("t", "en", right, answered, 0)
    for p in score.interval:
        error = (p * (1 - p) / answered) ** 0.5
        assert abs(score.share - p) == pytest.approx(1.96 * error, abs=1e-6)
    low, high = score.interval
    assert low - 1e-9 <= score.share <= high + 1e-9


def test_the_command_prints_a_table_and_writes_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, out = "arithmetic", tmp_path / "report.json"
    asked = held_out(chosen_tasks(name, CATALOGUE), ["en"], 3, 0)
    right = knowing(asked, Asking())

    def script(path: str, body: Json) -> tuple[int, Json]:
        return right(path, body) if body["seed"] != 1 else (200, said("nonsense"))

    with endpoint(script) as url:
        arguments = ["--url", url, "--tasks", name, "--languages", "en", "--questions", "3"]
        main(["eval", *arguments, "--out", str(out)])
        table = capsys.readouterr().out
        assert name in table and "2 of 3" in table and "66.7" in table
        document = json.loads(out.read_text())
        assert document["model"] == "scripted"
        (score,), (failed,) = document["scores"], document["failed"]
        assert (score["right"], score["answered"], score["errors"]) == (2, 3, 0)
        assert failed["answer"]["text"] == "nonsense" and failed["key"] == asked[1].example.key
    with endpoint(lambda path, body: (500, {})) as url, pytest.raises(SystemExit):
        main(["eval", "--url", url, "--tasks", name, "--questions", "1"])
    assert "no question was answered" in capsys.readouterr().err


def test_unknown_tasks_are_refused() -> None:
    assert chosen_tasks(None, [TASK]) == [TASK]
    with pytest.raises(ValueError, match="no task chess; there are parrot"):
        chosen_tasks("parrot,chess", [TASK])


def test_the_harness_is_asked_over_chat_completions() -> None:
    at = Endpoint("http://host:8000/v1/", "", "deepseek-chat")
    command = harness_command(
        at, "mmlu_pro,aime24", concurrency=4, temperature=0.3, questions=10, out="results"
    )
    assert command[1:] == [
        "-m", "lm_eval", "run", "--model", "local-chat-completions",
        "--model_args",
        "model=deepseek-chat,base_url=http://host:8000/v1/chat/completions,num_concurrent=4,"
        "max_retries=3,timeout=3600,tokenizer_backend=none",
        "--tasks", "mmlu_pro,aime24", "--apply_chat_template",
        "--gen_kwargs", "max_gen_toks=8192,temperature=0.3,do_sample=True",
        "--limit", "10", "--output_path", "results", "--log_samples",
    ]  # fmt: skip
    plain = harness_command(at, "aime24", concurrency=4, temperature=None, questions=None, out=None)
    assert "--limit" not in plain and plain[-1] == "max_gen_toks=8192"


def test_a_missing_harness_is_said_clearly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["eval", "--harness", "aime24"])
    assert "pip install 'rayseek[eval]'" in capsys.readouterr().err
