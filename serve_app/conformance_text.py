"""Checks of text: fill in the middle, prefixes, log-probabilities, usage, injection."""

from __future__ import annotations

import json
from typing import Any

from rayseek.serve_app.conformance import Endpoint, Json, check, require
from rayseek.serve_app.conformance_chat import (
    assistant,
    one,
    prompt_tokens,
    same_streamed,
    size,
    text_size,
    user,
)
from rayseek.serve_app.conformance_form import TOOLS, called, result
from rayseek.serve_app.tokenizer import Control

# fim


def middle(at: Endpoint, **fields: Any) -> Json:
    return at.complete("/beta/completions", **fields).answer()


@check("fim.answer", "A completion is a text_completion with one text; /beta serves it too.")
def _(at: Endpoint) -> None:
    for path in ("/v1/completions", "/completions", "/beta/completions"):
        answer = at.complete(path, prompt="def add(a, b):\n", suffix="\n    return c\n").answer()
        require(answer["object"] == "text_completion", answer)
        require(isinstance(one(answer)["text"], str), answer)
        require(one(answer)["finish_reason"] in ("stop", "length"), answer)


@check("fim.prompt", "A suffix, even an empty one, adds three control tokens to the prompt.")
def _(at: Endpoint) -> None:
    raw = prompt_tokens(middle(at, prompt="def f(", max_tokens=1))
    empty = prompt_tokens(middle(at, prompt="def f(", suffix="", max_tokens=1))
    full = prompt_tokens(middle(at, prompt="def f(", suffix="):", max_tokens=1))
    seen = f"{raw} tokens without suffix, {empty} with an empty one, {full} with '):'"
    require(empty == raw + 3 and full == empty + text_size(at, "):"), seen)


@check("fim.default", "Without a prompt it is DeepSeek's `Once upon a time, `.")
def _(at: Endpoint) -> None:
    default, said = middle(at), middle(at, prompt="Once upon a time, ")
    require(prompt_tokens(default) == prompt_tokens(said), [default["usage"], said["usage"]])
    require(one(default)["text"] == one(said)["text"], [one(default), one(said)])


@check("fim.stream", "Its stream says what the plain answer says.")
def _(at: Endpoint) -> None:
    more: tuple[Json, ...] = ({"suffix": "\n    return c\n"}, {"echo": True}, {})
    for fields in more:
        fields = {"prompt": "def add(a, b):\n", **fields}
        whole = one(middle(at, **fields))
        chunks = at.complete("/beta/completions", **fields, stream=True).chunks()
        told = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        require(told == whole["text"], [told, whole["text"]])
        require(chunks[-1]["choices"][0]["finish_reason"] == whole["finish_reason"], chunks[-1])


@check("fim.echo", "echo repeats the prompt; with a suffix it is refused.")
def _(at: Endpoint) -> None:
    whole, echoed = one(middle(at, prompt="One, ")), one(middle(at, prompt="One, ", echo=True))
    require(echoed["text"] == "One, " + whole["text"], echoed)
    at.complete(prompt="a", suffix="b", echo=True).error(400, 422)


# prefix


@check("prefix.prompt", "An assistant message with prefix: true is left open: only its text.")
def _(at: Endpoint) -> None:
    alone = size(at, "Write quick sort")
    started = size(at, [user("Write quick sort"), assistant("```python\n", prefix=True)])
    expected = alone + text_size(at, "```python\n")
    require(started == expected, f"{started} prompt tokens, not {expected}")


@check("prefix.answer", "The answer goes on after the prefix, streamed or not.")
def _(at: Endpoint) -> None:
    messages = [user("Write quick sort"), assistant("```python\n", prefix=True)]
    same_streamed(at, messages)
    beta = {"messages": messages, "temperature": 0, "max_tokens": 8}
    require(one(at.post("/beta/chat/completions", beta).answer())["message"]["role"], beta)


@check("prefix.last", "Only the last message may be a prefix, and only the assistant's.")
def _(at: Endpoint) -> None:
    at.chat([assistant("So", prefix=True), user("Hi")]).error(400, 422)
    at.chat([user("Hi", prefix=True)]).error(400, 422)


# logprobs


@check("logprobs.chat", "Each token has its text, log-probability, bytes and top tokens.")
def _(at: Endpoint) -> None:
    answer = at.chat("Hello!", logprobs=True, top_logprobs=3).answer()
    entries = one(answer)["logprobs"]["content"]
    require(entries, answer)
    for entry in entries:
        require({"token", "logprob", "bytes", "top_logprobs"} == entry.keys(), entry)
        require(-9999 <= entry["logprob"] <= 0, entry)
        tops = [top["logprob"] for top in entry["top_logprobs"]]
        require(len(tops) == 3 and tops == sorted(tops, reverse=True), entry)
        require(bytes(entry["bytes"]).decode("utf-8", "replace") == entry["token"], entry)


@check("logprobs.greedy", "At temperature 0 each token is the most likely text.")
def _(at: Endpoint) -> None:
    answer = at.chat("Hello!", logprobs=True, top_logprobs=20).answer()
    for entry in one(answer)["logprobs"]["content"]:
        for top in entry["top_logprobs"]:
            # Log-probabilities are of all ids, also of those that are never sampled in text.
            control = top["token"].startswith(("<｜", "<|")) or not top["token"]
            require(control or entry["logprob"] >= top["logprob"] - 1e-3, entry)


@check("logprobs.count", "There are as many entries as completion tokens, streamed or not.")
def _(at: Endpoint) -> None:
    answer = at.chat("Hello!", logprobs=True).answer()
    count = len(one(answer)["logprobs"]["content"])
    require(count == answer["usage"]["completion_tokens"], answer["usage"])
    same_streamed(at, "Hello!", logprobs=True, top_logprobs=2)


@check("logprobs.text", "Completions have the older form: tokens, values, top ones, offsets.")
def _(at: Endpoint) -> None:
    told = one(at.complete(prompt="One, two,", logprobs=2).answer())["logprobs"]
    names = {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    require(names <= told.keys(), told)
    require(len({len(told[name]) for name in names}) == 1, told)
    require(told["text_offset"] == sorted(told["text_offset"]), told)


@check("logprobs.limits", "top_logprobs needs logprobs, and is at most 20.")
def _(at: Endpoint) -> None:
    at.chat("Hello!", top_logprobs=2).error(400, 422)
    at.chat("Hello!", logprobs=True, top_logprobs=21).error(400, 422)
    at.chat("Hello!", logprobs=True, top_logprobs=20, max_tokens=1).answer()


# usage


def whole_usage(counts: Json) -> None:
    prompt, hit = counts["prompt_tokens"], counts["prompt_cache_hit_tokens"]
    require(counts["total_tokens"] == prompt + counts["completion_tokens"], counts)
    require(hit + counts["prompt_cache_miss_tokens"] == prompt and 0 <= hit < prompt, counts)
    require(counts["prompt_tokens_details"]["cached_tokens"] == hit, counts)


@check("usage.sums", "Hits and misses make the prompt; prompt and completion make the total.")
def _(at: Endpoint) -> None:
    for _ in range(2):
        whole_usage(at.chat("Tell me of the sea. " * 40, max_tokens=4).answer()["usage"])
    whole_usage(at.complete(prompt="Hello").answer()["usage"])
    whole_usage(at.chat("Hello!", stream=True).chunks()[-1]["usage"])


@check("usage.stream", "A stream counts the tokens that the plain answer counts.")
def _(at: Endpoint) -> None:
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    whole, told = at.chat("Hello!").answer(), at.chat("Hello!", stream=True).chunks()[-1]
    counts = [[document["usage"][name] for name in names] for document in (whole, told)]
    require(counts[0] == counts[1], counts)


@check("usage.choices", "The prompt of several choices is counted once.")
def _(at: Endpoint) -> None:
    single, double = at.chat("Hello!").answer(), at.chat("Hello!", n=2, temperature=1).answer()
    require(prompt_tokens(single) == prompt_tokens(double), [single["usage"], double["usage"]])
    whole_usage(double["usage"])


# injection

NAMES = "".join(control.value for control in Control)  # each would be one token
LEAST = 2 * len(Control)


def as_text(tokens: int, bare: int) -> None:
    seen = f"{len(Control)} names of control tokens cost {tokens - bare} prompt tokens"
    require(tokens - bare >= LEAST, seen)


@check("injection.user", "Control tokens' names in a user's text, in parts, in a name are text.")
def _(at: Endpoint) -> None:
    as_text(size(at, "x" + NAMES), size(at, "x"))
    as_text(size(at, [user([{"type": "text", "text": "x" + NAMES}])]), size(at, "x"))
    require(size(at, [user("x", name=NAMES)]) == size(at, "x"), "a name is not rendered")


@check("injection.system", "The same in system messages.")
def _(at: Endpoint) -> None:
    def tokens(text: str) -> int:
        return size(at, [{"role": "system", "content": text}, user("Hi")])

    as_text(tokens("x" + NAMES), tokens("x"))


@check("injection.assistant", "The same in earlier answers, and in prefixes.")
def _(at: Endpoint) -> None:
    def tokens(text: str, **fields: Any) -> int:
        last = [] if fields else [user("Hi")]
        return size(at, [user("Hi"), assistant(text, **fields), *last])

    as_text(tokens("x" + NAMES), tokens("x"))
    as_text(tokens("x" + NAMES, prefix=True), tokens("x", prefix=True))


@check("injection.tools", "The same in results, arguments and descriptions of tools.")
def _(at: Endpoint) -> None:
    def tokens(*, content: str = "x", arguments: str = "x", description: str = "x") -> int:
        call = called("get_weather")
        call["tool_calls"][0]["function"]["arguments"] = json.dumps(arguments, ensure_ascii=False)
        function = {**TOOLS[0]["function"], "description": description}
        shown = [{"type": "function", "function": function}]
        return size(at, [user("Hi"), call, result("1", content)], tools=shown)

    for field in ("content", "arguments", "description"):
        as_text(tokens(**{field: "x" + NAMES}), tokens())


@check("injection.completions", "The same in prompts, prefixes and suffixes of completions.")
def _(at: Endpoint) -> None:
    as_text(text_size(at, "x" + NAMES), text_size(at, "x"))

    def tokens(prompt: str, suffix: str) -> int:
        reply = at.complete(prompt=prompt, suffix=suffix, max_tokens=1)
        return int(reply.answer()["usage"]["prompt_tokens"])

    as_text(tokens("x" + NAMES, "y"), tokens("x", "y"))
    as_text(tokens("x", "y" + NAMES), tokens("x", "y"))
