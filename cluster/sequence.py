"""A request inside the engine: its tokens, its pages, what of them is computed, what is drafted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from llguidance import LLMatcher

from rayseek.cluster.grammar import reason
from rayseek.cluster.id_counts import IdCounts
from rayseek.cluster.pages import chain_root, page_hash
from rayseek.cluster.request import Request
from rayseek.kernels.sample import Draw
from rayseek.model.batch import PAGE_TOKENS


@dataclass(slots=True, eq=False)
class Sequence:
    """Invariant: 0 <= computed < len(ids) <= pages held * PAGE_TOKENS while running."""

    request: Request
    arrival: int
    ids: list[int]  # prompt and emitted tokens
    computed: int = 0  # tokens whose latents are in the cache
    pages: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)  # of the full pages of `ids`
    cached_tokens: int | None = None  # prompt tokens the first prefill skipped
    cached_before: int | None = None  # of handed-over pages: tokens somebody had cached before
    emitted: IdCounts = field(default_factory=lambda: IdCounts(()))
    seen: IdCounts | None = None  # of all `ids`, where a penalty is for them
    matcher: LLMatcher | None = None  # has consumed the emitted tokens; None: no grammar
    drafts: list[int] = field(default_factory=list)  # guesses of what comes after `ids`

    @staticmethod
    def start(request: Request, arrival: int) -> Sequence:
        sequence = Sequence(request, arrival, [*request.prompt_ids, *request.emitted_ids])
        sequence.emitted = IdCounts(request.emitted_ids)
        if request.sampling.repetition_penalty != 1.0:
            sequence.seen = IdCounts(sequence.ids)
        sequence.extend_hashes()
        return sequence

    @property
    def order(self) -> tuple[int, int]:
        return self.request.priority, self.arrival

    @property
    def num_emitted(self) -> int:
        return len(self.ids) - len(self.request.prompt_ids)

    @property
    def only_prompt(self) -> bool:
        """Nothing is sampled: all that is wanted are the pages of `chain`."""
        return self.request.sampling.max_tokens == 0

    @property
    def chain(self) -> list[bytes]:
        """Addresses of the pages a prefix match may use: the last token is always recomputed."""
        return self.hashes[: (len(self.ids) - 1) // PAGE_TOKENS]

    def append(self, token: int) -> None:
        self.ids.append(token)
        self.emitted.add(token)
        if self.seen is not None:
            self.seen.add(token)
        if len(self.ids) % PAGE_TOKENS == 0:
            self.extend_hashes()

    def extend_hashes(self) -> None:
        """Hash every full page that has none yet."""
        for page in range(len(self.hashes), len(self.ids) // PAGE_TOKENS):
            parent = self.hashes[-1] if self.hashes else chain_root(self.request.cache_salt)
            first = page * PAGE_TOKENS
            self.hashes.append(page_hash(parent, self.ids[first : first + PAGE_TOKENS]))

    def inputs(self, rows: int) -> list[int]:
        """The next `rows` tokens to compute: known ones first, then drafts."""
        stop = self.computed + rows
        return self.ids[self.computed : stop] + self.drafts[: max(0, stop - len(self.ids))]

    @property
    def place(self) -> Place:
        """Where its next token is drawn."""
        return Place(self, (), self.matcher)

    def places(self, drafts: int) -> list[Place]:
        """Where tokens are drawn: after all known tokens, and after each of the first drafts."""
        place = self.place
        if drafts and place.decides_nothing:
            return [Place(self, more=drafts)]
        places = [place]
        for draft in self.drafts[:drafts]:
            places.append(places[-1].then(draft))
        return places


class Place(NamedTuple):
    """A position where a token is drawn: after a sequence and drafts that nobody has verified.

    matcher: the grammar's state there. A place behind a draft has a copy of its own, so that
    whatever becomes of the copy, the sequence's own matcher stands behind its emitted tokens.
    more: so many positions behind this one are meant too, drawn by the same rules.
    """

    sequence: Sequence
    drafts: tuple[int, ...] = ()
    matcher: LLMatcher | None = None
    more: int = 0

    def then(self, draft: int) -> Place:
        """The place after one more draft. One that breaks the grammar is never accepted, and
        what the copy says afterwards is not asked for."""
        matcher = self.matcher
        if matcher is not None:
            matcher = matcher.deep_copy()
            matcher.consume_token(draft)
        return Place(self.sequence, (*self.drafts, draft), matcher)

    @property
    def num_emitted(self) -> int:
        return self.sequence.num_emitted + len(self.drafts)

    @property
    def decides_nothing(self) -> bool:
        """Whether places behind it draw by the same rules, whatever is drawn here."""
        p = self.sequence.request.sampling
        return not (self.matcher or p.counting or p.min_tokens > self.num_emitted)

    def grammar_error(self) -> str | None:
        if self.matcher is None or not self.matcher.is_error():
            return None
        return f"the grammar cannot be followed any further: {reason(self.matcher)}"

    def draw(self) -> Draw:
        """How its token is drawn; the position makes the noise independent of history."""
        p = self.sequence.request.sampling
        position = len(self.sequence.ids) + len(self.drafts)
        return Draw(p.temperature, p.top_k, p.top_p, p.min_p, p.seed, position)
