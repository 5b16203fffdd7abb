"""An engine from a checkpoint folder and settings: kernels, weights, page pool."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, thread_time

import torch

from rayseek.cluster.config import EngineSettings
from rayseek.cluster.engine import Engine, EngineLimits
from rayseek.cluster.expert_tally import ExpertTally
from rayseek.cluster.grammar import GrammarCompiler, grammar_vocabulary
from rayseek.cluster.pages import pages_for
from rayseek.cluster.participant import Participant
from rayseek.cluster.scheduler import Limits
from rayseek.cluster.unit_model import UnitModel
from rayseek.kernels.select import choose_ops, device_for
from rayseek.model.batch import PAGE_TOKENS
from rayseek.model.cached_model import CachedModel
from rayseek.model.checkpoint import Checkpoint
from rayseek.model.config import ModelConfig
from rayseek.model.fingerprint import fingerprint
from rayseek.model.inventory import owned_names
from rayseek.model.latent_cache import LatentCache
from rayseek.model.moe import Experts, LocalExperts
from rayseek.model.mtp import MTPModule
from rayseek.model.transformer import Transformer
from rayseek.model.vocabulary import undefined_ids

log = logging.getLogger("rayseek.build")


def engine_limits(config: ModelConfig, settings: EngineSettings) -> EngineLimits:
    """Sizes of a rank's engine. Raises ValueError when settings and model do not fit together."""
    allowed = config.max_position_embeddings
    context = settings.max_context or allowed
    if context > allowed:
        raise ValueError(
            f"engine.max_context is {context}, but the model has {allowed} positions "
            "(max_position_embeddings)"
        )
    drafts = settings.draft_tokens if config.num_nextn_predict_layers else 0
    page_bytes = LatentCache.page_bytes(
        config,
        config.num_hidden_layers + bool(drafts),
        device_for(settings.kernels),
        settings.kv_dtype,
    )
    num_pages = int(settings.cache_gib * 2**30 / page_bytes)
    if num_pages * PAGE_TOKENS < context:
        needed = pages_for(context) * page_bytes / 2**30
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
        draft_tokens=drafts,
    )


def build_engine(
    path: Path,
    settings: EngineSettings,
    spread: Participant | None = None,
    tally: ExpertTally | None = None,
) -> Engine:
    """Load a checkpoint and put an engine around it, in this process.

    spread: this rank's part in a unit over which the routed experts are spread; without it they
    are all here. tally: counts their rows then, on a CPU. torch itself keeps to one thread: two
    that share a busy core wait for each other. The kernels use `settings.threads` where a prompt
    makes it worth while.
    """
    torch.set_num_threads(1)
    config = ModelConfig.from_pretrained(path)
    device = device_for(settings.kernels)
    choice = choose_ops(device, settings.kernels, settings.threads, settings.kv_dtype)
    ops = choice.ops
    log.info("kernels: %s (%s)", ops.name, choice.reason)
    limits = engine_limits(config, settings)
    names = owned_names(config) if spread is None else owned_names(config, experts={})
    weights = Checkpoint.open(path).load(names).on(device)
    experts: Callable[[str], Experts] | None = None if spread is None else spread.experts
    if tally is not None and spread is None and device == "cpu":
        experts = tally.counted(config, lambda prefix: LocalExperts(config, weights, prefix, ops))
    model = Transformer(config, weights, ops, limits.context, experts=experts)
    mtp = MTPModule(config, weights, ops, model, experts) if limits.draft_tokens else None
    pages = limits.num_pages
    log.info("KV cache: %d pages, %d tokens", pages, pages * PAGE_TOKENS)
    vocabulary = grammar_vocabulary(path, config.vocab_size, config.eos_token_id)
    cached = CachedModel(model, pages, mtp, graphs=device == "cuda" and spread is None)
    return Engine(
        cached if spread is None else UnitModel(cached, spread),
        limits,
        undefined_ids(path, config.vocab_size),
        GrammarCompiler(vocabulary),
        fingerprint=fingerprint(path, choice.arithmetic),
        sampler=choice.sampler,
        # Alone on a CPU, it computes all by itself: what others do to its core says nothing.
        clock=thread_time if device == "cpu" and spread is None else perf_counter,
    )
