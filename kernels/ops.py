"""The operations a DeepSeek-V3 forward pass is made of, and who carries them out.

Every operation has a plain PyTorch reference in the file named after it. `Ops` bundles one
implementation of each; the model is given a bundle and calls nothing else, so which device code
runs is decided once, in the open. Nothing here knows layers or checkpoints.

Shape letters: T rows, D model, H heads, N no-position head dim, R rotary dim, V value head dim,
C latent (kv_lora_rank), X = C + R, E experts, K chosen experts, F expert hidden, P pages.
Activations are float32 on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from rayseek.kernels.kv_format import KVDtype
from rayseek.kernels.sampler import Row


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm to apply to a matmul's input first: x * rsqrt(mean(x^2) + eps) * weight_K."""

    weight_K: Tensor  # float32
    eps: float


@dataclass(frozen=True, slots=True)
class Weight:
    """A matrix [N, K] as the checkpoint stores it: bf16 or f32, or e4m3 with block scales.

    scale_inv: float32 [ceil(N/128), ceil(K/128)]; the value of element (i, j) is
    data[i, j] * scale_inv[i // 128, j // 128] (spec section 4.2: multiply, whatever its name).
    """

    data: Tensor
    scale_inv: Tensor | None = None


class Ops(Protocol):
    """One implementation of every operation. `Any` stands for its own packed weight.

    kv_dtype: of the pages that it makes.
    """

    name: str
    kv_dtype: KVDtype

    def pack(self, weight: Weight) -> Any:
        """[N, K] in the layout this implementation multiplies by."""

    def pack_stack(self, weights: list[Weight]) -> Any:
        """Several matrices with the same K, one below the other: [sum of N, K]."""

    def pack_heads(self, kv_b: Weight, heads: int, nope: int, value: int) -> tuple[Any, Any]:
        """kv_b_proj [H*(N+V), C] as (W_UK, W_UV) for `attend` (spec 1.3)."""

    def linear(
        self, x_TK: Tensor, w: Any, norm: Norm | None = None, residual_TN: Tensor | None = None
    ) -> Tensor:
        """norm(x) @ w.T (+ residual) -> [T, N]. x rows may be a slice of wider rows."""

    def rms_norm(self, x_TD: Tensor, norm: Norm) -> Tensor: ...

    def new_pages(self, count: int, latent: int, rope: int) -> Tensor:
        """Empty pages of PAGE_TOKENS latents and keys; pages[i] is one block of memory.

        The layout is the implementation's own, of as many bytes as `kv_format.py` says; with FP8
        latents it is uint8 [count, PAGE_TOKENS, bytes of a token], everywhere the same.
        """

    def read_latents(self, pages: Tensor, page_ids: Tensor, latent: int, rope: int) -> Tensor:
        """What these pages hold, in their order: float32 [tokens, X]."""

    def store_latents(
        self, ckr_TX: Tensor, norm: Norm, cos_sin_PR: Tensor, positions_T: Tensor,
        slots_T: Tensor, pages: Tensor,
    ) -> None:  # fmt: skip
        """Normalise the latent, rotate the key part, write rows into pages at slots.

        A slot is page * PAGE_TOKENS + offset. What is stored is within 2^-16 of float32, or what
        `fp8_tokens_ref` makes of it.
        cos_sin_PR: float32 [max positions, R], cos of the R/2 pairs, then sin.
        """

    def attend(
        self, q_THW: Tensor, w_uk: Any, w_uv: Any, cos_sin_PR: Tensor, pages: Tensor,
        page_table_BP: Tensor, sequence_T: Tensor, positions_T: Tensor, scale: float,
    ) -> Tensor:  # fmt: skip
        """q [T, H, N+R], its rotary part not yet rotated -> head outputs [T, H*V].

        Each row brings its queries into latent space (q_nope @ W_UK), sees its own sequence at
        positions 0..its own, and takes the resulting latents out of it again (W_UV).
        """

    def route(
        self, logits_TE: Tensor, bias_E: Tensor, groups: int, keep_groups: int, top_k: int,
        normalise: bool, factor: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Expert ids int32 [T, K] ascending, and their float32 weights [T, K] (spec 1.6)."""

    def mlp(self, x_TD: Tensor, gate_up: Any, down: Any) -> Tensor:
        """down(silu(gate x) * up x); gate_up is the stack of gate and up: [2F, D]."""

    def pack_experts(self, gate_up: list[list[Weight]], down: list[Weight]) -> Any:
        """All routed experts of a layer for `experts`: for each its [gate, up], and its down."""

    def experts(
        self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, packed: Any, into_TD: Tensor
    ) -> None:
        """into[t] += weight * expert(x[t]), in ascending expert order, in float32.

        expert_TK: int32, ascending in each row, indices into the lists given to pack_experts.
        """


@dataclass(frozen=True, slots=True)
class MoeParts:
    """Router and routed experts of a layer, packed; what else `Ops.route` is given.

    rows_E: int64, in which the rows of each expert are counted; None: they are not.
    """

    gate: Any
    bias_E: Tensor
    groups: int
    keep_groups: int
    top_k: int
    normalise: bool
    factor: float
    experts: Any
    rows_E: Tensor | None


@dataclass(frozen=True, slots=True)
class LayerParts:
    """A layer, packed. gate_up, down: of the dense MLP, or of the shared experts beside `moe`.

    Without q_b, q_and_kv_a gives the queries themselves.
    """

    input_norm: Norm
    q_and_kv_a: Any
    q_norm: Norm | None
    q_b: Any
    kv_norm: Norm
    w_uk: Any
    w_uv: Any
    o: Any
    norm: Norm
    gate_up: Any
    down: Any
    moe: MoeParts | None


@dataclass(frozen=True, slots=True)
class PassParts:
    """All that a pass needs, from token ids to logits. All norms have the same eps.

    join: of a draft module, its norm of tokens, projection, and norm of hidden states.
    scale: of attention scores. embed_VD: bf16 or float32, contiguous.
    """

    embed_VD: Tensor
    join: tuple[Norm, Any, Norm] | None
    layers: list[LayerParts]
    final_norm: Norm
    head: Any
    cos_sin_PR: Tensor
    scale: float


class PassRows(Protocol):
    """The new rows of a pass; `model/batch.py` says what they are."""

    @property
    def ids_T(self) -> Tensor: ...
    @property
    def positions_T(self) -> Tensor: ...
    @property
    def slots_T(self) -> Tensor: ...
    @property
    def sequence_T(self) -> Tensor: ...
    @property
    def page_table_BP(self) -> Tensor: ...
    @property
    def out_rows_R(self) -> Tensor: ...


class WholePass(Protocol):
    """A pass as one call."""

    def __call__(self, rows: PassRows, hidden_TD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits [R, V] of the out rows, and states after the final norm: of all rows [T, D].

        hidden_TD: for a draft module, whose states are those of the out rows [R, D].
        """

    def drafts(
        self, rows: PassRows, hidden_TD: Tensor, draws: Sequence[Row], most: list[int]
    ) -> list[list[int]]:
        """Several passes of a draft module, each going on from the tokens of the one before.

        draws[r]: how the first token after out row r is drawn, those after it likewise. most[r]:
        how many of them, 1 or more; the page table has room for all but the last.
        """


@runtime_checkable
class PassOps(Protocol):
    """Operations that can do a whole pass in one call, with the bits of the single operations."""

    def whole_pass(self, parts: PassParts, pages: Sequence[Tensor]) -> WholePass:
        """pages: of each layer, for as long as the pass is used."""


class SplitOps(Ops, Protocol):
    """What it takes besides when the experts of a layer are spread over several ranks.

    `expert_rows` where the experts are and `combine` where the rows came from give, bit for bit,
    what `experts` gives in one place.

    fp8_rows: rows travel in e4m3 with scales, products in bfloat16; else both in float32.
    """

    fp8_rows: bool

    def row_words(self, x_TD: Tensor) -> Tensor:
        """Rows as they travel to `expert_rows`: int32 [T, words], as cluster/wire_rows.py says."""

    def join_experts(self, parts: list[Any]) -> Any:
        """Several results of `pack_experts` as one. It may have memory of its own: who keeps it
        need not keep the parts, which `expert_part` gives back."""

    def expert_part(self, packed: Any, index: int) -> Any:
        """One expert of a result of `pack_experts` or `join_experts`, sharing its memory."""

    def expert_rows(self, x_RW: Tensor, row_N: Tensor, expert_N: Tensor, packed: Any) -> Tensor:
        """y[i] = expert_N[i](x[row_N[i]]), as products travel, [N, D]; zeros where it is -1.

        x_RW: made by `row_words`; may be a slice of wider rows. row_N, expert_N: int32.
        """

    def combine(self, y_MD: Tensor, index_TK: Tensor, weight_TK: Tensor, into_TD: Tensor) -> None:
        """into[t] += weight[t, k] * y[index[t, k]], in place, k ascending, in float32.

        index_TK: int32, where the product of row t and its k-th expert is.
        """
