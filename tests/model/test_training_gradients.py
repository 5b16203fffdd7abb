"""The differentiable operations against plain autograd, transformers, and the serving kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rayseek.kernels.select import Preference, choose_ops
from rayseek.model.batch import Batch
from rayseek.model.checkpoint import Checkpoint
from rayseek.model.inventory import Kind, inventory
from rayseek.model.maker import make_checkpoint
from rayseek.model.training.assess import Text, assess, load_model
from rayseek.model.training.attention import RowAttention, row_mask
from rayseek.model.training.corpus import Shard
from rayseek.model.training.grouped import GroupedExperts, plan_dispatch
from rayseek.model.training.loss import HeadLoss
from rayseek.model.training.packing import PackedBatch, lay_out
from rayseek.model.training.parameters import TrainedModel
from rayseek.model.training.step import Sums, add_gradients, states
from rayseek.model.training.train_ops import choose, in_order
from tests.conftest import TINY

LENGTHS = [20, 9, 3, 32, 12, 19]
ROWS = [[0, 1, 2], [3], [4, 5]]  # three rows of 32 tokens
ROW = 32


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
    draw = np.random.default_rng(1)
    return [draw.integers(0, TINY.vocab_size, n).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def packed(documents: list[list[int]]) -> PackedBatch:
    starts = np.cumsum([0, *LENGTHS])
    ids = np.concatenate(documents).astype(np.uint16)
    return lay_out(Shard(ids, np.full(len(ids), 255, np.uint8), starts), ROWS, ROW)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gradients") / "model"
    make_checkpoint(path, replace(TINY, num_hidden_layers=3), seed=5)
    return path


def trained(path: Path, dtype: torch.dtype) -> TrainedModel:
    """The trainer's model with the values of a checkpoint."""
    opened = Checkpoint.open(path)
    specs = inventory(opened.config)
    names = [name for name, spec in specs.items() if spec.kind != Kind.MTP_COPY]
    tensors = {name: opened.tensor(name).float().clone() for name in names}
    return TrainedModel(opened.config, tensors, dtype, ROW)


def errors(ours: Tensor, theirs: Tensor) -> Tensor:
    """Relative error of each row."""
    return (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)


def close(ours: Tensor, theirs: Tensor, what: str = "", within: float = 1e-4) -> None:
    assert ours.shape == theirs.shape
    ours, theirs = ours.detach(), theirs.detach()
    error = float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))
    assert error < within, f"{what}: {error}"


def test_gradients_are_those_of_transformers(
    path: Path, packed: PackedBatch, documents: list[list[int]]
) -> None:
    """Ours of packed rows, theirs of each document alone: nothing may leak between documents."""
    from transformers import DeepseekV3ForCausalLM

    model = trained(path, torch.float32)
    sums = Sums.zeros(len(model.bias), TINY.n_routed_experts)
    add_gradients(model, packed, 0.0, 0.0, sums)
    ours = model.named(model.gradient)
    other = DeepseekV3ForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    loss = torch.zeros(())
    for ids in documents:
        logits = other(torch.tensor([ids])).logits[0, :-1]
        loss = loss + F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")
    loss.backward()  # type: ignore[no-untyped-call]
    assert sums.values[0] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert sums.values[1] == sum(LENGTHS) - len(LENGTHS)
    compared = set()
    for name, parameter in other.named_parameters():
        assert parameter.grad is not None
        if ".experts." not in name:
            close(ours[name], parameter.grad, name, 1e-3)
            compared.add(name)
            continue
        stem, _, kind = name.rpartition(".")
        for e, gradient in enumerate(parameter.grad):
            parts = [f"{stem}.{e}.{p}_proj.weight" for p in kind.removesuffix("_proj").split("_")]
            close(torch.cat([ours[part] for part in parts]), gradient, f"{name} {e}", 1e-3)
            compared |= set(parts)
    module = f"model.layers.{model.config.num_hidden_layers}."
    assert compared == {name for name in ours if not name.startswith(module)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_trained_forward_pass_is_the_served_one(
    path: Path, packed: PackedBatch, documents: list[list[int]], dtype: torch.dtype
) -> None:
    """Main model and MTP module, each document alone in the latter, by absorbed attention."""
    model = trained(path, dtype)
    served = load_model(path, choose_ops(prefer="reference").ops, "cpu", 1, ROW)
    main_TD, mtp_TD = (s.detach().float() for s in states(model, packed))
    head = model.main.head.detach().float()
    found: list[Tensor] = []
    for row, begin, ids in places(documents):
        here = slice(row * ROW + begin, row * ROW + begin + len(ids))
        with torch.inference_mode():
            passed = served.forward(Batch.of_sequences([ids], [0], [[0]]))
            assert passed.normed_TD is not None
            ahead = Batch.of_sequences([ids[1:]], [0], [[0]])
            drafts = served.draft(ahead, passed.normed_TD[:-1]).logits_RV
        found.append(errors(main_TD[here] @ head.T, passed.logits_RV))
        found.append(errors((mtp_TD[here] @ head.T)[:-1], drafts))
    error = torch.cat(found)
    if dtype == torch.float32:
        assert error.max() < 1e-3
    else:  # rounding may send a token to another expert, now and then
        assert error.median() < 0.05 and error.max() < 1


def places(documents: list[list[int]]) -> Iterator[tuple[int, int, list[int]]]:
    """Row, offset in it, and ids of each document."""
    for row, members in enumerate(ROWS):
        begin = 0
        for d in members:
            yield row, begin, documents[d]
            begin += len(documents[d])


@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_the_assessment_is_by_hand(
    path: Path, documents: list[list[int]], kernels: Preference
) -> None:
    """Perplexity of the answers only, every token routed once, the MTP module's too."""
    texts = [Text(ids, [i >= len(ids) // 2 for i in range(len(ids))]) for ids in documents]
    ops = choose_ops(prefer=kernels).ops
    found = assess(path, texts, ops)
    served = load_model(path, ops, "cpu", 1, ROW)
    losses = []
    for text in texts:
        with torch.inference_mode():
            logits = served.forward(Batch.of_sequences([text.ids], [0], [[0]])).logits_RV
        loss = F.cross_entropy(logits[:-1], torch.tensor(text.ids[1:]), reduction="none")
        losses.append(loss[torch.tensor(text.answer[1:])])
        assert text.prompt == text.ids[: len(text.ids) // 2]
    assert found.tokens == sum(map(len, losses))
    assert math.log(found.perplexity) == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
    assert len(found.max_violation) == 3  # two MoE layers of three, and the module's


def with_gradients(*tensors: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Two sets of leaves with the same values."""
    return tuple([t.clone().requires_grad_() for t in tensors] for _ in range(2))  # type: ignore[return-value]


def test_attention_against_autograd() -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, 16, 8)
    ours, plain = with_gradients(*(torch.randn(shape, generator=generator) for _ in "qkv"))
    position = torch.tensor([[*range(5), *range(11)], list(range(16))], dtype=torch.int32)
    document = (position == 0).cumsum(1)
    seen = (document[:, :, None] == document[:, None]) & torch.ones(16, 16).tril().bool()
    mask = row_mask(position, torch.float32)
    assert torch.equal(mask[:, 0] == 0, seen) and bool((mask[:, 0][~seen] == -torch.inf).all())
    weight = torch.randn(shape, generator=generator)
    out = RowAttention.apply(*ours, mask, 0.3)  # type: ignore[no-untyped-call]
    scores = (plain[0] @ plain[1].mT * 0.3).masked_fill(~seen[:, None], -torch.inf)
    expected = scores.softmax(-1) @ plain[2]
    for value in (out, expected):
        (value * weight).sum().backward()
    close(out, expected)
    for a, b in zip(ours, plain, strict=True):
        assert a.grad is not None and b.grad is not None
        close(a.grad, b.grad)


def test_grouped_experts_against_autograd() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, experts, k, width, inner = 150, 8, 2, 16, 12
    x, weight, gate_up, down, pull = (
        torch.randn(shape, generator=generator)
        for shape in ((tokens, width), (tokens, k), (experts, 2 * inner, width),
                      (experts, width, inner), (tokens, width))
    )  # fmt: skip
    scores = torch.rand(experts - 1, tokens, generator=generator)  # one expert gets no token
    chosen = choose(torch.cat([scores, torch.full((1, tokens), -9.0)]), 1, 1, k)
    expert_TK = in_order(chosen, k)
    assert torch.equal(expert_TK.sort(-1).values, expert_TK)
    ours, plain = with_gradients(x, weight, gate_up, down)
    plan = plan_dispatch(expert_TK, experts)
    assert plan.count_E.tolist() == [int((expert_TK == e).sum()) for e in range(experts)]
    out = GroupedExperts.apply(*ours, plan)  # type: ignore[no-untyped-call]
    px, pweight, pgate_up, pdown = plain
    expected = torch.zeros(tokens, width)
    for t in range(tokens):
        for j, e in enumerate(expert_TK[t].tolist()):
            gate, up = (pgate_up[e] @ px[t]).chunk(2)
            expected[t] = expected[t] + pweight[t, j] * (pdown[e] @ (F.silu(gate) * up))
    for value in (out, expected):
        (value * pull).sum().backward()
    close(out, expected)
    for a, b in zip(ours, plain, strict=True):
        assert a.grad is not None and b.grad is not None
        close(a.grad, b.grad)


def test_head_loss_against_autograd() -> None:
    generator = torch.Generator().manual_seed(0)
    state, head = torch.randn(700, 8, generator=generator), torch.randn(50, 8, generator=generator)
    target = torch.randint(0, 50, (700,), generator=generator)
    weight = torch.rand(700, generator=generator).clamp(min=0.2) - 0.2
    ours, plain = with_gradients(state, head)
    loss, right = HeadLoss.apply(*ours, target, weight)  # type: ignore[no-untyped-call]
    logits = plain[0] @ plain[1].T
    expected = (F.cross_entropy(logits, target, reduction="none") * weight).sum()
    (0.5 * loss).backward()
    (0.5 * expected).backward()  # type: ignore[no-untyped-call]
    assert loss.detach() == pytest.approx(float(expected.detach()), rel=1e-5)
    assert torch.equal(right, (logits.argmax(-1) == target) & (weight > 0))
    for a, b in zip(ours, plain, strict=True):
        assert a.grad is not None and b.grad is not None
        close(a.grad, b.grad)


def test_recycled_states_stay_within_a_document(
    path: Path, packed: PackedBatch, documents: list[list[int]]
) -> None:
    """The module's rows that go on from its own states: never a document's first, and none of
    another document's; the main model sees nothing of it."""
    model = trained(path, torch.float32)
    main_TD, plain_TD = (t.detach() for t in states(model, packed))
    same_TD, recycled_TD = (t.detach() for t in states(model, packed, recycled=0.5))
    close(same_TD, main_TD)
    changed_T = errors(recycled_TD, plain_TD) > 1e-4
    first_T = torch.from_numpy(packed.position == 0)
    assert not changed_T[first_T].any() and changed_T.any()
    at = 0
    for row in ROWS:
        for number in row:
            ids = documents[number]
            starts = np.array([0, len(ids)])
            alone = Shard(np.array(ids, np.uint16), np.full(len(ids), 255, np.uint8), starts)
            _, theirs_TD = states(model, lay_out(alone, [[0]], ROW), recycled=0.5)
            length = len(ids) - 2  # of rows that learn: each looks two tokens ahead
            close(recycled_TD[at : at + length], theirs_TD[:length], str(number))
            at += len(ids)
        at = -(-at // ROW) * ROW
