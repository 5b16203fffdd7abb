"""HTTP methods in any case: the vendor's curl sample sends `Post`.

uvicorn's fast parser refuses such a request before any application code sees it, so the method is
put into upper case at the start of each message, in this process only.
"""

from __future__ import annotations

import re

import uvicorn.protocols.http.auto
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_REQUEST_LINE = re.compile(rb"[A-Za-z]{1,16}(?= [^\r\n]* HTTP/)")


class AnyCaseProtocol(HttpToolsProtocol):
    """Upper-cases the method of a request that begins a chunk of received data.

    A request that begins in the middle of a chunk (pipelining) is passed on as it is; HAProxy, in
    front of us, does not pipeline.
    """

    def data_received(self, data: bytes) -> None:
        between_requests = self.cycle is None or self.cycle.response_complete
        if between_requests and (line := _REQUEST_LINE.match(data)):
            data = line[0].upper() + data[line.end() :]
        super().data_received(data)


def accept_methods_in_any_case() -> None:
    """Make uvicorn servers started later in this process accept `Post` for `POST`."""
    uvicorn.protocols.http.auto.AutoHTTPProtocol = AnyCaseProtocol
