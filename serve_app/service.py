"""What every front door shares: who asks, what they may, and the engine as they see it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rayseek.serve_app.engine_port import Engine
from rayseek.serve_app.errors import ApiError
from rayseek.serve_app.fairness import FairEngine
from rayseek.serve_app.keys import Key, KeyRing
from rayseek.serve_app.limits import Lease, Limiter
from rayseek.serve_app.observer import Observer
from rayseek.serve_app.readiness import Readiness, WatchedEngine
from rayseek.serve_app.settings import ApiSettings
from rayseek.serve_app.tokenizer import Tokenizer


class Service:
    """One ingress replica's keys, limits and fair queue, over its engine."""

    def __init__(
        self,
        settings: ApiSettings,
        tokenizer: Tokenizer,
        engine: Engine,
        problems: Callable[[], list[str]] = list,
        observer: Observer | None = None,
    ) -> None:
        """problems: a sentence for each thing that is not as the config wants it."""
        self.settings, self.tokenizer = settings, tokenizer
        self.problems, self.observer = problems, observer or Observer()
        self.watched = WatchedEngine(engine)
        self.readiness = Readiness(self.watched, settings, tokenizer.bos_id, problems)
        self.keys = KeyRing(settings.api_keys, settings.key_file)
        self._limiter = Limiter(settings.ingress_replicas)
        self._fair = FairEngine(
            self.watched,
            settings.in_flight,
            settings.max_waiting,
            several_keys=lambda: len(self.keys) > 1,
            crowd=settings.crowd,
            observer=self.observer,
            shared_cache=settings.shared_cache,
        )

    @property
    def load(self) -> tuple[int, int]:
        """Sequences at the engine, and waiting for it."""
        return self._fair.load

    def resize(self, slots: int) -> None:
        """So many sequences may be at the engine from now on."""
        self._fair.resize(slots)

    def check_model(self, key: Key, name: str) -> None:
        """Raises ApiError: 404 for a model that is not served, 403 for one not for this key."""
        if name not in self.settings.models:
            served = ", ".join(self.settings.models)
            raise ApiError(
                404,
                f"The model {name!r} does not exist here; this server has: {served}",
                param="model",
                code="model_not_found",
            )
        if not key.may_use(name):
            allowed = ", ".join(key.models or ())
            raise ApiError(
                403,
                f"The key {key.name!r} may not use the model {name!r}; it may use: {allowed}",
                kind="permission_error",
                param="model",
                code="model_not_allowed",
            )

    @contextlib.contextmanager
    def admitted(self, key: Key) -> Iterator[Lease]:
        """Count a request of `key` in; it is released here only if the block fails.

        Otherwise whoever sends the answer releases it. Raises ApiError (429).
        """
        lease = self._limiter.admit(key)
        try:
            yield lease
        except BaseException:
            lease.release()
            raise

    def engine(self, lease: Lease) -> Engine:
        """The engine for the request that holds `lease`."""
        return self._fair.of(lease)
