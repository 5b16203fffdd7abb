"""A request inside the engine: its tokens, its pages, and what of them is computed."""

from __future__ import annotations

from dataclasses import dataclass, field

from llguidance import LLMatcher

from rayseek.cluster.grammar import reason
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
    counts: dict[int, int] = field(default_factory=dict)  # emitted tokens, for penalties
    matcher: LLMatcher | None = None  # has consumed the emitted tokens; None: no grammar

    @staticmethod
    def start(request: Request, arrival: int) -> Sequence:
        sequence = Sequence(request, arrival, [*request.prompt_ids, *request.emitted_ids])
        for token in request.emitted_ids:
            sequence.counts[token] = sequence.counts.get(token, 0) + 1
        sequence.extend_hashes()
        return sequence

    @property
    def order(self) -> tuple[int, int]:
        return self.request.priority, self.arrival

    @property
    def num_emitted(self) -> int:
        return len(self.ids) - len(self.request.prompt_ids)

    @property
    def chain(self) -> list[bytes]:
        """Addresses of the pages a prefix match may use: the last token is always recomputed."""
        return self.hashes[: (len(self.ids) - 1) // PAGE_TOKENS]

    def grammar_error(self) -> str | None:
        if self.matcher is None or not self.matcher.is_error():
            return None
        return f"the grammar cannot be followed any further: {reason(self.matcher)}"

    def append(self, token: int) -> None:
        self.ids.append(token)
        self.counts[token] = self.counts.get(token, 0) + 1
        if len(self.ids) % PAGE_TOKENS == 0:
            self.extend_hashes()

    def extend_hashes(self) -> None:
        """Hash every full page that has none yet."""
        for page in range(len(self.hashes), len(self.ids) // PAGE_TOKENS):
            parent = self.hashes[-1] if self.hashes else chain_root(self.request.cache_salt)
            first = page * PAGE_TOKENS
            self.hashes.append(page_hash(parent, self.ids[first : first + PAGE_TOKENS]))

    def draw(self) -> Draw:
        """How its next token is drawn; the position makes the noise independent of history."""
        p = self.request.sampling
        return Draw(p.temperature, p.top_k, p.top_p, p.min_p, p.seed, len(self.ids))
