"""How much a key may ask for: token buckets, and the lease that a request holds while it runs.

A bucket holds a minute's worth and refills evenly, so a burst of a whole minute's worth is allowed
and any minute sees at most twice the limit. Requests are paid before they run. Tokens are paid
as they are computed, and a request is let in while the bucket is not in debt: nobody has to guess
how long an answer will be, and what was used too much is waited for before the next request.

Each ingress replica counts for itself, and gets an equal part of every limit (`replicas`):
together they allow no more than the limit, and less when the proxy spreads a key unevenly. What
cannot be divided so is at least one: each replica lets one request run at a time, and a bucket that
fills by less than one in a minute holds one, so that a minute in which all do sees one of each.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from rayseek.cluster.request import Request
from rayseek.serve_app.errors import ApiError
from rayseek.serve_app.keys import Key


@dataclass(frozen=True, slots=True)
class Bucket:
    """`level` (of what is counted) at time `at` in seconds. Negative: debt."""

    level: float
    at: float


def full(per_minute: float) -> float:
    """The most that a bucket holds: a minute's worth, and at least what one request needs."""
    return max(1.0, per_minute)


def level(bucket: Bucket, per_minute: float, now: float) -> float:
    """What the bucket holds at `now`: it refills evenly until it is full, never back."""
    passed = max(0.0, now - bucket.at)
    return min(full(per_minute), bucket.level + passed * per_minute / 60)


def take(bucket: Bucket, per_minute: float, cost: float, now: float) -> Bucket:
    """Pay `cost`, into debt if need be."""
    return Bucket(level(bucket, per_minute, now) - cost, max(now, bucket.at))


def wait_for(bucket: Bucket, per_minute: float, amount: float, now: float) -> float:
    """Seconds until the bucket holds `amount`; inf for more than it ever holds."""
    if amount > full(per_minute):
        return math.inf
    seconds = (amount - level(bucket, per_minute, now)) * 60 / per_minute
    return seconds if seconds > 0.001 else 0.0  # who has waited exactly may lack a rounding error


class _Allowance:
    """A bucket and its rate; without a rate it refuses nothing."""

    def __init__(self) -> None:
        self.rate: float | None = None
        self._bucket: Bucket | None = None

    def set_rate(self, limit: int | None, part: float, now: float) -> None:
        """A new rate; what is spent stays spent."""
        if self.rate is not None and self._bucket is not None:
            self._bucket = take(self._bucket, self.rate, 0, now)
        self.rate = None if limit is None else limit * part

    def wait(self, now: float) -> float:
        """Seconds until there is a whole unit to spend."""
        if self.rate is None or self._bucket is None:
            return 0.0
        return wait_for(self._bucket, self.rate, 1.0, now)

    def pay(self, cost: float, now: float) -> None:
        if self.rate is not None:
            bucket = self._bucket or Bucket(full(self.rate), now)
            self._bucket = take(bucket, self.rate, cost, now)


class _Account:
    """One key's state here; survives a reload of the key file."""

    def __init__(self, key: Key, part: float, now: float) -> None:
        self.running = 0
        self.requests, self.tokens = _Allowance(), _Allowance()
        self.set_limits(key, part, now)

    def set_limits(self, key: Key, part: float, now: float) -> None:
        """`part` of each limit is this replica's."""
        self.key = key
        self.requests.set_rate(key.requests_per_minute, part, now)
        self.tokens.set_rate(key.tokens_per_minute, part, now)
        limit = key.concurrent
        self.concurrent = math.inf if limit is None else max(1, int(limit * part))


class Lease:
    """One HTTP request of a key, from its admission to its end."""

    def __init__(self, key: Key, account: _Account, clock: Callable[[], float]) -> None:
        self.key = key
        self.waiting = 0  # sequences in the fair queue
        self.begun = 0  # sequences that have left it
        self.arrived = clock()
        self._account, self._clock = account, clock
        self._prompts: set[tuple[int, ...]] = set()
        self._open = True
        account.running += 1

    @property
    def admitted(self) -> bool:
        """Everything this request needs is at the engine: it may be told that it succeeds."""
        return self.begun > 0 and self.waiting == 0

    def paid_prompt(self, request: Request) -> int:
        """Choices that share a prompt pay it once, as in `usage`. Returns how many tokens it is."""
        if request.prompt_ids in self._prompts:
            return 0
        self._prompts.add(request.prompt_ids)
        self.paid_tokens(len(request.prompt_ids))
        return len(request.prompt_ids)

    def paid_tokens(self, count: int) -> None:
        self._account.tokens.pay(count, self._clock())

    def release(self) -> None:
        """The request has ended. Harmless twice."""
        if self._open:
            self._open = False
            self._account.running -= 1


class Limiter:
    """The accounts of all keys that have called."""

    def __init__(self, replicas: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        """`replicas`: of the ingress; each gets that part of every limit."""
        self._part, self._clock = 1 / replicas, clock
        self._accounts: dict[str, _Account] = {}

    def admit(self, key: Key) -> Lease:
        """Count a request in. Raises ApiError (429) with the time after which it may come again."""
        now = self._clock()
        account = self._accounts.get(key.sha256)
        if account is None:
            account = self._accounts[key.sha256] = _Account(key, self._part, now)
        elif account.key != key:  # the key file was edited
            account.set_limits(key, self._part, now)
        if account.running >= account.concurrent:
            raise _too_much(key, f"{key.concurrent} requests at one time", 1.0)
        if (wait := account.requests.wait(now)) > 0:
            raise _too_much(key, f"{key.requests_per_minute} requests per minute", wait)
        if (wait := account.tokens.wait(now)) > 0:
            raise _too_much(key, f"{key.tokens_per_minute} tokens per minute", wait)
        account.requests.pay(1.0, now)
        return Lease(key, account, self._clock)


def _too_much(key: Key, limit: str, wait_s: float) -> ApiError:
    seconds = max(1, math.ceil(wait_s))
    return ApiError(
        429,
        f"Rate limit of key {key.name!r} reached: {limit}. Please try again in {seconds} s.",
        kind="rate_limit_error",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(seconds)},
    )
