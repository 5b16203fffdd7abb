"""What an engine runs: the main model and its draft module over one page pool.

Two kinds of pass. `forward` is the main model; `draft` is the MTP module (spec section 2), which
proposes the token after the next. Each runs every layer it has once, so ranks that share experts
meet in it equally often. `remember` only writes the draft module's latents and meets nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rayseek.kernels.ops import Ops, PassOps, PassParts, WholePass
from rayseek.kernels.sampler import Row
from rayseek.model.batch import Batch
from rayseek.model.decode_graphs import DecodeGraphs
from rayseek.model.latent_cache import LatentCache
from rayseek.model.mtp import MTPModule
from rayseek.model.transformer import Transformer


@dataclass(frozen=True, slots=True)
class Passed:
    """What a pass brought: logits float32 [R, V] of the batch's out rows.

    normed_TD: hidden states after the final norm, for the next draft pass: of every row, after a
    draft of the out rows only; None from a model that does not draft.
    """

    logits_RV: Tensor
    normed_TD: Tensor | None


class CachedModel:
    """A transformer, its draft module if it has one, and `num_pages` pages for both.

    The module's latents are one more layer of every page. Slot i belongs to (hidden state i,
    token i + 1), so the last slot of a page knows the first token of the next page. A sequence
    that shares the page may have another token there; the slot is a hint like every draft, and
    costs at most a rejected one. graphs: on a GPU whose experts are all here, run small batches
    as CUDA graphs (`decode_graphs.py`), which takes one page more.
    """

    def __init__(
        self,
        transformer: Transformer,
        num_pages: int,
        mtp: MTPModule | None = None,
        graphs: bool = False,
    ) -> None:
        self.transformer, self.mtp = transformer, mtp
        config = transformer.config
        layers = config.num_hidden_layers + (mtp is not None)
        self.cache = LatentCache(config, num_pages + graphs, transformer.ops, layers)
        self.device = transformer.embed_VD.device
        self._graphs: DecodeGraphs | None = None
        if graphs:
            widths = config.vocab_size, config.hidden_size
            self._graphs = DecodeGraphs(self._forward, num_pages, *widths, self.device)
        self._main = self.cache.layers[: config.num_hidden_layers]
        self._whole = _whole_pass(transformer.ops, transformer.parts, self._main)
        self._whole_draft = _whole_pass(
            transformer.ops, None if mtp is None else mtp.parts, self.cache.layers[-1:]
        )

    @property
    def drafts(self) -> bool:
        """Whether `draft` and `remember` may be called."""
        return self.mtp is not None

    @property
    def vocab_size(self) -> int:
        return self.transformer.config.vocab_size

    def forward(self, batch: Batch, micro_batches: int = 1) -> Passed:
        """The main model over new rows; writes their latents."""
        if self._graphs is not None and (passed := self._graphs.run(batch)):
            return Passed(*passed)
        whole = self._whole
        if whole is not None and len(batch.ids_T) and micro_batches == 1:
            return Passed(*whole(batch))
        return Passed(*self._forward(batch.to(self.device), micro_batches))

    def _forward(self, batch: Batch, micro_batches: int = 1) -> tuple[Tensor, Tensor | None]:
        model = self.transformer
        x_TD = model.hidden(batch, self._main, micro_batches)
        out_RD = x_TD if len(batch.out_rows_R) == len(x_TD) else x_TD[batch.out_rows_R]
        normed = model.ops.rms_norm(x_TD, model.final_norm) if self.mtp is not None else None
        return model.logits(out_RD), normed

    def draft(self, batch: Batch, hidden_TD: Tensor) -> Passed:
        """One draft pass. batch.ids_T[t] follows the token at whose position hidden_TD[t] is.

        hidden_TD: rows of `normed_TD` from `forward`, or from `draft` to look further ahead. Rows
        that are not out rows only write their latents, as by `remember`.
        """
        assert self.mtp is not None
        whole = self._whole_draft
        if whole is not None and len(batch.ids_T):
            return Passed(*whole(batch, hidden_TD))
        hidden_TD = hidden_TD.to(self.device)
        return Passed(*self.mtp(batch.to(self.device), hidden_TD, self.cache.layers[-1]))

    def drafts_ahead(
        self, batch: Batch, hidden_TD: Tensor, draws: Sequence[Row], most: list[int]
    ) -> list[list[int]] | None:
        """As `draft`, and as many passes after it as it takes for most[r] tokens of each out row.

        draws[r]: how the first of them is drawn; the others differ in their position alone. None
        where every pass is one call: nothing was done.
        """
        whole = self._whole_draft
        if whole is None:
            return None
        return whole.drafts(batch, hidden_TD, draws, most)

    def remember(self, batch: Batch, hidden_TD: Tensor) -> None:
        """Write the module's latents of rows of which no draft is wanted."""
        assert self.mtp is not None
        whole = self._whole_draft
        if whole is not None:
            whole(batch, hidden_TD)
            return
        hidden_TD = hidden_TD.to(self.device)
        self.mtp.remember(batch.to(self.device), hidden_TD, self.cache.layers[-1])


def _whole_pass(ops: Ops, parts: PassParts | None, pages: list[Tensor]) -> WholePass | None:
    """Where operations and model allow it."""
    return ops.whole_pass(parts, pages) if isinstance(ops, PassOps) and parts else None
