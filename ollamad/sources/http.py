"""Fetches files over HTTP or from `file://`, as pip is configured to, and goes on after a break."""

import contextlib
import dataclasses
import functools
import ssl
import urllib.parse
import urllib.request
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Final

import certifi
import httpx
import trio

from ollamad import __version__
from ollamad.sources.base import SourceError
from ollamad.sources.pipconfig import PipConfig

CHUNK_BYTES: Final = 1 << 20  # one turn of a hashing and unpacking thread: about 10 ms
MAX_PAGE_BYTES: Final = 32 << 20  # of an index page; the longest real ones have some 5 MB
CONNECT_S: Final = 10.0  # pip waits 15 s; people are watching
STALL_S: Final = 30.0  # without a byte, after which the connection counts as broken
MAX_FAILURES: Final = 5  # in a row without a new byte
BACKOFF_S: Final = 0.5  # before the second attempt; doubles for each further one
MAX_REDIRECTS: Final = 5
_RETRIED_STATUSES: Final = {408, 425, 429, 500, 502, 503, 504}


@dataclasses.dataclass(frozen=True, slots=True)
class Page:
    """A small file, and where it was found after all redirects."""

    content: bytes
    content_type: str
    url: str


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """Some bytes of a file, in order; `total` is the file's length if the server told."""

    data: bytes
    total: int | None


class NotFound(Exception):
    """The server says that there is no such page."""


class Http:
    """One fetcher for one task: `async with` it."""

    def __init__(self, config: PipConfig, limiter: trio.CapacityLimiter) -> None:
        self._config = config
        self._limiter = limiter
        self._stack = contextlib.AsyncExitStack()
        self._client: httpx.AsyncClient | None = None

    async def __aenter__(self) -> "Http":
        client = await trio.to_thread.run_sync(self._make_client, limiter=self._limiter)
        self._client = await self._stack.enter_async_context(client)
        return self

    async def __aexit__(self, *details: object) -> None:
        with trio.move_on_after(1.0, shield=True):
            await self._stack.aclose()

    async def page(self, url: str, accept: str) -> Page:
        """A whole small file.

        Raises:
          NotFound: there is none.
          SourceError: it cannot be had, or is far too large.
        """
        if _is_file(url):
            return await trio.to_thread.run_sync(
                functools.partial(_read_page, url), limiter=self._limiter
            )
        content = bytearray()
        try:
            async with self._get(url, {"Accept": accept}) as response:
                _check_status(response)
                async with _unwinding(response.aiter_raw(CHUNK_BYTES)) as chunks:
                    async for data in chunks:
                        content += data
                        if len(content) > MAX_PAGE_BYTES:
                            raise SourceError(f"{shown(url)} is larger than any index page")
                kind = response.headers.get("Content-Type", "")
                return Page(bytes(content), kind, str(response.url))
        except (httpx.HTTPError, httpx.InvalidURL, _TryAgain) as error:
            raise SourceError(_explain(url, error)) from error

    async def parts(self, url: str) -> AsyncGenerator[Part, None]:
        """The bytes of a file, in order and each once. Close it (`aclosing`) when abandoned.

        A broken connection is taken up again where it broke, with a range if the server has
        ranges, else by reading over what is here already.

        Raises:
          SourceError: it cannot be had, or `MAX_FAILURES` attempts in a row brought nothing.
        """
        if _is_file(url):
            async for part in self._file_parts(url):
                yield part
            return
        gathered = bytearray()
        received = failures = 0
        while True:
            before = received
            try:
                headers = {"Range": f"bytes={received}-"} if received else {}
                async with self._get(url, headers) as response:
                    _check_status(response)
                    resumed = _is_rest(response, received)
                    skip = 0 if resumed else received  # this server has no ranges
                    total = _total(response, received if resumed else 0)
                    async with _unwinding(response.aiter_raw()) as chunks:
                        async for data in chunks:
                            fresh = data[skip:]
                            skip -= len(data) - len(fresh)
                            received += len(fresh)
                            gathered += fresh
                            if len(gathered) >= CHUNK_BYTES:
                                yield Part(bytes(gathered), total)
                                gathered.clear()
                yield Part(bytes(gathered), total)
                return
            except NotFound:
                raise SourceError(f"there is no {shown(url)} any more (HTTP 404)") from None
            except (httpx.TransportError, _TryAgain) as error:
                failures = 1 if received > before else failures + 1
                if failures >= MAX_FAILURES:
                    raise SourceError(_explain(url, error)) from error
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise SourceError(_explain(url, error)) from error
            await trio.sleep(BACKOFF_S * 2 ** (failures - 1))

    async def _file_parts(self, url: str) -> AsyncGenerator[Part, None]:
        path = _path_of(url)
        try:
            size = (await trio.to_thread.run_sync(path.stat, limiter=self._limiter)).st_size
            async with await trio.open_file(path, "rb") as file:
                while data := await file.read(CHUNK_BYTES):
                    yield Part(data, size)
        except OSError as error:
            raise SourceError(f"{path} cannot be read: {error.strerror}") from error

    def _get(
        self, url: str, headers: dict[str, str]
    ) -> contextlib.AbstractAsyncContextManager[httpx.Response]:
        assert self._client is not None
        plain, credentials = split_credentials(url)
        auth = credentials or self._credentials_for(plain)
        # identity: ranges and lengths are those of the file itself.
        headers = {"Accept-Encoding": "identity", **headers}
        return self._client.stream("GET", plain, headers=headers, auth=auth)

    def _credentials_for(self, url: str) -> tuple[str, str] | None:
        """Those of an index on the same server, as pip uses them for its files."""
        for index in self._config.index_urls:
            plain, credentials = split_credentials(index)
            if credentials is not None and _origin(plain) == _origin(url):
                return credentials
        return None

    def _make_client(self) -> httpx.AsyncClient:
        try:
            context = ssl.create_default_context(cafile=self._config.cert)
            if self._config.cert is None:
                context.load_verify_locations(certifi.where())
        except (OSError, ssl.SSLError) as error:
            raise SourceError(
                f"the CA bundle {self._config.cert} of pip's configuration cannot be used: {error}"
            ) from error
        proxy = self._config.proxy
        return httpx.AsyncClient(
            verify=context,
            proxy=proxy,
            mounts={
                f"https://{host}": httpx.AsyncHTTPTransport(verify=False, proxy=proxy)
                for host in self._config.trusted_hosts
            },
            timeout=httpx.Timeout(STALL_S, connect=CONNECT_S),
            follow_redirects=True,
            max_redirects=MAX_REDIRECTS,
            headers={"User-Agent": f"ollamad/{__version__}"},
        )


@contextlib.asynccontextmanager
async def _unwinding(chunks: AsyncIterator[bytes]) -> AsyncGenerator[AsyncIterator[bytes], None]:
    """Leaves no generator suspended when its user stops reading.

    httpx reads through generators within generators, of which `aclose` reaches the outermost
    only. A read that is cancelled ends them all.
    """
    try:
        yield chunks
    finally:
        with contextlib.suppress(httpx.HTTPError), trio.CancelScope(shield=True) as scope:
            scope.cancel()
            while await anext(chunks, None) is not None:
                pass  # what was buffered; the next real read is the cancelled one


class _TryAgain(Exception):
    """The server is there but cannot answer now."""


def shown(url: str) -> str:
    """A URL as it may be shown: without credentials."""
    return split_credentials(url)[0]


def split_credentials(url: str) -> tuple[str, tuple[str, str] | None]:
    """The URL without its credentials, and those."""
    parts = urllib.parse.urlsplit(url)
    info, at, host = parts.netloc.rpartition("@")
    if not at:
        return url, None
    user, _, password = info.partition(":")
    credentials = (urllib.parse.unquote(user), urllib.parse.unquote(password))
    return urllib.parse.urlunsplit(parts._replace(netloc=host)), credentials


def _origin(url: str) -> tuple[str, str]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.netloc.lower()


def _check_status(response: httpx.Response) -> None:
    status = response.status_code
    if status in (200, 206):
        return
    if status in (404, 410):
        raise NotFound
    url = shown(str(response.url))
    if status in _RETRIED_STATUSES:
        raise _TryAgain(f"HTTP {status}")
    if status in (401, 403, 407):
        raise SourceError(
            f"{url} refuses access (HTTP {status}); check the credentials in pip's index-url "
            "and the proxy"
        )
    raise SourceError(f"{url} answered HTTP {status}")


def _is_rest(response: httpx.Response, offset: int) -> bool:
    """Whether this is the rest from that offset on, rather than the whole file again."""
    if response.status_code != httpx.codes.PARTIAL_CONTENT:
        return False
    if not response.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
        raise SourceError(f"{shown(str(response.url))} sends another range than was asked for")
    return True


def _total(response: httpx.Response, offset: int) -> int | None:
    length = response.headers.get("Content-Length", "")
    return offset + int(length) if length.isdecimal() else None


def _explain(url: str, error: Exception) -> str:
    host = urllib.parse.urlsplit(shown(url)).netloc
    reason = str(error) or type(error).__name__
    if isinstance(error, httpx.TimeoutException):
        reason = "it does not answer"
    return (
        f"{host} cannot be reached or broke off ({reason}); check the network, "
        "HTTPS_PROXY or pip's proxy setting, and that pip's index-url is right"
    )


def _is_file(url: str) -> bool:
    return urllib.parse.urlsplit(url).scheme == "file"


def _path_of(url: str) -> Path:
    return Path(urllib.request.url2pathname(urllib.parse.urlsplit(url).path))


def _read_page(url: str) -> Page:
    path = _path_of(url)
    if path.is_dir():
        path, url = path / "index.html", url.rstrip("/") + "/index.html"
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_PAGE_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound from None
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > MAX_PAGE_BYTES:
        raise SourceError(f"{path} is larger than any index page")
    return Page(content, "text/html", url)
