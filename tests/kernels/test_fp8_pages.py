"""FP8 latents: the bytes of a token, what they say, and who reads the same of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rayseek.kernels.kv_format import Fp8Token, token_bytes
from rayseek.kernels.latent_pages import fp8_tokens_ref, read_pages_ref
from rayseek.kernels.mla_attention import mla_attention_ref
from rayseek.kernels.native import NativeOps
from rayseek.kernels.native_build import NativeUnavailableError
from rayseek.kernels.ops import Norm, Weight
from rayseek.kernels.reference import ReferenceOps
from rayseek.kernels.rope import yarn_cos_sin

REFERENCE = ReferenceOps("fp8")
COS_SIN = yarn_cos_sin(400, 8, 10000.0, 40.0, 64)


@pytest.fixture(params=["amx", "vector", "any cpu"])
def ops(request: pytest.FixtureRequest) -> NativeOps:
    try:
        native = NativeOps(1, "x86-64" if request.param == "any cpu" else "native", "fp8")
    except NativeUnavailableError as error:
        pytest.skip(str(error))
    if request.param == "amx" and not native.amx:
        pytest.skip("this CPU has no AMX")
    native.library.rs_set_amx(request.param == "amx")
    request.addfinalizer(lambda: native.library.rs_set_amx(native.amx))
    return native


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_sizes() -> None:
    token = Fp8Token(512, 64)
    assert (token.size, token.scales_at, token.keys_at, token.groups) == (656, 512, 528, 4)
    assert token_bytes("fp8", "cuda", 512, 64) == token_bytes("fp8", "cpu", 512, 64) == 656
    assert token_bytes("auto", "cuda", 512, 64) == 1152
    assert token_bytes("auto", "cpu", 512, 64) == 2304
    assert REFERENCE.new_pages(2, 512, 64).shape == (2, 64, 656)


@given(st.integers(0, 1000), st.sampled_from([(512, 64), (40, 8), (200, 2)]), st.integers(-50, 40))
@settings(max_examples=40)
def test_values_are_near_and_exact_in_bf16(seed: int, shape: tuple[int, int], power: int) -> None:
    """To 1/16 of each value, or of the least normal one beside the group's largest, or of the least
    scale, 2^-64."""
    latent = randn(seed, 5, shape[0]) * 2.0**power
    latent[1] *= torch.logspace(-6, 6, shape[0])
    latent[2], latent[3, ::2] = 0, 0
    key = randn(seed + 1, 5, shape[1])
    read = read_pages_ref(fp8_tokens_ref(latent, key)[None], *shape)[0]
    assert torch.equal(read, read.bfloat16().float())
    assert torch.equal(read[:, shape[0] :], key.bfloat16().float())
    for first in range(0, shape[0], 128):
        group = slice(first, min(first + 128, shape[0]))
        exact, got = latent[:, group], read[:, group]
        floor = (exact.abs().amax(dim=1, keepdim=True) * 2.0**-13).clamp(min=2.0**-70)
        assert ((got - exact).abs() <= torch.maximum(exact.abs(), floor) / 16).all()


def test_every_code_of_a_group_is_found_again() -> None:
    """All of e4m3 under a scale of 1; the codes of NaN stay NaN."""
    codes = torch.arange(256, dtype=torch.uint8)
    latent = codes.view(torch.float8_e4m3fn).float().view(2, 128)
    bytes_ = fp8_tokens_ref(latent.nan_to_num(0.0), torch.zeros(2, 2))
    keep = ~latent.isnan()
    assert torch.equal(bytes_[:, :128][keep], codes.view(2, 128)[keep])


@pytest.mark.parametrize("latent", [128, 40, 200])
def test_the_cpu_writes_the_references_bytes(ops: NativeOps, latent: int) -> None:
    t, rope = 30, 8
    ckr, norm = randn(1, t, latent + rope), Norm(randn(2, latent) * 3, 1e-6)
    ckr[3] *= 1e-4
    ckr[4, 5] = 2000.0  # the others of its group fall below e4m3's normal numbers
    ckr[5, :] = 0
    slots = torch.randperm(3 * 64, generator=torch.Generator().manual_seed(3))[:t]
    positions = torch.arange(t, dtype=torch.int32) * 10
    pages = []
    for each in (ops, REFERENCE):
        pages.append(each.new_pages(3, latent, rope))
        each.store_latents(ckr, norm, COS_SIN, positions, slots, pages[-1])
    ids = torch.tensor([2, 0, 1], dtype=torch.int32)
    got, expected = (ops.read_latents(p, ids, latent, rope) for p in pages)
    # A sum of squares in another order moves a value across a boundary now and then.
    assert (got == expected).float().mean() > 0.995
    torch.testing.assert_close(got, expected, rtol=1 / 7, atol=1e-6)
    ckr[7, 3] = float("nan")
    ops.store_latents(ckr, norm, COS_SIN, positions, slots, pages[0])
    assert ops.read_latents(pages[0], slots[7:8] // 64, latent, rope)[slots[7] % 64, 3].isnan()


@pytest.mark.parametrize("latent, rope, heads", [(512, 64, 8), (40, 8, 3), (200, 16, 20)])
def test_the_cpu_reads_what_the_reference_reads(
    ops: NativeOps, latent: int, rope: int, heads: int
) -> None:
    """Rows of four sequences in scattered pages, and each alone: the same bits."""
    lengths = [150, 64, 65, 1]
    counts = [-(-n // 64) for n in lengths]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(1)).int()
    table = torch.zeros(4, max(counts), dtype=torch.int32)
    for row, ids in zip(table, order.split(counts), strict=True):
        row[: len(ids)] = ids
    tokens = fp8_tokens_ref(randn(2, sum(counts) * 64, latent), randn(3, sum(counts) * 64, rope))
    pages = tokens.view(sum(counts), 64, -1)
    for b, n in enumerate(lengths):  # what is not theirs is NaN
        pages[table[b, counts[b] - 1], n - 64 * (counts[b] - 1) :] = 127
    rows = [(b, p) for b, n in enumerate(lengths) for p in range(max(0, n - 20), n)]
    sequence, positions = torch.tensor(rows, dtype=torch.int32).T.contiguous()
    q, still = randn(8, len(rows), heads, latent + rope), torch.zeros(400, rope)
    still[:, : rope // 2] = 1  # no rotation, and W_UK = W_UV = 1: attention alone
    ones = Weight(torch.eye(latent).repeat(2 * heads, 1).bfloat16())
    w_uk, w_uv = ops.pack_heads(ones, heads, latent, latent)

    def attend(of: slice) -> Tensor:
        return ops.attend(
            q[of], w_uk, w_uv, still, pages, table, sequence[of], positions[of], 0.1
        )  # fmt: skip

    got = attend(slice(None))
    expected = mla_attention_ref(q.double(), pages, table, sequence, positions, 0.1, latent)
    error = (got - expected.flatten(1)).abs().max()
    assert error <= 3e-5 * expected.abs().max(), error
    for t in range(0, len(rows), 7):
        assert torch.equal(attend(slice(t, t + 1))[0], got[t])
