"""Turns the runner's events into chunks whose token ids are exactly those of their text.

Sans-I/O. llama.cpp's stream has three habits that a consumer must not see:
- While a stop string may be beginning, tokens bring no text: their ids are held here until the
  text comes.
- Tokens that leave a character incomplete are not told at all, only counted
  (`tokens_predicted`). Their text comes with the token that completes it, so the missing ids
  can be looked up: a `Gap` asks for that.
- The token that ends a generation comes like any other, mostly without text, but with the text
  that was held back for a stop string. It is left out.

How likely untold tokens were is not told either.
"""

import dataclasses
import itertools
from collections.abc import Sequence

from ollamad.core.inference import Chunk, Likelihood
from ollamad.engine.llama_client import CompletionEvent, Probability


@dataclasses.dataclass(frozen=True, slots=True)
class Gap:
    """A text, and the ids of its tokens as far as they are known (None: untold)."""

    text: str
    ids: tuple[int | None, ...]
    logprobs: tuple[Likelihood, ...] = dataclasses.field(default=(), compare=False)

    def fits(self, candidate: Sequence[int]) -> bool:
        """Whether these ids can be the ones."""
        return len(candidate) == len(self.ids) and all(
            known is None or known == id_ for known, id_ in zip(self.ids, candidate, strict=True)
        )


Piece = Chunk | Gap


class Assembler:
    """Eats the events of one completion up to, but without, the last one; then `finish`.

    `candidates` is how many tokens are told that could have stood where one was written.
    """

    def __init__(self, candidates: int = 0) -> None:
        self._candidates = candidates
        self._counted = 0  # tokens that the runner has predicted so far
        self._held: list[int | None] = []  # tokens whose text has not come yet
        self._likely: list[Likelihood] = []  # how likely those were
        self._delayed: tuple[str, list[int | None], list[Likelihood]] | None = None

    def feed(self, event: CompletionEvent) -> list[Piece]:
        """What can be told now, in order; mostly one chunk."""
        if not event.tokens:
            return []
        untold = event.tokens_predicted - self._counted - len(event.tokens)
        self._counted = event.tokens_predicted
        probabilities = event.completion_probabilities
        likely = likelihoods(probabilities, self._candidates) if probabilities else []
        if event.content and untold <= 0 and not self._held and self._delayed is None:
            return [Chunk(event.content, tuple(event.tokens), tuple(likely))]
        pieces = self._release()
        was_held_back = bool(self._held)
        self._held += [None] * untold
        self._held += event.tokens
        self._likely += likely
        if event.content:
            self._delayed = (event.content, self._held, self._likely)
            self._held, self._likely = [], []
            # Text that was held back may have been let go by the end-of-generation token; only
            # the next event tells.
            if not was_held_back:
                pieces += self._release()
        return pieces

    def finish(self, stop_type: str) -> tuple[list[Piece], list[int]]:
        """What was still held back, given how the runner says that it stopped.

        Returns the pieces, and ids of tokens whose text the runner kept for itself: the
        beginning of a stop string that did not come, because a limit came first. How likely
        those were is in `likely`.
        """
        if stop_type == "eos":
            if self._delayed is not None:
                self._delayed[1].pop()
                del self._delayed[2][-1:]
            self._held = []
        if stop_type == "word":
            return self._release(), []
        # What comes after an untold token cannot be spelled without it.
        kept = itertools.takewhile(lambda id_: id_ is not None, self._held)
        return self._release(), [id_ for id_ in kept if id_ is not None]

    @property
    def likely(self) -> tuple[Likelihood, ...]:
        """How likely the tokens were that are held back."""
        return tuple(self._likely)

    def _release(self) -> list[Piece]:
        if self._delayed is None:
            return []
        text, ids, likely = self._delayed
        self._delayed = None
        known = tuple(id_ for id_ in ids if id_ is not None)
        if len(known) == len(ids):
            return [Chunk(text, known, tuple(likely))]
        return [Gap(text, tuple(ids), tuple(likely))]


def likelihoods(told: Sequence[Probability], candidates: int) -> list[Likelihood]:
    """What the runner tells of tokens, with so many candidates of each."""
    return [
        Likelihood(
            bytes(token.bytes),
            token.logprob,
            tuple(
                Likelihood(bytes(other.bytes), other.logprob)
                for other in token.top_logprobs[:candidates]
            ),
        )
        for token in told
    ]
