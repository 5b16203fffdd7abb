"""Uvicorn's fast HTTP parser, made to take methods in any case.

llhttp refuses `Post`, which the vendor's published curl sample sends; h11 takes it but costs
several times as much per chunk. So the method is upper-cased before llhttp sees it.
"""

from __future__ import annotations

import re
from typing import Any

import uvicorn.config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_METHOD = re.compile(rb"[A-Za-z]{3,7} ")


class AnyCaseHttpProtocol(HttpToolsProtocol):
    """Knows where a request begins: at the connection's start and after each whole request."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._at_start = True

    def data_received(self, data: bytes) -> None:
        if self._at_start:
            self._at_start = False
            method = _METHOD.match(data)
            if method and not method[0].isupper():
                data = method[0].upper() + data[method.end() :]
        super().data_received(data)

    def on_message_complete(self) -> None:
        self._at_start = True
        super().on_message_complete()


def install() -> None:
    """Make it this process's default, for servers that others start (Ray Serve's replicas)."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{AnyCaseHttpProtocol.__name__}"
