"""Logs as one JSON object a line, from every process of ours that Ray starts.

They go to the process's standard error, which Ray keeps in a file of its own. `request` is the id
that the caller got with the answer. Prompts and answers are never logged.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

_ROOT = "rayseek"


class JsonLines(logging.Formatter):
    """`process`: what the line's own process is called. Whatever a record carries as `fields`
    becomes keys of the object."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "process": self._process,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def start_logging(process: str) -> None:
    """Write what our loggers say from now on; another call renames the process."""
    logger = logging.getLogger(_ROOT)
    # Serve puts a logger in the place of sys.stderr, which swallows lines below its own level.
    handler = logging.StreamHandler(sys.__stderr__)
    handler.setFormatter(JsonLines(process))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)


def fields(**values: object) -> dict[str, dict[str, object]]:
    """As `extra` of a log call: further keys of its object."""
    return {"fields": values}
