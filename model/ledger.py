"""Where a checkpoint's bytes go, rank by rank, and how many tokens of KV fit beside them.

Attention, dense and shared weights are on every rank (data-parallel attention); routed experts
are spread over the ranks' slots (spec sections 1.7 and 1.8). Pure arithmetic: opens no file, needs
no torch.
"""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from rayseek.kernels.kv_format import PAGE_TOKENS, token_bytes
from rayseek.model.config import ModelConfig
from rayseek.model.inventory import Kind, inventory

MTP_KIND = "MTP module"


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of weight. `rank_bytes`: what each rank holds of it."""

    kind: str
    tensors: int
    parameters: int  # without scales
    file_bytes: int
    rank_bytes: int


@dataclass(frozen=True, slots=True)
class Ledger:
    """`rows` are the main model's kinds, then the MTP module and its copies, if there is one."""

    rows: tuple[Row, ...]
    ranks: int
    slots: int  # expert slots of a rank in each MoE layer
    slot_bytes: int  # one slot over the main model's MoE layers
    mtp_slot_bytes: int
    kv_bytes_per_token: int  # one latent in each layer of the main model, in BF16
    kv_fp8_bytes_per_token: int
    mtp_kv_bytes_per_token: int  # and in the MTP module, when it drafts
    device_bytes: int | None

    @property
    def file_bytes(self) -> int:
        return sum(row.file_bytes for row in self.rows)

    @property
    def rank_bytes(self) -> int:
        """Weights of the main model on one rank."""
        return sum(row.rank_bytes for row in self.rows if row.kind != MTP_KIND)

    @property
    def mtp_rank_bytes(self) -> int:
        return sum(row.rank_bytes for row in self.rows if row.kind == MTP_KIND)

    @property
    def page_bytes(self) -> int:
        return self.kv_bytes_per_token * PAGE_TOKENS

    @property
    def room_bytes(self) -> int | None:
        """What the weights leave of a device, before activations; negative if they do not fit."""
        if self.device_bytes is None:
            return None
        return self.device_bytes - self.rank_bytes - self.mtp_rank_bytes

    @property
    def room_tokens(self) -> int | None:
        """Tokens of KV in that room, in whole pages."""
        return self._room_for(self.kv_bytes_per_token)

    @property
    def fp8_room_tokens(self) -> int | None:
        """The same with FP8 latents."""
        return self._room_for(self.kv_fp8_bytes_per_token)

    def _room_for(self, token: int) -> int | None:
        if self.room_bytes is None:
            return None
        return max(0, self.room_bytes // (token * PAGE_TOKENS)) * PAGE_TOKENS


@functools.lru_cache(maxsize=16)  # the official inventory has 92,000 tensors
def make_ledger(
    config: ModelConfig, ranks: int = 1, redundant: int = 0, device_gib: float | None = None
) -> Ledger:
    """The ledger of `ranks` ranks; `redundant` expert copies a layer, device size in GiB.

    Raises ValueError if the experts and copies do not fill the ranks evenly.
    """
    copies = config.n_routed_experts + redundant
    if ranks < 1 or redundant < 0:
        raise ValueError(f"expected 1 rank or more, 0 redundant or more: {ranks}, {redundant}")
    if copies % ranks:
        raise ValueError(
            f"{config.n_routed_experts} experts + {redundant} redundant do not split evenly over "
            f"{ranks} ranks; {-copies % ranks} more redundant would"
        )
    slots = copies // ranks
    sums: dict[str, list[int]] = {}
    slot_bytes = {False: 0, True: 0}  # of the main model, of the MTP module
    for name, spec in inventory(config).items():
        mtp = spec.layer is not None and spec.layer >= config.num_hidden_layers
        kind = MTP_KIND if mtp and spec.kind != Kind.MTP_COPY else str(spec.kind)
        row = sums.setdefault(kind, [0, 0, 0, 0])
        row[0] += 1
        row[1] += spec.elements if not name.endswith("_scale_inv") else 0
        row[2] += spec.bytes
        if spec.kind != Kind.MTP_COPY and not spec.expert:
            # Experts of a layer are all of one size: the first stands for every slot's.
            row[3] += spec.bytes * (1 if spec.expert is None else slots)
            slot_bytes[mtp] += spec.bytes if spec.expert is not None else 0
    latent, latent_fp8 = (
        token_bytes(kv_dtype, "cuda", config.kv_lora_rank, config.qk_rope_head_dim)
        for kv_dtype in ("auto", "fp8")
    )
    order = [str(kind) for kind in Kind if kind != Kind.MTP_COPY] + [MTP_KIND, str(Kind.MTP_COPY)]
    return Ledger(
        rows=tuple(Row(kind, *sums[kind]) for kind in order if kind in sums),
        ranks=ranks,
        slots=slots,
        slot_bytes=slot_bytes[False],
        mtp_slot_bytes=slot_bytes[True],
        kv_bytes_per_token=latent * config.num_hidden_layers,
        kv_fp8_bytes_per_token=latent_fp8 * config.num_hidden_layers,
        mtp_kv_bytes_per_token=latent * config.num_nextn_predict_layers,
        device_bytes=None if device_gib is None else int(device_gib * 2**30),
    )


def render(ledger: Ledger) -> str:
    """The ledger as text with decimal units, 100 columns wide."""
    table = Table(title=f"Weights on each of {ledger.ranks} rank(s)", title_justify="left")
    table.add_column("kind")
    for column in ("tensors", "parameters", "bytes in files", "bytes per rank", "per rank"):
        table.add_column(column, justify="right")
    for row in ledger.rows:
        table.add_row(
            row.kind, f"{row.tensors:,}", f"{row.parameters:,}", f"{row.file_bytes:,}",
            f"{row.rank_bytes:,}", _size(row.rank_bytes),
        )  # fmt: skip
    table.add_section()
    rank_bytes = ledger.rank_bytes + ledger.mtp_rank_bytes
    table.add_row(
        "all", f"{sum(r.tensors for r in ledger.rows):,}",
        f"{sum(r.parameters for r in ledger.rows):,}", f"{ledger.file_bytes:,}",
        f"{rank_bytes:,}", _size(rank_bytes),
    )  # fmt: skip
    text = io.StringIO()
    console = Console(file=text, width=100, highlight=False)
    console.print(table)
    for line in _notes(ledger):
        console.print(line)
    return text.getvalue()


def _notes(ledger: Ledger) -> list[str]:
    with_mtp = ""
    if ledger.mtp_rank_bytes:
        with_mtp = f", with the MTP module {_size(ledger.rank_bytes + ledger.mtp_rank_bytes)}"
    lines = [
        f"Per rank: main model {_size(ledger.rank_bytes)}{with_mtp}; "
        f"{ledger.slots} expert slots a layer.",
        f"KV cache: {ledger.kv_bytes_per_token:,} bytes a token, {ledger.page_bytes:,} a page of "
        f"{PAGE_TOKENS}; drafting with MTP adds {ledger.mtp_kv_bytes_per_token:,} a token.",
        f"With FP8 latents (engine.kv_dtype: fp8) {ledger.kv_fp8_bytes_per_token:,} bytes a token.",
    ]
    if ledger.device_bytes is not None and ledger.room_bytes is not None:
        device = f"{ledger.device_bytes / 2**30:g} GiB"
        if ledger.room_bytes < 0:
            lines.append(f"A device of {device} is {_size(-ledger.room_bytes)} too small.")
        else:
            lines.append(
                f"A device of {device} has {_size(ledger.room_bytes)} left: "
                f"{ledger.room_tokens:,} tokens of KV, {ledger.fp8_room_tokens:,} in FP8; less "
                "what activations need."
            )
    return lines


def _size(count: int) -> str:
    return decimal(count, precision=2)
