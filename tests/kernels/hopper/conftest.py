"""The Hopper kernels run here in Triton's interpreter, made exact for bf16 and e4m3.

The interpreter of Triton 3.6 to 3.7 multiplies and adds bf16 as if the bits were integers, rounds
to bf16 toward zero and gets 8 % of the conversions to e4m3 wrong. So its conversions, element-wise
operations and dot products on these types are replaced by torch's; sums in them are refused.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

TORCH = {
    tl.bfloat16: torch.bfloat16, tl.float16: torch.float16, tl.float32: torch.float32,
    tl.float64: torch.float64, tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2,
}  # fmt: skip
NARROW = {tl.bfloat16, tl.float8e4nv, tl.float8e5}  # numpy lacks them: kept as raw bits
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
Handle = interpreter.TensorHandle
Builder = interpreter.InterpreterBuilder
plain = {
    name: getattr(Builder, name)
    for name in ("create_dot", "binary_op", "unary_op", "cast_impl", "create_fma")
}
plain_reduce = interpreter.ReduceScanOpInterface.apply
plain_patch_tensor = interpreter._patch_lang_tensor


def to_torch(data: Any, kind: Any) -> torch.Tensor:
    array = np.ascontiguousarray(data)
    flat = torch.from_numpy(array.reshape(-1).view(np.uint8).copy())
    return flat.view(TORCH[kind]).reshape(array.shape)


def convert(data: Any, source: Any, target: Any, rounding_mode: Any = None) -> Any:
    """To the nearest, ties to even; e4m3 saturates: as the hardware does."""
    values = to_torch(data, source).float()
    if target is tl.float8e4nv:
        values = values.clamp(-448.0, 448.0)
    values = values.to(TORCH[target]).contiguous()
    bits = values.reshape(-1).view(torch.uint8).numpy()
    return bits.view(UNSIGNED[values.element_size()]).reshape(np.shape(data))


def float32(handle: Any) -> Any:
    return convert(handle.data, handle.dtype.scalar, tl.float32).view(np.float32)


def narrow(values: Any, kind: Any) -> Any:
    bits = convert(np.asarray(values, np.float32), tl.float32, kind)
    return Handle(bits.view(interpreter._get_np_dtype(kind)), kind)


def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
    if a.dtype.scalar not in TORCH:
        return plain["create_dot"](self, a, b, d, *rest)
    product = to_torch(a.data, a.dtype.scalar).float() @ to_torch(b.data, b.dtype.scalar).float()
    return Handle(product.numpy().astype(d.data.dtype, copy=False) + d.data, d.dtype.scalar)


def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
    kind = lhs.dtype.scalar
    if kind not in NARROW:
        return plain["binary_op"](self, lhs, rhs, op)
    out = op(float32(lhs), float32(rhs))
    return Handle(out, tl.int1) if out.dtype == bool else narrow(out, kind)


def unary_op(self: Any, arg: Any, op: Any) -> Any:
    kind = arg.dtype.scalar
    return narrow(op(float32(arg)), kind) if kind in NARROW else plain["unary_op"](self, arg, op)


def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    kind = z.dtype.scalar
    if kind not in NARROW:
        return plain["create_fma"](self, x, y, z)
    return narrow(float32(x) * float32(y) + float32(z), kind)


def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
    source, target = src.dtype.scalar, dst_type.scalar
    if source in TORCH and target in TORCH and (source in NARROW or target in NARROW):
        bits = convert(src.data, source, target)
        return Handle(bits.view(interpreter._get_np_dtype(target)), target)
    if target in NARROW:
        return narrow(src.data, target)
    if source in NARROW:
        return Handle(float32(src).astype(interpreter._get_np_dtype(target)), target)
    return plain["cast_impl"](self, src, dst_type)


def reduce(self: Any, values: Any) -> Any:
    for value in values if isinstance(values, tuple) else (values,):
        if getattr(value, "dtype", None) is not None and value.dtype.scalar in NARROW:
            raise TypeError(f"reduction over {value.dtype}: cast to float32 first")
    return plain_reduce(self, values)


def patch_tensor(tensor: Any, scope: Any) -> None:
    """Triton 3.6 makes an int of an array of one element, which numpy 2.4 refuses."""
    plain_patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))


interpreter._convert_float = convert
interpreter._patch_lang_tensor = patch_tensor
for function in (create_dot, binary_op, unary_op, create_fma, cast_impl):
    setattr(Builder, function.__name__, function)
interpreter.ReduceScanOpInterface.apply = reduce
