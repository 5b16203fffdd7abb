"""The web pages: overview, chat, cluster, API reference; the files they load; who may see the key.

    GET /  /chat  /cluster  /docs HTML that is the same for everyone
    GET /static/{version}/{name}  what it loads, from memory; the version is a digest of it all
    GET /pages/info               what the pages fill in; more for a caller with a key

All that is secret or changes comes from /pages/info, so nothing else depends on the viewer.
"""

from __future__ import annotations

import gzip
import hashlib
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from rayseek.serve_app.errors import ApiError
from rayseek.serve_app.keys import KeyRing
from rayseek.serve_app.prompt import default_system_prompt
from rayseek.serve_app.settings import ApiSettings

FOLDER = Path(__file__).parent / "static"
TYPES = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".txt": "text/plain",
         ".svg": "image/svg+xml"}  # fmt: skip

# Only our own files; no inline script or style, no frames, and HTML only through DOMPurify.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types dompurify"
)
SECURITY = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
FOR_EVER = "public, max-age=31536000, immutable"
# Any of these says that a proxy stands between the viewer and this machine.
FORWARDING = (
    "forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip",
    "x-client-ip", "true-client-ip", "cf-connecting-ip", "x-envoy-external-address",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class File:
    body: bytes
    packed: bytes  # gzip
    media_type: str
    etag: str

    def response(self, request: Request, caching: str, vary: str = "") -> Response:
        vary = ", ".join(filter(None, (vary, "Accept-Encoding")))
        headers = {**SECURITY, "Cache-Control": caching, "ETag": self.etag, "Vary": vary}
        known = request.headers.get("if-none-match", "")
        if self.etag in (tag.strip() for tag in known.split(",")):
            return Response(status_code=304, headers=headers)
        body = self.body
        if "gzip" in request.headers.get("accept-encoding", ""):
            body, headers["Content-Encoding"] = self.packed, "gzip"
        return Response(body, headers=headers, media_type=self.media_type)


def _file(name: str, body: bytes) -> File:
    # Weak: the same for both encodings.
    etag = f'W/"{hashlib.sha256(body).hexdigest()[:20]}"'
    packed = gzip.compress(body, 9, mtime=0)
    return File(body, packed, TYPES[Path(name).suffix], etag)


@cache
def static_files() -> tuple[str, Mapping[str, File]]:
    """A version that changes with any file, and every file by its name under `static/`."""
    bodies = {
        str(path.relative_to(FOLDER)): path.read_bytes()
        for path in sorted(FOLDER.rglob("*"))
        if path.suffix in TYPES
    }
    digest = hashlib.sha256()
    for name, body in bodies.items():
        digest.update(f"{name}\0{len(body)}\0".encode() + body)
    version = digest.hexdigest()[:16]
    folder = f"static/{version}".encode()
    files = {
        name: _file(name, body.replace(b"{static}", folder) if name.endswith(".html") else body)
        for name, body in bodies.items()
    }
    return version, files


def is_loopback(host: str) -> bool:
    """Whether a host name or address, without port, means this machine and nothing else."""
    host = host.strip("[]").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_local_viewer(request: Request) -> bool:
    """Whether everything about a request says that it comes from this machine.

    The peer alone proves nothing, since behind HAProxy it is HAProxy, which says nothing about its
    own peer. So a key is shown on this ground only where the service listens on loopback
    (`ApiSettings.local_key`). The `Host` must be a name of loopback too, or a foreign page could
    get here by a DNS name of its own; and nothing may hint at a further proxy.
    """
    headers = request.headers
    return (
        request.client is not None
        and is_loopback(request.client.host)
        and headers.get("host") == request.url.netloc  # or it is malformed, and not used
        and is_loopback(request.url.hostname or "")
        and not any(name in headers for name in FORWARDING)
        and headers.get("sec-fetch-site", "none") in ("none", "same-origin")
    )


def add_pages(app: FastAPI, settings: ApiSettings, keys: KeyRing, about: str) -> None:
    """`about`: what `/` says to those who do not ask for HTML; `{base}` is where they asked."""
    version, files = static_files()

    async def overview(request: Request) -> Response:
        if "text/html" in request.headers.get("accept", ""):
            return files["overview.html"].response(request, "no-cache", "Accept")
        text = about.format(model=settings.model, base=str(request.base_url).rstrip("/"))
        return PlainTextResponse(text, headers={"Vary": "Accept"})

    def add_page(name: str) -> None:
        async def page(request: Request) -> Response:
            return files[f"{name}.html"].response(request, "no-cache")

        app.get(f"/{name}", include_in_schema=False)(page)

    async def static(request: Request, asked: str, name: str) -> Response:
        if name not in files or name.endswith(".html"):
            raise ApiError(404, f"There is no file {name!r}", code="not_found")
        # While two versions of the service run, a page may ask the other one for its files.
        return files[name].response(request, FOR_EVER if asked == version else "no-store")

    async def info(request: Request) -> Response:
        return JSONResponse(_info(request, settings, keys), headers={
            **SECURITY, "Cache-Control": "no-store", "Vary": "Authorization"
        })  # fmt: skip

    app.get("/", include_in_schema=False)(overview)
    for name in ("chat", "cluster", "docs"):
        add_page(name)
    app.get("/static/{asked}/{name:path}", include_in_schema=False)(static)
    app.get("/pages/info", include_in_schema=False)(info)


def _info(request: Request, settings: ApiSettings, keys: KeyRing) -> dict[str, object]:
    signed_in = True
    try:
        keys.check(request.headers.get("authorization"))
    except ApiError:
        signed_in = False
    local = settings.local_key is not None and is_local_viewer(request)
    known = signed_in or local
    return {
        "model": settings.model,
        "aliases": settings.aliases,
        "context_length": settings.context_length,
        "max_output_tokens": min(settings.max_output_tokens, settings.context_length),
        "default_output_tokens": settings.default_output_tokens,
        "temperature_mapping": settings.temperature_mapping,
        "public_url": settings.public_url,
        "system_prompt": default_system_prompt(settings.page_system_prompt, settings.today()),
        "signed_in": signed_in,
        "local": local,
        "key": settings.local_key if local else None,
        "dashboard_url": settings.dashboard_url if known else None,
    }
