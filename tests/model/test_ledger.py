"""The byte ledger against the spec's table of ranks (section 1.7) and cache sizes (1.8)."""

from pathlib import Path

import pytest

from rayseek.model import ledger as ledger_module
from rayseek.model.batch import PAGE_TOKENS
from rayseek.model.config import ModelConfig
from rayseek.model.inventory import inventory, owned_names
from rayseek.model.ledger import make_ledger, render
from rayseek.model.maker import SMALL

OFFICIAL = ModelConfig.from_pretrained(Path(__file__).with_name("config_671b.json"))


@pytest.mark.parametrize(
    ("ranks", "redundant", "slots", "gigabytes"),
    [
        (8, 0, 32, 100.8),
        (16, 0, 16, 60.0),
        (32, 0, 8, 39.5),
        (32, 32, 9, 42.1),
        (64, 0, 4, 29.3),
        (144, 32, 2, 24.2),
        (320, 64, 1, 21.6),
    ],
)
def test_gigabytes_of_a_rank(ranks: int, redundant: int, slots: int, gigabytes: float) -> None:
    ledger = make_ledger(OFFICIAL, ranks, redundant)
    assert ledger.slots == slots
    assert round(ledger.rank_bytes / 1e9, 1) == gigabytes
    assert ledger.rank_bytes == pytest.approx(19.082e9 + slots * 2.554955e9, abs=1e6)


def test_files_and_cache_of_the_671b_model() -> None:
    ledger = make_ledger(OFFICIAL)
    assert ledger.file_bytes == 688_574_839_360
    assert sum(row.tensors for row in ledger.rows) == 91_991
    assert sum(row.parameters for row in ledger.rows) == 684_489_845_504
    assert ledger.rank_bytes == 673_150_611_808
    assert ledger.kv_bytes_per_token == 70_272
    assert ledger.kv_bytes_per_token + ledger.mtp_kv_bytes_per_token == 71_424
    assert ledger.page_bytes == 4_497_408
    assert ledger.kv_fp8_bytes_per_token == 61 * 656


def test_one_rank_holds_exactly_what_it_would_load() -> None:
    for config in (OFFICIAL, SMALL):
        specs = inventory(config)
        ledger = make_ledger(config)
        loaded = sum(specs[name].bytes for name in owned_names(config))
        assert ledger.rank_bytes + ledger.mtp_rank_bytes == loaded


def test_room_for_cache() -> None:
    ledger = make_ledger(OFFICIAL, 32, device_gib=80)
    assert ledger.room_bytes is not None
    assert ledger.room_bytes == 80 * 2**30 - ledger.rank_bytes - ledger.mtp_rank_bytes
    assert ledger.room_tokens == ledger.room_bytes // 4_497_408 * 64
    assert ledger.fp8_room_tokens == ledger.room_bytes // (61 * 656 * 64) * 64
    small = make_ledger(OFFICIAL, 8, device_gib=80)
    assert small.room_tokens == 0
    assert "too small" in render(small)
    assert make_ledger(OFFICIAL, 8).room_tokens is None


def test_experts_must_split_evenly() -> None:
    with pytest.raises(ValueError, match="8 more redundant would"):
        make_ledger(OFFICIAL, 24)
    with pytest.raises(ValueError, match="1 rank or more"):
        make_ledger(OFFICIAL, 0)


def test_rendered_text() -> None:
    text = render(make_ledger(OFFICIAL, 32, 32, device_gib=80))
    for shown in ("688,574,839,360", "42.08 GB", "70,272", "4,497,408", "routed experts", "91,991"):
        assert shown in text
    assert max(map(len, text.splitlines())) <= 100


def test_the_page_is_the_engines_page() -> None:
    assert ledger_module.PAGE_TOKENS == PAGE_TOKENS
