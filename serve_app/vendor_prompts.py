"""The prompts that DeepSeek's web and app put around a question: files, search results, the date.

The texts are the V3-0324 model card's, word for word, in `vendor_prompts.yaml` (spec sections 6.2
and 6.3). Everything here makes plain text of a user message; as such it is encoded, and whatever
stands in a file or a web page, it can not become a control token.

    file_prompt([File("notes.txt", "line 1")], "Summarise.")
    search_prompt([SearchResult("1+1=2", title="Sums")], "What is 1+1?", date=date(2025, 3, 24))
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date as Date
from pathlib import Path
from typing import Literal
from urllib.parse import unquote_to_bytes

import yaml

Language = Literal["auto", "zh", "en"]
TEMPLATES: Mapping[str, str] = yaml.safe_load(
    Path(__file__).with_suffix(".yaml").read_text("utf-8")
)
# A file's block and, at the very end, the question: several files repeat the block alone.
FILE_BLOCK, _, _ = TEMPLATES["file"].rpartition("{question}")
PLACEHOLDER = re.compile(r"\{(\w+)\}")

WEEKDAYS = "一二三四五六日"
MONTHS = (  # strftime would write them in the process's language
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip
HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
KANA_OR_HANGUL = re.compile(r"[\u3040-\u30ff\uac00-\ud7af]")
LATIN_WORD = re.compile(r"[A-Za-zÀ-ɏ]+")

TEXT_TYPES = re.compile(
    r"text/[\w.+-]+"
    r"|application/([\w.-]+\+)?(json|xml|yaml)|application/(x-yaml|x-ndjson|jsonl|toml|sql"
    r"|javascript|x-javascript|typescript|x-sh|x-python|x-tex|graphql)"
)
MAX_DATA_HEAD = 1024  # characters of a data: URL before its data


@dataclass(frozen=True, slots=True)
class File:
    name: str
    content: str


@dataclass(frozen=True, slots=True)
class SearchResult:
    content: str
    title: str = ""
    url: str = ""
    date: str = ""


def _fill(template: str, values: Mapping[str, str]) -> str:
    """Every placeholder in one pass: a value that contains `{question}` keeps it."""
    return PLACEHOLDER.sub(lambda found: values[found[1]], template)


def file_prompt(files: Sequence[File], question: str) -> str:
    """A user message that asks `question` about `files`, in their order."""
    blocks = (_fill(FILE_BLOCK, {"file_name": f.name, "file_content": f.content}) for f in files)
    return "".join(blocks) + question


def search_prompt(
    results: Sequence[SearchResult],
    question: str,
    *,
    date: Date | str,
    language: Language = "auto",
    about: str | None = None,
) -> str:
    """A user message that asks `question` and gives web pages to cite as [citation:X].

    `date` is today: a date is written as the language writes it, a text is taken as it is.
    `about`: what to judge the language by, where `question` holds more than the question.
    """
    if language == "auto":
        language = "zh" if is_chinese(question if about is None else about) else "en"
    if isinstance(date, Date):
        date = _written(date, language)
    pages = "\n".join(_page(number, result) for number, result in enumerate(results, 1))
    values = {"search_results": pages, "cur_date": date, "question": question}
    return _fill(TEMPLATES[f"search_{language}"], values)


def _page(number: int, result: SearchResult) -> str:
    lines = (result.title, result.url, result.date, result.content)
    return f"[webpage {number} begin]{chr(10).join(filter(None, lines))}[webpage {number} end]"


def system_prompt(today: Date) -> str:
    """The system prompt of DeepSeek's web and app."""
    return _fill(TEMPLATES["system"], {"current_date": _written(today, "zh", year=False)})


def _written(day: Date, language: Language, *, year: bool = True) -> str:
    if language == "en":
        return f"{MONTHS[day.month - 1]} {day.day}, {day.year}"
    start = f"{day.year}年" if year else ""
    return f"{start}{day.month}月{day.day}日，星期{WEEKDAYS[day.weekday()]}"


def is_chinese(question: str) -> bool:
    """At least as many Han characters as Latin words, and neither kana nor hangul."""
    han = len(HAN.findall(question))
    if not han or KANA_OR_HANGUL.search(question):
        return False
    return han >= len(LATIN_WORD.findall(question))


def text_of_data_url(url: str) -> str:
    """The text in a `data:` URL of a text type. Raises ValueError that says what is wrong."""
    head, comma, data = url.partition(",")
    if not comma or len(head) > MAX_DATA_HEAD or head[:5].lower() != "data:":
        raise ValueError("must be a data: URL, such as data:text/plain;base64,SGk=")
    kind, *parameters = (part.strip() for part in head[5:].lower().split(";"))
    if kind and not TEXT_TYPES.fullmatch(kind):
        raise ValueError(f"type {kind[:80]!r} is not text; this model reads only text files")
    raw = unquote_to_bytes(data)
    if "base64" in parameters:
        try:
            raw = base64.b64decode(raw, validate=True)
        except ValueError:
            raise ValueError("is not valid base64") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text: {error.reason} at byte {error.start}") from None
