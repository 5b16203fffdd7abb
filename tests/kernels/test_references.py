"""The plain references against recorded facts of the spec and independent implementations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rayseek.kernels.fp8 import dequantise_ref, quantise_blocks_ref
from rayseek.kernels.mla_attention import (
    absorb_ref,
    mla_attention_ref,
    split_heads_ref,
    unabsorb_ref,
)
from rayseek.kernels.ops import Norm, Weight
from rayseek.kernels.reference import ReferenceOps
from rayseek.kernels.rope import rotate_ref, yarn_cos_sin, yarn_frequencies
from rayseek.kernels.router import route_ref


def test_yarn_frequencies_of_v3() -> None:
    theta = yarn_frequencies(64, 10000.0, 40.0, 4096)
    recorded = {0: 1.0, 1: 0.7498942, 10: 0.05623413, 11: 0.03900693, 16: 0.005500000,
                22: 1.778279e-4, 23: 3.333804e-5, 31: 3.333804e-6}  # fmt: skip
    for pair, value in recorded.items():
        assert theta[pair].item() == pytest.approx(value, rel=4e-7)


def test_cos_sin_is_exact_at_the_last_position() -> None:
    table = yarn_cos_sin(163840, 64, 10000.0, 40.0, 4096)
    angle = 163839 * yarn_frequencies(64, 10000.0, 40.0, 4096).numpy()
    assert table.dtype == torch.float32
    np.testing.assert_array_max_ulp(table[-1].numpy()[:32], np.cos(angle).astype(np.float32))
    np.testing.assert_array_max_ulp(table[-1].numpy()[32:], np.sin(angle).astype(np.float32))


def test_rotation_is_of_interleaved_pairs() -> None:
    x = torch.randn(5, 3, 64)
    table = yarn_cos_sin(40, 64, 10000.0, 40.0, 4096)
    positions = torch.tensor([0, 7, 39, 2, 1])
    pairs = torch.view_as_complex(x.view(5, 3, 32, 2))
    turn = torch.polar(torch.ones(40, 32).double(), torch.arange(40)[:, None]
                       * yarn_frequencies(64, 10000.0, 40.0, 4096))  # fmt: skip
    expected = torch.view_as_real(pairs * turn[positions][:, None].to(torch.complex64)).flatten(-2)
    torch.testing.assert_close(rotate_ref(x, table[positions][:, None]), expected)


@given(n=st.integers(1, 300), k=st.integers(1, 300), seed=st.integers(0, 99))
@settings(max_examples=15)
def test_fp8_blocks_hold_values_to_one_part_in_sixteen(n: int, k: int, seed: int) -> None:
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    weight = quantise_blocks_ref(w)
    assert weight.scale_inv is not None
    assert weight.scale_inv.shape == (-(-n // 128), -(-k // 128))
    back = dequantise_ref(weight)
    floor = weight.scale_inv.max() * 2**-10  # half the smallest subnormal
    assert bool(((back - w).abs() <= w.abs() / 16 + floor).all())
    assert bool((quantise_blocks_ref(back).data.float() == weight.data.float()).all())


def test_fp8_scale_multiplies_its_own_block() -> None:
    data = torch.ones(129, 257).to(torch.float8_e4m3fn)
    scale = torch.arange(1.0, 7.0).view(2, 3)
    values = dequantise_ref(Weight(data, scale))
    assert values[127, 128] == 2 and values[128, 127] == 4 and values[128, 256] == 6
    with pytest.raises(ValueError, match=r"must be \(2, 3\)"):
        dequantise_ref(Weight(data, scale.T.contiguous()))


def route_by_hand(
    score: list[float], bias: list[float], groups: int, keep: int, top_k: int
) -> list[int]:
    """Spec 1.6 with lists and sorts only."""
    size = len(score) // groups
    biased = [np.float32(s) + np.float32(b) for s, b in zip(score, bias, strict=True)]
    rank = [
        sum(sorted(biased[g * size : (g + 1) * size])[-2:], np.float32(0)) for g in range(groups)
    ]
    kept = sorted(range(groups), key=lambda g: (-rank[g], g))[:keep]
    among = [e for e in range(len(score)) if e // size in kept]
    return sorted(sorted(among, key=lambda e: (-biased[e], e))[:top_k])


@given(
    seed=st.integers(0, 10_000),
    shape=st.sampled_from([(8, 4, 32, 8), (4, 2, 8, 4), (1, 1, 16, 2), (4, 4, 2, 8), (4, 1, 3, 2)]),
    mean=st.sampled_from([0.0, -0.6, -3.0]),
    ties=st.booleans(),
)
@settings(max_examples=60)
def test_router_is_the_spec(
    seed: int, shape: tuple[int, int, int, int], mean: float, ties: bool
) -> None:
    groups, keep, size, top_k = shape
    make = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, groups * size, generator=make)
    bias = torch.randn(groups * size, generator=make) * 0.3 + mean
    if ties:
        logits, bias = logits.round(), (bias * 2).round() / 2
    chosen, weight = route_ref(logits, bias, groups, keep, top_k, True, 2.5)
    score = logits.sigmoid()
    for t in range(6):
        hand = route_by_hand(score[t].tolist(), bias.tolist(), groups, keep, top_k)
        assert chosen[t].tolist() == hand
        picked = score[t, hand]
        torch.testing.assert_close(weight[t], picked / picked.sum() * 2.5)


def test_absorbed_attention_over_pages_is_the_naive_form() -> None:
    heads, nope, rope, value, latent, length = 4, 16, 8, 12, 32, 150
    make = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make)

    kv_b, q, c = random(heads * (nope + value), latent), random(length, heads, nope + rope), None
    c, key = random(length, latent), random(length, rope)
    table = yarn_cos_sin(length, rope, 10000.0, 40.0, 64)
    positions = torch.arange(length, dtype=torch.int32)
    pages = torch.full((7, 64, latent + rope), float("nan"))
    page_table = torch.tensor([[0, 0, 0], [5, 2, 6]], dtype=torch.int32)
    slots = page_table[1].long().repeat_interleave(64)[:length] * 64 + torch.arange(length) % 64
    norm = Norm(random(latent), 1e-6)
    ops = ReferenceOps()
    ops.store_latents(torch.cat([c, key], 1), norm, table, positions, slots, pages)

    w_uk, w_uv = split_heads_ref(kv_b, heads, nope, value)
    absorbed = absorb_ref(q, w_uk, table, positions)
    sequence = torch.ones(length, dtype=torch.int32)
    u = mla_attention_ref(absorbed, pages, page_table, sequence, positions, 0.3, latent)
    got = unabsorb_ref(u, w_uv)

    kv = (ops.rms_norm(c, norm) @ kv_b.T).view(length, heads, nope + value)
    k = torch.cat([kv[..., :nope], rotate_ref(key, table)[:, None].expand(-1, heads, -1)], -1)
    q_full = torch.cat([q[..., :nope], rotate_ref(q[..., nope:], table[:, None])], -1)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q_full.transpose(0, 1), k.transpose(0, 1), kv[..., nope:].transpose(0, 1),
        is_causal=True, scale=0.3,
    ).transpose(0, 1).flatten(1)  # fmt: skip
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_experts_sum_in_ascending_order_with_two_roundings() -> None:
    make = torch.Generator().manual_seed(2)
    gate_up = [[Weight(torch.randn(6, 8, generator=make)) for _ in range(2)] for _ in range(5)]
    down = [Weight(torch.randn(8, 6, generator=make)) for _ in range(5)]
    ops = ReferenceOps()
    x, into = torch.randn(3, 8, generator=make), torch.randn(3, 8, generator=make)
    chosen = torch.tensor([[0, 2, 4], [1, 2, 3], [0, 1, 2]], dtype=torch.int32)
    weight = torch.rand(3, 3, generator=make)
    expected = into.clone()
    for t in range(3):
        for k in range(3):
            gate, up = gate_up[chosen[t, k]]
            hidden = torch.nn.functional.silu(x[t] @ gate.data.T) * (x[t] @ up.data.T)
            expected[t] += weight[t, k] * (hidden @ down[chosen[t, k]].data.T)
    ops.experts(x, chosen, weight, ops.pack_experts(gate_up, down), into)
    torch.testing.assert_close(into, expected)
