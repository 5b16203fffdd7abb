"""KV pages: which are free, which are shared, which still hold a prefix worth keeping.

A full page is addressed by the hash of its whole token chain and the cache salt, so equal prefixes
share pages. This file counts pages; the latents themselves are in `model/latent_cache.py`.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rayseek.model.batch import PAGE_TOKENS


def chain_root(salt: str) -> bytes:
    """The parent hash of a sequence's first page; different salts never share a page."""
    return hashlib.blake2b(salt.encode(), digest_size=16, person=b"rayseek-salt").digest()


def page_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Address of a full page after `parent`: 16 bytes over the parent and PAGE_TOKENS ids."""
    assert len(token_ids) == PAGE_TOKENS, f"a page holds {PAGE_TOKENS} tokens"
    return hashlib.blake2b(parent + array("I", token_ids).tobytes(), digest_size=16).digest()


def pages_for(tokens: int) -> int:
    """Pages needed to hold this many tokens."""
    return -(-tokens // PAGE_TOKENS)


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """Cached pages at the start of a chain; `idle` of them are held by nobody at the moment."""

    pages: tuple[int, ...]
    idle: int


class PagePool:
    """Free list, reference counts, and an LRU of idle pages that still hold a known prefix."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders = [0] * num_pages
        self._hash_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # oldest first

    @property
    def available(self) -> int:
        """Pages that `take` can hand out: free ones and idle cached ones."""
        return len(self._free) + len(self._idle)

    def look_up(self, chain: Iterable[bytes]) -> PrefixMatch:
        """The longest cached prefix of a chain of page hashes. Changes nothing."""
        pages: list[int] = []
        for address in chain:
            page = self._page_of.get(address)
            if page is None:
                break
            pages.append(page)
        return PrefixMatch(tuple(pages), sum(self._holders[p] == 0 for p in pages))

    def sole_held(self, pages: Iterable[int]) -> int:
        """How many of these pages have exactly one holder."""
        return sum(self._holders[p] == 1 for p in pages)

    def hold(self, pages: Iterable[int]) -> None:
        """Take one more reference to cached pages found by `look_up`."""
        for page in pages:
            self._idle.pop(page, None)
            self._holders[page] += 1

    def take(self, count: int) -> list[int]:
        """`count` pages for new tokens, evicting the least recently used prefixes if need be."""
        assert count <= self.available, f"{count} pages wanted, {self.available} available"
        taken = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._idle.popitem(last=False)
                del self._page_of[self._hash_of.pop(page)]
            self._holders[page] = 1
            taken.append(page)
        return taken

    def publish(self, page: int, address: bytes) -> None:
        """The page is full and final: others may share it. The first page of an address wins."""
        if address not in self._page_of and page not in self._hash_of:
            self._page_of[address] = page
            self._hash_of[page] = address

    def retract(self, pages: Iterable[int]) -> None:
        """Share these pages no more: what is in them turned out to be wrong."""
        for page in pages:
            address = self._hash_of.pop(page, None)
            if address is not None:
                del self._page_of[address]
                if page in self._idle:
                    del self._idle[page]
                    self._free.append(page)

    def release(self, pages: Sequence[int]) -> None:
        """Drop one reference to each page of a sequence (in chain order).

        Later pages of a chain become older than earlier ones: a chain is evicted from its end,
        since a page is useless without its predecessors.
        """
        for page in reversed(pages):
            self._holders[page] -= 1
            assert self._holders[page] >= 0, f"page {page} released twice"
            if self._holders[page] == 0:
                if page in self._hash_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def check(self) -> None:
        """Assert the invariants: every page is held, idle or free, exactly once."""
        held = {p for p in range(self.num_pages) if self._holders[p] > 0}
        parts = (held, set(self._idle), set(self._free))
        assert sum(map(len, parts)) == self.num_pages == len(set().union(*parts))
        assert len(self._free) == len(set(self._free))
        assert {p: h for h, p in self._page_of.items()} == self._hash_of
        assert not set(self._hash_of) & set(self._free)
