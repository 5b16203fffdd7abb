"""How long a step takes on a GPU: bytes and operations over the device's rates, times efficiencies.

Each part is max(bytes / bandwidth, operations / peak). The rates of the best published kernels
(FlashMLA, DeepGEMM, DeepEP) turn hardware peaks into a bound; two factors more, of a whole system
to that bound, are fitted to published measurements (`PUBLISHED` and tests/cluster/test_cost.py).
They are not measurements of Rayseek: pass others when you have them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rayseek.cluster.wire_rows import WireRows
from rayseek.kernels.kv_format import KVDtype, token_bytes
from rayseek.model.config import ModelConfig

NODE = 8  # GPUs that NVLink joins


@dataclass(frozen=True, slots=True)
class Device:
    """Peaks of one GPU: bytes/s of memory, FLOP/s dense, bytes/s in one direction."""

    memory: float
    bf16: float
    fp8: float
    nvlink: float
    network: float


DEVICES = {
    "H100": Device(3.35e12, 989e12, 1979e12, 450e9, 50e9),
    "H800": Device(3.35e12, 989e12, 1979e12, 200e9, 50e9),
    "H200": Device(4.8e12, 989e12, 1979e12, 450e9, 50e9),
}


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Parts of the peaks that kernels reach, and of the kernels' bound that the system reaches."""

    memory_attention: float = 0.90
    memory_product: float = 0.75
    bf16: float = 0.667
    fp8: float = 0.63
    network: float = 0.80
    decode: float = 0.62
    prefill: float = 0.53


PUBLISHED = Efficiency()


@dataclass(frozen=True, slots=True)
class Step:
    """Seconds of one step of one GPU: its own work, and sending rows to experts and back.

    They overlap. `limit`: memory, operations or network, whichever takes longest.
    """

    compute: float
    network: float
    limit: str
    efficiency: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.network) / self.efficiency


class Cost:
    """The cost model for one model on one kind of device, in a unit of `ranks` with so many expert
    slots each."""

    def __init__(
        self,
        model: ModelConfig,
        device: Device,
        ranks: int,
        slots: int,
        efficiency: Efficiency = PUBLISHED,
        kv_dtype: KVDtype = "auto",
    ) -> None:
        self._model, self._ranks, self._slots, self._parts = model, ranks, slots, efficiency
        self._product = device.memory * efficiency.memory_product
        self._latents = device.memory * efficiency.memory_attention
        self._bf16, self._fp8 = device.bf16 * efficiency.bf16, device.fp8 * efficiency.fp8
        self._nvlink = device.nvlink * efficiency.network
        self._network = device.network * efficiency.network
        heads, width = model.num_attention_heads, model.hidden_size
        low, query = model.q_lora_rank, heads * model.qk_head_dim
        self._projections = (
            (width * query if low is None else low * (width + query))
            + width * model.latent_width
            + heads * model.v_head_dim * width
        )
        self._absorbed = model.kv_lora_rank * heads * (model.qk_nope_head_dim + model.v_head_dim)
        self._token = token_bytes(kv_dtype, "cuda", model.kv_lora_rank, model.qk_rope_head_dim)
        self._expert = 3 * width * model.moe_intermediate_size
        self._dense = 3 * width * model.intermediate_size
        self._moe_layers = model.num_hidden_layers - model.first_k_dense_replace
        wire = WireRows(width, model.num_experts_per_tok, fp8=True)
        self._row_bytes = wire.row_bytes + wire.product_bytes  # there and back

    def decode(self, batch: int, context: float, tokens: int = 1) -> Step:
        """One step of `batch` sequences on each GPU, `tokens` rows each, over `context` latents."""
        model, rows = self._model, batch * tokens
        times = [0.0, 0.0]  # by memory, by operations
        total = 0.0

        def add(count: int, reading: float, computing: float) -> None:
            nonlocal total
            times[0] += count * reading
            times[1] += count * computing
            total += count * max(reading, computing)

        def product(count: int, size: float, item: int = 1, peak: float = self._fp8) -> None:
            add(count, size * item / self._product, 2 * size * rows / peak)

        layers = model.num_hidden_layers
        product(layers, self._projections)
        product(layers, self._absorbed, peak=self._bf16)
        score = 2 * model.num_attention_heads * (2 * model.kv_lora_rank + model.qk_rope_head_dim)
        add(
            layers, batch * context * self._token / self._latents,
            rows * context * score / self._bf16,
        )  # fmt: skip
        product(self._moe_layers, model.hidden_size * model.n_routed_experts, 2, self._bf16)
        product(self._moe_layers, self._expert * model.n_shared_experts)
        chosen = model.num_experts_per_tok
        missed = (1 - chosen / (self._slots * self._ranks)) ** (rows * self._ranks)
        add(
            self._moe_layers, self._slots * (1 - missed) * self._expert / self._product,
            2 * self._expert * rows * chosen / self._fp8,
        )  # fmt: skip
        product(model.first_k_dense_replace, self._dense)
        product(1, model.vocab_size * model.hidden_size, 2, self._bf16)
        local, remote = chosen * (min(NODE, self._ranks) - 1), chosen * (self._ranks - NODE)
        row = self._row_bytes * rows * self._moe_layers / self._ranks
        sending = max(row * max(remote, 0) / self._network, row * local / self._nvlink)
        limit = max(zip((*times, sending), ("memory", "operations", "network"), strict=True))[1]
        return Step(total, sending, limit, self._parts.decode)

    def prefill(
        self, rows: float, context: float, cached: float = 0.0, mean_rows: float | None = None
    ) -> Step:
        """One step of `rows` new prompt tokens on each GPU, of prompts so long. A row goes to each
        node that it needs once, since expert groups lie on one node where they can. mean_rows: of
        all GPUs, if one has more than others, for whom the experts work alike."""
        model = self._model
        linear = model.num_hidden_layers * (self._projections + self._absorbed)
        linear += self._moe_layers * self._expert * model.n_shared_experts
        linear += model.first_k_dense_replace * self._dense
        routed = self._moe_layers * self._expert * model.num_experts_per_tok
        seen = model.num_hidden_layers * model.num_attention_heads * (context + cached) / 2
        attention = 2 * rows * seen * (model.qk_head_dim + model.v_head_dim)
        shared = rows if mean_rows is None else mean_rows
        computing = 2 * (rows * linear + shared * routed) / self._fp8 + attention / self._bf16
        nodes = max(1, self._ranks // NODE)
        row = self._row_bytes * rows * self._moe_layers
        inside = row * model.num_experts_per_tok * (NODE - 1) / NODE if self._ranks >= NODE else 0.0
        between = row * self._nodes_hit(nodes) * (1 - 1 / nodes)
        sending = max(between / self._network, inside / self._nvlink)
        limit = "network" if sending > computing else "operations"
        return Step(computing, sending, limit, self._parts.prefill)

    def _nodes_hit(self, nodes: int) -> float:
        """Nodes with one of a row's experts, of which it chooses `topk_group` groups."""
        groups, drawn = self._model.n_group, self._model.topk_group
        if nodes <= groups:
            missed = math.comb(groups - max(1, groups // nodes), drawn) / math.comb(groups, drawn)
            return nodes * (1 - missed)
        span = nodes / groups  # a group lies on several nodes, with about two of the row's experts
        return drawn * span * (1 - (1 - 1 / span) ** 2)
