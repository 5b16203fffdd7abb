"""All tasks of the small model: what it is trained on, and what `rayseek eval` asks.

for example in questions(task("arithmetic"), "en", count=20): ...
"""

from __future__ import annotations

from dataclasses import replace

from rayseek.serve_app.tasks import (
    arithmetic,
    chat,
    code,
    counting,
    dates,
    decline,
    dialogue,
    edits,
    facts,
    fim,
    json_answers,
    lists,
    memory,
    obeying,
    reading,
    sorting,
    story,
    tools,
    units,
)
from rayseek.serve_app.tasks.example import Task

CATALOGUE: tuple[Task, ...] = (
    *chat.TASKS,
    *tools.TASKS,
    *facts.TASKS,
    *decline.TASKS,
    *obeying.TASKS,
    *memory.TASKS,
    *dialogue.TASKS,
    *reading.TASKS,
    *story.TASKS,
    *arithmetic.TASKS,
    *sorting.TASKS,
    *counting.TASKS,
    *lists.TASKS,
    *dates.TASKS,
    *units.TASKS,
    *edits.TASKS,
    *json_answers.TASKS,
    *fim.TASKS,
    *code.TASKS,
)
_BY_NAME = {entry.name: entry for entry in CATALOGUE}


def task(name: str) -> Task:
    """The task of this name. Raises KeyError that lists the names."""
    if name not in _BY_NAME:
        raise KeyError(f"no task {name!r}; there are {', '.join(_BY_NAME)}")
    return _BY_NAME[name]


def weighted(text: str) -> tuple[Task, ...]:
    """All tasks with the weights of a text such as "sort=12,tools=7"; others keep their own.

    Raises ValueError for a name that is no task or a weight that is no positive number.
    """
    weights: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, _, weight = part.partition("=")
        try:
            weights[task(name).name] = float(weight)
        except KeyError as why:
            raise ValueError(why.args[0]) from None
        except ValueError:
            raise ValueError(f"{part!r} is not TASK=WEIGHT, as sort=12") from None
        if not 0 < weights[name] < float("inf"):
            raise ValueError(f"the weight of {name} must be a positive number, not {weight}")
    return tuple(replace(one, weight=weights.get(one.name, one.weight)) for one in CATALOGUE)
