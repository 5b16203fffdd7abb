"""`CudaOps` as a whole in the interpreter: a tiny model, and experts in one place or apart."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rayseek.kernels.cuda import CudaOps
from rayseek.kernels.fp8 import quantise_blocks_ref
from rayseek.kernels.kv_format import KVDtype
from rayseek.kernels.ops import Weight
from rayseek.kernels.reference import ReferenceOps
from rayseek.model.batch import Batch
from rayseek.model.checkpoint import Checkpoint
from rayseek.model.config import ModelConfig
from rayseek.model.expert_slots import ExpertSlots, ExpertStore
from rayseek.model.latent_cache import LatentCache
from rayseek.model.maker import SMALL, make_checkpoint
from rayseek.model.transformer import Transformer

CONFIG = replace(
    SMALL, vocab_size=200, hidden_size=128, intermediate_size=128, moe_intermediate_size=128,
    num_hidden_layers=2, num_attention_heads=2, q_lora_rank=128, kv_lora_rank=64,
    qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, n_routed_experts=8,
    num_experts_per_tok=2, num_nextn_predict_layers=0,
)  # fmt: skip


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class RandomWeights:
    """What `Weights` gives, made up by name."""

    def __init__(self, config: ModelConfig, fp8: bool) -> None:
        from rayseek.model.inventory import inventory

        self.specs, self.fp8 = inventory(config), fp8

    def tensor(self, name: str) -> Tensor:
        shape = self.specs[name].shape
        value = random(*shape, seed=sum(name.encode()))
        if len(shape) == 1:
            return 1 + value / 10 if "norm" in name else value / 10
        return (value * shape[-1] ** -0.5).bfloat16()

    def weight(self, name: str) -> Weight:
        data = self.tensor(name)
        plain = not self.fp8 or "lm_head" in name or "mlp.gate." in name
        return Weight(data) if plain else quantise_blocks_ref(data)


def passes(ops: CudaOps | ReferenceOps, fp8: bool) -> Tensor:
    """Logits of a prompt in two pieces beside another sequence."""
    model = Transformer(CONFIG, RandomWeights(CONFIG, fp8), ops, 256)  # type: ignore[arg-type]
    cache = LatentCache(CONFIG, 6, ops)
    ids = torch.randint(0, 200, (90,), generator=torch.Generator().manual_seed(1)).tolist()
    first = Batch.of_sequences([ids[:70], ids[3:7]], [0, 0], [[4, 1], [2]])
    second = Batch.of_sequences([ids[70:73], ids[7:8]], [70, 4], [[4, 1], [2]])
    return torch.cat([model(first, cache), model(second, cache)])


@pytest.mark.parametrize("fp8, kv, noise", [(True, "auto", 0.15), (False, "fp8", 0.06)])
def test_a_model_gives_the_references_logits(fp8: bool, kv: KVDtype, noise: float) -> None:
    """To the noise of e4m3 activations, which a wrong rotation or page would exceed many times.

    In a few rows it sends the row to another expert.
    """
    expected, actual = passes(ReferenceOps(kv), fp8), passes(CudaOps("cpu", kv), fp8)
    assert actual.dtype is torch.float32
    error_T = ((actual - expected).norm(dim=1) / expected.norm(dim=1)).sort().values
    assert error_T.median() < noise and error_T[int(0.8 * len(error_T))] < 1.5 * noise, error_T


@pytest.mark.parametrize("inner, hidden", [(128, 128), (40, 96)])
def test_experts_apart_give_the_bits_of_experts_here(inner: int, hidden: int) -> None:
    """Blocks from the checkpoint, and matrices that must be filled up to whole blocks first."""
    ops, experts = CudaOps("cpu"), 5

    def made(n: int, k: int, seed: int) -> Weight:
        data = random(n, k, seed=seed) * k**-0.5
        return quantise_blocks_ref(data) if inner == 128 else Weight(data.bfloat16())

    gate_up = [[made(inner, hidden, 2 * e + i) for i in (0, 1)] for e in range(experts)]
    down = [made(hidden, inner, 100 + e) for e in range(experts)]
    packed = ops.pack_experts(gate_up, down)
    x, into = random(30, hidden).bfloat16(), random(30, hidden, seed=5)
    chosen = torch.stack([torch.randperm(experts)[:3].sort().values for _ in range(30)]).int()
    weights = random(30, 3, seed=6).abs()
    here, reference = into.clone(), into.clone()
    ops.experts(x, chosen, weights, packed, here)
    plain = ReferenceOps()
    plain.experts(x, chosen, weights, plain.pack_experts(gate_up, down), reference)
    error = (here - reference).norm() / (reference - into).norm()
    assert error < 0.06, error

    parts = [ops.pack_experts(gate_up[:2], down[:2]), ops.pack_experts(gate_up[2:], down[2:])]
    joined = ops.join_experts(parts[::-1])  # experts 2, 3, 4, 0, 1
    pair_row = torch.arange(30).repeat_interleave(3).int()
    words = ops.row_words(x)
    y = ops.expert_rows(words, pair_row, (chosen.flatten() - 2) % 5, joined)
    apart = into.clone()
    ops.combine(y, torch.arange(90).view(30, 3).int(), weights, apart)
    assert torch.equal(apart, here)
    absent = ops.expert_rows(words, pair_row[:4], torch.tensor([-1, 0, -1, 4]), joined)
    assert not absent[[0, 2]].any() and absent[[1, 3]].any()


def memory_of(*slots: ExpertSlots) -> int:
    """Bytes of all tensors that can be reached from the experts of a process."""
    found: dict[int, int] = {}
    todo: list[object] = list(slots)
    seen: set[int] = set()
    while todo:
        here = todo.pop()
        if id(here) in seen or isinstance(here, type | CudaOps):
            continue
        seen.add(id(here))
        if isinstance(here, Tensor):
            storage = here.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        todo += gc.get_referents(here)
    return sum(found.values())


def test_experts_are_in_memory_once(tmp_path: Path) -> None:
    """Also those that came from different places, and those that stay at the next placement."""
    config = replace(CONFIG, num_hidden_layers=3, vocab_size=300)
    make_checkpoint(tmp_path / "model", config, seed=0, fp8=True)
    store = ExpertStore(Checkpoint.open(tmp_path / "model"), CudaOps("cpu"))
    inner, hidden = config.moe_intermediate_size, config.hidden_size
    one = 3 * inner * hidden + 3 * 4  # e4m3, and a scale for each of its three blocks
    first = store.load({1: [3, 0, 7], 2: [5, 6, 1]})
    assert memory_of(first) == 6 * one
    second = store.load({1: [3, 0, 7], 2: [1, 5]}, first)
    assert memory_of(second) == 5 * one
    assert memory_of(first, second) == (6 + 2) * one  # layer 1 is shared, layer 2 made anew
    x = CudaOps("cpu").row_words(random(1, hidden).bfloat16())
    row = torch.zeros(1, dtype=torch.int32)
    for old, new in ((2, 0), (0, 1)):
        slots = torch.tensor([old], dtype=torch.int32), torch.tensor([new], dtype=torch.int32)
        a, b = first.compute(2, x, row, slots[0]), second.compute(2, x, row, slots[1])
        assert torch.equal(a, b) and a.any()
    third = store.load({1: [7, 4], 2: [5, 1]}, second, release=True)
    assert memory_of(second, third) == memory_of(third) == 4 * one
