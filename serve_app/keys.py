"""API keys: where they come from, and whether a caller has one."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rayseek.serve_app.errors import unauthorized


def load_keys(
    configured: Sequence[str] = (), file: Path | None = None, *, generated: Path
) -> tuple[str, ...]:
    """The keys to accept: those configured and those in `file` (one a line, `#` comments).

    If there are none, one is made and kept in `generated`, readable by its owner only; the next
    start finds it there. Raises ValueError or OSError naming the file.
    """
    keys = [*configured]
    if file is not None:
        keys += _lines(file)
    if not keys:
        keys = _lines(generated) if generated.exists() else [_generate(generated)]
    bad = [key for key in keys if not key.isascii() or not key.isprintable() or " " in key]
    if not keys or bad or "" in keys:
        raise ValueError(f"no usable API key in {file or generated}: keys are printable ASCII")
    return tuple(dict.fromkeys(keys))


def _lines(file: Path) -> list[str]:
    lines = (line.strip() for line in file.read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _generate(path: Path) -> str:
    """Create `path` with a new key, whole or not at all; another process may be first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as out:
            out.write(f"sk-{secrets.token_hex(24)}\n")
        with suppress(FileExistsError):
            os.link(draft, path)  # unlike rename, never replaces
    finally:
        draft.unlink()
    return _lines(path)[0]


class KeyRing:
    """Keys as digests, compared in constant time."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def check(self, authorization: str | None) -> None:
        """`authorization` is the request's header. Raises ApiError (401)."""
        scheme, _, key = (authorization or "").strip().partition(" ")
        key = key.strip()
        if scheme.lower() != "bearer" or not key:
            raise unauthorized("Authentication Fails (auth header format should be Bearer sk-...)")
        digest = hashlib.sha256(key.encode("utf-8", "replace")).digest()
        # All are compared, whichever matches: the time tells nothing.
        if not sum(hmac.compare_digest(digest, known) for known in self._digests):
            shown = key[-4:] if len(key) >= 12 else ""
            raise unauthorized(f"Authentication Fails, Your api key: ****{shown} is invalid")
