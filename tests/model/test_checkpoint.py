"""Opening a checkpoint names everything wrong with it; loading gives exactly the stored values."""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from rayseek.kernels.fp8 import dequantise_ref
from rayseek.model.checkpoint import INDEX, SINGLE, Checkpoint, CheckpointError
from rayseek.model.config import ConfigError, ModelConfig
from rayseek.model.inventory import inventory, owned_names
from rayseek.model.maker import SMALL, make_checkpoint
from rayseek.model.reading import PIECE_BYTES, Span, pieces

TINY = replace(
    SMALL, vocab_size=300, num_hidden_layers=2, n_routed_experts=4, n_group=2, topk_group=1,
    num_experts_per_tok=2,
)  # fmt: skip
EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"
FIRST_SHARD = "model-00001-of-000003.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block-FP8 and one BF16 checkpoint; tests that change anything copy them."""
    folder = tmp_path_factory.mktemp("made")
    make_checkpoint(folder / "fp8", TINY, shards=3)
    make_checkpoint(folder / "bf16", TINY, fp8=False, shards=3)
    return folder


@pytest.fixture(params=["fp8", "bf16"])
def folder(request: pytest.FixtureRequest, made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / request.param, tmp_path / "copy"))


def read_all(folder: Path) -> dict[str, Tensor]:
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


def weight_map(folder: Path) -> dict[str, str]:
    return dict(json.loads((folder / INDEX).read_text())["weight_map"])


def edit_shard(folder: Path, name: str, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite the shard that holds tensor `name`; the index stays."""
    file = folder / weight_map(folder)[name]
    tensors = {n: t.clone() for n, t in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)


def edit_json(file: Path, **changes: Any) -> None:
    raw = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))


def as_single(folder: Path, tensors: dict[str, Tensor]) -> None:
    for file in (folder / INDEX, *folder.glob("model-*.safetensors")):
        file.unlink()
    save_file(tensors, folder / SINGLE)


def problems_of(folder: Path) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    assert str(folder) in str(caught.value)
    return caught.value.problems


def same(ours: Tensor, theirs: Tensor) -> bool:
    return (
        ours.dtype == theirs.dtype
        and ours.shape == theirs.shape
        and torch.equal(ours.contiguous().view(torch.uint8), theirs.view(torch.uint8))
    )


def test_values_are_those_that_safetensors_reads(folder: Path) -> None:
    theirs = read_all(folder)
    checkpoint = Checkpoint.open(folder)
    weights = checkpoint.load(owned_names(checkpoint.config))
    for name in owned_names(checkpoint.config):
        assert same(weights.tensor(name), theirs[name]), name
        assert same(checkpoint.tensor(name), theirs[name]), name
    for source in (checkpoint, weights):
        weight = source.weight(EXPERT)
        scale = theirs.get(EXPERT + "_scale_inv")
        assert (weight.scale_inv is None) == (scale is None)
        assert scale is None or torch.equal(weight.scale_inv, scale)  # type: ignore[arg-type]


def test_a_scale_may_lie_in_another_file(made: Path) -> None:
    files = weight_map(made / "fp8")
    apart = [n for n in files if f"{n}_scale_inv" in files and files[n] != files[f"{n}_scale_inv"]]
    assert apart
    weights = Checkpoint.open(made / "fp8").load([apart[0], f"{apart[0]}_scale_inv"])
    assert dequantise_ref(weights.weight(apart[0])).std() > 0


def test_a_rank_gets_only_what_it_asked_for(made: Path) -> None:
    checkpoint = Checkpoint.open(made / "fp8")
    weights = checkpoint.load(owned_names(TINY, {1: {0, 2}, 2: {1}}))
    assert "model.layers.1.mlp.experts.2.up_proj.weight" in weights.tensors
    assert "model.layers.2.embed_tokens.weight" not in weights.tensors
    with pytest.raises(KeyError):
        weights.tensor(EXPERT)
    with pytest.raises(CheckpointError, match="no tensor 'model.typo'"):
        checkpoint.load(["model.typo"])


def test_one_file_without_an_index(folder: Path) -> None:
    tensors = read_all(folder)
    as_single(folder, tensors)
    checkpoint = Checkpoint.open(folder)
    assert same(checkpoint.tensor(EXPERT), tensors[EXPERT])


def test_a_float32_checkpoint(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made / "bf16", tmp_path / "f32"))
    as_single(folder, {name: tensor.float() for name, tensor in read_all(folder).items()})
    assert Checkpoint.open(folder).tensor("lm_head.weight").dtype == torch.float32


def test_the_selection_bias_may_be_bfloat16(folder: Path) -> None:
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    edit_shard(folder, bias, lambda t: t.update({bias: t[bias].bfloat16()}))
    assert Checkpoint.open(folder).tensor(bias).dtype == torch.bfloat16


def test_mtp_copies_may_be_absent(folder: Path) -> None:
    tensors = read_all(folder)
    del tensors["model.layers.2.embed_tokens.weight"]
    del tensors["model.layers.2.shared_head.head.weight"]
    as_single(folder, tensors)
    Checkpoint.open(folder)


def test_no_mtp_module_needs_the_config_to_say_so(folder: Path) -> None:
    tensors = {n: t for n, t in read_all(folder).items() if "layers.2." not in n}
    as_single(folder, tensors)
    (problem,) = problems_of(folder)
    assert "num_nextn_predict_layers" in problem
    edit_json(folder / "config.json", num_nextn_predict_layers=0)
    Checkpoint.open(folder)


def test_a_checkpoint_that_transformers_saved(tmp_path: Path) -> None:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    raw = replace(TINY, num_nextn_predict_layers=0, fp8_blocks=False, q_lora_rank=None).to_dict()
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**raw)).bfloat16()
    theirs.save_pretrained(tmp_path, max_shard_size="500KB")
    assert (tmp_path / INDEX).exists()
    checkpoint = Checkpoint.open(tmp_path)
    experts = theirs.state_dict()["model.layers.1.mlp.experts.down_proj"]
    assert torch.equal(checkpoint.tensor(EXPERT), experts[3])


def rename(tensors: dict[str, Tensor], old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


def garbage(file: Path) -> None:
    file.write_bytes((9).to_bytes(8, "little") + b"not json!" + bytes(50))


def longer_header(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes((len(data) * 2).to_bytes(8, "little") + data[8:])


def cut(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])


BREAKAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda p: (p / FIRST_SHARD).unlink(), rf"^{FIRST_SHARD} \(.* no such file"),
    "cut shard": (lambda p: cut(p / FIRST_SHARD, -1), rf"^{FIRST_SHARD} .*cut off: .* bytes"),
    "cut header": (lambda p: cut(p / FIRST_SHARD, 100), "cut off in its header"),
    "empty shard": (lambda p: cut(p / FIRST_SHARD, 0), "cut off in its header"),
    "endless header": (lambda p: longer_header(p / FIRST_SHARD), "cut off in its header"),
    "garbage": (lambda p: garbage(p / FIRST_SHARD), "header is not JSON"),
    "bytes appended": (
        lambda p: (p / FIRST_SHARD).write_bytes((p / FIRST_SHARD).read_bytes() + b"x"),
        "too long",
    ),
    "wrong shape": (
        lambda p: edit_shard(p, EXPERT, lambda t: t.update({EXPERT: t[EXPERT][:, :64].clone()})),
        rf"^{EXPERT}: shape \[256, 64\]; config.json means \[256, 128\]",
    ),
    "wrong dtype": (
        lambda p: edit_shard(p, EXPERT, lambda t: t.update({EXPERT: t[EXPERT].float()})),
        rf"^{EXPERT}: dtype F32; expected",
    ),
    "unknown dtype": (
        lambda p: edit_shard(p, EXPERT, lambda t: t.update({EXPERT: t[EXPERT].half()})),
        rf"^{EXPERT}: dtype F16; expected",
    ),
    "tensor lost": (
        lambda p: edit_shard(p, EXPERT, lambda t: t.pop(EXPERT)),
        rf"^{EXPERT}: {INDEX} places it in",
    ),
    "index lost": (lambda p: (p / INDEX).unlink(), "neither .* nor"),
    "index garbage": (lambda p: (p / INDEX).write_text("{"), f"{INDEX}: cannot be read"),
    "index of lists": (lambda p: edit_json(p / INDEX, weight_map=[]), "cannot be read"),
    "index elsewhere": (
        lambda p: edit_json(p / INDEX, weight_map={"x": "../x.safetensors"}),
        "must name files of this folder",
    ),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_broken_checkpoints(breakage: str, folder: Path) -> None:
    break_it, message = BREAKAGES[breakage]
    break_it(folder)
    problems = problems_of(folder)
    assert any(re.search(message, problem) for problem in problems), problems
    assert len(problems) <= 2  # nothing is said about what follows from it


def test_every_problem_is_in_one_error(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        rename(tensors, EXPERT, "model.layers.1.mlp.experts.down_proj")
        tensors["model.norm.weight"] = torch.ones(7, dtype=torch.bfloat16)

    tensors = read_all(folder)
    change(tensors)
    as_single(folder, tensors)
    text = "\n".join(problems_of(folder))
    assert f"{EXPERT}: missing" in text
    assert "model.layers.1.mlp.experts.down_proj: not a tensor of this config" in text
    assert "model.norm.weight: shape [7]; config.json means [256]" in text


def test_a_missing_scale_is_named(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made / "fp8", tmp_path / "copy"))
    tensors = read_all(folder)
    del tensors[f"{EXPERT}_scale_inv"]
    as_single(folder, tensors)
    assert problems_of(folder) == [f"{EXPERT}_scale_inv: missing; expected F32 [2, 1]"]


def test_one_float32_tensor_does_not_make_a_float32_checkpoint(folder: Path) -> None:
    tensors = read_all(folder)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    as_single(folder, tensors)
    assert problems_of(folder) == ["model.norm.weight: dtype F32; expected BF16"]


def test_a_tensor_in_two_files(folder: Path) -> None:
    other = next(n for n, f in weight_map(folder).items() if f != weight_map(folder)[EXPERT])
    edit_shard(folder, other, lambda t: t.update({EXPERT: read_all(folder)[EXPERT]}))
    assert any(p.startswith(f"{EXPERT}: stored") for p in problems_of(folder))


def test_a_tensor_elsewhere_than_the_index_says(folder: Path) -> None:
    files = weight_map(folder)
    holder = files[EXPERT]
    files[EXPERT] = next(file for file in files.values() if file != holder)
    edit_json(folder / INDEX, weight_map=files)
    assert problems_of(folder) == [
        f"{EXPERT}: stored in {holder}, but {INDEX} places it in {files[EXPERT]}"
    ]


def test_a_tensor_that_the_index_does_not_list(folder: Path) -> None:
    files = weight_map(folder)
    holder = files.pop(EXPERT)
    edit_json(folder / INDEX, weight_map=files)
    assert problems_of(folder) == [f"{EXPERT}: stored in {holder}, but {INDEX} does not list it"]


@pytest.mark.parametrize("made_as", ["fp8", "bf16"])
def test_config_and_files_disagree_about_fp8(made_as: str, made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made / made_as, tmp_path / "copy"))
    other = made / ("bf16" if made_as == "fp8" else "fp8")
    shutil.copy(other / "config.json", folder)
    (problem,) = problems_of(folder)
    assert "quantization_config" in problem


def test_a_long_list_of_problems_is_shortened_in_the_message_only(folder: Path) -> None:
    edit_json(folder / "config.json", n_routed_experts=64)
    with pytest.raises(CheckpointError, match=r"\.\.\. and \d+ more") as caught:
        Checkpoint.open(folder)
    assert len(caught.value.problems) > 100


def test_a_bad_config_is_named(folder: Path) -> None:
    edit_json(folder / "config.json", topk_method="greedy")
    with pytest.raises(ConfigError, match="topk_method"):
        Checkpoint.open(folder)


def test_a_file_that_is_written_after_it_was_opened(folder: Path) -> None:
    """Shorter or not: nobody computes with weights of which a part is new."""
    checkpoint = Checkpoint.open(folder)
    shard = folder / FIRST_SHARD
    others = [name for name, entry in checkpoint.stored.items() if entry.file != FIRST_SHARD]
    for change in (lambda: os.utime(shard), lambda: cut(shard, 5000)):
        change()
        with pytest.raises(CheckpointError, match=rf"{FIRST_SHARD}: written since"):
            checkpoint.load(owned_names(checkpoint.config))
        checkpoint.load(others)


def test_the_671b_layout_is_checked_without_reading_data(tmp_path: Path) -> None:
    """163 files of the real sizes, all of them holes."""
    shutil.copy(Path(__file__).with_name("config_671b.json"), tmp_path / "config.json")
    specs = inventory(ModelConfig.from_pretrained(tmp_path))
    files = [f"model-{n:05}-of-000163.safetensors" for n in range(1, 164)]
    headers: dict[str, dict[str, Any]] = {file: {} for file in files}
    sizes = dict.fromkeys(files, 0)
    for number, (name, spec) in enumerate(specs.items()):
        file = files[number * len(files) // len(specs)]
        end = sizes[file] + spec.bytes
        headers[file][name] = {
            "dtype": spec.dtype, "shape": spec.shape, "data_offsets": [sizes[file], end]
        }  # fmt: skip
        sizes[file] = end
    for file, header in headers.items():
        text = json.dumps(header).encode()
        with (tmp_path / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + sizes[file])
    index = {"weight_map": {n: file for file, header in headers.items() for n in header}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    checkpoint = Checkpoint.open(tmp_path)
    assert len(checkpoint.stored) == 91_991
    assert sum(e.end - e.begin for e in checkpoint.stored.values()) == 688_574_839_360


def test_progress_is_a_bar_or_two_log_lines(
    made: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = Checkpoint.open(made / "fp8")
    names = owned_names(TINY)
    with caplog.at_level(logging.INFO):
        checkpoint.load(names)  # stderr is no terminal here
    assert [r.message.split()[0] for r in caplog.records] == ["reading", "read"]
    assert not capsys.readouterr().err
    checkpoint.load(names, progress=True)
    assert "MB" in capsys.readouterr().err


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 40), st.integers(0, 40)), max_size=12)
)
def test_every_wanted_byte_is_read_once(wanted: list[tuple[str, int, int]]) -> None:
    unit = PIECE_BYTES // 8  # so that spans are cut as well as joined
    spans = [Span(Path(f), b * unit, (b + length) * unit) for f, b, length in wanted]
    units = pieces(spans)
    assert all(0 < p.end - p.begin <= PIECE_BYTES for p in units)
    read = [(p.path, at) for p in units for at in range(p.begin, p.end, unit)]
    assert len(read) == len(set(read))
    assert set(read) == {(s.path, at) for s in spans for at in range(s.begin, s.end, unit)}
