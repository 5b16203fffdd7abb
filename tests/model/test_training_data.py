"""From documents to batches: what is packed, what is predicted, and in which order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from rayseek.model.training.corpus import Shard, read_shard, shard_path, write_shard
from rayseek.model.training.packing import PackedBatch, lay_out, pack_rows, thin
from rayseek.model.training.stream import BatchStream, Position

SIZES = (8, 16, 32)
BATCH = 64
documents = st.lists(
    st.lists(st.tuples(st.integers(0, 2**16 - 1), st.integers(0, 255)), min_size=1, max_size=40),
    max_size=60,
)


def shard_of(docs: list[list[tuple[int, int]]]) -> Shard:
    tokens = [token for doc in docs for token in doc]
    ids, weights = (np.array([t[i] for t in tokens], dt) for i, dt in ((0, "u2"), (1, "u1")))
    return Shard(ids, weights, np.cumsum([0, *map(len, docs)]))


@given(documents)
def test_packing_loses_little_and_repeats_nothing(docs: list[list[tuple[int, int]]]) -> None:
    lengths = [len(doc) for doc in docs]
    packed = pack_rows(lengths, BATCH, SIZES)
    seen = [d for _, rows in packed for row in rows for d in row]
    assert len(seen) == len(set(seen))
    for size, rows in packed:
        assert size in SIZES and len(rows) == BATCH // size
        assert all(row and sum(lengths[d] for d in row) <= size for row in rows)
    lost = set(range(len(docs))) - set(seen)
    fitting = [lengths[d] for d in lost if lengths[d] <= max(SIZES)]
    assert sum(fitting) < len(SIZES) * BATCH  # what did not fill a batch


def test_packing_fills_rows() -> None:
    lengths = np.random.default_rng(0).integers(3, 500, 2000).tolist()
    packed = pack_rows(lengths, 4096, (128, 256, 512))
    used = sum(lengths[d] for _, rows in packed for row in rows for d in row)
    assert used > 0.98 * 4096 * len(packed)
    for size, rows in packed:
        shorter = max((s for s in (0, 128, 256) if s < size), default=0)
        long = [d for row in rows for d in row if lengths[d] > shorter]
        assert len(long) > 0.3 * len(rows)  # rows of a length are for documents of that length


@given(documents)
def test_targets_stay_within_a_document(docs: list[list[tuple[int, int]]]) -> None:
    """Every token of a packed document, what it predicts, and the filler behind the last one."""
    shard = shard_of(docs)
    for size, rows in pack_rows([len(doc) for doc in docs], BATCH, SIZES):
        batch = lay_out(shard, rows, size)
        for r, row in enumerate(rows):
            at = r * size
            for d in row:
                for i, (token, _) in enumerate(docs[d]):
                    assert (batch.ids[at], batch.position[at]) == (token, i)
                    for ahead, ids, weights in (
                        (1, batch.next_ids, batch.next_weight),
                        (2, batch.after_ids, batch.after_weight),
                    ):
                        if i + ahead < len(docs[d]):
                            target, weight = docs[d][i + ahead]
                            assert ids[at] == target
                            assert weights[at] == np.float32(weight) / np.float32(255)
                        else:
                            assert weights[at] == 0
                    at += 1
            gap = slice(at, (r + 1) * size)
            assert not batch.next_weight[gap].any() and not batch.after_weight[gap].any()
            filler = [token for token, _ in docs[row[0]]][: (r + 1) * size - at]
            assert batch.ids[gap].tolist()[: len(filler)] == filler
            assert (batch.position[gap] == np.arange((r + 1) * size - at)).all()


def test_thinned_weights_have_the_same_mean() -> None:
    weight = np.repeat(np.float32([0, 0.1, 0.5, 1]), 5000)
    unused = np.zeros(1, np.int64)
    whole = PackedBatch(1, unused, unused, unused, weight, unused, weight)
    thinned = thin(whole, np.random.default_rng(0))
    for drawn in (thinned.next_weight, thinned.after_weight):
        assert set(drawn.tolist()) == {0.0, 1.0}
        means = drawn.reshape(4, -1).mean(1)
        assert means == pytest.approx([0, 0.1, 0.5, 1], abs=0.03)
        assert (means[0], means[3]) == (0, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    draw = np.random.default_rng(0)
    for number in range(2):
        docs = [draw.integers(0, 99, draw.integers(2, 30)).tolist() for _ in range(60)]
        write_shard(shard_path(folder, number), [(doc, [100] * len(doc)) for doc in docs])
    return folder


def stream(folder: Path, seed: int = 0, position: Position = Position()) -> BatchStream:  # noqa: B008
    return BatchStream(folder, 2, BATCH, SIZES, seed, position)


def same(one: PackedBatch, two: PackedBatch) -> bool:
    return all(np.array_equal(getattr(one, f), getattr(two, f)) for f in PackedBatch.__slots__)


def test_a_stream_goes_on_from_any_position(folder: Path) -> None:
    """Also into the next round, where the documents come in another order."""
    whole, positions, batches, shards = stream(folder), [], [], []
    while whole.position.shard < 3:
        positions.append(whole.position)
        batches.append(whole.take())
        shards.append(whole.position.shard)
    for start in (0, 7, len(batches) - 2):
        part = stream(folder, position=positions[start])
        assert all(same(part.take(), batch) for batch in batches[start:])
    first, again = ([b for b, s in zip(batches, shards, strict=True) if s == n] for n in (0, 2))
    assert len(first) > 10 and not all(map(same, first, again))


def test_workers_share_one_stream(folder: Path) -> None:
    alone, shared = stream(folder), [stream(folder) for _ in range(3)]
    for _ in range(6):
        for rank, other in enumerate(shared):
            assert same(alone.take(), other.take(rank, 3))
        assert {other.position for other in shared} == {alone.position}


def test_wrong_shards_are_refused(tmp_path: Path) -> None:
    path = shard_path(tmp_path, 0)
    for documents in ([([], [])], [([1, 2], [0])], [([70000], [0])], [([1], [256])]):
        with pytest.raises(ValueError, match="document 0"):
            write_shard(path, documents)
    assert not list(tmp_path.iterdir())
    write_shard(path, [([1, 2, 3], [0, 255, 255]), ([4], [0])])
    assert read_shard(path).document(1)[0].tolist() == [4]
    with pytest.raises(ValueError, match="no shard fills a batch"):
        BatchStream(tmp_path, 1, BATCH, SIZES, 0, Position()).take()
    save_file({"ids": np.zeros(2, np.uint16)}, path)
    with pytest.raises(ValueError, match="no starts, weights"):
        read_shard(path)
    arrays = {"ids": np.zeros(2, np.uint16), "weights": np.zeros(2, np.uint8)}
    save_file(arrays | {"starts": np.array([0, 1])}, path)
    with pytest.raises(ValueError, match="do not fit together"):
        read_shard(path)
