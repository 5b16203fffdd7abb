"""How request bodies are checked: strict types, finite numbers, problems told in our words."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError


class StrictBody(BaseModel):
    """`true` is no number and "1" is no integer; unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)


def wrong(message: str) -> PydanticCustomError:
    """To be raised by a validator: told to the caller with the parameter's path."""
    return PydanticCustomError("value_error", "{message}", {"message": message})
