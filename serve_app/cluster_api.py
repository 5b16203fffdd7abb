"""What the cluster page shows: `GET /api/cluster`, for those with a key."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from rayseek.cluster.unit_report import UnitView
from rayseek.serve_app.pages import SECURITY
from rayseek.serve_app.service import Service

Views = Callable[[], Awaitable[list[UnitView]]]

KEEP_S = 1.0  # many who look cost the leaders no more than one


class ClusterView:
    """Asks the units' leaders, at most once a second."""

    def __init__(self, service: Service, views: Views) -> None:
        self._service, self._views = service, views
        self._found: list[UnitView] = []
        self._asked = float("-inf")
        self._asking = asyncio.Lock()

    async def document(self) -> dict[str, object]:
        async with self._asking:
            if time.monotonic() - self._asked > KEEP_S:
                self._found = await self._views()
                self._asked = time.monotonic()
        running, waiting = self._service.load
        return {
            "time": time.time(),
            "model": self._service.settings.model,
            "running": running,  # of this ingress replica
            "waiting": waiting,
            "problems": self._service.problems(),
            "units": [asdict(view) for view in self._found],
        }


def add_cluster(app: FastAPI, service: Service, views: Views) -> None:
    view = ClusterView(service, views)

    async def cluster(request: Request) -> Response:
        service.keys.check(request.headers.get("authorization"))
        headers = {**SECURITY, "Cache-Control": "no-store", "Vary": "Authorization"}
        return JSONResponse(await view.document(), headers=headers)

    app.get("/api/cluster", include_in_schema=False)(cluster)
