"""Speaks HTTP with origins by the rules of `policy.py`.

Redirects are followed here and not by httpx, so that each hop is checked and credentials stay
with the host that they are for. Addresses are checked below TLS, in the backend that connects.
A proxy (HTTPS_PROXY, NO_PROXY) resolves names itself and is trusted with that, as it is the
operator's own.
"""

import contextlib
import ipaddress
import os
import ssl
import urllib.parse
import urllib.request
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping
from typing import Any, Final, Protocol

import certifi
import httpcore
import httpx
import trio

from ollamad import __version__
from ollamad.sources.base import (
    AccessRefused,
    NotFound,
    OriginRefused,
    OriginUnreachable,
    SourceError,
)
from ollamad.sources.policy import HostList, Origin, Policy, origin_of

CONNECT_S: Final = 10.0  # people are watching
STALL_S: Final = 30.0  # without a byte, after which the connection counts as broken
# For an answer that is read whole: somebody waits for it, and a byte now and then is no progress.
DOCUMENT_S: Final = 120.0
MAX_REDIRECTS: Final = 5
MAX_ADDRESSES: Final = 8  # of one name that are tried
MAX_DOCUMENT_BYTES: Final = 8 << 20  # of an answer that is read whole: lists of files, manifests
CHUNK_BYTES: Final = 1 << 20
RETRIED_STATUSES: Final = {408, 425, 429, 500, 502, 503, 504}
MAX_RETRY_AFTER_S: Final = 60.0  # a server that wants more patience is given up for now


class TryAgain(Exception):
    """The server is there but cannot answer now."""

    def __init__(self, reason: str, after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.after_s = after_s


class Credentials(Protocol):
    """How to sign in at one origin; asked for each request to it."""

    def header(self) -> str:
        """The value of Authorization; empty if none is known (yet)."""
        ...

    async def challenged(self, www_authenticate: str) -> bool:
        """Answer a 401; whether it is worth asking again."""
        ...


class Document:
    """A whole small answer."""

    def __init__(self, content: bytes, headers: httpx.Headers, url: str) -> None:
        self.content = content
        self.headers = headers
        self.url = url


class OriginClient:
    """One client for one task: `async with` it.

    Args:
      ca_file: PEM file of CAs that are trusted beside the system's; SSL_CERT_FILE replaces
        those, as everywhere.
      proxy: for all requests; by default the environment says.
      unverified: hosts whose certificates are not looked at.
      login: the user and password for a URL, if there are any.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        ca_file: str = "",
        proxy: str | None = None,
        unverified: HostList = HostList(),  # noqa: B008 - immutable
        login: Callable[[str], tuple[str, str] | None] = lambda url: None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._policy = policy
        self._ca_file = ca_file
        self._proxy = proxy
        self._unverified = unverified
        self._login = login
        self._environment = os.environ if environment is None else environment
        self._stack = contextlib.AsyncExitStack()
        self._context: ssl.SSLContext | None = None
        # By the proxy's URL ("" for none), and whether certificates are verified.
        self._clients: dict[tuple[str, bool], httpx.AsyncClient] = {}

    async def __aenter__(self) -> "OriginClient":
        self._context = await trio.to_thread.run_sync(self._make_context)
        return self

    async def __aexit__(self, *details: object) -> None:
        with trio.move_on_after(1.0, shield=True):
            await self._stack.aclose()

    @contextlib.asynccontextmanager
    async def open(
        self,
        url: str,
        headers: Mapping[str, str] | None = None,
        *,
        method: str = "GET",
        content: bytes | AsyncIterator[bytes] | None = None,
        credentials: Credentials | None = None,
        vouched: bool = False,
    ) -> AsyncIterator[httpx.Response]:
        """The answer to a request, its body not yet read; to a GET the one after all redirects.

        Args:
          credentials: for the origin of `url` and no other.
          vouched: see `Policy.check_redirect`.

        Raises:
          OriginRefused: the rules forbid it.
          httpx.TransportError: the connection failed. Statuses are the caller's to judge.
        """
        plain, basic = split_credentials(url)
        first = origin = self._policy.check_url(plain)
        answered = False
        for _ in range(MAX_REDIRECTS + 2):
            sent = {"Accept-Encoding": "identity", **(headers or {})}
            if origin != first:
                sent.pop("Authorization", None)
            login = basic if origin == first and basic is not None else self._login(plain)
            value = credentials.header() if origin == first and credentials is not None else ""
            if value:
                sent["Authorization"] = value
            elif login is not None:
                sent["Authorization"] = basic_header(*login)
            client = await self._client_for(plain)
            request = client.build_request(method, plain, headers=sent, content=content)
            if isinstance(content, bytes):
                request.stream = _Body(content)
            response = await client.send(request, stream=True)
            try:
                challenge = response.headers.get("WWW-Authenticate", "")
                if (
                    response.status_code == 401
                    and credentials is not None
                    and origin == first
                    and not answered
                    and not isinstance(content, AsyncIterator)
                    # Another connection may have signed in since this one asked.
                    and (value != credentials.header() or await credentials.challenged(challenge))
                ):
                    answered = True
                    continue
                # What is sent is not sent to somebody else, and who asks with HEAD whether
                # something is there has the answer.
                if response.has_redirect_location and method == "GET":
                    plain, _ = split_credentials(join(plain, response.headers["Location"]))
                    origin = self._policy.check_redirect(origin, plain, vouched=vouched)
                    continue
                yield response
                return
            finally:
                with trio.move_on_after(1.0, shield=True):
                    await response.aclose()
        raise SourceError(
            f"{shown(url)} redirects again and again; use the address that the file itself has"
        )

    async def document(
        self,
        url: str,
        headers: Mapping[str, str] | None = None,
        *,
        method: str = "GET",
        credentials: Credentials | None = None,
        limit: int = MAX_DOCUMENT_BYTES,
    ) -> Document:
        """A whole small answer.

        Raises:
          NotFound: there is none. OriginUnreachable: nobody answers, or too slowly.
          SourceError: it cannot be had, or is larger than the limit.
        """
        try:
            with trio.fail_after(DOCUMENT_S):
                return await self._document(url, headers, method, credentials, limit)
        except trio.TooSlowError:
            error = TryAgain(f"its answer was not there after {DOCUMENT_S:g} s")
            raise OriginUnreachable(explain(url, error)) from None

    async def _document(
        self,
        url: str,
        headers: Mapping[str, str] | None,
        method: str,
        credentials: Credentials | None,
        limit: int,
    ) -> Document:
        content = bytearray()
        try:
            async with self.open(url, headers, method=method, credentials=credentials) as response:
                check_status(response)
                async with unwinding(response.aiter_raw(CHUNK_BYTES)) as chunks:
                    async for data in chunks:
                        content += data
                        if len(content) > limit:
                            raise SourceError(
                                f"the answer of {shown(url)} has more than {limit:,} bytes, "
                                "which is no list and no manifest; check the address"
                            )
                return Document(bytes(content), response.headers, str(response.url))
        except (httpx.HTTPError, httpx.InvalidURL, TryAgain) as error:
            raise OriginUnreachable(explain(url, error)) from error

    async def _client_for(self, url: str) -> httpx.AsyncClient:
        proxy = self._proxy or proxy_for(url, self._environment)
        key = proxy, not self._unverified.has(origin_of(url))
        client = self._clients.get(key)
        if client is None:
            client = httpx.AsyncClient(
                transport=self._transport(*key),
                timeout=httpx.Timeout(STALL_S, connect=CONNECT_S),
                headers={"User-Agent": f"ollamad/{__version__}"},
                trust_env=False,
            )
            self._clients[key] = await self._stack.enter_async_context(client)
        return client

    def _transport(self, proxy: str, verified: bool) -> httpx.AsyncHTTPTransport:
        context = self._context
        assert context is not None, "used inside `async with`"
        if not verified:
            context = ssl.create_default_context()
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if proxy:
            return httpx.AsyncHTTPTransport(verify=context, proxy=proxy, trust_env=False)
        transport = httpx.AsyncHTTPTransport(verify=context, trust_env=False)
        # httpx has no way to hand in a network backend, which httpcore has. How many connections
        # there are is the downloads' business: who waits for one here counts as not answered.
        transport._pool = httpcore.AsyncConnectionPool(
            ssl_context=context,
            max_connections=None,
            network_backend=GuardedBackend(self._policy),
        )
        return transport

    def _make_context(self) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context()  # heeds SSL_CERT_FILE and SSL_CERT_DIR
            if "SSL_CERT_FILE" not in self._environment:
                context.load_verify_locations(certifi.where())
            if self._ca_file:
                context.load_verify_locations(self._ca_file)
        except (OSError, ssl.SSLError) as error:
            raise SourceError(
                f"the CAs in {self._ca_file or 'SSL_CERT_FILE'} cannot be used: {error}; check "
                "sources.ca_file and SSL_CERT_FILE"
            ) from error
        return context


class _Body(httpx.AsyncByteStream):
    """Bytes to send. httpx's own leaves a generator suspended when the connection breaks."""

    def __init__(self, data: bytes) -> None:
        self._parts = [data]

    def __aiter__(self) -> "_Body":
        return self

    async def __anext__(self) -> bytes:
        if not self._parts:
            raise StopAsyncIteration
        return self._parts.pop()


class GuardedBackend(httpcore.AsyncNetworkBackend):
    """Connects to addresses that the policy allows, and to no others."""

    def __init__(
        self,
        policy: Policy,
        *,
        inner: httpcore.AsyncNetworkBackend | None = None,
        resolve: Callable[..., Any] = trio.socket.getaddrinfo,
    ) -> None:
        self._policy = policy
        self._inner = inner or httpcore.TrioBackend()
        self._resolve = resolve

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        # The scheme does not matter for addresses.
        origin = Origin("https", host.strip("[]").lower(), port)
        try:
            with trio.fail_after(timeout or CONNECT_S):
                found = await self._resolve(host, port, type=trio.socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise httpcore.ConnectError(f"the name {host} cannot be resolved: {reason}") from error
        except trio.TooSlowError:
            raise httpcore.ConnectTimeout(f"the name {host} is not resolved in time") from None
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))[:MAX_ADDRESSES]
        refused: OriginRefused | None = None
        failed: Exception = httpcore.ConnectError(f"{host} has no address")
        for text in addresses:
            try:
                self._policy.check_address(origin, ipaddress.ip_address(text.partition("%")[0]))
            except OriginRefused as error:
                refused = error
                continue
            try:
                return await self._inner.connect_tcp(
                    text, port, timeout, local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failed = error
        if refused is not None:
            raise refused
        raise failed

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)


def proxy_for(url: str, environment: Mapping[str, str]) -> str:
    """The proxy for a URL by HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY; "" for none."""
    lower = {k.lower(): v for k, v in environment.items() if k.lower().endswith("_proxy") and v}
    origin = origin_of(url)
    proxies = {"no": lower.get("no_proxy", "")}
    if urllib.request.proxy_bypass_environment(f"{origin.host}:{origin.port}", proxies):  # type: ignore[attr-defined]
        return ""
    proxy = lower.get(f"{origin.scheme}_proxy") or lower.get("all_proxy", "")
    return proxy if not proxy or "://" in proxy else f"http://{proxy}"


@contextlib.asynccontextmanager
async def unwinding(chunks: AsyncIterator[bytes]) -> AsyncGenerator[AsyncIterator[bytes], None]:
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


def join(url: str, reference: str) -> str:
    """Where a reference in an answer from `url` leads.

    Raises:
      OriginRefused: nowhere.
    """
    try:
        return urllib.parse.urljoin(url, reference)
    except ValueError:
        raise OriginRefused(
            f"{shown(url)} leads to something that is no URL; use the address that the file "
            "itself has"
        ) from None


def shown(url: str) -> str:
    """A URL as it may be shown: without credentials and signatures."""
    parts = urllib.parse.urlsplit(split_credentials(url)[0])
    return urllib.parse.urlunsplit(parts._replace(query="", fragment=""))


def split_credentials(url: str) -> tuple[str, tuple[str, str] | None]:
    """The URL without its credentials, and those."""
    parts = urllib.parse.urlsplit(url)
    info, at, host = parts.netloc.rpartition("@")
    if not at:
        return url, None
    user, _, password = info.partition(":")
    credentials = (urllib.parse.unquote(user), urllib.parse.unquote(password))
    return urllib.parse.urlunsplit(parts._replace(netloc=host)), credentials


def basic_header(user: str, password: str) -> str:
    return httpx.BasicAuth(user, password)._auth_header


def check_status(response: httpx.Response) -> None:
    """Raise what a status means.

    Raises:
      NotFound, AccessRefused, SourceError: it will not change. TryAgain: it may.
    """
    status = response.status_code
    if 200 <= status < 300:
        return
    url = shown(str(response.url))
    if status in (404, 410):
        raise NotFound(f"there is no {url} (HTTP {status}); check the address")
    if status in RETRIED_STATUSES:
        raise TryAgain(f"HTTP {status}", retry_after(response))
    if status in (401, 403, 407):
        raise AccessRefused(
            f"{url} refuses access (HTTP {status}); sign in there first: docs/sources.md says "
            "where credentials come from"
        )
    raise SourceError(f"{url} answered HTTP {status}; check the address, or try again later")


def number(text: str) -> int | None:
    """A number in a header; None for what is none, or none that a size or a place could be."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 19 else None


def retry_after(response: httpx.Response) -> float:
    """Seconds that a server wants to be left alone for, within reason."""
    seconds = number(response.headers.get("Retry-After", ""))
    return min(float(seconds or 0), MAX_RETRY_AFTER_S)


def explain(url: str, error: Exception) -> str:
    """Why nobody answered, and what to do."""
    host = urllib.parse.urlsplit(shown(url)).netloc
    reason = str(error) or type(error).__name__
    if isinstance(error, httpx.TimeoutException):
        reason = "it does not answer"
    cause: BaseException | None = error
    while cause is not None:  # some layers above TLS do not pass its words on
        if isinstance(cause, ssl.SSLCertVerificationError):
            return (
                f"the certificate of {host} is not trusted ({cause.verify_message}); if its CA "
                "is your own, name it: sources.ca_file or SSL_CERT_FILE"
            )
        cause = cause.__cause__ or cause.__context__
    return (
        f"{host} cannot be reached or broke off ({reason}); check the network, HTTPS_PROXY and "
        "the name, and pull again: what has come is kept"
    )
