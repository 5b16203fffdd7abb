"""`rayseek eval`: held-out questions of the tasks, asked of any OpenAI-compatible endpoint.

Questions are made here, so every endpoint gets the same ones; an answer is judged by the task's
own rule. A request that failed is an error, neither right nor wrong.
"""

from __future__ import annotations

import argparse
import http.client
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from rayseek.serve_app.conformance import Endpoint, Unmet, open_endpoint
from rayseek.serve_app.prompt import DEFAULT_SYSTEM, JSON_MODE, Message
from rayseek.serve_app.tasks.example import (
    Answer,
    Call,
    Chat,
    Example,
    Fill,
    Language,
    Task,
    questions,
)

Json = dict[str, Any]
QUESTIONS = 100  # of each task and language
NORMAL_95 = 1.96  # standard deviations either side that hold 95 % of a normal distribution


@dataclass(frozen=True, slots=True)
class Question:
    """`number` counts from 0 within its task and language."""

    task: str
    language: Language
    number: int
    example: Example


@dataclass(frozen=True, slots=True)
class Outcome:
    """`answer` is None and `error` says why if none came."""

    question: Question
    request: Json
    answer: Answer | None
    right: bool = False
    error: str = ""


@dataclass(frozen=True, slots=True)
class Asking:
    """How questions are put. temperature None: not sent, so the API's own default holds.

    json_mode: ask for JSON by `response_format`, which binds the answer to a grammar. Otherwise
    the system message says what that field would make the prompt say, and nothing is bound.
    """

    temperature: float | None = None
    seed: int = 0
    max_tokens: int = 512
    json_mode: bool = False


def held_out(
    tasks: Sequence[Task], languages: Sequence[Language], count: int, seed: int
) -> list[Question]:
    """Up to `count` of each task and language; a small task may have fewer."""
    return [
        Question(task.name, language, number, example)
        for task in tasks
        for language in languages
        if language in task.languages
        for number, example in enumerate(questions(task, language, count, seed))
    ]


def request_of(question: Question, asking: Asking) -> tuple[str, Json]:
    """Path and body. FIM goes to the beta endpoint, as DeepSeek has it."""
    body: Json = {"seed": asking.seed + question.number, "max_tokens": asking.max_tokens}
    if asking.temperature is not None:
        body["temperature"] = asking.temperature
    example = question.example
    if isinstance(example, Fill):
        return "/beta/completions", {"prompt": example.prefix, "suffix": example.suffix, **body}
    messages = list(example.messages)
    if example.json_mode and asking.json_mode:
        body["response_format"] = {"type": "json_object"}
    elif example.json_mode:
        messages = _asked_for_json(messages)
    if example.tools:
        body["tools"] = [{"type": "function", "function": tool} for tool in example.tools]
    body["messages"] = [_wire(message) for message in messages]
    return "/v1/chat/completions", body


def _asked_for_json(messages: list[Message]) -> list[Message]:
    """Without tools, the very prompt that JSON mode makes (with tools, it stands before them)."""
    system = [message.content or "" for message in messages if message.role == "system"]
    text = ("\n\n".join(system) or DEFAULT_SYSTEM) + JSON_MODE
    return [Message("system", text), *(m for m in messages if m.role != "system")]


def _wire(message: Message) -> Json:
    shown: Json = {"role": message.role, "content": message.content}
    if message.tool_calls:
        shown["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        shown["tool_call_id"] = message.tool_call_id
    return shown


def read_answer(document: Json) -> Answer:
    """The first choice of a chat or a completion. Raises KeyError, TypeError, IndexError."""
    choice = document["choices"][0]
    reason = choice["finish_reason"] or ""
    if "message" not in choice:
        return Answer(choice["text"], (), reason)
    message = choice["message"]
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    return Answer(
        message.get("content") or "",
        tuple(Call(call["name"], _parsed(call["arguments"])) for call in calls),
        reason,
    )


def _parsed(arguments: str) -> Any:
    """Arguments that are no JSON stay text, which no judge takes for them."""
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


def ask(question: Question, at: Endpoint, asking: Asking) -> Outcome:
    path, body = request_of(question, asking)
    try:
        answer = read_answer(at.post(path, body).answer())
    except Unmet as unmet:
        return Outcome(question, body, None, error=str(unmet))
    except (OSError, http.client.HTTPException) as error:
        return Outcome(question, body, None, error=f"the connection failed: {error!r}")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        return Outcome(question, body, None, error=f"an answer of another shape: {error!r}")
    return Outcome(question, body, answer, question.example.judge(answer))


def ask_all(
    asked: Sequence[Question], at: Endpoint, asking: Asking, concurrency: int
) -> list[Outcome]:
    """The outcomes in the questions' order, so many requests at one time."""
    with ThreadPoolExecutor(concurrency) as pool:
        outcomes = pool.map(lambda question: ask(question, at, asking), asked)
        console = Console(stderr=True)
        return list(track(outcomes, "Asking", len(asked), console=console, transient=True))


@dataclass(frozen=True, slots=True)
class Score:
    """Of one task in one language. Errors are not among the answered."""

    task: str
    language: str
    right: int
    answered: int
    errors: int

    @property
    def share(self) -> float:
        return self.right / self.answered if self.answered else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the share that would be right of endlessly many questions."""
        if not self.answered:
            return 0.0, 1.0
        n, z2 = self.answered, NORMAL_95**2
        centre = (self.share + z2 / (2 * n)) / (1 + z2 / n)
        spread = self.share * (1 - self.share) / n + z2 / (4 * n * n)
        half = NORMAL_95 * spread**0.5 / (1 + z2 / n)
        return max(0.0, centre - half), min(1.0, centre + half)


def scores(outcomes: Iterable[Outcome]) -> list[Score]:
    """By task and language, in order of appearance."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        key = (outcome.question.task, outcome.question.language)
        groups.setdefault(key, []).append(outcome)
    return [
        Score(
            *key,
            right=sum(outcome.right for outcome in group),
            answered=sum(outcome.answer is not None for outcome in group),
            errors=sum(outcome.answer is None for outcome in group),
        )
        for key, group in groups.items()
    ]


def table_of(found: Sequence[Score], title: str) -> Table:
    table = Table("task", "", title=title)
    for name in ("right", "%", "95 % interval", "errors"):
        table.add_column(name, justify="right")
    for score in found:
        low, high = score.interval
        table.add_row(
            score.task,
            score.language,
            f"{score.right} of {score.answered}",
            f"{100 * score.share:.1f}" if score.answered else "–",
            f"{100 * low:.0f}–{100 * high:.0f}",
            str(score.errors or ""),
        )
    return table


def report(found: Sequence[Score], outcomes: Sequence[Outcome], **how: object) -> Json:
    """Scores, and every question without a right answer, with what was sent and what came."""
    rows = [{**asdict(score), "interval": score.interval} for score in found]
    return {**how, "scores": rows, "failed": [_failure(o) for o in outcomes if not o.right]}


def _failure(outcome: Outcome) -> Json:
    question, answer = outcome.question, outcome.answer
    expected = question.example
    shown: Json = {
        "task": question.task,
        "language": question.language,
        "key": expected.key,
        "request": outcome.request,
        "model_answer": _wire(expected.answer) if isinstance(expected, Chat) else expected.middle,
    }
    came = {"error": outcome.error} if answer is None else {"answer": asdict(answer)}
    return {**shown, **came}


def chosen_tasks(names: str | None, catalogue: Sequence[Task]) -> list[Task]:
    """Names with commas between; None: all. Raises ValueError for one that is not there."""
    known = {task.name: task for task in catalogue}
    wanted = names.split(",") if names else list(known)
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"no task {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in wanted]


def run(arguments: argparse.Namespace) -> None:
    """Ask, print the table, write the report. Raises ValueError if nothing was answered."""
    if arguments.harness is not None:
        from rayseek.serve_app.harness import run_harness

        return run_harness(arguments)
    from rayseek.serve_app.tasks.catalogue import CATALOGUE

    languages: list[Language] = arguments.languages.split(",")
    if not set(languages) <= {"en", "zh"}:
        raise ValueError(f"--languages {arguments.languages}: en, zh, or en,zh")
    tasks = chosen_tasks(arguments.tasks, CATALOGUE)
    asking = Asking(
        arguments.temperature, arguments.seed, arguments.max_tokens, arguments.json_mode
    )
    asked = held_out(tasks, languages, arguments.questions or QUESTIONS, arguments.seed)
    at = open_endpoint(arguments.url, arguments.key, arguments.model)
    outcomes = ask_all(asked, at, asking, arguments.concurrency)
    found = scores(outcomes)
    Console().print(table_of(found, f"{at.model} at {arguments.url}"))
    if arguments.out is not None:
        how = {"model": at.model, "url": arguments.url, "temperature": asking.temperature,
               "seed": asking.seed, "json_mode": asking.json_mode}  # fmt: skip
        text = json.dumps(report(found, outcomes, **how), ensure_ascii=False, indent=2)
        arguments.out.write_text(text + "\n", encoding="utf-8")
    if outcomes and all(outcome.answer is None for outcome in outcomes):
        raise ValueError(f"no question was answered; the first error: {outcomes[0].error}")
