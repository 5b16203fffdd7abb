"""What the API needs to know about its deployment."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Literal
from zoneinfo import ZoneInfo

TemperatureMapping = Literal["deepseek", "none"]


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """Built by the Ingress from the cluster's config; constant while it runs."""

    model: str  # the name that callers ask for
    context_length: int  # prompt and answer together, in tokens
    api_keys: tuple[str, ...]  # may be empty if there is a key file
    key_file: Path | None = None  # of hashed keys with limits, see keys.py
    ingress_replicas: int = 1  # each gets an equal part of every key's limits
    in_flight: int = 64  # sequences this replica gives to the engine at once, until units tell
    crowd: float = 0.25  # of `in_flight`: what a key may hold while another has modest needs
    max_waiting: int = 1024  # sequences of one key that may wait here; one more is refused
    shared_cache: bool = False  # keys share computed prompts
    aliases: tuple[str, ...] = ()  # further names, such as "deepseek-chat"
    max_output_tokens: int = 8192  # the most a caller may ask for
    default_output_tokens: int = 4096  # when the caller does not say; less if the context is short
    temperature_mapping: TemperatureMapping = "deepseek"  # spec section 6.1
    max_choices: int = 16  # sequences per HTTP request
    body_limit_bytes: int = 8 * 2**20
    keep_alive_s: float = 10.0  # a silent stream sends a comment this often
    ready_window_s: float = 30.0  # a token this fresh proves readiness
    probe_timeout_s: float = 10.0  # how long a probe token may take
    default_system_prompt: str = "none"  # none, deepseek, or a text; for callers who send none
    page_system_prompt: str = "deepseek"  # the same, of the chat page
    time_zone: str = "Asia/Shanghai"  # of the date in DeepSeek's system prompt
    public_url: str | None = None  # where the service is reached from outside, without /v1
    dashboard_url: str | None = None
    local_key: str | None = None  # shown to viewers on the machine of a loopback-only service
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        if not self.api_keys and self.key_file is None:
            raise ValueError("neither api_keys nor a key file: the API would answer nobody")

    def today(self, now: datetime | None = None) -> date:
        """The day it is where the model's users are. now: other than now; it knows its zone."""
        return (now or datetime.now(UTC)).astimezone(ZoneInfo(self.time_zone)).date()

    @property
    def models(self) -> tuple[str, ...]:
        return (self.model, *self.aliases)
