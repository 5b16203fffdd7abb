"""Which implementation of the operations runs here, decided once and with its reason."""

from __future__ import annotations

from typing import Literal, NamedTuple

from rayseek.kernels.native import NativeOps
from rayseek.kernels.native_build import NativeUnavailableError
from rayseek.kernels.ops import SplitOps
from rayseek.kernels.reference import ReferenceOps

Preference = Literal["auto", "native", "reference"]


class Choice(NamedTuple):
    """The operations to use, and why these, in one line for an operator."""

    ops: SplitOps
    reason: str

    @property
    def arithmetic(self) -> str:
        """What decides how sums are rounded: two with the same name give the same bits."""
        tiles = isinstance(self.ops, NativeOps) and self.ops.amx
        return f"{self.ops.name}{' amx' if tiles else ''}"


def choose_ops(device: str = "cpu", prefer: Preference = "auto", threads: int = 1) -> Choice:
    """The operations for a device, with the reason.

    "auto" takes the native ones where they can be built and loaded, else the reference. threads:
    how many may share a call with much work. Raises ValueError for a device without operations,
    NativeUnavailableError when "native" is asked for and cannot be had.
    """
    if device != "cpu":
        raise ValueError(f"no operations for device {device!r}: use 'cpu'")
    if prefer == "reference":
        return Choice(ReferenceOps(), "plain PyTorch (slow): chosen by configuration")
    try:
        native = NativeOps(threads)
    except NativeUnavailableError as error:
        if prefer == "native":
            raise
        return Choice(ReferenceOps(), f"plain PyTorch (slow): {error}")
    how = "AMX tiles" if native.amx else "vector code, no AMX here"
    return Choice(native, f"C++ built for this CPU: {how}")
