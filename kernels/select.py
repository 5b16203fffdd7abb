"""Which implementation of the operations runs here, decided once and with its reason."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from rayseek.kernels.kv_format import KVDtype
from rayseek.kernels.native import NativeOps
from rayseek.kernels.native_build import NativeUnavailableError
from rayseek.kernels.ops import SplitOps
from rayseek.kernels.reference import ReferenceOps
from rayseek.kernels.sampler import NativeSampler, Sampler, TorchSampler

Preference = Literal["auto", "cuda", "native", "reference"]
Device = Literal["cpu", "cuda"]
HOPPER = (9, 0)  # compute capability


class Choice(NamedTuple):
    """The operations to use, and why these, in one line for an operator."""

    ops: SplitOps
    reason: str

    @property
    def arithmetic(self) -> str:
        """What decides how sums are rounded: two with the same name give the same bits."""
        tiles = isinstance(self.ops, NativeOps) and self.ops.amx
        latents = ", FP8 latents" if self.ops.kv_dtype == "fp8" else ""
        return f"{self.ops.name}{' amx' if tiles else ''}{latents}, drawn by {self.sampler.name}"

    @property
    def sampler(self) -> Sampler:
        """Draws tokens from what these operations compute, where they do."""
        if isinstance(self.ops, NativeOps):
            return NativeSampler(self.ops.library)
        return TorchSampler()


def device_for(prefer: Preference = "auto") -> Device:
    """Where the operations of this preference run: "auto" takes a Hopper GPU if there is one.

    Raises ValueError when "cuda" is asked for and cannot be had.
    """
    if prefer not in ("auto", "cuda"):
        return "cpu"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() == HOPPER:
        return "cuda"
    if prefer == "cuda":
        found = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
        raise ValueError(
            f"the cuda kernels are for Hopper GPUs (H100, H800, H200); here is {found}. "
            "Elsewhere, set engine.kernels to auto"
        )
    return "cpu"


def choose_ops(
    device: Device = "cpu",
    prefer: Preference = "auto",
    threads: int = 1,
    kv_dtype: KVDtype = "auto",
) -> Choice:
    """The operations for a device (see `device_for`), with the reason.

    On a CPU, "auto" takes the native ones where they can be built and loaded, else the reference.
    threads: how many may share a call with much work. kv_dtype: of their latent cache. Raises
    NativeUnavailableError when "native" is asked for and cannot be had.
    """
    if device == "cuda":
        from rayseek.kernels.cuda import CudaOps

        return Choice(
            CudaOps(kv_dtype=kv_dtype), f"Triton kernels for {torch.cuda.get_device_name()}"
        )
    if prefer == "reference":
        reason = "plain PyTorch (slow): chosen by configuration"
        return Choice(ReferenceOps(kv_dtype), reason)
    try:
        native = NativeOps(threads, kv_dtype=kv_dtype)
    except NativeUnavailableError as error:
        if prefer == "native":
            raise
        return Choice(ReferenceOps(kv_dtype), f"plain PyTorch (slow): {error}")
    how = "AMX tiles" if native.amx else "vector code, no AMX here"
    return Choice(native, f"C++ built for this CPU: {how}")
