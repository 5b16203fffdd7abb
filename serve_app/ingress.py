"""The ingress replica: our HTTP application, and the dispatcher that feeds it.

Serve only places and discovers here. Tokens come over the dispatcher's own channels, not through
Serve handles.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from rayseek.cluster.config import Config
from rayseek.cluster.dispatch import Dispatcher, RankAddress
from rayseek.cluster.logs import start_logging
from rayseek.cluster.metrics import INGRESS, RayMeter
from rayseek.cluster.status import Roll, UnitStatus, views
from rayseek.cluster.traces import start_tracing
from rayseek.cluster.unit_report import UnitView
from rayseek.serve_app.app import build_app
from rayseek.serve_app.grpc_door import GrpcDoor
from rayseek.serve_app.http_methods import accept_methods_in_any_case
from rayseek.serve_app.observer import Observer
from rayseek.serve_app.pages import is_loopback
from rayseek.serve_app.readiness import MOVES_TOLD_S, told_moves
from rayseek.serve_app.service import Service
from rayseek.serve_app.settings import ApiSettings
from rayseek.serve_app.tokenizer import Tokenizer


class Ingress(GrpcDoor):
    """Deployment class of `Ingress`.

    units: handles of `Decode` and `Prefill`. experts: of the deployments that serve those units;
    bound here so that Serve starts them, never called.
    """

    def __init__(
        self, settings: ApiSettings, model_path: str, units: list[Any], experts: list[Any]
    ) -> None:
        accept_methods_in_any_case()
        start_logging("ingress")
        start_tracing("ingress")
        self._settings = settings
        self._units, self._rolls = units, [Roll(of_role) for of_role in units]
        self._tokenizer = Tokenizer.from_pretrained(Path(model_path))
        self._statuses: list[UnitStatus] = []
        self._name = uuid4().hex
        self._observer = Observer(RayMeter(INGRESS))

    async def _discover(self) -> list[RankAddress]:
        """Every attention rank of every unit that serves now. Leaders hear what waits here."""
        running, waiting = self._service.load
        share = waiting / max(1, sum(s.role == "decode" for s in self._statuses))
        found = await asyncio.gather(*(roll.statuses(self._name, share) for roll in self._rolls))
        self._statuses = [status for of_role in found for status in of_role]
        self._observer.state(running, waiting, self._engine.moved)
        places = sum(s.places for s in self._statuses if s.role == "decode")
        if places:
            self._service.resize(-(-places // self._settings.ingress_replicas))
        return [
            replace(rank, prefills=status.role == "prefill")
            for status in self._statuses
            for rank in status.ranks
        ]

    async def _views(self) -> list[UnitView]:
        """Every unit as its leader sees it."""
        found = await asyncio.gather(*(views(units) for units in self._units))
        return [view for of_role in found for view in of_role]

    def _degraded(self) -> list[str]:
        """A sentence for each thing that the units miss, and for what that has done."""
        missing = [problem for status in self._statuses for problem in status.problems]
        return missing + told_moves(self._engine.moved_lately(MOVES_TOLD_S))

    async def __serve_build_asgi_app__(self) -> Any:
        engine = self._engine = Dispatcher(self._discover)
        self._service = Service(
            self._settings, self._tokenizer, engine, self._degraded, self._observer
        )
        return build_app(self._settings, self._tokenizer, engine, self._service, self._views)


def api_settings(
    config: Config, context: int, key_file: Path | None, shown_key: str | None
) -> ApiSettings:
    """The HTTP side's branch of the config, with what the model and the key file say.

    `shown_key`: one that a viewer on this machine may see.
    """
    api = config.api
    engines = config.decode.units * config.decode.attention_ranks
    running = config.engine_of("decode").max_batch * engines
    shows_key = config.pages.local_key and is_loopback(config.ingress.host)
    return ApiSettings(
        model=config.model.name,
        aliases=config.model.aliases,
        context_length=context,
        api_keys=api.keys,
        key_file=key_file,
        ingress_replicas=config.ingress.replicas,
        in_flight=-(-running // config.ingress.replicas),
        max_waiting=api.max_waiting,
        crowd=api.crowd,
        shared_cache=api.shared_cache,
        temperature_mapping=api.temperature_mapping,
        max_output_tokens=api.max_output_tokens,
        default_output_tokens=api.default_output_tokens,
        body_limit_bytes=int(api.body_limit_mib * 2**20),
        keep_alive_s=api.keep_alive_s,
        ready_window_s=api.ready_window_s,
        default_system_prompt=api.default_system_prompt,
        time_zone=api.time_zone,
        page_system_prompt=config.pages.default_system_prompt,
        public_url=config.pages.public_url,
        dashboard_url=config.pages.dashboard_url,
        local_key=shown_key if shows_key else None,
    )
