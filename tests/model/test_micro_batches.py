"""A batch in parts gives the bits of the batch, and all parts together are the batch."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rayseek.model.batch import Batch
from rayseek.model.latent_cache import LatentCache
from rayseek.model.micro_batches import part_sizes, split
from rayseek.model.mtp import MTPModule
from rayseek.model.transformer import Transformer


@given(rows=st.integers(0, 500), parts=st.integers(1, 5))
def test_parts_are_even_and_complete(rows: int, parts: int) -> None:
    sizes = part_sizes(rows, parts)
    assert len(sizes) == parts and sum(sizes) == rows and max(sizes) - min(sizes) <= 1


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    parts=st.integers(1, 4),
    seed=st.integers(0, 99),
)
@settings(max_examples=20)
def test_a_model_in_parts_is_the_model(
    tiny_model: tuple[Transformer, MTPModule], lengths: list[int], parts: int, seed: int
) -> None:
    make = torch.Generator().manual_seed(seed)
    model, _ = tiny_model
    ids = [torch.randint(0, 2000, (n + 1,), generator=make).tolist() for n in lengths]
    pages = [[i] for i in range(len(lengths))]

    @torch.inference_mode()
    def run(parts: int) -> list[Tensor]:
        """A prompt, then one more token of each sequence; and what the cache holds."""
        cache = LatentCache(model.config, len(pages), model.ops)
        prompts = Batch.of_sequences([x[:-1] for x in ids], [0] * len(ids), pages)
        more = Batch.of_sequences([x[-1:] for x in ids], lengths, pages)
        return [model.hidden(b, cache.layers, parts) for b in (prompts, more)] + cache.layers

    whole = run(1)
    if model.ops.name == "native":
        assert all(torch.equal(a, b) for a, b in zip(run(parts), whole, strict=True))
    batch = Batch.of_sequences(ids, [0] * len(ids), pages)
    some = split(batch, parts)
    for name in ("ids_T", "positions_T", "slots_T", "sequence_T"):
        assert torch.equal(torch.cat([getattr(b, name) for b in some]), getattr(batch, name))
