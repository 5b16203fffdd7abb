"""What lets one process of ours use the gRPC services of another: a secret that all of them know.

It is made from the token that Ray's own authentication gives every process of a cluster, so it is
the same in all replicas and ranks, survives restarts and rolling updates, and nobody has to hand
it out: who may run code in the cluster may talk to its ranks, and nobody else. It is checked when a
stream opens; frames carry nothing. Where Ray's authentication is off, so is this.
"""

from __future__ import annotations

import hmac
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

log = logging.getLogger("rayseek.credentials")

KEY = "rayseek-secret"  # of the metadata of a call
PURPOSE = b"rayseek token channel"  # so that nothing sent here is Ray's token itself


def secret() -> str:
    """Of this process's cluster; "" where Ray's authentication is off.

    Raises RuntimeError if it is on and there is no token where Ray looks for one.
    """
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return ""
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    if not token:
        path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
        token = path.read_text("utf-8").strip() if path.is_file() else ""
        if not token:
            raise RuntimeError(
                f"RAY_AUTH_MODE is token, but neither RAY_AUTH_TOKEN nor {path} has one; give "
                "every node of the cluster the same"
            )
    return hmac.new(token.encode(), PURPOSE, "sha256").hexdigest()


def credentials() -> tuple[tuple[str, str], ...]:
    """Metadata of a call to a process that has a `Gate`."""
    own = secret()
    return ((KEY, own),) if own else ()


class Gate(grpc.ServerInterceptor):  # type: ignore[misc]
    """Lets calls with this process's secret in, all calls where there is none."""

    def __init__(self) -> None:
        self._secret = secret().encode()
        if not self._secret:
            log.warning(
                "Ray's token authentication is off: whoever reaches this process's ports may use "
                "it. Set RAY_AUTH_MODE=token and a token on every node"
            )

    def intercept_service(self, continuation: Callable[[Any], Any], call: Any) -> Any:
        """gRPC's hook; called once for a stream."""
        shown = next((str(v) for k, v in call.invocation_metadata if k == KEY), "")
        known = not self._secret or hmac.compare_digest(shown.encode(), self._secret)
        return continuation(call) if known else _STRANGER


def _refuse(_: Any, context: Any) -> None:
    context.abort(
        grpc.StatusCode.UNAUTHENTICATED,
        "the caller does not know this cluster's secret: both ends must run under the same Ray "
        "token (RAY_AUTH_MODE, RAY_AUTH_TOKEN)",
    )


_STRANGER = grpc.stream_stream_rpc_method_handler(_refuse)
