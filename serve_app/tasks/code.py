"""Requests for a small Python function, answered by the function in a Markdown fence."""

from __future__ import annotations

from random import Random

from rayseek.serve_app.tasks.asking import chat, phrase
from rayseek.serve_app.tasks.example import Answer, Chat, Judge, Language, Task, is_held_out
from rayseek.serve_app.tasks.functions import KINDS, Function, same_results, write
from rayseek.serve_app.tasks.judging import unfenced
from rayseek.serve_app.tasks.wording import wordings_of

_WORDINGS = wordings_of(__file__)
# Of kinds that are described alike, the first is the answer where no name tells them apart.
_DESCRIBED = tuple({kind.says["en"].template: kind for kind in reversed(KINDS)}.values())


def _does(says: str, language: Language) -> str:
    """ "Return the sum of a and b." as "returns the sum of a and b"."""
    if language == "zh":
        return says.rstrip("。")
    verb, _, rest = says.rstrip(".").partition(" ")
    return f"{verb.lower()}s {rest}"


def _judge(function: Function, name: str | None) -> Judge:
    right = function.source.strip()

    def judge(answer: Answer) -> bool:
        source = unfenced(answer.text)
        return source.strip() == right or same_results(function, source, name)

    return judge


def _code(random: Random, language: Language) -> Chat:
    named = random.random() < 0.5
    while True:
        kind = random.choice(KINDS if named else _DESCRIBED)
        function = write(random, language, kind, plain=not named)
        if not named or is_held_out("code", function.source) == is_held_out("fim", function.source):
            break  # held out in one of the two tasks is held out in both
    does = _does(function.says, language)
    if named:
        key = function.source
        wordings = _WORDINGS["named"][language]
    else:
        which = random.randrange(len(_WORDINGS["unnamed"][language]))
        key = f"{does}|{which}"
        wordings = _WORDINGS["unnamed"][language][which : which + 1]
    head = function.head.removeprefix("def ").removesuffix(":")
    return chat(
        random,
        language,
        key=key,
        text=phrase(random, language, wordings, head=head, does=does),
        answer=f"```python\n{function.source}```",
        judge=_judge(function, function.name if named else None),
    )


TASKS = (Task("code", _code, 4),)
