"""Bring parts of files into the page cache with several threads, showing bytes and rate."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

log = logging.getLogger(__name__)
PIECE_BYTES = 64 << 20  # one thread's unit of work
BUFFER_BYTES = 4 << 20
THREADS = 8


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Bytes begin..end of a file."""

    path: Path
    begin: int
    end: int


def read_spans(spans: Iterable[Span], what: str, progress: bool | None) -> None:
    """Read every span once. Raises OSError naming the file that cannot be read to its end.

    progress: a bar on stderr, or log lines; None: a bar if stderr is a terminal.
    """
    units = pieces(spans)
    total = sum(piece.end - piece.begin for piece in units)
    if sys.stderr.isatty() if progress is None else progress:
        columns = (
            TextColumn("{task.description}"), BarColumn(), DownloadColumn(),
            TransferSpeedColumn(), TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=total)
            _read_all(units, lambda count: bar.advance(task, count))
        return
    log.info("reading %s of %s", decimal(total), what)
    start = time.monotonic()
    _read_all(units, lambda count: None)
    seconds = max(time.monotonic() - start, 1e-6)
    log.info("read %s in %.1f s, %s/s", decimal(total), seconds, decimal(int(total / seconds)))


def pieces(spans: Iterable[Span]) -> list[Span]:
    """Neighbouring spans joined, then cut into units of work."""
    joined: list[Span] = []
    for span in sorted(spans):
        if joined and joined[-1].path == span.path and span.begin <= joined[-1].end:
            last = joined.pop()
            span = Span(span.path, last.begin, max(last.end, span.end))
        joined.append(span)
    return [
        Span(s.path, begin, min(begin + PIECE_BYTES, s.end))
        for s in joined
        for begin in range(s.begin, s.end, PIECE_BYTES)
    ]


def _read_all(units: list[Span], done: Callable[[int], object]) -> None:
    with ThreadPoolExecutor(THREADS, thread_name_prefix="read") as pool:
        try:
            for future in as_completed([pool.submit(_read, unit) for unit in units]):
                done(future.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _read(piece: Span) -> int:
    """The bytes themselves are dropped: what stays is the operating system's cached copy."""
    buffer = memoryview(bytearray(min(BUFFER_BYTES, piece.end - piece.begin)))
    at = piece.begin
    with piece.path.open("rb", buffering=0) as file:
        file.seek(at)
        while at < piece.end:
            count = file.readinto(buffer[: piece.end - at])
            if not count:
                raise OSError(f"{piece.path} ends at byte {at:,}; {piece.end:,} are needed")
            at += count
    return piece.end - piece.begin
