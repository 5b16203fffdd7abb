"""The slice bench without a GPU: its weights, floors and reckoning."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rayseek.cluster import slice_bench
from rayseek.kernels.hopper.bench import Ceilings
from rayseek.model.official import DEEPSEEK_V3

TOP = Ceilings("GPU", 3e12, 6e14, 1.2e15)


def test_floor_of_one_token_is_the_known_count() -> None:
    """Spec 1.9: parameters and operations of a layer, and 278.5 kFLOP a cached token."""
    one = slice_bench.layer_floor(DEEPSEEK_V3, True, 1, 1000, 1000)
    attention = 15.14e6 + 37.75e6 + 117.44e6
    expert = 44.04e6
    assert one.bytes == pytest.approx(
        attention + 2 * 16.78e6 + 9 * expert + 3.67e6 + 1000 * 1152, rel=1e-3
    )
    assert one.fp8_flops == pytest.approx(2 * (attention + 9 * expert), rel=1e-3)
    assert one.bf16_flops == pytest.approx(2 * 16.78e6 + 1000 * 278.5e3, rel=1e-3)
    many = slice_bench.layer_floor(DEEPSEEK_V3, True, 4096, 0, 0)
    assert many.bytes == pytest.approx(attention + 2 * 16.78e6 + 257 * expert + 3.67e6, rel=1e-3)
    dense = slice_bench.layer_floor(DEEPSEEK_V3, False, 1, 0, 0)
    assert dense.bytes == pytest.approx(attention + 2 * 16.78e6 + 396.36e6, rel=1e-3)


def test_the_whole_model_is_the_sum_of_its_layers() -> None:
    config = slice_bench.sliced(DEEPSEEK_V3, 5)
    dense_s, moe_s, rest_s = 3.0, 5.0, 11.0
    taken = rest_s + dense_s + 4 * moe_s
    whole = slice_bench.whole_model_s(taken, moe_s, dense_s, config, DEEPSEEK_V3)
    assert whole == rest_s + 3 * dense_s + 58 * moe_s
    with pytest.raises(ValueError, match="3 or more"):
        slice_bench.sliced(DEEPSEEK_V3, 2)


def test_report_has_a_line_for_each_pass() -> None:
    config = slice_bench.sliced(DEEPSEEK_V3, 4)
    times = {
        ("decode", 64, 4096): 4e-3, ("decode, graphs", 64, 4096): 3e-3, ("prefill", 1024, 0): 9e-3
    }  # fmt: skip
    text = slice_bench.report(config, DEEPSEEK_V3, times, {k: t / 2 for k, t in times.items()}, TOP)
    assert "| decode 64 x 4096 | 4.000 |" in text and "| prefill 1024 | 9.000 |" in text
    assert "61 layers, ms" in text and "| decode, graphs 64 x 4096 | 3.000 |" in text
    floors = [line.split("|")[3] for line in text.splitlines()[2:4]]
    assert floors[0] == floors[1], "it is the same work"


def test_weights_and_batches_have_the_models_shapes() -> None:
    tiny = replace(slice_bench.sliced(DEEPSEEK_V3, 3), hidden_size=128, vocab_size=300)
    weights = slice_bench.RandomWeights(tiny, "cpu")
    weight = weights.weight("model.layers.1.mlp.experts.3.gate_proj.weight")
    assert weight.data.shape == (2048, 128) and weight.scale_inv is not None
    assert weight.scale_inv.shape == (16, 1) and bool(weight.data.float().isfinite().all())
    assert weights.weight("model.layers.1.mlp.gate.weight").scale_inv is None
    batch = slice_bench.decode_batch(3, 130)
    assert batch.positions_T.tolist() == [129] * 3 and batch.page_table_BP.shape == (3, 3)
    assert batch.slots_T.tolist() == [2 * 64 + 1, 5 * 64 + 1, 8 * 64 + 1]
