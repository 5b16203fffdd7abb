"""Holes in small Python functions, as an editor makes them: lines, an expression, the arguments.

What is missing follows from the name, the description or the code around it. Where the text is cut
varies: before or after a line break, behind the indentation.
"""

from __future__ import annotations

from random import Random

from rayseek.serve_app.tasks.example import Answer, Fill, Judge, Language, Task, is_held_out
from rayseek.serve_app.tasks.functions import KINDS, Function, same_results, write
from rayseek.serve_app.tasks.running import evaluate
from rayseek.serve_app.tasks.words import invented

_FIBONACCI = tuple(kind for kind in KINDS if kind.names[0].template == "fib")
_SPLITS = ("return ", " = ", " += ", " *= ", "if ", " in ")
_INDENT = "    "


def _call(random: Random, function: Function) -> tuple[str, str]:
    """A call as code, and `repr` of its value."""
    arguments = random.choice(function.kind.calls)
    (value,) = evaluate(function.source, function.name, [arguments])
    return f"{function.name}({', '.join(map(repr, arguments))})", value


def _before(random: Random, function: Function, language: Language) -> tuple[list[str], list[str]]:
    """What says the purpose: comment lines above the head, docstring lines below it."""
    roll = random.random()
    if roll < 0.25:
        return [f"# {function.says}"], []
    if roll < 0.85 or function.kind.constant:
        return [], [f'{_INDENT}"""{function.says}"""']
    call, value = _call(random, function)
    shown = ["", f"{_INDENT}>>> {call}", f"{_INDENT}{value}", f'{_INDENT}"""']
    return [], [f'{_INDENT}"""{function.says}', *shown]


def _after(random: Random, function: Function) -> list[str]:
    """A use of the function below it."""
    call, value = _call(random, function)
    if random.random() < 0.5:
        return ["", "", f"print({call})  # {value}"]
    return ["", "", f"assert {call} == {value}" if random.random() < 0.5 else f"print({call})"]


def _lines_cut(random: Random, lines: list[str], start: int, end: int) -> tuple[str, str, str]:
    """Prefix, middle and suffix where lines start..end are missing."""
    prefix, middle = "\n".join(lines[:start]), "\n".join(lines[start:end])
    suffix = "\n".join(lines[end:])
    roll = random.random()
    if not prefix:
        pass
    elif roll < 0.45:
        middle = "\n" + middle
    else:
        prefix += "\n"
        if roll < 0.6:  # the cursor stands behind the indentation
            space = len(middle) - len(middle.lstrip(" "))
            prefix, middle = prefix + middle[:space], middle[space:]
    if suffix and random.random() < 0.5:
        return prefix, middle + "\n", suffix
    return prefix, middle, "\n" + suffix if suffix or random.random() < 0.5 else ""


def _expression_cut(random: Random, lines: list[str], at: int) -> tuple[str, str, str]:
    """A hole from after `return`, `=` or `if` to the end of the line or its colon."""
    line = lines[at]
    split = next((mark for mark in _SPLITS if mark in line), None)
    if split is None:
        return _lines_cut(random, lines, at, at + 1)
    start = line.index(split) + len(split)
    end = len(line) - line.endswith(":")
    if split == "return " and start < end and random.random() < 0.3:
        words = [place for place in range(start, end) if line[place] == " "]
        start = random.choice(words) + 1 if words else start
    prefix = "\n".join([*lines[:at], line[:start]])
    return prefix, line[start:end], "\n".join([line[end:], *lines[at + 1 :]])


def _arguments_cut(random: Random, lines: list[str], at: int) -> tuple[str, str, str]:
    """A hole in the brackets of the head: all arguments, or the last."""
    line = lines[at]
    start, end = line.index("(") + 1, line.index(")")
    if ", " in line and random.random() < 0.5:
        start = line.rindex(", ") + 2
    prefix = "\n".join([*lines[:at], line[:start]])
    return prefix, line[start:end], "\n".join([line[end:], *lines[at + 1 :]])


def _judge(function: Function, prefix: str, middle: str, suffix: str) -> Judge:
    def judge(answer: Answer) -> bool:
        if answer.text == middle:
            return True
        return same_results(function, prefix + answer.text + suffix, function.name)

    return judge


def _fill(random: Random, language: Language) -> Fill:
    fibonacci = random.random() < 0.06
    kind = random.choice(_FIBONACCI if fibonacci else KINDS)
    bare = random.random() < (0.6 if fibonacci else 0.15)
    named = bare or random.random() < 0.9
    function = write(random, language, kind, name="" if named else invented(random))
    above, below = ([], []) if bare else _before(random, function, language)
    if random.random() < 0.06:
        other = write(random, language, random.choice(KINDS))
        if not is_held_out("fim", other.source):
            above = [other.head, *other.body, "", "", *above]
    use = _after(random, function) if random.random() < 0.2 else []
    head = len(above)
    body, end = head + 1 + len(below), head + 1 + len(below) + len(function.body)
    lines = [*above, function.head, *below, *function.body, *use]
    roll, inner = random.random(), len(function.body)
    if roll < (0.3 if inner == 1 else 0.2):
        cut = _lines_cut(random, lines, body, end)
    elif roll < (0.8 if fibonacci else 0.6) and inner > 1:
        start, stop = 0, inner - 1  # all but the last line
        if random.random() < 0.6:
            start = random.randrange(inner)
            stop = random.randint(start + 1, min(inner, start + 3))
        cut = _lines_cut(random, lines, body + start, body + stop)
    elif roll < 0.88:
        cut = _expression_cut(random, lines, random.randrange(body, end))
    elif use and roll < 0.92:
        cut = _lines_cut(random, lines, head, head + 1)
    else:
        cut = _arguments_cut(random, lines, head)
    prefix, middle, suffix = cut
    return Fill(
        function.source, prefix, suffix, middle, _judge(function, prefix, middle, suffix), language
    )


TASKS = (Task("fim", _fill, 12),)
