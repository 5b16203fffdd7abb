"""Files and search results: the vendor's words to the byte, and what a caller may send."""

from __future__ import annotations

import base64
import hashlib
from datetime import date
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayseek.serve_app.errors import ApiError
from rayseek.serve_app.prompt import as_text, render_chat
from rayseek.serve_app.protocol import ChatRequest, parse
from rayseek.serve_app.tokenizer import Tokenizer
from rayseek.serve_app.vendor_prompts import (
    TEMPLATES,
    File,
    SearchResult,
    file_prompt,
    is_chinese,
    search_prompt,
    system_prompt,
    text_of_data_url,
)

DAY = date(2025, 3, 24)
CARD = {  # the model card's templates: characters, bytes, tokens, sha256
    "file": (90, 90, 25, "45e718c209246a85ab9edd367a84854b09a0c6b0afaa08043234a94f7b7341ae"),
    "search_zh": (
        852, 2210, 430, "26520ec2010163d604f8ebd442f391d0a6f26741b00d576b27c3c9bb0385bf1f",
    ),
    "search_en": (
        2517, 2517, 504, "0626f1984a3ff4d91859ad2cad443e04fcc2b61b6bd4784bfc49b89c05109f52",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CARD)
def test_templates_are_the_model_cards(v3: Tokenizer, name: str) -> None:
    text = TEMPLATES[name]
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert (len(text), len(text.encode()), len(v3.encode_text(text)), digest) == CARD[name]


def chat(**fields: Any) -> ChatRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "Summarise."}], **fields}
    return parse(ChatRequest, body)


def user_texts(request: ChatRequest) -> list[str | None]:
    return [m.content for m in request.template_messages(DAY) if m.role == "user"]


def part(text: str, name: str = "notes.txt", kind: str = "text/plain") -> dict[str, Any]:
    data = f"data:{kind};base64,{base64.b64encode(text.encode()).decode()}"
    return {"type": "file", "file": {"filename": name, "file_data": data}}


def test_recorded_file_prompt_in_all_three_forms(v3: Tokenizer, vectors: dict[str, Any]) -> None:
    [vector] = [v for v in vectors["prompt_construction"] if v["id"] == "P17"]
    text = "line 1\nline 2"
    by_part = [{"role": "user", "content": [part(text), {"type": "text", "text": "Summarise."}]}]
    for request in (chat(files=[{"name": "notes.txt", "content": text}]), chat(messages=by_part)):
        prompt = render_chat(request.template_messages(DAY))
        assert as_text(prompt) == vector["text"] and v3.encode_prompt(prompt) == vector["ids"]
    helped = file_prompt([File("notes.txt", text)], "Summarise.")
    assert user_texts(chat(messages=[{"role": "user", "content": helped}])) == [helped]


def test_several_files_repeat_the_block_and_ask_once() -> None:
    assert file_prompt([File("a", "1"), File("b", "2")], "Q") == (
        "[file name]: a\n[file content begin]\n1\n[file content end]\n"
        "[file name]: b\n[file content begin]\n2\n[file content end]\nQ"
    )


def test_values_are_put_in_once_and_as_they_are() -> None:
    """A value that looks like a placeholder stays what it is."""
    assert file_prompt([File("{file_content}", "{question}")], "{file_name}\\1") == (
        "[file name]: {file_content}\n[file content begin]\n{question}\n[file content end]\n"
        "{file_name}\\1"
    )
    text = search_prompt([SearchResult("{cur_date}")], "{search_results}", date="{question}")
    assert "[webpage 1 begin]{cur_date}[webpage 1 end]" in text
    assert "- Today is {question}.\n" in text and text.endswith("is:\n{search_results}")


@given(files=st.lists(st.builds(File, st.text(), st.text()), max_size=3), question=st.text())
def test_nothing_of_a_file_is_lost(files: list[File], question: str) -> None:
    text = file_prompt(files, question)
    assert text.endswith(question)
    assert len(text) == len(question) + sum(
        len(f.name) + len(f.content) + len("[file name]: \n[file content begin]\n\n")
        + len("[file content end]\n") for f in files
    )  # fmt: skip


def test_search_prompt_by_language() -> None:
    results = [SearchResult("Rain.", "Weather", "http://a", "2025-03-23"), SearchResult("Sun.")]
    english = search_prompt(results, "What is the weather?", date=DAY)
    pages = (
        "[webpage 1 begin]Weather\nhttp://a\n2025-03-23\nRain.[webpage 1 end]\n"
        "[webpage 2 begin]Sun.[webpage 2 end]\n"
    )
    assert english.startswith(
        "# The following contents are the search results related to the user's message:\n" + pages
    )
    assert "\n- Today is March 24, 2025.\n" in english
    assert english.endswith("\n# The user's message is:\nWhat is the weather?")
    chinese = search_prompt(results, "今天天气怎么样？", date=DAY)
    assert chinese.startswith("# 以下内容是基于用户发送的消息的搜索结果:\n" + pages)
    assert "\n- 今天是2025年3月24日，星期一。\n" in chinese
    assert chinese.endswith("\n# 用户消息为：\n今天天气怎么样？")
    assert search_prompt(results, "Hi", date=DAY, language="zh").startswith("# 以下")


@pytest.mark.parametrize(
    ("question", "chinese"),
    [
        ("今天天气怎么样", True),
        ("用Python写一个quicksort", True),
        ("iPhone 16 和 Samsung S25 哪个好？", True),
        ("What does 你好 mean?", False),
        ("Hello", False),
        ("", False),
        ("今日の天気は", False),
        ("오늘 날씨", False),
    ],
)
def test_language_of_a_question(question: str, chinese: bool) -> None:
    assert is_chinese(question) is chinese


def test_system_prompt_of_the_web_app() -> None:
    assert system_prompt(DAY) == (
        "该助手为DeepSeek Chat，由深度求索公司创造。\n今天是3月24日，星期一。"
    )


def test_attachments_go_to_the_last_user_message() -> None:
    messages = [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": [part("F"), {"type": "text", "text": "天气"}]},
        {"role": "assistant", "content": "B", "prefix": True},
    ]
    request = chat(
        messages=messages,
        files=[{"name": "english.txt", "content": "All the words here are English"}],
        web_search_results={"results": [{"content": "C"}], "date": "2025-03-24"},
    )
    first, last = user_texts(request)
    assert first == "One" and last is not None
    assert last.startswith("# 以下") and "今天是2025年3月24日，星期一。" in last  # by the question
    assert last.index("english.txt") < last.index("notes.txt") < last.index("\n天气")
    own_date = {"results": [{"content": "C"}], "date": "Easter", "lang": "en"}
    assert "Today is Easter." in (user_texts(chat(web_search_results=own_date))[0] or "")
    no_date = {"results": [{"content": "C"}]}
    assert "Today is March 24, 2025." in (user_texts(chat(web_search_results=no_date))[0] or "")


def test_text_parts_with_files_are_lines_without_files_they_are_joined() -> None:
    texts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert user_texts(chat(messages=[{"role": "user", "content": texts}])) == ["ab"]
    with_file = [texts[0], part("F"), texts[1]]
    [text] = user_texts(chat(messages=[{"role": "user", "content": with_file}]))
    assert text is not None and text.endswith("[file content end]\na\nb")


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("data:text/plain;base64,SGk=", "Hi"),
        ("data:text/plain;charset=utf-8;base64,5L2g", "你"),
        ("data:;base64,SGk=", "Hi"),
        ("data:,Hi%20there", "Hi there"),
        ("data:application/json;base64,e30=", "{}"),
        ("data:text/x-python;base64,77u/SGk=", "Hi"),  # a byte-order mark is no text
        ("data:application/ld+json,{}", "{}"),
    ],
)
def test_data_urls(url: str, text: str) -> None:
    assert text_of_data_url(url) == text


FILE = {"filename": "a.txt", "file_data": "data:text/plain;base64,SGk="}
PAGE = {"content": "C"}


def with_file(role: str = "user", **fields: Any) -> dict[str, Any]:
    content = [{"type": "file", "file": {**FILE, **fields}}]
    return {"messages": [{"role": role, "content": content}]}


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        (with_file(file_data="http://a/b"), "messages[0].content", "must be a data: URL"),
        (with_file(file_data=None, file_id="file-1"), "messages[0].content", "data: URL"),
        (with_file(file_data="data:image/png;base64,SGk="), "messages[0].content", "not text"),
        (with_file(file_data="data:" + ";" * 10**6), "messages[0].content", "must be a data: URL"),
        (with_file(file_data="data:" + ";" * 2000 + ","), "messages[0].content", "data: URL"),
        (with_file(file_data="data:application/pdf,a"), "messages[0].content", "not text"),
        (with_file(file_data="data:text/plain;base64,=="), "messages[0].content", "base64"),
        (with_file(file_data="data:text/plain;base64,/w=="), "messages[0].content", "UTF-8"),
        (with_file(file_data="data:text/plain," + "a" * (2**20 + 1)), "messages[0].content",
         "at most 1,048,576"),
        (with_file(filename=""), "messages[0].content", "filename"),
        (with_file(filename="a\nb"), "messages[0].content", "filename"),
        (with_file(filename="a\n"), "messages[0].content", "filename"),
        (with_file(role="system"), "messages[0].content", "has no files"),
        (with_file(role="assistant"), "messages[0].content", "has no files"),
        ({"messages": [{"role": "user", "content": [part("")] * 33}]}, "messages[0].content",
         "at most 32"),
        ({"files": [{"name": "a", "content": "b"}] * 33}, "files", "32"),
        ({"files": [{"name": "a"}]}, "files[0].content", "required"),
        ({"files": [{"name": "a\nb", "content": ""}]}, "files[0].name", "pattern"),
        ({"files": [{"name": "a", "content": "x" * (2**20 + 1)}]}, "files[0].content", "1048576"),
        ({"files": [{"name": "a", "content": "b"}],
          "messages": [{"role": "system", "content": "S"}]}, "files", "role user"),
        ({"web_search_results": {"results": []}}, "web_search_results.results", "at least 1"),
        ({"web_search_results": {"results": [PAGE] * 65}}, "web_search_results.results", "64"),
        ({"web_search_results": {"results": [PAGE], "lang": "fr"}}, "web_search_results.lang", ""),
        ({"web_search_results": {"results": ["C"]}}, "web_search_results.results[0]", ""),
    ],
    ids=lambda value: str(value)[:50],
)  # fmt: skip
def test_bad_attachments(fields: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(ApiError) as raised:
        chat(**fields).template_messages(DAY)
    assert raised.value.status == 400 and raised.value.param == param
    assert says in raised.value.message
