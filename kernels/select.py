"""Which implementation of the operations runs here, decided once and with its reason."""

from __future__ import annotations

from typing import Literal, NamedTuple

from rayseek.kernels.ops import Ops
from rayseek.kernels.reference import ReferenceOps

Preference = Literal["auto", "native", "reference"]


class Choice(NamedTuple):
    """The operations to use, and why these, in one line for an operator."""

    ops: Ops
    reason: str


def choose_ops(device: str = "cpu", prefer: Preference = "auto") -> Choice:
    """The operations for a device, with the reason.

    "auto" takes the native ones where they can be built and loaded, else the reference. Raises
    ValueError for a device without operations, RuntimeError when "native" is asked for and
    cannot be had.
    """
    if device != "cpu":
        raise ValueError(f"no operations for device {device!r}: use 'cpu'")
    if prefer == "reference":
        return Choice(ReferenceOps(), "plain PyTorch: chosen by configuration")
    if prefer == "native":
        raise RuntimeError("native operations cannot be used")
    return Choice(ReferenceOps(), "plain PyTorch")


def ops_for(device: str = "cpu", prefer: Preference = "auto") -> Ops:
    """`choose_ops` without the reason."""
    return choose_ops(device, prefer).ops
