"""Checks of text: chat, streams, fill in the middle, prefixes, log-probabilities, usage.

Each says in one sentence what must hold. What several checks need stands first.
"""

from __future__ import annotations

from typing import Any

from rayseek.serve_app.conformance import Endpoint, Json, check, require


def user(content: Any, **fields: Any) -> Json:
    return {"role": "user", "content": content, **fields}


def assistant(content: Any, **fields: Any) -> Json:
    return {"role": "assistant", "content": content, **fields}


def one(document: Json) -> Json:
    """The only choice of an answer."""
    require(len(document["choices"]) == 1, f"{len(document['choices'])} choices")
    choice: Json = document["choices"][0]
    return choice


def prompt_tokens(document: Json) -> int:
    return int(document["usage"]["prompt_tokens"])


def size(at: Endpoint, messages: Any, **fields: Any) -> int:
    """Prompt tokens of a chat."""
    return prompt_tokens(at.chat(messages, max_tokens=1, **fields).answer())


def text_size(at: Endpoint, text: str) -> int:
    """Tokens of a text, without the token that begins every prompt."""
    return prompt_tokens(at.complete(prompt=text, max_tokens=1).answer()) - 1


def joined(chunks: list[Json], index: int = 0) -> Json:
    """A choice as a stream's chunks tell it, in the shape of a plain choice."""
    content, finish, logprobs, calls = "", None, [], dict[int, Json]()
    for choice in (c for chunk in chunks for c in chunk["choices"] if c["index"] == index):
        require(finish is None, f"more after the finish reason: {choice}")
        delta, finish = choice["delta"], choice["finish_reason"]
        content += delta.get("content") or ""
        logprobs += (choice["logprobs"] or {}).get("content", [])
        for part in delta.get("tool_calls") or ():
            call = calls.setdefault(part["index"], {"function": {"name": "", "arguments": ""}})
            require("id" not in part or "id" not in call, f"a call's id came twice: {part}")
            call.update({key: part[key] for key in ("id", "type") if key in part})
            for key, value in part["function"].items():
                call["function"][key] += value or ""
    require(finish is not None, "no finish reason came")
    told = [calls[number] for number in sorted(calls)]
    return {"content": content, "finish": finish, "logprobs": logprobs, "calls": told}


def plain(choice: Json) -> Json:
    message = choice["message"]
    return {
        "content": message["content"] or "",
        "finish": choice["finish_reason"],
        "logprobs": (choice["logprobs"] or {}).get("content", []),
        "calls": message.get("tool_calls") or [],
    }


def without_ids(choice: Json) -> Json:
    """Ids of calls are drawn anew for each answer; an `index` is DeepSeek's addition."""
    calls = [{key: call[key] for key in ("type", "function")} for call in choice["calls"]]
    return {**choice, "calls": calls}


def same_streamed(at: Endpoint, messages: Any, **fields: Any) -> Json:
    """Law 1 for one request; the plain choice."""
    whole = plain(one(at.chat(messages, **fields).answer()))
    chunks = at.chat(messages, **fields, stream=True).chunks()
    told = joined(chunks)
    require(without_ids(told) == without_ids(whole), f"streamed {told}, plain {whole}")
    return whole


# chat


@check("chat.models", "GET /models lists the chat model; each can be asked for by its id.")
def _(at: Endpoint) -> None:
    listed = at.get("/v1/models").answer()
    require(listed["object"] == "list", listed)
    ids = [entry["id"] for entry in listed["data"]]
    require(at.model in ids, ids)
    entry = at.get(f"/v1/models/{at.model}").answer()
    require((entry["id"], entry["object"]) == (at.model, "model"), entry)


@check("chat.answer", "An answer has id, object, created, model, one choice with a message.")
def _(at: Endpoint) -> None:
    answer = at.chat("Hello!").answer()
    require(answer["object"] == "chat.completion" and answer["model"] == at.model, answer)
    require(isinstance(answer["id"], str) and isinstance(answer["created"], int), answer)
    choice = one(answer)
    require(choice["index"] == 0 and choice["message"]["role"] == "assistant", choice)
    require(isinstance(choice["message"]["content"], str), choice)
    require(choice["finish_reason"] in ("stop", "length"), choice)
    require("logprobs" in choice and choice["logprobs"] is None, choice)


@check("chat.bases", "The same paths are served with /v1, without it, and under /beta.")
def _(at: Endpoint) -> None:
    body = {"messages": [user("Hello!")], "temperature": 0, "seed": 7, "max_tokens": 8}
    texts = [
        one(at.post(f"{base}/chat/completions", body).answer())["message"]["content"]
        for base in ("/v1", "", "/beta")
    ]
    require(len(set(texts)) == 1, texts)


@check("chat.parts", "Content as text parts is the same as one string.")
def _(at: Endpoint) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo!"}]
    two, whole = at.chat([user(parts)]).answer(), at.chat("Hello!").answer()
    require(one(two)["message"] == one(whole)["message"], [one(two), one(whole)])
    require(prompt_tokens(two) == prompt_tokens(whole), [two["usage"], whole["usage"]])


@check("chat.systems", "System messages from anywhere are joined at the front.")
def _(at: Endpoint) -> None:
    system = [{"role": "system", "content": text} for text in ("Be brief.", "Be kind.", "")]
    several = at.chat([system[0], user("Hi"), system[1]]).answer()
    system[2]["content"] = "Be brief.\n\nBe kind."
    whole = at.chat([system[2], user("Hi")]).answer()
    require(prompt_tokens(several) == prompt_tokens(whole), [several["usage"], whole["usage"]])
    require(one(several)["message"] == one(whole)["message"], [one(several), one(whole)])


@check("chat.turns", "A user's turn costs two control tokens, an assistant's one.")
def _(at: Endpoint) -> None:
    alone = size(at, "Hi")
    require(alone == 3 + text_size(at, "Hi"), f"{alone} tokens for one turn")
    turns = size(at, [user("Hi"), assistant("Yes."), user("Hi")])
    expected = 2 * alone + text_size(at, "Yes.")  # one BOS less, one EOS more
    require(turns == expected, f"{turns} tokens for three turns, not {expected}")


@check("chat.seed", "The same seed gives the same answer.")
def _(at: Endpoint) -> None:
    first, second = (
        one(at.chat("Hello!", temperature=1.5, seed=11).answer())["message"] for _ in range(2)
    )
    require(first == second, [first, second])


@check("chat.choices", "n = 2 gives two choices, numbered 0 and 1.")
def _(at: Endpoint) -> None:
    choices = at.chat("Hello!", n=2, temperature=1).answer()["choices"]
    require([choice["index"] for choice in choices] == [0, 1], choices)


@check("chat.stop", "A stop string ends the answer and is not part of it, streamed or not.")
def _(at: Endpoint) -> None:
    whole = same_streamed(at, "Hello!")["content"].replace("\ufffd", "")
    require(whole, "an empty answer, in which nothing can be stopped at")
    stop = whole[len(whole) // 2]
    cut = same_streamed(at, "Hello!", stop=[stop, "never to be seen"])
    require(stop not in cut["content"] and cut["finish"] == "stop", f"stop {stop!r}: {cut}")


@check("chat.limit", "max_tokens limits the answer; max_completion_tokens wins over it.")
def _(at: Endpoint) -> None:
    for fields in ({"max_tokens": 2}, {"max_tokens": 9, "max_completion_tokens": 2}):
        answer = at.chat("Hello!", **fields).answer()
        require(answer["usage"]["completion_tokens"] <= 2, answer)
        require(one(answer)["finish_reason"] in ("stop", "length"), answer)


@check("chat.temperature", "Every temperature from 0 to 2 is served.")
def _(at: Endpoint) -> None:
    for temperature in (0, 1e-7, 0.5, 1, 1.3, 2, None):
        at.chat("Hello!", temperature=temperature, max_tokens=1).answer()


@check("chat.unknown-fields", "Fields that are not known are ignored.")
def _(at: Endpoint) -> None:
    at.chat("Hello!", max_tokens=1, user="u", metadata={"a": "b"}, never_heard_of=1).answer()


# stream


@check("stream.same", "A stream says what the plain answer says.")
def _(at: Endpoint) -> None:
    for prompt in ("Hello!", "你好，世界 😀", "Count to ten."):
        same_streamed(at, prompt)
    same_streamed(at, "Hello!", temperature=1.7, max_tokens=48)


@check("stream.chunks", "All chunks have the answer's id, created, model and object.")
def _(at: Endpoint) -> None:
    chunks = at.chat("Hello!", stream=True).chunks()
    heads = {(c["id"], c["created"], c["model"], c["object"]) for c in chunks}
    require(len(heads) == 1 and heads.pop()[2:] == (at.model, "chat.completion.chunk"), chunks[:2])


@check("stream.first", "The first chunk has the role and empty content.")
def _(at: Endpoint) -> None:
    first = at.chat("Hello!", stream=True).chunks()[0]["choices"][0]
    require(first["delta"] == {"role": "assistant", "content": ""}, first)
    require(first["finish_reason"] is None, first)


@check("stream.content", "Every chunk has one choice and string content, as DeepSeek's have.")
def _(at: Endpoint) -> None:
    for chunk in at.chat("Hello!", stream=True).chunks():
        require(isinstance(one(chunk)["delta"].get("content"), str), chunk)


@check("stream.last", "The finish reason comes with empty content and the usage.")
def _(at: Endpoint) -> None:
    last = at.chat("Hello!", stream=True).chunks()[-1]
    require(last["choices"][0]["delta"].get("content") == "", last)
    require(last["choices"][0]["finish_reason"] and last["usage"]["prompt_tokens"], last)


@check("stream.usage", "include_usage adds a chunk without choices and `usage: null` elsewhere.")
def _(at: Endpoint) -> None:
    options = {"include_usage": True}
    chunks = at.chat("Hello!", stream=True, stream_options=options).chunks()
    require(chunks[-1]["choices"] == [] and chunks[-1]["usage"]["total_tokens"], chunks[-1])
    earlier = [chunk for chunk in chunks if chunk["choices"][:1] and not finishes(chunk)]
    require(all(chunk["usage"] is None for chunk in earlier), earlier[:1])


def finishes(chunk: Json) -> bool:
    return any(choice["finish_reason"] for choice in chunk["choices"])


@check("stream.choices", "Several choices are streamed side by side, each whole.")
def _(at: Endpoint) -> None:
    fields = {"n": 2, "temperature": 1, "seed": 3}
    whole = at.chat("Hello!", **fields).answer()["choices"]
    chunks = at.chat("Hello!", **fields, stream=True).chunks()
    told = [joined(chunks, index) for index in range(2)]
    require(told == [plain(choice) for choice in whole], [told, whole])


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
