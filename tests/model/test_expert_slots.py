"""Experts held in slots: reused, copied between processes, checked, and exactly the local ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rayseek.kernels.ops import SplitOps
from rayseek.kernels.select import choose_ops
from rayseek.model.checkpoint import Checkpoint
from rayseek.model.config import ModelConfig
from rayseek.model.expert_slots import ExpertCopy, ExpertSlots, ExpertStore
from rayseek.model.inventory import owned_names
from rayseek.model.maker import SMALL, make_checkpoint
from rayseek.model.moe import LocalExperts

CONFIG = replace(
    SMALL, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=2, q_lora_rank=32, kv_lora_rank=64, n_routed_experts=8,
    num_experts_per_tok=2, vocab_size=2048,
)  # fmt: skip
LAYERS = (1, 2)  # the second is the MTP module's


@pytest.fixture(scope="module", params=[False, True], ids=["bf16", "fp8"])
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    path = tmp_path_factory.mktemp("models") / "experts"
    make_checkpoint(path, CONFIG, seed=1, fp8=request.param)
    return Checkpoint.open(path)


@pytest.fixture
def ops() -> SplitOps:
    return choose_ops().ops


def check(slots: ExpertSlots, checkpoint: Checkpoint, ops: SplitOps) -> None:
    """Every slot of every layer gives the row that the layer's local experts give."""
    config: ModelConfig = checkpoint.config
    weights = checkpoint.load(owned_names(config), progress=False)
    for layer, experts in slots.lists.items():
        local = LocalExperts(config, weights, f"model.layers.{layer}", ops)
        x = torch.randn(3, CONFIG.hidden_size, generator=torch.Generator().manual_seed(layer))
        count = len(experts)
        row = torch.arange(count, dtype=torch.int32) % 3
        got = slots.compute(layer, x, row, torch.arange(count, dtype=torch.int32))
        expected = torch.zeros_like(got)
        ids = torch.tensor(experts, dtype=torch.int32)[:, None]
        local.begin(x[row.long()], ids).add(torch.ones(count, 1), expected)
        assert torch.equal(got, expected)


def test_slots_hold_what_a_placement_lists(checkpoint: Checkpoint, ops: SplitOps) -> None:
    store = ExpertStore(checkpoint, ops)
    check(store.load({1: [3, 0, 7], 2: [5, 6, 1]}), checkpoint, ops)


def test_what_stays_is_not_read_again(
    checkpoint: Checkpoint, ops: SplitOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ExpertStore(checkpoint, ops)
    first = store.load({1: [3, 0, 7], 2: [5, 6, 1]})
    read: list[str] = []
    plain = Checkpoint.load

    def load(self: Checkpoint, names: list[str], progress: bool | None = None) -> object:
        read.extend(names)
        return plain(self, names, progress)

    monkeypatch.setattr(Checkpoint, "load", load)
    second = store.load({1: [7, 3, 4], 2: [1, 5, 6]}, first)
    assert {name.split(".")[5] for name in read} == {"4"}
    monkeypatch.undo()
    check(second, checkpoint, ops)
    check(first, checkpoint, ops)  # still whole: it computes until the next one is adopted


def test_copies_come_from_others_and_flipped_bits_are_healed(
    checkpoint: Checkpoint, ops: SplitOps
) -> None:
    sender, receiver = ExpertStore(checkpoint, ops), ExpertStore(checkpoint, ops)
    had = sender.load({1: [0, 1, 2, 3]})
    damage = {1: "flip", 2: "short", 3: "digest"}

    def fetch(layer: int, expert: int) -> ExpertCopy | None:
        if expert > 3:
            return None
        copy = sender.copy(layer, expert)
        data = bytearray(copy.data)
        match damage.get(expert):
            case "flip":
                data[len(data) // 2] ^= 4
            case "short":
                data.pop()
            case "digest":
                return replace(copy, digest=bytes(len(copy.digest)))
        return replace(copy, data=bytes(data))

    got = receiver.load({1: [4, 2, 1, 0, 3]}, None, fetch)
    taken = receiver.taken
    assert (taken["copied"], taken["refused"], taken["read"]) == (1, 3, 4)
    assert 4 * taken["copied_bytes"] == taken["read_bytes"] == sender.taken["read_bytes"]
    assert not sender.taken["copied"]
    check(got, checkpoint, ops)
    for expert in range(4):
        assert got.digest(1, expert) == had.digest(1, expert)
    assert len({got.digest(1, expert) for expert in range(5)}) == 5


def test_a_good_copy_is_used_and_not_the_checkpoint(checkpoint: Checkpoint, ops: SplitOps) -> None:
    """What the peer holds counts: expert 5's bytes, given as expert 0's, are computed with."""
    store = ExpertStore(checkpoint, ops)
    had = store.load({1: [5]})
    got = store.load({1: [0]}, None, lambda layer, _: store.copy(layer, 5))
    x, zero = torch.ones(1, CONFIG.hidden_size), torch.zeros(1, dtype=torch.int32)
    assert torch.equal(got.compute(1, x, zero, zero), had.compute(1, x, zero, zero))
    with pytest.raises(KeyError):
        store.copy(1, 4)
