"""The request bodies that callers send: OpenAI's schema with DeepSeek's and vLLM's extensions.

Everything that can be judged without knowing the deployment is judged here (spec section 6.5,
column "ours"). Types are strict: `true` is no number and "1" is no integer. Unknown fields are
ignored; `user`, `metadata`, `reasoning_effort` and their like are unknown fields to us.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    WithJsonSchema,
)

from rayseek.serve_app.attachments import (
    MAX_FILES,
    AttachedFile,
    Content,
    Parts,
    WebSearchResults,
    attach,
)
from rayseek.serve_app.errors import bad_request, from_validation
from rayseek.serve_app.prompt import Message, ToolCall
from rayseek.serve_app.strict import Several, StrictBody, wrong
from rayseek.serve_app.vendor_prompts import file_prompt

MAX_PROMPTS, MAX_STOPS, MAX_STOP_CHARS, MAX_BIASES = 1024, 16, 1024, 1024
DEFAULT_PROMPT = "Once upon a time, "  # DeepSeek's
INT64 = 2**63


def _refused(why: str) -> BeforeValidator:
    """A field that may only be absent or null."""

    def check(value: object) -> None:
        if value is not None:
            raise wrong(why)

    return BeforeValidator(check)


def _stop_list(value: object) -> object:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        return stops
    if len(stops) > MAX_STOPS:
        raise wrong(f"at most {MAX_STOPS} stop strings are allowed, not {len(stops)}")
    if not all(0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise wrong(f"each stop string must have 1 to {MAX_STOP_CHARS} characters")
    return stops


def _few_biases(value: object) -> object:
    if isinstance(value, dict) and len(value) > MAX_BIASES:  # told before they are looked at
        raise wrong(f"at most {MAX_BIASES} tokens may have a bias, not {len(value)}")
    return value


def _prompts(value: object) -> object:
    """A completion's prompt in its four forms as a list of strings or lists of ids."""
    if value is None:
        return [DEFAULT_PROMPT]
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(type(item) is int for item in value):
            return [value]
        if len(value) > MAX_PROMPTS:  # told before they are looked at
            raise wrong(f"at most {MAX_PROMPTS} prompts are allowed, not {len(value)}")
        if all(isinstance(item, str) for item in value):
            return value
        if all(
            isinstance(item, list) and item and all(type(i) is int for i in item) for item in value
        ):
            return value
    raise wrong("must be a string, a list of token ids, or a list of either")


_STOP = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
STOP_SCHEMA = {
    "anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": MAX_STOPS}, {"type": "null"}]
}
_IDS = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        _IDS,
        {"type": "array", "items": _IDS, "minItems": 1},
        {"type": "null"},
    ]
}


TOOL_CHOICE_SCHEMA = {
    "anyOf": [
        {"enum": ["none", "auto", "required", None]},
        {
            "type": "object",
            "properties": {
                "type": {"const": "function"},
                "function": {
                    "type": "object",
                    "properties": {"name": {"type": "string"}},
                    "required": ["name"],
                },
            },
            "required": ["type", "function"],
        },
    ]
}


class StreamOptions(StrictBody):
    include_usage: bool | None = None


class GenerationFields(StrictBody):
    """What chat and plain completions share."""

    prompt_field: ClassVar[str]  # what to shorten when it is too long

    model: str
    temperature: float | None = Field(
        None, ge=0, le=2, description="0 to 2, by default 1, which is the model's 0.3."
    )
    temperature_scale: Literal["api", "model"] | None = Field(
        None, description="model: the temperature is the model's own; nothing is mapped."
    )
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = None
    n: int | None = Field(None, ge=1, lt=INT64)
    stop: Annotated[
        Several[str] | None, BeforeValidator(_stop_list), WithJsonSchema(STOP_SCHEMA)
    ] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[
        dict[str, Annotated[float, Field(ge=-100, le=100)]] | None, BeforeValidator(_few_biases)
    ] = Field(None, max_length=MAX_BIASES)
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    # vLLM's extensions
    top_k: int | None = Field(None, ge=-1, description="0 and -1: off.")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=2)
    min_tokens: int | None = Field(None, ge=0)
    stop_token_ids: list[int] | None = Field(None, max_length=128)
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = Field(
        None,
        validation_alias=AliasChoices("include_stop_str_in_output", "no_stop_trim"),
        description="SGLang's no_stop_trim is the same.",
    )
    cache_salt: str | None = Field(None, min_length=1, max_length=256)
    priority: int | None = Field(
        None, ge=-(2**31), lt=2**31, description="Lower goes first, of the key's own that wait."
    )

    @property
    def streams(self) -> bool:
        return bool(self.stream)

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def token_limit(self) -> int | None:
        """The explicit limit of new tokens."""
        return self.max_tokens


class CalledFunction(StrictBody):
    name: str
    arguments: str


class CalledTool(StrictBody):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(StrictBody):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    tool_calls: Several[CalledTool] | None = None
    tool_call_id: str | None = None
    prefix: bool | None = None

    def to_message(self, where: str) -> Message:
        """The template's message. Raises ApiError for what this role must have and lacks."""
        role = "system" if self.role == "developer" else self.role
        content = self.content
        if isinstance(content, Parts):
            if role != "user":
                raise bad_request(f"a {role} message has no files", param=f"{where}.content")
            content = file_prompt(content.files, content.text)
        if role != "assistant" and content is None:
            raise bad_request(f"{where}.content: Field required", param=f"{where}.content")
        if role == "tool" and self.tool_call_id is None:
            raise bad_request(
                f"{where}.tool_call_id: Field required", param=f"{where}.tool_call_id"
            )
        if role != "assistant" and self.tool_calls:
            raise bad_request("only role assistant may call tools", param=f"{where}.tool_calls")
        calls = tuple(
            ToolCall(call.id, call.function.name, call.function.arguments)
            for call in self.tool_calls or ()
        )
        return Message(role, content, calls, self.tool_call_id, bool(self.prefix))


class Function(StrictBody):
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(StrictBody):
    type: Literal["function"]
    function: Function


class JsonSchema(StrictBody):
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="Missing: an object.")
    strict: bool | None = Field(
        None, description="Refuse a schema with keywords that cannot be enforced; else ignore them."
    )


class ResponseFormat(StrictBody):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(GenerationFields):
    prompt_field = "messages"

    messages: Several[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, description="Wins over max_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Annotated[Any, WithJsonSchema(TOOL_CHOICE_SCHEMA)] = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    continue_final_message: bool | None = None
    files: list[AttachedFile] | None = Field(
        None, max_length=MAX_FILES, description="Text files for the last user message."
    )
    web_search_results: WebSearchResults | None = Field(
        None, description="Pages for the last user message, to be cited as [citation:X]."
    )
    modalities: Several[Literal["text"]] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    audio: Annotated[None, _refused("this model has no audio")] = None
    web_search_options: Annotated[None, _refused("this server has no search backend")] = None
    functions: Annotated[None, _refused("deprecated; use 'tools'")] = None
    function_call: Annotated[None, _refused("deprecated; use 'tool_choice'")] = None

    @property
    def token_limit(self) -> int | None:
        given = self.max_completion_tokens
        return self.max_tokens if given is None else given

    def template_messages(self, today: date) -> list[Message]:
        """What the template renders, with files and search results in place. Raises ApiError."""
        messages = [m.to_message(f"messages[{i}]") for i, m in enumerate(self.messages)]
        if self.continue_final_message:
            if messages[-1].role != "assistant":
                raise bad_request(
                    "continue_final_message needs a last message of role assistant",
                    param="continue_final_message",
                )
            messages[-1] = replace(messages[-1], prefix=True)
        asked = next((m.content for m in reversed(self.messages) if m.role == "user"), "")
        question = asked.text if isinstance(asked, Parts) else asked
        return attach(
            messages, self.files or (), self.web_search_results, question=question, today=today
        )

    @property
    def may_call(self) -> bool:
        """Whether the answer may hold tool calls."""
        return bool(self.tools) and self.tool_choice != "none"

    def template_tools(self) -> list[dict[str, Any]]:
        """Function objects as the prompt shows them: without wrapper, `strict` and nulls."""
        return [
            tool.function.model_dump(exclude_none=True, exclude={"strict"})
            for tool in self.tools or ()
        ]

    def check(self) -> None:
        """What hangs on two fields. Raises ApiError."""
        _check_stream_options(self)
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_request("top_logprobs needs logprobs: true", param="top_logprobs")
        self._check_tools()

    def _check_tools(self) -> None:
        names: set[str] = set()
        for index, tool in enumerate(self.tools or ()):
            where, function = f"tools[{index}].function", tool.function
            if function.name in names:
                raise bad_request(
                    f"{where}.name: tool names must be unique; {function.name!r} came before",
                    param=f"{where}.name",
                )
            names.add(function.name)
            kind = (function.parameters or {}).get("type", "object")
            if kind != "object":
                raise bad_request(
                    f"{where}.parameters: must be a JSON schema of type 'object', not {kind!r:.80}",
                    param=f"{where}.parameters",
                )


class CompletionRequest(GenerationFields):
    prompt_field = "prompt"

    prompt: Annotated[
        list[str] | list[list[int]], BeforeValidator(_prompts), WithJsonSchema(PROMPT_SCHEMA)
    ] = Field(default=[DEFAULT_PROMPT], union_mode="left_to_right")
    suffix: str | None = Field(None, description="Fill in the middle: the text that comes after.")
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = None

    def check(self) -> None:
        _check_stream_options(self)
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise bad_request("best_of must equal n", param="best_of")
        if self.suffix is not None and not all(isinstance(p, str) for p in self.prompt):
            raise bad_request("with suffix the prompt must be text", param="prompt")
        if self.echo and self.suffix is not None:
            raise bad_request("echo and suffix exclude each other", param="echo")
        if self.echo and self.logprobs is not None:
            raise bad_request("echo and logprobs exclude each other here", param="echo")
        if self.echo and not all(isinstance(p, str) for p in self.prompt):
            raise bad_request("with echo the prompt must be text", param="echo")


def _check_stream_options(body: GenerationFields) -> None:
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options needs stream: true", param="stream_options")


Body = TypeVar("Body", bound=BaseModel)


def parse(kind: type[Body], data: object) -> Body:
    """`data` is parsed JSON. Raises ApiError (400) naming the parameter and what is allowed."""
    if not isinstance(data, dict):
        raise bad_request(f"the body must be a JSON object, not {type(data).__name__}")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise from_validation(error.errors(include_url=False)) from None
