"""Runs code that a model wrote, apart from this process, and says what its function returned.

The child is a Python of its own in an empty folder, isolated from the user's settings, with limits
on time, memory and file size, no imports beyond a few harmless modules and no `open`. That keeps
an unlucky program from doing harm; it is no wall against a determined one.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

SECONDS = 2  # of CPU
_PATIENCE_S = 60  # a busy machine takes long for them
_MEMORY = 1 << 30
_MODULES = ("math", "string", "re", "itertools", "functools", "collections", "operator", "typing")


def results(source: str, function: str | None, calls: Sequence[Sequence[Any]]) -> list[str] | None:
    """`repr` of what each call returns; None if the program fails, hangs or lacks the function.

    function: its name; None takes the last one that the program defines. The arguments are plain
    JSON values.
    """
    task = json.dumps({"source": source, "function": function, "calls": calls})
    with tempfile.TemporaryDirectory() as folder:
        try:
            child = subprocess.run(
                [sys.executable, "-I", "-S", __file__],
                input=task,
                capture_output=True,
                text=True,
                cwd=folder,
                env={},
                timeout=_PATIENCE_S,
                check=False,
            )
        except (subprocess.TimeoutExpired, UnicodeDecodeError):
            return None
    if child.returncode or not child.stdout:
        return None
    try:
        answer = json.loads(child.stdout.splitlines()[-1])
    except ValueError:
        return None
    return answer if isinstance(answer, list) else None


def evaluate(source: str, function: str | None, calls: Sequence[Sequence[Any]]) -> list[str]:
    """The same in this process, for code of our own. Raises what the code raises."""
    space: dict[str, Any] = {}
    exec(compile(source, "<answer>", "exec"), space)
    own = [value for value in space.values() if type(value) is type(evaluate)]
    called = space[function] if function else own[-1]
    return [repr(called(*json.loads(json.dumps(call)))) for call in calls]


def _limit() -> None:
    import resource

    limits = (
        (resource.RLIMIT_CPU, SECONDS),
        (resource.RLIMIT_AS, _MEMORY),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 8),
    )
    for kind, value in limits:
        with contextlib.suppress(ValueError, OSError):  # not every system has every limit
            resource.setrlimit(kind, (value, value))


def _harmless() -> None:
    """Takes away from this process's builtins what a small function does not need."""
    import builtins

    ordinary = builtins.__import__

    def imported(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] not in _MODULES:
            raise ImportError(f"{name} is not allowed here")
        return ordinary(name, *rest)

    for module in _MODULES:
        ordinary(module)
    builtins.__dict__["__import__"] = imported
    for name in ("open", "input", "breakpoint"):
        delattr(builtins, name)


def _child() -> None:
    task = json.loads(sys.stdin.read())
    _limit()
    _harmless()
    print("\n" + json.dumps(evaluate(task["source"], task["function"], task["calls"])))


if __name__ == "__main__":
    _child()
