"""The config's `autoscaling` section: what may grow, how far, and what is aimed at."""

from __future__ import annotations

from datetime import datetime, time
from typing import Annotated, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import AfterValidator, Field, model_validator

from rayseek.cluster.cell import Section


def _known_zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"no time zone {name!r}; names are like Asia/Shanghai") from None
    return name


TimeZone = Annotated[str, AfterValidator(_known_zone)]


class Range(Section):
    """Never fewer than `least`, never more than `most`."""

    least: int = Field(ge=1)
    most: int = Field(ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.least > self.most:
            raise ValueError(f"least is {self.least}, more than most ({self.most})")
        return self


class Night(Section):
    """Other bounds from `begins` to `ends`, both as HH:MM; over midnight if `ends` is earlier."""

    begins: time
    ends: time
    time_zone: TimeZone = "Asia/Shanghai"
    prefill: Range | None = None
    decode: Range | None = None

    def covers(self, moment: datetime) -> bool:
        clock = moment.astimezone(ZoneInfo(self.time_zone)).time()
        if self.begins <= self.ends:
            return self.begins <= clock < self.ends
        return clock >= self.begins or clock < self.ends


class AutoscalingSettings(Section):
    """Without ranges nothing scales. Only whole units and whole expert ranks come and go."""

    prefill: Range | None = None  # units
    decode: Range | None = None  # units
    experts: Range | None = None  # dedicated expert ranks of each decode unit
    night: Night | None = None
    queue_s: float = Field(default=2.0, gt=0)  # prompts should wait no longer for a prefill unit
    prefill_busy: float = Field(default=0.7, gt=0, le=1)  # part of the time
    kv_used: float = Field(default=0.75, gt=0, le=1)  # of a decode unit's pages
    inter_token_s: float = Field(default=0.05, gt=0)  # of a decode unit's steps
    expert_busy: float = Field(default=0.6, gt=0, le=1)  # part of the time
    up_s: float = Field(default=30, ge=0)  # more is wanted for so long: then it comes
    down_s: float = Field(default=600, ge=0)  # less is enough for so long: then one goes
    drain_s: float = Field(default=120, ge=0)  # between one that goes and the next

    def bounds(self, role: str, moment: datetime) -> Range | None:
        """Of "prefill" or "decode" at this time; None: it does not scale."""
        day: Range | None = getattr(self, role)
        if day is None:
            return None
        night: Range | None = getattr(self.night, role) if self.night else None
        return night if night and self.night and self.night.covers(moment) else day

    def widest(self, role: str) -> Range | None:
        """Over day and night."""
        day: Range | None = getattr(self, role)
        night: Range | None = getattr(self.night, role, None) if self.night else None
        if day is None or night is None:
            return day
        return Range(least=min(day.least, night.least), most=max(day.most, night.most))
