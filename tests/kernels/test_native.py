"""The C++ operations: the reference's numbers, and the same bits in any company."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rayseek.kernels.fp8 import quantise_blocks_ref
from rayseek.kernels.mla_attention import mla_attention_ref
from rayseek.kernels.native import NativeOps
from rayseek.kernels.native_build import NativeUnavailableError
from rayseek.kernels.ops import Norm, Weight
from rayseek.kernels.reference import ReferenceOps
from rayseek.kernels.rope import yarn_cos_sin

REFERENCE = ReferenceOps()
COS_SIN = yarn_cos_sin(400, 8, 10000.0, 40.0, 64)
FEW = settings(max_examples=12)


@pytest.fixture(params=["amx", "vector", "any cpu"])
def ops(request: pytest.FixtureRequest) -> Iterator[NativeOps]:
    """The library with AMX, the same without it, and one built for the plainest x86-64."""
    if request.param == "any cpu" and platform.machine() != "x86_64":
        pytest.skip("builds for x86-64")
    try:
        native = NativeOps(target="x86-64" if request.param == "any cpu" else "native")
    except NativeUnavailableError as error:
        pytest.skip(str(error))
    if request.param == "amx" and not native.amx:
        pytest.skip("this CPU has no AMX")
    native.library.rs_set_amx(request.param == "amx")
    yield native
    native.library.rs_set_amx(native.amx)
    native.library.rs_set_threads(1)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight(seed: int, n: int, k: int, kind: str) -> Weight:
    values = randn(seed, n, k) / math.sqrt(k)
    if kind == "fp8":
        return quantise_blocks_ref(values)
    return Weight(values if kind == "f32" else values.bfloat16())


def close(got: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


kinds = pytest.mark.parametrize("kind", ["bf16", "fp8", "f32"])


@pytest.mark.parametrize("rows", [1, 4, 9, 160])
def test_every_e4m3_number_is_exact(ops: NativeOps, rows: int) -> None:
    """Also where it is kept as a byte, and where columns or values of k fill a part of a tile."""
    numbers = torch.arange(256, dtype=torch.uint8)
    numbers = numbers[(numbers & 0x7F) != 0x7F].repeat(21)[: 40 * 130].view(40, 130)
    w = Weight(numbers.view(torch.float8_e4m3fn), torch.ones(1, 2))
    packed = ops.pack(w)
    got = torch.cat([ops.linear(part, packed) for part in torch.eye(160, 130).split(rows)])
    assert torch.equal(got[:130].T, numbers.view(torch.float8_e4m3fn).float())


def test_what_is_not_a_number_stays_so(ops: NativeOps) -> None:
    codes = torch.full((16, 64), 0x38, dtype=torch.uint8)
    codes[3, 5] = 0x7F
    w = Weight(codes.view(torch.float8_e4m3fn), torch.ones(1, 1))
    out = ops.linear(torch.ones(1, 64), ops.pack(w))[0]
    assert out.isnan().tolist() == [column == 3 for column in range(16)]


@kinds
@pytest.mark.parametrize(
    "t, n, k", [(1, 256, 512), (3, 16, 32), (7, 33, 100), (11, 257, 129), (170, 48, 1024)]
)
def test_linear_is_float32(ops: NativeOps, t: int, n: int, k: int, kind: str) -> None:
    w = weight(1, n, k, kind)
    wide, residual, norm = randn(2, t, k + 9), randn(3, t, n + 5)[:, 5:], Norm(randn(4, k), 1e-6)
    x = wide[:, 4 : k + 4]
    packed, plain = ops.pack(w), REFERENCE.pack(w)
    close(ops.linear(x, packed), (x.double() @ plain.double().T).float())
    close(ops.linear(x, packed, norm, residual), REFERENCE.linear(x, plain, norm, residual))


@kinds
def test_a_stack_is_its_parts(ops: NativeOps, kind: str) -> None:
    parts = [weight(i, n, 96, kind) for i, n in enumerate((128, 40, 7))]
    x = randn(9, 6, 96)
    expected = torch.cat([ops.linear(x, ops.pack(part)) for part in parts], dim=1)
    assert torch.equal(ops.linear(x, ops.pack_stack(parts)), expected)


@kinds
@pytest.mark.parametrize("nope, value", [(128, 128), (16, 24), (192, 64)])
def test_heads_go_into_latent_space_and_back(
    ops: NativeOps, kind: str, nope: int, value: int
) -> None:
    heads, latent, t = 3, 160, 9
    kv_b = weight(5, heads * (nope + value), latent, kind)
    q, cache = randn(6, t, heads, nope + 8), Cache([300], latent, 8)
    positions = torch.arange(t, dtype=torch.int32) * 37

    def attended(by: Any) -> Tensor:
        w_uk, w_uv = by.pack_heads(kv_b, heads, nope, value)
        out: Tensor = by.attend(
            q, w_uk, w_uv, COS_SIN, as_pages(by, cache.pages), cache.table,
            torch.zeros(t, dtype=torch.int32), positions, 0.2,
        )  # fmt: skip
        return out

    close(attended(ops), attended(REFERENCE), 3e-5)


def as_pages(ops: Any, plain_PSX: Tensor) -> Tensor:
    """The values in the layout of these operations, written down once more in plain torch."""
    if ops.name == "reference":
        return plain_PSX
    high = plain_PSX.bfloat16()
    rest = (plain_PSX - high.float()).bfloat16()
    pairs = torch.stack([high, rest], dim=-1).view(torch.int16)
    padded = torch.nn.functional.pad(pairs, (0, 0, 0, -plain_PSX.shape[-1] % 16))
    blocks: Tensor = padded.unflatten(2, (-1, 16)).transpose(1, 2).contiguous()
    return blocks.view(torch.int32).squeeze(-1)


class Cache:
    """Sequences of given lengths in scattered pages; whatever is not theirs is NaN."""

    def __init__(self, lengths: list[int], latent: int, rope: int) -> None:
        per = [-(-length // 64) for length in lengths]
        order = torch.randperm(sum(per) + 1, generator=torch.Generator().manual_seed(1)).tolist()
        self.pages = torch.full((len(order), 64, latent + rope), float("nan"))
        self.table = torch.zeros(len(lengths), max(per), dtype=torch.int32)
        for b, length in enumerate(lengths):
            mine = [order.pop() for _ in range(per[b])]
            self.table[b, : per[b]] = torch.tensor(mine)
            slots = (
                torch.tensor(mine).repeat_interleave(64)[:length] * 64 + torch.arange(length) % 64
            )
            self.pages.view(-1, latent + rope)[slots] = randn(b, length, latent + rope)


@pytest.mark.parametrize("latent, rope, heads", [(512, 64, 8), (40, 8, 3), (32, 16, 20)])
def test_attention_over_pages(ops: NativeOps, latent: int, rope: int, heads: int) -> None:
    lengths = [150, 64, 65, 1]
    cache = Cache(lengths, latent, rope)
    rows = [(b, p) for b, length in enumerate(lengths) for p in range(max(0, length - 30), length)]
    sequence, position = torch.tensor(rows, dtype=torch.int32).T.contiguous()
    q, still = randn(8, len(rows), heads, latent + rope), torch.zeros(400, rope)
    still[:, : rope // 2] = 1  # no rotation, and W_UK = W_UV = 1: attention alone
    ones = Weight(torch.eye(latent).repeat(2 * heads, 1).bfloat16())
    w_uk, w_uv = ops.pack_heads(ones, heads, latent, latent)
    for scale in (0.05, 0.3, 3.0):
        rest = (cache.table, sequence, position, scale)
        exact = mla_attention_ref(q.double(), cache.pages.double(), *rest, latent)
        got = ops.attend(q, w_uk, w_uv, still, as_pages(ops, cache.pages), *rest)
        close(got, exact.flatten(1).float(), 3e-5 if scale < 1 else 3e-4)


def test_latents_are_stored_where_told(ops: NativeOps) -> None:
    latent, t = 40, 9
    ckr, norm = randn(1, t, latent + 8 + 5)[:, 5:], Norm(randn(2, latent), 1e-6)
    slots = torch.randperm(3 * 64, generator=torch.Generator().manual_seed(3))[:t]
    positions = torch.arange(t, dtype=torch.int32) * 40
    got, expected = ops.new_pages(3, latent, 8), REFERENCE.new_pages(3, latent, 8)
    ops.store_latents(ckr, norm, COS_SIN, positions, slots, got)
    REFERENCE.store_latents(ckr, norm, COS_SIN, positions, slots, expected)
    which = torch.tensor([2, 0], dtype=torch.int32)
    read = [each.read_latents(pages, which, latent, 8)
            for each, pages in ((ops, got), (REFERENCE, expected))]  # fmt: skip
    close(read[0], read[1], 8e-6)
    close(ops.read_latents(as_pages(ops, expected), which, latent, 8), read[1], 8e-6)
    close(ops.rms_norm(ckr[:, :latent], norm), REFERENCE.rms_norm(ckr[:, :latent], norm))


@given(
    seed=st.integers(0, 1000),
    shape=st.sampled_from([(8, 4, 32, 8), (4, 2, 8, 4), (1, 1, 20, 2), (4, 1, 3, 2)]),
    mean=st.sampled_from([0.0, -3.0]),
    ties=st.booleans(),
)
@FEW
def test_routes_are_the_reference(
    ops: NativeOps, seed: int, shape: tuple[int, int, int, int], mean: float, ties: bool
) -> None:
    groups, keep, size, top_k = shape
    logits, bias = randn(seed, 20, groups * size), randn(seed + 1, groups * size) * 0.3 + mean
    if ties:
        logits, bias = torch.zeros_like(logits), (bias * 2).round() / 2
    for normalise in (True, False):
        got = ops.route(logits, bias, groups, keep, top_k, normalise, 2.5)
        expected = REFERENCE.route(logits, bias, groups, keep, top_k, normalise, 2.5)
        assert torch.equal(got[0], expected[0])
        close(got[1], expected[1])


def test_a_row_of_nan_is_routed_somewhere_valid(ops: NativeOps) -> None:
    ids, _ = ops.route(torch.full((2, 16), float("nan")), torch.zeros(16), 4, 2, 4, True, 1.0)
    assert all(len(set(row)) == 4 and 0 <= min(row) <= max(row) < 16 for row in ids.tolist())


class Layer:
    """Packed weights of every operation, small and of odd sizes."""

    def __init__(self, ops: Any, kind: str) -> None:
        self.heads, self.latent, self.nope, self.d = 3, 40, 16, 72
        self.w = ops.pack(weight(1, 50, self.d, kind))
        self.w_uk, self.w_uv = ops.pack_heads(weight(2, 3 * 40, 40, kind), 3, 16, 24)
        gate_up = [[weight(10 + i, 24, self.d, kind), weight(50 + i, 24, self.d, kind)]
                   for i in range(8)]  # fmt: skip
        down = [weight(90 + i, self.d, 24, kind) for i in range(8)]
        self.gate_up, self.down = ops.pack_stack(gate_up[0]), ops.pack(down[0])
        self.experts = ops.pack_experts(gate_up, down)
        self.each_gate_up, self.each_down = gate_up, down
        self.norm = Norm(randn(3, self.d), 1e-6)
        self.cache = Cache([200, 130, 70], self.latent, 8)
        self.pages = as_pages(ops, self.cache.pages)
        self.bias = randn(4, 8) * 0.1


def run_all(ops: Any, layer: Layer, seed: int, count: int, rows: Tensor) -> list[Tensor]:
    """Every operation on the given ones of `count` random rows (by sequence, as a batch is)."""
    x, residual = randn(seed, count, layer.d)[rows], randn(seed + 1, count, 50)[rows]
    sequence = torch.arange(count, dtype=torch.int32)[rows] * 3 // count
    position = (torch.arange(count, dtype=torch.int32)[rows] * 29) % 70
    q = randn(seed + 2, count, 3, layer.nope + 8)[rows]
    attended = ops.attend(
        q, layer.w_uk, layer.w_uv, COS_SIN, layer.pages, layer.cache.table, sequence, position, 0.3
    )
    ids, weights = ops.route(randn(seed + 3, count, 8)[rows], layer.bias, 4, 2, 3, True, 2.5)
    into = x.clone()
    ops.experts(x, ids, weights, layer.experts, into)
    mlp = ops.mlp(x, layer.gate_up, layer.down)
    linear = ops.linear(x, layer.w, layer.norm, residual)
    return [linear, attended, weights, ids, into, mlp, ops.rms_norm(x, layer.norm)]


@kinds
def test_every_operation_together_is_the_reference(ops: NativeOps, kind: str) -> None:
    every = torch.arange(40)
    got = run_all(ops, Layer(ops, kind), 7, 40, every)
    expected = run_all(REFERENCE, Layer(REFERENCE, kind), 7, 40, every)
    for mine, theirs in zip(got, expected, strict=True):
        close(mine, theirs, 3e-5)


@kinds
@given(data=st.data(), seed=st.integers(0, 50), count=st.integers(1, 60))
@FEW
def test_a_row_does_not_depend_on_its_company(
    ops: NativeOps, kind: str, data: st.DataObject, seed: int, count: int
) -> None:
    layer = Layer(ops, kind)
    whole = run_all(ops, layer, seed, count, torch.arange(count))
    some = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=count))
    order = torch.tensor(some)
    for part, full in zip(run_all(ops, layer, seed, count, order), whole, strict=True):
        assert torch.equal(part, full[order])


def test_nor_on_threads(ops: NativeOps) -> None:
    layer, every = Layer(ops, "bf16"), torch.arange(700)
    one = run_all(ops, layer, 3, 700, every)
    ops.library.rs_set_threads(3)
    for alone, shared in zip(one, run_all(ops, layer, 3, 700, every), strict=True):
        assert torch.equal(alone, shared)


@kinds
@given(
    seed=st.integers(0, 50),
    count=st.sampled_from([1, 2, 15, 16, 70, 200]),
    holders=st.integers(1, 5),
    threads=st.integers(1, 3),
)
@FEW
def test_experts_apart_are_experts_together(
    ops: NativeOps, kind: str, seed: int, count: int, holders: int, threads: int
) -> None:
    """Products made by several holders, with copies of rows, in any order, then combined."""
    layer = Layer(ops, kind)
    ops.library.rs_set_threads(threads)
    wide = randn(seed, count, layer.d + 5)
    x, logits = wide[:, : layer.d], randn(seed + 3, count, 8)
    ids, weights = ops.route(logits, layer.bias, 4, 2, 3, True, 2.5)
    expected, into = randn(seed + 4, count, layer.d), randn(seed + 4, count, layer.d)
    ops.experts(x, ids, weights, layer.experts, expected)

    parts = [
        ops.pack_experts([gu], [d])
        for gu, d in zip(layer.each_gate_up, layer.each_down, strict=True)
    ]
    index, products = torch.empty(count * 3, dtype=torch.int32), []
    owner = torch.randint(holders, (8,), generator=torch.Generator().manual_seed(seed))
    at = 0
    for holder in range(holders):
        mine = [e for e in range(8) if owner[e] == holder]
        pairs = torch.isin(ids.flatten(), torch.tensor(mine)).nonzero()[:, 0]
        pairs = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))]
        local = torch.tensor([mine.index(e) for e in ids.flatten()[pairs].tolist()]).int()
        packed = ops.join_experts([parts[e] for e in mine])
        products.append(ops.expert_rows(ops.row_words(x), (pairs // 3).int(), local, packed))
        index[pairs] = torch.arange(at, at + len(pairs), dtype=torch.int32)
        at += len(pairs)
    ops.combine(torch.cat(products), index.view(count, 3), weights, into)
    assert torch.equal(into, expected)


def test_a_row_without_an_expert_is_zero(ops: NativeOps) -> None:
    layer, x = Layer(ops, "bf16"), randn(1, 2, 72)
    rows, ids = torch.tensor([1, 0, 1]), torch.tensor([3, -1, 3])
    got = ops.expert_rows(ops.row_words(x), rows, ids, layer.experts)
    assert not got[1].any() and got[0].any() and torch.equal(got[0], got[2])
    expected = REFERENCE.expert_rows(ops.row_words(x), rows, ids, Layer(REFERENCE, "bf16").experts)
    close(got, expected, 3e-5)
    into, again = randn(2, 1, 72), randn(2, 1, 72)
    index, weights = torch.tensor([[2, 0]], dtype=torch.int32), torch.tensor([[0.3, 0.7]])
    ops.combine(got, index, weights, into)
    REFERENCE.combine(got, index, weights, again)
    assert torch.equal(into, again)


def test_wrong_shapes_are_refused(ops: NativeOps) -> None:
    layer = Layer(ops, "bf16")
    with pytest.raises(ValueError, match="rows have 71 values, the weight takes 72"):
        ops.linear(torch.zeros(2, 71), layer.w)
    with pytest.raises(ValueError, match=r"pages must come from new_pages\(count, 40, 8\)"):
        ops.attend(torch.zeros(1, 3, 24), layer.w_uk, layer.w_uv, COS_SIN, torch.zeros(2, 64, 48),
                   layer.cache.table, torch.zeros(1).int(), torch.zeros(1).int(), 1.0)  # fmt: skip
    with pytest.raises(ValueError, match=r"expert ids must be 0\.\.7"):
        ids = torch.tensor([[8]], dtype=torch.int32)
        ops.experts(torch.zeros(1, 72), ids, torch.ones(1, 1), layer.experts, torch.zeros(1, 72))
    with pytest.raises(ValueError, match=r"expert ids must be -1\.\.7"):
        ops.expert_rows(torch.zeros(1, 72), ids[0] * 0, ids[0], layer.experts)
    with pytest.raises(ValueError, match=r"indices must be 0\.\.2"):
        ops.combine(torch.zeros(3, 72), ids, torch.ones(1, 1), torch.zeros(1, 72))
    with pytest.raises(ValueError, match="cannot choose 5 of 8 experts in 2 of 4 groups"):
        ops.route(torch.zeros(1, 8), layer.bias, 4, 2, 5, True, 1.0)


def test_no_rows_is_no_work(ops: NativeOps) -> None:
    none = torch.arange(0)
    assert [len(out) for out in run_all(ops, Layer(ops, "bf16"), 0, 1, none)] == [0] * 7
