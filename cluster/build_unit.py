"""What the processes of a unit are made of: an attention rank's engine, an expert rank's slots."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from rayseek.cluster.build import build_engine
from rayseek.cluster.copies import Asking, Sources, Taken
from rayseek.cluster.engine import Engine
from rayseek.cluster.expert_tally import ExpertTally
from rayseek.cluster.participant import OnBroken, Participant
from rayseek.cluster.placement import ExpertPlacement
from rayseek.cluster.spec import RankSpec
from rayseek.kernels.select import choose_ops, device_for
from rayseek.model.checkpoint import Checkpoint
from rayseek.model.expert_slots import ExpertSlots, ExpertStore
from rayseek.model.fingerprint import fingerprint

log = logging.getLogger("rayseek.experts")


class ExpertLoader:
    """Loads what a placement gives this process; what it has already is kept.

    copy: an expert for another process (ExpertStore.copy).
    """

    def __init__(self, store: ExpertStore) -> None:
        self._store, self.copy = store, store.copy
        self._slots: ExpertSlots | None = None  # loaded last
        self._used: ExpertSlots | None = None  # of the plan that was committed last

    def load(
        self,
        placement: ExpertPlacement,
        holder: int,
        sources: Sources | None = None,
        release: bool = False,
    ) -> ExpertSlots:
        """The slots of `holder`, copied from `sources` if they can be. One caller at a time.

        release: those in use are of no use any more, and their memory is wanted. That of slots
        which were loaded and never used is taken in any case.
        """
        lists = {layer: placement.experts_of(holder, layer) for layer in placement.slots}
        before = self._slots
        if before is None or before.lists != lists:
            if release and self._used is not None and self._used is not before:
                self._used.layers.clear()
            with Asking(sources, first=holder) as asking:
                self._slots = before = self._store.load(
                    lists, before, asking.fetch, release or before is not self._used
                )
            log.info("experts so far: %s", self.taken)
        return before

    def use(self, slots: ExpertSlots | None) -> None:
        """These are committed to."""
        self._used = slots

    @property
    def taken(self) -> Taken:
        return Taken(**self._store.taken)


def build_rank(
    name: str, spec: RankSpec, host: str, on_broken: OnBroken, tally: ExpertTally | None = None
) -> tuple[Engine, Participant | None, ExpertLoader | None]:
    """An attention rank: its engine; its part in the unit and its experts, unless it is alone.

    tally: of the experts' rows, if it is.
    """
    path = Path(spec.model_path)
    if spec.alone:
        return build_engine(path, spec.settings, tally=tally), None, None
    participant, loader = build_expert_rank(name, spec, host, on_broken)
    return build_engine(path, spec.settings, participant), participant, loader


def build_expert_rank(
    name: str, spec: RankSpec, host: str, on_broken: OnBroken
) -> tuple[Participant, ExpertLoader]:
    """A process that takes part with experts; which ones, a plan will say."""
    torch.set_num_threads(1)
    checkpoint = Checkpoint.open(Path(spec.model_path))
    settings = spec.settings
    device = device_for(settings.kernels)
    ops = choose_ops(device, settings.kernels, settings.threads, settings.kv_dtype).ops
    timeout_s = settings.step_timeout_s + GRACE_S
    participant = Participant(
        name, host, checkpoint.config, ops, device, spec.exchange, timeout_s, on_broken
    )
    return participant, ExpertLoader(ExpertStore(checkpoint, ops))


def fingerprint_of(spec: RankSpec) -> str:
    """Of what a rank of this kind computes with, as an engine tells it."""
    settings = spec.settings
    device = device_for(settings.kernels)
    choice = choose_ops(device, settings.kernels, settings.threads, settings.kv_dtype)
    return fingerprint(Path(spec.model_path), choice.arithmetic)


GRACE_S = 5.0  # the leader finds out first who stands still, and kills it
