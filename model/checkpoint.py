"""A checkpoint in the official Hugging Face layout: checked whole, then read in part.

`Checkpoint.open` reads headers only and compares every name, shape, dtype and file with the
inventory. `load` brings the bytes that a rank owns into the page cache, several threads at once,
and hands out memory-mapped views; nothing is copied.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayseek.kernels.ops import Weight
from rayseek.model.config import ModelConfig
from rayseek.model.inventory import ITEM_BYTES, SCALE_SUFFIX, Kind, TensorSpec, inventory
from rayseek.model.reading import Span, read_spans

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
SHOWN_PROBLEMS = 100
DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "BF16": torch.bfloat16, "F32": torch.float32}


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; `problems` has one line for each thing wrong."""

    def __init__(self, path: Path, problems: list[str]) -> None:
        shown = problems[:SHOWN_PROBLEMS]
        if len(problems) > len(shown):
            shown.append(f"... and {len(problems) - len(shown)} more")
        super().__init__(f"{path}: {len(problems)} problem(s)\n  " + "\n  ".join(shown))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor's bytes lie: file[begin:end], row-major."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Weights:
    """Loaded tensors by their checkpoint names."""

    tensors: Mapping[str, Tensor]
    device: str = "cpu"  # where `tensor` puts them

    def on(self, device: str) -> Weights:
        """The same for a model on another device."""
        return Weights(self.tensors, device)

    def tensor(self, name: str) -> Tensor:
        """In the checkpoint's dtype. KeyError if it was not among the names that were loaded."""
        return self.tensors[name].to(self.device)

    def weight(self, name: str) -> Weight:
        """A matrix with its scales, if it has any; in host memory, for `Ops.pack` to take."""
        return Weight(self.tensors[name], self.tensors.get(name + SCALE_SUFFIX))


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint: every tensor of `config` is there as the inventory wants it."""

    path: Path
    config: ModelConfig
    stored: Mapping[str, Stored]
    _states: Mapping[str, tuple[int, int]]  # of each file, when it was opened
    _maps: dict[str, mmap.mmap] = field(default_factory=dict, repr=False)

    @staticmethod
    def open(path: str | Path) -> Checkpoint:
        """Check the checkpoint in folder `path` from its config, index and shard headers.

        Raises ConfigError for config.json, then CheckpointError listing every other problem.
        """
        path = Path(path)
        config = ModelConfig.from_pretrained(path)
        index = _read_index(path)
        headers: dict[str, dict[str, Stored]] = {}
        problems: list[str] = []
        for file in sorted(set(index.values())) if index is not None else [SINGLE]:
            try:
                headers[file] = read_header(path / file)
            except (OSError, ValueError) as error:
                held = f" ({list(index.values()).count(file)} tensors)" if index else ""
                reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
                problems.append(f"{file}{held}: {reason}")
        problems += _index_disagreements(index, headers)
        stored = {name: entry for header in headers.values() for name, entry in header.items()}
        unreadable = {n for n, file in (index or {}).items() if file not in headers}
        if index is not None or headers:
            problems += _differences(config, stored, unreadable)
        if problems:
            raise CheckpointError(path, problems)
        return Checkpoint(path, config, stored, {file: _state(path / file) for file in headers})

    def tensor(self, name: str) -> Tensor:
        """A private memory-mapped view, in the checkpoint's dtype."""
        entry = self.stored[name]
        if entry.file not in self._maps:
            with (self.path / entry.file).open("rb") as file:
                # Copy-on-write, because torch warns about memory that it may not write.
                self._maps[entry.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        flat = torch.frombuffer(
            self._maps[entry.file],
            dtype=DTYPES[entry.dtype],
            count=math.prod(entry.shape),
            offset=entry.begin,
        )
        return flat.view(entry.shape)

    def weight(self, name: str) -> Weight:
        """A matrix with its scales, which may lie in another file."""
        scale = name + SCALE_SUFFIX
        return Weight(self.tensor(name), self.tensor(scale) if scale in self.stored else None)

    def load(self, names: Iterable[str], progress: bool | None = None) -> Weights:
        """Read these tensors (see `owned_names`) from disk and give views of them.

        progress: a bar with bytes and rate (True) or a log line before and after (False); by
        default a bar when stderr is a terminal. Raises CheckpointError for names that are not
        there, and for files that were written since they were opened: what was loaded before
        would not belong to what is there now.
        """
        names = list(names)
        if unknown := [f"no tensor {name!r}" for name in names if name not in self.stored]:
            raise CheckpointError(self.path, unknown)
        entries = [self.stored[name] for name in names]
        spans = [Span(self.path / e.file, e.begin, e.end) for e in entries]
        try:
            changed = [
                f"{file}: written since this process opened it; start the service again"
                for file in sorted({entry.file for entry in entries})
                if _state(self.path / file) != self._states[file]
            ]
            if changed:
                raise CheckpointError(self.path, changed)
            read_spans(spans, f"weights from {self.path}", progress)
        except OSError as error:
            raise CheckpointError(self.path, [str(error)]) from error
        return Weights({name: self.tensor(name) for name in names})


def _state(path: Path) -> tuple[int, int]:
    """Differs once a file was written."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file by name, without reading data.

    Raises ValueError if the header is not valid or the file is not as long as it says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(f"not a safetensors file, or cut off in its header ({size:,} bytes)")
        try:
            raw = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"its header is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError("its header is not a JSON object")
    raw.pop("__metadata__", None)
    entries = {name: _entry(path.name, name, value, 8 + length) for name, value in raw.items()}
    end = 8 + length
    for entry in sorted(entries.values(), key=lambda e: (e.begin, e.end)):
        if entry.begin != end:
            raise ValueError(f"its header's offsets have a gap or an overlap at byte {end:,}")
        end = entry.end
    if size != end:
        fault = "cut off" if size < end else "too long"
        raise ValueError(f"{fault}: {size:,} bytes, its header says {end:,}; copy it again")
    return entries


def _entry(file: str, name: str, raw: Any, data_start: int) -> Stored:
    try:
        dtype, shape, (begin, end) = raw["dtype"], tuple(raw["shape"]), raw["data_offsets"]
        good = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in (*shape, begin))
        size = ITEM_BYTES.get(dtype)
        good = good and (size is None or end - begin == math.prod(shape) * size)
    except (TypeError, KeyError, ValueError):
        good = False
    if not good:
        raise ValueError(f"its header describes {name!r} wrongly: {raw!r}")
    return Stored(file, dtype, shape, data_start + begin, data_start + end)


def _read_index(path: Path) -> dict[str, str] | None:
    """Tensor name -> file name; None for a checkpoint that is a single file."""
    try:
        raw = json.loads((path / INDEX).read_text("utf-8"))
        weight_map = raw["weight_map"]
        good = all(Path(file).name == file for file in weight_map.values())
    except FileNotFoundError:
        if (path / SINGLE).exists():
            return None
        raise CheckpointError(path, [f"neither {INDEX} nor {SINGLE} is there"]) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(path, [f"{INDEX}: cannot be read: {error!r}"]) from None
    if not good or not weight_map:
        raise CheckpointError(path, [f"{INDEX}: weight_map must name files of this folder"])
    return dict(weight_map)


def _index_disagreements(
    index: Mapping[str, str] | None, headers: Mapping[str, Mapping[str, Stored]]
) -> list[str]:
    """Tensors that the index places in one file and the headers in another, or in two."""
    problems: list[str] = []
    holder: dict[str, str] = {}
    for file, header in headers.items():
        for name in header:
            if name in holder:
                problems.append(f"{name}: stored twice, in {holder[name]} and {file}")
            elif index is not None and index.get(name) != file:
                said = f"places it in {index[name]}" if name in index else "does not list it"
                problems.append(f"{name}: stored in {file}, but {INDEX} {said}")
            holder[name] = file
    for name, file in (index or {}).items():
        if file in headers and name not in holder:
            problems.append(f"{name}: {INDEX} places it in {file}, whose header lacks it")
    return problems


def _differences(
    config: ModelConfig, stored: Mapping[str, Stored], unreadable: set[str]
) -> list[str]:
    """What differs from the inventory. `unreadable`: names in files already complained about."""
    problems: list[str] = []
    quantised = any(entry.dtype == "F8_E4M3" for entry in stored.values())
    if quantised != config.fp8_blocks and not unreadable:
        found = "F8_E4M3 weights" if quantised else "no F8_E4M3 weight"
        key = "has" if config.fp8_blocks else "lacks"
        problems.append(f"config.json {key} quantization_config, but the files hold {found}")
        config = replace(config, fp8_blocks=quantised)  # so that the rest is about other things
    specs = inventory(config)
    known = stored.keys() | unreadable
    for layer in range(config.num_hidden_layers, config.stored_layers):
        if not any(name.startswith(f"model.layers.{layer}.") for name in known):
            problems.append(
                f"model.layers.{layer}: the MTP module is missing; without one, "
                "num_nextn_predict_layers in config.json must be 0"
            )
            specs = {name: spec for name, spec in specs.items() if spec.layer != layer}
    wide = not any(e.dtype == "BF16" for n, e in stored.items() if not _is_bias(n))
    float32 = wide and not config.fp8_blocks
    for name, spec in specs.items():
        entry = stored.get(name)
        if entry is None:
            if name not in known and spec.kind != Kind.MTP_COPY:
                problems.append(f"{name}: missing; expected {spec.dtype} {list(spec.shape)}")
            continue
        if entry.shape != spec.shape:
            problems.append(
                f"{name}: shape {list(entry.shape)}; config.json means {list(spec.shape)}"
            )
        if entry.dtype not in (dtypes := _dtypes(name, spec, float32)):
            problems.append(f"{name}: dtype {entry.dtype}; expected {' or '.join(dtypes)}")
    for name in sorted(stored.keys() - inventory(config).keys()):
        problems.append(f"{name}: not a tensor of this config")
    return problems


def _is_bias(name: str) -> bool:
    return name.endswith(".e_score_correction_bias")


def _dtypes(name: str, spec: TensorSpec, float32: bool) -> tuple[str, ...]:
    """Dtypes to accept: all of a checkpoint may be float32 instead of bfloat16."""
    if _is_bias(name):
        return ("F32", "BF16")
    return ("F32",) if float32 and spec.dtype == "BF16" else (spec.dtype,)
