"""bfloat16 products, latent cache and MLA in the interpreter, against the plain references."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rayseek.kernels.hopper import bf16_gemm, latent_cache, mla_decode, mla_prefill
from rayseek.kernels.kv_format import PAGE_TOKENS
from rayseek.kernels.latent_pages import fp8_tokens_ref, read_pages_ref, store_latents_ref
from rayseek.kernels.mla_attention import mla_attention_ref
from rayseek.kernels.ops import Norm
from rayseek.kernels.reference import ReferenceOps
from rayseek.kernels.rope import rotate_ref, yarn_cos_sin


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(actual: Tensor, expected: Tensor, bits: int) -> None:
    """Within 2^-bits of the largest value."""
    error = (actual.double() - expected.double()).abs().max()
    assert error <= expected.abs().max() * 2.0**-bits, error


@pytest.mark.parametrize("rows, n, k", [(1, 256, 128), (20, 130, 72), (50, 64, 64), (130, 128, 64)])
def test_bf16_product(rows: int, n: int, k: int) -> None:
    x, w = random(rows, k).bfloat16(), random(n, k, seed=1).bfloat16()
    add = random(rows, n + 5, seed=2)[:, 2 : n + 2]
    expected = x.double() @ w.double().T
    close(bf16_gemm.bf16_matmul(x, w), expected, 18)
    close(bf16_gemm.bf16_matmul(x, w, add), expected + add, 18)


def test_batched_product_reads_and_writes_slices() -> None:
    x, w = random(3, 4, 40).bfloat16()[..., :32], random(4, 24, 32, seed=1).bfloat16()
    out = torch.zeros(3, 4, 30, dtype=torch.bfloat16)
    bf16_gemm.bf16_batched(x, w, out[..., :24])
    close(out[..., :24], torch.einsum("thk,hnk->thn", x.double(), w.double()), 8)
    assert not out[..., 24:].any()


def test_latents_are_stored_rounded_once() -> None:
    ckr = random(5, 160).bfloat16()[:, 10 : 10 + 128 + 16]
    norm, table = Norm(random(128, seed=1), 1e-6), yarn_cos_sin(200, 16, 1e4, 40, 100)
    positions = torch.tensor([0, 199, 7, 8, 64], dtype=torch.int32)
    slots = torch.tensor([3, 64, 191, 100, 0])
    pages = torch.zeros(3, PAGE_TOKENS, 144, dtype=torch.bfloat16)
    exact = torch.zeros(3, PAGE_TOKENS, 144)
    latent_cache.store_latents(ckr, norm, table, positions, slots, pages)
    store_latents_ref(ckr, norm, table, positions, slots, exact)
    torch.testing.assert_close(pages.float(), exact, rtol=2**-8, atol=0)
    assert (pages == exact.bfloat16()).float().mean() > 0.999


def test_fp8_latents_are_the_references_bytes() -> None:
    for latent, rope in ((256, 16), (64, 16)):
        ckr = random(6, 10 + latent + rope).bfloat16()[:, 10:]
        ckr[1] *= 1e-4
        ckr[2, 5] = 2000.0
        ckr[3] = 0
        norm, table = Norm(random(latent, seed=1), 1e-6), yarn_cos_sin(200, rope, 1e4, 40, 100)
        positions = torch.tensor([0, 199, 7, 8, 64, 3], dtype=torch.int32)
        slots = torch.tensor([3, 64, 191, 100, 0, 1])
        pages = ReferenceOps("fp8").new_pages(3, latent, rope)
        exact = pages.clone()
        latent_cache.store_latents(ckr, norm, table, positions, slots, pages)
        store_latents_ref(ckr, norm, table, positions, slots, exact)
        assert (pages == exact).float().mean() > 0.999
        got, expected = (read_pages_ref(p, latent, rope) for p in (pages, exact))
        torch.testing.assert_close(got, expected, rtol=1 / 7, atol=1e-6)


def test_queries_are_rotated_in_place_of_a_slice() -> None:
    q, table = random(4, 5, 24).bfloat16(), yarn_cos_sin(50, 8, 1e4, 40, 100)
    positions = torch.tensor([0, 49, 3, 4], dtype=torch.int32)
    out = torch.zeros(4, 5, 12, dtype=torch.bfloat16)
    latent_cache.rotate_queries(q[..., 16:], table, positions, out[..., 4:])
    expected = rotate_ref(q[..., 16:], table[positions.long()][:, None])
    torch.testing.assert_close(out[..., 4:].float(), expected, rtol=2**-8, atol=1e-6)


def paged(lengths: list[int], width: int) -> tuple[Tensor, Tensor]:
    """Pages in a mixed order, and the table of each sequence."""
    counts = [-(-n // PAGE_TOKENS) for n in lengths]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(3)).int()
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    for row, ids in zip(table, order.split(counts), strict=True):
        row[: len(ids)] = ids
    return random(sum(counts), PAGE_TOKENS, width, seed=4).bfloat16(), table


@pytest.mark.parametrize("heads, fp8", [(2, False), (66, False), (2, True), (66, True)])
def test_attention_over_pages(heads: int, fp8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short and long sequences, one to three rows of each, one split and several, some at a time.

    What lies beyond a sequence's last token is not seen, not even a NaN.
    """
    monkeypatch.setattr(mla_decode, "SPLIT_TOKENS", 128)
    monkeypatch.setattr(mla_decode, "PARTS", 16)  # of four splits each: four rows at a time
    latent, rope, lengths = 256 if fp8 else 32, 16, [1, 64, 129, 400]
    pages, table = paged(lengths, latent + rope)
    if fp8:
        tokens = pages.float().flatten(0, 1).split([latent, rope], dim=1)
        pages = fp8_tokens_ref(*tokens).view(len(pages), PAGE_TOKENS, -1)
    rows = [(0, 0), (1, 62), (1, 63), (2, 126), (2, 127), (2, 128), (3, 399)]
    sequence, positions = (torch.tensor(x, dtype=torch.int32) for x in zip(*rows, strict=True))
    q = random(len(rows), heads, latent + rope).bfloat16()
    out = mla_decode.mla_attention(q, pages, table, sequence, positions, 0.15, latent)
    plain = read_pages_ref(pages, latent, rope).float()
    expected = mla_attention_ref(q.float(), plain, table, sequence, positions, 0.15, latent)
    close(out, expected, 6)
    for b, n in enumerate(lengths):  # whoever had the page before may have left anything
        pages[table[b, (n - 1) // PAGE_TOKENS], (n - 1) % PAGE_TOKENS + 1 :] = (
            0xFF if fp8 else torch.nan
        )
    for t in range(len(rows)):  # alone, with a table just wide enough: the same bits
        width = int(positions[t]) // PAGE_TOKENS + 1
        one = mla_decode.mla_attention(
            q[t : t + 1], pages, table[:, :width].contiguous(), sequence[t : t + 1],
            positions[t : t + 1], 0.15, latent,
        )  # fmt: skip
        assert torch.equal(one[0], out[t])


@pytest.mark.parametrize("rows, keys", [(5, 5), (3, 130), (140, 150)])
def test_prefill_is_causal_attention_after_a_cached_prefix(rows: int, keys: int) -> None:
    heads, nope, rope, value = 2, 32, 16, 32
    q, kv = random(rows, heads, nope + rope), random(keys, heads, nope + value, seed=1)
    key_rope = random(keys, rope, seed=2)
    q, kv, key_rope = q.bfloat16(), kv.bfloat16(), key_rope.bfloat16()
    k = torch.cat([kv[..., :nope], key_rope[:, None].expand(-1, heads, -1)], dim=-1)
    score = torch.einsum("thx,shx->hts", q.float(), k.float()) * 0.1
    future = torch.arange(keys)[None, :] > torch.arange(keys - rows, keys)[:, None]
    weight = score.masked_fill(future, -torch.inf).softmax(dim=-1)
    expected = torch.einsum("hts,shv->thv", weight, kv[..., nope:].float())
    close(mla_prefill.mla_prefill(q, kv, key_rope, 0.1), expected, 6)
