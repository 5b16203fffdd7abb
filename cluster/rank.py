"""A Ray actor around one attention rank: load the model, start the engine, serve the channel."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

import torch

from rayseek.cluster.config import EngineSettings
from rayseek.cluster.dispatch import RankAddress
from rayseek.cluster.engine import Engine, EngineLimits
from rayseek.cluster.pages import pages_for
from rayseek.cluster.rank_server import Pulse, RankServer
from rayseek.cluster.scheduler import Limits
from rayseek.kernels.select import choose_ops
from rayseek.model.batch import PAGE_TOKENS
from rayseek.model.checkpoint import Checkpoint
from rayseek.model.config import ModelConfig
from rayseek.model.inventory import owned_names
from rayseek.model.latent_cache import LatentCache
from rayseek.model.transformer import CachedModel, Transformer
from rayseek.model.vocabulary import undefined_ids

log = logging.getLogger("rayseek.rank")


def engine_limits(config: ModelConfig, settings: EngineSettings) -> EngineLimits:
    """Sizes of a rank's engine. Raises ValueError when settings and model do not fit together."""
    allowed = config.max_position_embeddings
    context = settings.max_context or allowed
    if context > allowed:
        raise ValueError(
            f"engine.max_context is {context}, but the model has {allowed} positions "
            "(max_position_embeddings)"
        )
    num_pages = int(settings.cache_gib * 2**30 / LatentCache.page_bytes(config))
    if num_pages * PAGE_TOKENS < context:
        needed = pages_for(context) * LatentCache.page_bytes(config) / 2**30
        raise ValueError(
            f"engine.cache_gib is {settings.cache_gib}: room for {num_pages * PAGE_TOKENS} tokens, "
            f"fewer than one context of {context}. Give it {needed:.2f} GiB or more, or lower "
            "engine.max_context"
        )
    return EngineLimits(
        num_pages=num_pages,
        context=context,
        max_queue=settings.max_queue,
        step=Limits(settings.max_batch, settings.step_tokens, settings.chunk_tokens),
    )


def build_engine(path: Path, settings: EngineSettings) -> Engine:
    """Load a checkpoint and put an engine around it, in this process."""
    config = ModelConfig.from_pretrained(path)
    ops, reason = choose_ops("cpu", settings.kernels)
    log.info("kernels: %s (%s)", ops.name, reason)
    limits = engine_limits(config, settings)
    weights = Checkpoint.open(path).load(owned_names(config))
    model = Transformer(config, weights, ops, limits.context)
    pages = limits.num_pages
    log.info("KV cache: %d pages, %d tokens", pages, pages * PAGE_TOKENS)
    return Engine(CachedModel(model, pages), limits, undefined_ids(path, config.vocab_size))


class Rank:
    """Actor class; plain, so that tests can run it without Ray."""

    def __init__(self, name: str, path: str, settings: EngineSettings) -> None:
        torch.set_num_threads(1)  # one compute thread; the kernels have their own for prompts
        logging.basicConfig(level=logging.INFO)
        self._name = name
        self._path = Path(path)
        self._settings = settings
        self._server: RankServer | None = None

    async def start(self, host: str) -> RankAddress:
        """Load the model and listen on `host`."""
        loop = asyncio.get_running_loop()
        engine = await loop.run_in_executor(None, build_engine, self._path, self._settings)
        self._server = RankServer(engine)
        port = await self._server.start(host)
        return RankAddress(self._name, f"{host}:{port}")

    async def pulse(self) -> Pulse:
        """Whether the engine moves; the leader asks once a second."""
        assert self._server is not None, "pulse is asked for after start"
        return self._server.engine_loop.pulse

    async def run_forever(self) -> None:
        """Never returns: its failure is how the leader learns of this process's death."""
        await asyncio.Event().wait()

    async def process_id(self) -> int:
        return os.getpid()
