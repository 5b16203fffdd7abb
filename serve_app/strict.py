"""How request bodies are checked: strict types, finite numbers, problems told in our words."""

from __future__ import annotations

from typing import Annotated, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

T = TypeVar("T")
# Only the first wrong item is told: the problems of a million take a gigabyte.
Several: TypeAlias = Annotated[list[T], Field(fail_fast=True)]


class StrictBody(BaseModel):
    """`true` is no number and "1" is no integer; unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)


def wrong(message: str) -> PydanticCustomError:
    """To be raised by a validator: told to the caller with the parameter's path."""
    return PydanticCustomError("value_error", "{message}", {"message": message})
