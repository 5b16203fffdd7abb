"""The one config tree. Parsed once at the edge, frozen, each part handed only to its user.

A field exists only if an operator would change it. Unknown fields are errors with their path.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSettings(Section):
    """Which checkpoint is served, and under which names."""

    path: Path | None = None  # official layout; None: a small model is made on first start
    name: str = "deepseek-v3"  # `models.data[0].id`
    aliases: tuple[str, ...] = ("deepseek-chat",)  # further names that requests may use


class EngineSettings(Section):
    """One attention rank's engine."""

    max_context: int | None = Field(default=None, ge=64)  # tokens; None: what the model allows
    cache_gib: float = Field(default=0.25, gt=0)  # KV pages of a rank
    max_batch: int = Field(default=64, ge=1)  # sequences running at once
    step_tokens: int = Field(default=1024, ge=1)  # rows of a step that only computes prompts
    chunk_tokens: int = Field(default=256, ge=1)  # prompt rows of a step that also decodes
    draft_tokens: int = Field(default=1, ge=0, le=8)  # most that the MTP module drafts; 0: none
    max_queue: int = Field(default=1024, ge=1)  # waiting requests; one more is refused with 503
    kernels: Literal["auto", "native", "reference"] = "auto"
    threads: int = Field(
        default=2, ge=1
    )  # CPU threads of a prompt's big matmuls; decoding uses one
    load_timeout_s: float = Field(
        default=1800, gt=0
    )  # a rank that has not loaded by then is replaced
    step_timeout_s: float = Field(default=60, gt=0)  # a rank whose step takes longer is killed


class DecodeSettings(Section):
    """Units that decode (and, colocated, also prefill)."""

    replicas: int = Field(default=1, ge=1)


class ApiSettings(Section):
    """The HTTP side's behaviour."""

    temperature_mapping: Literal["deepseek", "none"] = "deepseek"  # API 1.0 = model 0.3
    max_output_tokens: int = Field(default=8192, ge=1)  # largest max_tokens
    default_output_tokens: int = Field(default=4096, ge=1)  # when the caller names none
    keys: tuple[str, ...] = ()  # accepted without limits, beside those of the key file
    key_file: Path | None = None  # of `rayseek keys`; None: ~/.config/rayseek/keys.yaml
    # Part of the engine that one key may fill while another asks now and then: lower means quicker
    # first tokens for the other, and less throughput for the one.
    crowd: float = Field(default=0.25, gt=0, le=1)
    max_waiting: int = Field(default=1024, ge=1)  # sequences of one key that may queue; then 503
    body_limit_mib: float = Field(default=8, gt=0)
    keep_alive_s: float = Field(default=10, gt=0)  # a comment line in streams that wait
    ready_window_s: float = Field(default=30, gt=0)  # /ready: a token within this, or a probe
    default_system_prompt: str = "none"  # without one of the caller's: none, deepseek, or a text
    time_zone: str = "Asia/Shanghai"  # of the date in DeepSeek's system prompt

    @field_validator("time_zone")
    @classmethod
    def _known(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError(f"no time zone {name!r}; names are like Asia/Shanghai") from None
        return name


class PageSettings(Section):
    """The web pages: overview, chat, API reference."""

    default_system_prompt: str = "deepseek"  # the chat page's: none, deepseek, or a text
    public_url: str | None = Field(default=None, pattern=r"^https?://[^\s/]+(/\S*)?$")
    dashboard_url: str | None = Field(default=None, pattern=r"^https?://\S+$")  # None: if known
    local_key: bool = True  # who is on the machine of a loopback-only service sees its key


class IngressSettings(Section):
    """Where the API listens, and how many processes speak it."""

    host: str = "0.0.0.0"
    port: int = Field(default=8000, ge=1, le=65535)
    grpc_port: int | None = Field(default=None, ge=1, le=65535)  # the gRPC front door; None: off
    replicas: int = Field(default=1, ge=1)  # keep it stable: a change reloads the proxy
    longest_stream_s: int = Field(
        default=7200, ge=1
    )  # streams live this long through reloads and updates


class Config(Section):
    """Everything `rayseek serve` can be told."""

    model: ModelSettings = ModelSettings()
    engine: EngineSettings = EngineSettings()
    decode: DecodeSettings = DecodeSettings()
    api: ApiSettings = ApiSettings()
    pages: PageSettings = PageSettings()
    ingress: IngressSettings = IngressSettings()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.engine.chunk_tokens > self.engine.step_tokens:
            raise ValueError(
                f"engine.chunk_tokens ({self.engine.chunk_tokens}) must not exceed "
                f"engine.step_tokens ({self.engine.step_tokens})"
            )
        return self


class ConfigFileError(ValueError):
    """A config file that cannot be used; the message lists every problem with its path."""


def load_config(path: Path) -> Config:
    """Read a YAML config. Raises ConfigFileError."""
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigFileError(f"{path}: {error}") from None
    try:
        return Config.model_validate(data or {})
    except ValidationError as error:
        problems = [
            f"  {'.'.join(map(str, e['loc'])) or 'config'}: {e['msg']}" for e in error.errors()
        ]
        raise ConfigFileError("\n".join([f"{path}:", *problems])) from None
