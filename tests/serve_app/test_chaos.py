"""What `rayseek chaos` does to processes, and how it comes by another node."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest
import ray

from rayseek.serve_app import local
from rayseek.serve_app.chaos import strike

PARENT = (
    "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=-1);"
    "print(child.pid, flush=True); child.wait()"
)


@pytest.fixture
def family() -> Iterator[tuple[psutil.Process, psutil.Process]]:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    yield psutil.Process(parent.pid), child
    for process in (parent, child):
        process.kill()
    parent.wait()
    parent.stdout.close()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("whole", (True, False))
def test_a_node_stops_with_all_that_it_has_started(
    family: tuple[psutil.Process, psutil.Process], whole: bool
) -> None:
    parent, child = family
    strike(parent, signal.SIGSTOP, whole)
    for process in family if whole else family[:1]:  # a signal takes a moment
        while process.status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
    assert (child.status() == psutil.STATUS_STOPPED) == whole


@pytest.mark.parametrize("failures", (0, 2, 3))
def test_a_node_that_ends_while_it_starts_is_started_again(
    monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    nodes = [{"NodeID": "first", "Alive": True}, {"NodeID": "dead", "Alive": False}]
    started: list[int] = []

    class Node:
        def __init__(self, command: list[str], **_: object) -> None:
            started.append(len(started))
            self.works = len(started) > failures
            if self.works:
                nodes.append({"NodeID": "new", "Alive": True})

        def poll(self) -> int | None:
            return None if self.works else 1

    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(local.subprocess, "Popen", Node)
    if failures < local.NODE_STARTS:
        local.add_node("127.0.0.1:1")
        assert len(started) == failures + 1
    else:
        with pytest.raises(local.StartError, match="ended 3 times"):
            local.add_node("127.0.0.1:1")
