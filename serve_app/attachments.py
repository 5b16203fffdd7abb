"""What a user message may carry besides its text: files and web search results (spec 6.3).

`content` of a message: text, or a list of parts of type `text` and, from users, `file`.
`files`, `web_search_results`: extensions of a chat request, for its last user message.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date as Date
from typing import Annotated, Any

from pydantic import Field, PlainValidator, WithJsonSchema

from rayseek.serve_app.errors import bad_request
from rayseek.serve_app.prompt import Message
from rayseek.serve_app.strict import StrictBody, wrong
from rayseek.serve_app.vendor_prompts import (
    File,
    Language,
    SearchResult,
    file_prompt,
    search_prompt,
    text_of_data_url,
)

MAX_FILES, MAX_RESULTS = 32, 64
MAX_CHARS = 2**20  # of one file or web page: far more than the context holds
FILE_NAME = r"^[^\x00-\x1f\x7f]{1,255}$"

_PART_SCHEMA = {
    "oneOf": [
        {
            "type": "object",
            "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
            "required": ["type", "text"],
        },
        {
            "type": "object",
            "description": "A text file, in messages of role user.",
            "properties": {
                "type": {"const": "file"},
                "file": {
                    "type": "object",
                    "properties": {
                        "filename": {"type": "string", "pattern": FILE_NAME},
                        "file_data": {
                            "type": "string",
                            "description": "A data: URL of a text type, UTF-8.",
                            "examples": ["data:text/plain;base64,SGk="],
                        },
                    },
                    "required": ["filename", "file_data"],
                },
            },
            "required": ["type", "file"],
        },
    ]
}
CONTENT_SCHEMA = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": _PART_SCHEMA}, {"type": "null"}]
}


class AttachedFile(StrictBody):
    name: str = Field(pattern=FILE_NAME)
    content: str = Field(max_length=MAX_CHARS)


class WebPage(StrictBody):
    content: str = Field(max_length=MAX_CHARS)
    title: str | None = Field(None, max_length=1024)
    url: str | None = Field(None, max_length=4096)
    date: str | None = Field(None, max_length=64)


class WebSearchResults(StrictBody):
    results: list[WebPage] = Field(min_length=1, max_length=MAX_RESULTS)
    date: str | None = Field(
        None, min_length=1, max_length=64, description="Today, ISO or as it shall be shown."
    )
    lang: Language = Field("auto", description="Of the instructions; auto: the question's.")


@dataclass(frozen=True, slots=True)
class Parts:
    """The content of a message with files: its texts, one a line, and the files."""

    text: str
    files: tuple[File, ...]


def read_content(value: object) -> str | Parts | None:
    """Message content in its three forms. Raises what pydantic expects of a validator."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise wrong("must be a string or a list of parts")
    texts: list[str] = []
    files: list[File] = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if not isinstance(part, dict) or kind not in ("text", "file"):
            raise wrong(
                f"part {index} is of type {str(kind)[:80]!r}; this model takes only 'text' parts, "
                "and from users 'file' parts with text"
            )
        if kind == "file":
            files.append(_read_file(part.get("file"), f"part {index}: file"))
        elif isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise wrong(f"part {index} has no string 'text'")
    if len(files) > MAX_FILES:
        raise wrong(f"at most {MAX_FILES} files are allowed, not {len(files)}")
    return Parts("\n".join(texts), tuple(files)) if files else "".join(texts)


Content = Annotated[Any, PlainValidator(read_content), WithJsonSchema(CONTENT_SCHEMA)]


def _read_file(file: Any, where: str) -> File:
    file = file if isinstance(file, dict) else {}
    name, data = file.get("filename"), file.get("file_data")
    if not isinstance(name, str) or not re.fullmatch(FILE_NAME, name):
        raise wrong(f"{where}.filename must be 1 to 255 characters without line breaks")
    if not isinstance(data, str):
        raise wrong(f"{where}.file_data must be a data: URL; stored files are not known here")
    try:
        content = text_of_data_url(data)
    except ValueError as error:
        raise wrong(f"{where}.file_data {error}") from None
    if len(content) > MAX_CHARS:
        raise wrong(f"{where}.file_data has {len(content):,} characters; at most {MAX_CHARS:,}")
    return File(name, content)


def attach(
    messages: Sequence[Message],
    files: Sequence[AttachedFile],
    search: WebSearchResults | None,
    *,
    question: str,
    today: Date,
) -> list[Message]:
    """Put files, then search results, around the last user message.

    `question` is what the user asked there, without files. Raises ApiError (400).
    """
    messages = list(messages)
    if not files and search is None:
        return messages
    asked = [index for index, message in enumerate(messages) if message.role == "user"]
    if not asked:
        param = "files" if files else "web_search_results"
        raise bad_request(f"{param} needs a message of role user", param=param)
    text = messages[asked[-1]].content or ""
    text = file_prompt([File(file.name, file.content) for file in files], text)
    if search is not None:
        pages = [
            SearchResult(page.content, page.title or "", page.url or "", page.date or "")
            for page in search.results
        ]
        day = _date(search.date) or today
        text = search_prompt(pages, text, date=day, language=search.lang, about=question)
    messages[asked[-1]] = replace(messages[asked[-1]], content=text)
    return messages


def _date(text: str | None) -> Date | str | None:
    try:
        return Date.fromisoformat(text) if text else None
    except ValueError:
        return text
