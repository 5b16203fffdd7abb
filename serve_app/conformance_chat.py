"""Checks of chat and of streams. What checks of every area need stands first."""

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
