"""API keys: the key file with names, digests and limits, and who a caller is.

The file holds SHA-256 digests only; keys are random, so they need no salt. Only the key made on the
first start is also kept in the clear, in a file of its own, to be shown again at every start.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rayseek.serve_app.errors import unauthorized

log = logging.getLogger("rayseek.keys")

FIRST = "first"  # the name of the key that is made on the first start
CHECK_EVERY_S = 1.0
HEADER = "# Written by `rayseek keys`; may be edited by hand. Read again when it changes.\n"


class Key(BaseModel):
    """One caller. A limit that is absent does not apply."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9._@-]{1,64}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    created: str | None = None
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)  # prompt and answer together
    concurrent: int | None = Field(default=None, ge=1)  # HTTP requests at one time
    models: tuple[str, ...] | None = None  # names that requests may ask for

    def may_use(self, model: str) -> bool:
        return self.models is None or model in self.models


class _KeyFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: tuple[Key, ...] = ()

    @model_validator(mode="after")
    def _distinct(self) -> _KeyFile:
        for what in ("name", "sha256"):
            seen: set[str] = set()
            for key in self.keys:
                value = getattr(key, what)
                if value in seen:
                    raise ValueError(f"two keys have the {what} {value!r}")
                seen.add(value)
        return self


def digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()


def read_keys(file: Path) -> tuple[Key, ...]:
    """Raises OSError, or ValueError that names the file and every problem in it."""
    try:
        data = yaml.safe_load(file.read_text("utf-8"))
        return _KeyFile.model_validate(data or {}).keys
    except ValidationError as error:
        problems = [f"  {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ValueError("\n".join([f"{file}:", *problems])) from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: {error}") from None


def undivided(keys: Iterable[Key], replicas: int) -> list[str]:
    """Sentences about limits that cannot be divided among so many ingress replicas."""
    return [
        f"key {key.name}: {replicas} ingress replicas let one request each run at a time, "
        f"{replicas} together, not {key.concurrent}"
        for key in keys
        if key.concurrent is not None and key.concurrent < replicas
    ]


def write_keys(file: Path, keys: Iterable[Key]) -> None:
    """Replace `file`, whole or not at all, readable by its owner only."""
    entries = [key.model_dump(exclude_none=True, mode="json") for key in keys]
    _write_private(file, HEADER + yaml.safe_dump({"keys": entries}, sort_keys=False))


def add_key(file: Path, name: str, **limits: object) -> str:
    """Enter a new random key and return it; it is shown this once.

    Raises ValueError for a name that is taken or a limit that makes no sense.
    """
    key = f"sk-{secrets.token_hex(24)}"
    created = datetime.now(UTC).isoformat(timespec="seconds")
    fields = {"name": name, "sha256": digest(key), "created": created, **limits}
    try:
        entry = Key.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    with _one_writer(file):
        known = read_keys(file) if file.exists() else ()
        if any(other.name == name for other in known):
            raise ValueError(f"a key named {name!r} exists; revoke it or choose another name")
        write_keys(file, (*known, entry))
    return key


def revoke_key(file: Path, name: str, plain: Path) -> None:
    """Take a key out, and its clear text if it is in `plain`. Raises ValueError, OSError."""
    with _one_writer(file):
        known = read_keys(file)
        left = tuple(entry for entry in known if entry.name != name)
        if len(left) == len(known):
            names = ", ".join(entry.name for entry in known)
            raise ValueError(f"{file} has no key named {name!r}; it has: {names or 'none'}")
        write_keys(file, left)
    gone = {entry.sha256 for entry in known} - {entry.sha256 for entry in left}
    if plain.exists() and digest(plain.read_text().strip()) in gone:
        plain.unlink()


def first_key(file: Path, plain: Path) -> str | None:
    """The key to show at a start, if its clear text is known and it is still valid.

    If `file` has no key at all, one is made (or the one in `plain` is taken) and entered there.
    Several processes may start at once: they agree on one key. Raises ValueError, OSError.
    """
    with _one_writer(file):
        known = read_keys(file) if file.exists() else ()
        if not known:
            if not plain.exists():
                _write_private(plain, f"sk-{secrets.token_hex(24)}\n")
            key = plain.read_text().strip()
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise ValueError(f"no usable API key in {plain}: a key is printable ASCII")
            created = datetime.now(UTC).isoformat(timespec="seconds")
            known = (Key(name=FIRST, sha256=digest(key), created=created),)
            write_keys(file, known)
    shown = plain.read_text().strip() if plain.exists() else ""
    return shown if digest(shown) in {entry.sha256 for entry in known} else None


@contextlib.contextmanager
def _one_writer(file: Path) -> Iterator[None]:
    """Processes that change the file take turns. (It is replaced, so the lock is beside it.)"""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_name(f".{file.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write_private(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as out:
            out.write(text)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


class KeyRing:
    """The keys that are valid now: those of the config, and those of the key file as it is.

    The file is looked at no more than once a second, when somebody calls. What cannot be read is
    logged, and the keys that were valid stay so: a slip of an editor locks nobody out.
    """

    def __init__(
        self,
        configured: Sequence[str] = (),
        file: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises ValueError or OSError when `file` cannot be read now."""
        self._fixed = {
            digest(key): Key(name=f"config.{index}", sha256=digest(key))
            for index, key in enumerate(configured)
        }
        self._file, self._clock = file, clock
        self._seen: tuple[int, ...] | None = None
        self._checked = clock()
        self._known = self._fixed
        if file is not None:
            self._seen = _version(file)
            self._enter(read_keys(file))

    def __len__(self) -> int:
        return len(self._known)

    def check(self, authorization: str | None, x_api_key: str | None = None) -> Key:
        """The caller, by the headers `Authorization` or `x-api-key`. Raises ApiError (401)."""
        scheme, _, key = (authorization or "").strip().partition(" ")
        if scheme.lower() != "bearer":
            key = x_api_key or ""
        key = key.strip()
        if not key:
            raise unauthorized("Authentication Fails (auth header format should be Bearer sk-...)")
        self._reload()
        # A look-up by digest: its time tells about the digest, and nobody can choose that.
        known = self._known.get(digest(key))
        if known is None:
            shown = key[-4:] if len(key) >= 12 else ""
            raise unauthorized(f"Authentication Fails, Your api key: ****{shown} is invalid")
        return known

    def _enter(self, keys: Iterable[Key]) -> None:
        self._known = {**{key.sha256: key for key in keys}, **self._fixed}

    def _reload(self) -> None:
        now = self._clock()
        if self._file is None or now - self._checked < CHECK_EVERY_S:
            return
        self._checked = now
        try:
            version = _version(self._file)
            if version == self._seen:
                return
            self._seen = version
            self._enter(read_keys(self._file))
            log.info("read %d keys from %s", len(self._known), self._file)
        except (OSError, ValueError) as error:
            if self._seen is not None or not isinstance(error, OSError):
                log.error("the key file cannot be used, the keys stay as they were: %s", error)
            if isinstance(error, OSError):
                self._seen = None


def _version(file: Path) -> tuple[int, ...]:
    state = file.stat()
    return state.st_mtime_ns, state.st_size, state.st_ino
