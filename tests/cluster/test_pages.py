"""The page pool under arbitrary use: nothing is lost, nothing is handed out twice."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from rayseek.cluster.pages import PagePool, chain_root, page_hash, pages_for
from rayseek.model.batch import PAGE_TOKENS

SIZE = 12
CHAINS = st.lists(st.sampled_from("ab"), min_size=1, max_size=4)


def addresses(chain: list[str], salt: str = "") -> list[bytes]:
    """Hashes of a chain of pages, each full of one letter."""
    parent, out = chain_root(salt), []
    for letter in chain:
        parent = page_hash(parent, [ord(letter)] * PAGE_TOKENS)
        out.append(parent)
    return out


class Pool(RuleBasedStateMachine):
    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(SIZE)
        self.contents: dict[int, bytes] = {}  # what the model would have written

    @rule(target=held, chain=CHAINS, salt=st.sampled_from(["", "x"]))
    def start(self, chain: list[str], salt: str) -> list[int]:
        """What the engine does for a prompt: match, hold, take, write, publish."""
        wanted = addresses(chain, salt)
        match = self.pool.look_up(wanted)
        for page, address in zip(match.pages, wanted, strict=False):
            assert self.contents[page] == address, "a cached page holds what its address says"
        if len(wanted) - len(match.pages) + match.idle > self.pool.available:
            return []
        self.pool.hold(match.pages)
        fresh = self.pool.take(len(wanted) - len(match.pages))
        assert not set(fresh) & set(match.pages)
        for page, address in zip(fresh, wanted[len(match.pages) :], strict=True):
            self.contents[page] = address
            self.pool.publish(page, address)
        return [*match.pages, *fresh]

    @rule(pages=consumes(held))
    def end(self, pages: list[int]) -> None:
        self.pool.release(pages)

    @rule(pages=consumes(held))
    def fail(self, pages: list[int]) -> None:
        self.pool.retract(pages)
        self.pool.release(pages)

    @invariant()
    def consistent(self) -> None:
        self.pool.check()


TestPool = Pool.TestCase


def test_prefix_is_found_again_and_salt_separates() -> None:
    pool = PagePool(8)
    chain = addresses(["a", "b", "a"])
    pages = pool.take(3)
    for page, address in zip(pages, chain, strict=True):
        pool.publish(page, address)
    pool.release(pages)
    assert pool.look_up(chain).pages == tuple(pages)
    assert pool.look_up(addresses(["a", "b", "b"])).pages == tuple(pages[:2])
    assert pool.look_up(addresses(["a"], salt="tenant")).pages == ()


def test_a_chain_is_evicted_from_its_end() -> None:
    pool = PagePool(4)
    chain = addresses(["a", "b", "a", "b"])
    pages = pool.take(4)
    for page, address in zip(pages, chain, strict=True):
        pool.publish(page, address)
    pool.release(pages)
    pool.take(1)
    assert pool.look_up(chain).pages == tuple(pages[:3])


def test_releasing_twice_is_a_bug() -> None:
    pool = PagePool(2)
    pages = pool.take(1)
    pool.release(pages)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(pages)


def test_pages_for() -> None:
    assert [pages_for(n) for n in (0, 1, 64, 65)] == [0, 1, 1, 2]
