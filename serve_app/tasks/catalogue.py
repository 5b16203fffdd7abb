"""All tasks of the small model: what it is trained on, and what `rayseek eval` asks.

for example in questions(task("arithmetic"), "en", count=20): ...
"""

from __future__ import annotations

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
