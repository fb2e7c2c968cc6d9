"""The REST client: addresses, signing in, refreshing, streams, uploads, errors in one line.

It is synchronous and never follows a redirect or a proxy of the environment, so a token goes
to the daemon that was named and to nobody else. Used for one command at a time, by one thread.
"""

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx

from ollama_dist import credentials
from ollama_dist.address import Address
from ollama_dist.credentials import Login
from ollama_dist.errors import ApiError, CliError, NoConnection, UsageProblem
from ollama_dist.text import one_line, parse_time

Json = dict[str, Any]
T = TypeVar("T")

CONNECT_TIMEOUT_S = 5.0  # a LAN answers in milliseconds; a lost host should not take long
ANSWER_TIMEOUT_S = 30.0  # what needs the cluster's consent waits for an election at the most
SLOW_TIMEOUT_S = 600.0  # creating a model hashes it again; leaving moves models away
EARLY_REFRESH = timedelta(seconds=30)  # before the expiry, for clocks that are not equal
# A host that lost power sends no goodbye: the kernel asks after 15 s, and gives up in 30 s.
_KEEPALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
]
_SHOWN_BY_ITSELF = ("suggestions", "retry_after")  # details that have their own words


def path(*segments: str) -> str:
    """A path below the base of the API; each segment may hold any character.

    Raises:
      UsageProblem: a segment is empty or would climb up the path.
    """
    for segment in segments:
        if segment in ("", ".", ".."):
            raise UsageProblem(f"{segment!r} is not a name")
    return "/" + "/".join(quote(segment, safe="") for segment in segments)


class Api:
    """One daemon's API. All methods raise `CliError`, with the exit code that fits.

    `token` is what the user gave; without it the stored sign-in is used, then the token that
    a daemon on this host left for its user, then none.
    """

    def __init__(
        self, address: Address, *, token: str | None = None, timeout_s: float = ANSWER_TIMEOUT_S
    ) -> None:
        self.address = address
        self.credential = ""  # where the token of the last request came from, for people
        self._login: Login | None = None
        self._fallbacks: list[tuple[str | None, str]]
        if token:
            self._fallbacks = [(token, "the given token")]
        elif (login := credentials.load_login(address)) is not None:
            self._login = login
            self._fallbacks = [(login.token, "the stored sign-in")]
        else:
            local = credentials.local_tokens(address)
            self._fallbacks = [(text, str(place)) for text, place in local]
            self._fallbacks.append((None, "no token"))
        self._http = httpx.Client(
            base_url=f"{address.url}/api/v1",
            # Reading the system's certificates takes longer than all else, and http needs none.
            transport=httpx.HTTPTransport(
                verify=address.url.startswith("https:"), socket_options=_KEEPALIVE
            ),
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S)),
            headers={"Accept": "application/json, application/x-ndjson"},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; what still streams is cancelled by that."""
        self._http.close()

    def at(self, address: Address) -> "Api":
        """Another node of the same cluster, with the credential that was good here."""
        return Api(address, token=self._fallbacks[0][0])

    def get(self, url: str) -> Json:
        """The JSON object at `url`."""
        return self._call("GET", url)

    def post(self, url: str, body: Json | None = None, *, timeout_s: float | None = None) -> Json:
        """Send a JSON object, or no body; return the answer's JSON object."""
        return self._call("POST", url, body, timeout_s=timeout_s)

    def put(self, url: str, body: Json) -> Json:
        """Send a JSON object; return the answer's JSON object."""
        return self._call("PUT", url, body)

    def bearer(self) -> str | None:
        """The token that is good for more than one request; None where none is needed."""
        self.get("/auth/me")
        return self._fallbacks[0][0]

    def refused(
        self, status: int, body: bytes | bytearray | None, retry_after: str | None
    ) -> ApiError:
        """The error of an answer that did not come by this client."""
        try:
            answer = json.loads(body or b"{}")
        except ValueError:
            answer = {}
        return self._refusal(answer if isinstance(answer, dict) else {}, status, retry_after)

    def delete(self, url: str) -> Json:
        """Delete what is at `url`; return the answer's JSON object."""
        return self._call("DELETE", url)

    def exists(self, url: str) -> bool:
        """Whether HEAD finds something at `url`."""
        response = self._send(lambda: self._http.build_request("HEAD", url))
        if response.status_code == 404:
            return False
        self._check(response)
        return True

    def upload(self, url: str, chunks: Callable[[], Iterator[bytes]], size: int) -> None:
        """Stream `size` bytes as the body; `chunks` may be called again after a new sign-in."""

        def build() -> httpx.Request:
            return self._http.build_request(
                "POST",
                url,
                content=chunks(),
                headers={
                    "Content-Length": str(size),
                    "Content-Type": "application/octet-stream",
                },
                timeout=httpx.Timeout(SLOW_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            )

        self._check(self._send(build))

    def sign_in(self, username: str, password: str) -> Json:
        """The answer of `/auth/login`; no stored token goes along."""
        body = {"username": username, "password": password}
        response = self._transmit(self._http.build_request("POST", "/auth/login", json=body))
        if response.status_code == 401:
            raise ApiError("wrong user name or password", status=401)
        return self._object(self._check(response))

    def infer(self, url: str, body: Json) -> Json:
        """Like `post`, for answers that take as long as they take."""
        request = self._generation(url, {**body, "stream": False})
        return self._object(self._check(self._send(request)))

    @contextmanager
    def stream(self, url: str, body: Json) -> Iterator[Iterator[Json]]:
        """The objects of an NDJSON answer, up to and with the one that says `done`.

        Leaving the block early closes the connection, which stops the generation. An error
        in band raises `ApiError`; an answer that ends without `done` raises `NoConnection`.
        """
        request = self._generation(url, {**body, "stream": True})
        response = self._send(request, stream=True)
        try:
            if not response.is_success:
                self._translated(response.read)
                self._check(response)
            yield self._lines(response)
        finally:
            response.close()

    def _generation(self, url: str, body: Json) -> Callable[[], httpx.Request]:
        # Queueing, loading and thinking have no bound that a client could know.
        timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S)
        return lambda: self._http.build_request("POST", url, json=body, timeout=timeout)

    def _lines(self, response: httpx.Response) -> Iterator[Json]:
        # httpx's own iter_lines also splits at U+2028 and its like, which JSON may hold.
        rest = b""
        chunks = response.iter_bytes()
        while True:
            chunk = self._translated(lambda: next(chunks, None), lost=True)
            if chunk is None:
                break
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                if not line.strip():
                    continue
                item = self._decode(line)
                if "error" in item:
                    raise self._refusal(item, response.status_code)
                yield item
                if item.get("done"):
                    return
        raise NoConnection("the answer broke off before its end", exit_code=1)

    def _call(
        self, method: str, url: str, body: Json | None = None, *, timeout_s: float | None = None
    ) -> Json:
        def build() -> httpx.Request:
            extra: dict[str, Any] = {}
            if timeout_s is not None:
                extra["timeout"] = httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S)
            if body is not None:
                extra["json"] = body
            return self._http.build_request(method, url, **extra)

        return self._object(self._check(self._send(build)))

    def _send(self, build: Callable[[], httpx.Request], *, stream: bool = False) -> httpx.Response:
        """Send with the best credential; after a 401 with the next one, if there is any."""
        if self._login is not None and _expired(self._login):
            self._refresh(self._login)
        refreshed = False
        while True:
            token, self.credential = self._fallbacks[0]
            request = build()
            if token is not None:
                request.headers["Authorization"] = f"Bearer {token}"
            response = self._transmit(request, stream=stream)
            if response.status_code != 401:
                return response
            if self._login is not None and not refreshed:
                response.close()
                self._refresh(self._login)
                refreshed = True
            elif len(self._fallbacks) > 1:
                # A token file of another cluster must not take away what needs no token.
                response.close()
                self._fallbacks.pop(0)
            else:
                return response

    def _refresh(self, spent: Login) -> None:
        with credentials.lock():
            login = credentials.load_login(self.address)
            if login is None or login.token == spent.token:
                login = self._renew(spent)
                credentials.save_login(self.address, login)
        self._login = login
        self._fallbacks = [(login.token, "the stored sign-in")]

    def _renew(self, spent: Login) -> Login:
        request = self._http.build_request(
            "POST", "/auth/refresh", json={"refresh_token": spent.refresh_token}
        )
        response = self._transmit(request)
        if response.status_code in (400, 401, 403):
            raise ApiError(
                f"the sign-in at {self.address.url} has expired",
                status=401,
                hint=f"Sign in again: {self._login_command}",
            )
        answer = self._object(self._check(response))
        return login_of(answer, username=spent.username)

    def _transmit(self, request: httpx.Request, *, stream: bool = False) -> httpx.Response:
        return self._translated(lambda: self._http.send(request, stream=stream))

    def _translated(self, call: Callable[[], T], *, lost: bool = False) -> T:
        """Run `call`; httpx's exceptions become ours. `lost`: an answer had already begun."""
        try:
            return call()
        except (httpx.ConnectError, httpx.ConnectTimeout) as problem:
            reason = "no answer" if isinstance(problem, httpx.TimeoutException) else _why(problem)
            raise NoConnection(
                f"cannot connect to {self.address.url}: {reason}",
                hint='Is ollamad running there? "ollamad start" starts it, '
                "--host names another node.",
            ) from problem
        except httpx.TimeoutException as problem:
            raise NoConnection(
                f"{self.address.url} did not answer in time", exit_code=1
            ) from problem
        except httpx.TransportError as problem:
            raise NoConnection(
                f"the connection to {self.address.url} was lost: {_why(problem)}",
                exit_code=1 if lost else NoConnection("").exit_code,
            ) from problem

    def _check(self, response: httpx.Response) -> httpx.Response:
        if response.is_success:
            return response
        try:
            answer = json.loads(response.content or b"{}")
        except ValueError:
            answer = None
        if not isinstance(answer, dict) or (response.content and "error" not in answer):
            raise ApiError(
                f"{self.address.url} does not answer like ollamad (status {response.status_code})",
                status=response.status_code,
                hint="Check --host.",
            )
        raise self._refusal(answer, response.status_code, response.headers.get("Retry-After"))

    def _refusal(self, answer: Json, status: int, retry_after: str | None = None) -> ApiError:
        """The error that `{"error","code","details"}` tells, with what to do about it."""
        raw = answer.get("details")
        details = raw if isinstance(raw, dict) else {}
        message = one_line(answer.get("error") or f"the daemon answered with status {status}")
        shown = [
            f"{key}: {one_line(value)}"
            for key, value in details.items()
            if isinstance(value, str | int | float)
            and key not in _SHOWN_BY_ITSELF
            and str(value) not in message
        ]
        if shown:
            message += f" ({one_line(', '.join(shown))})"
        wait_s = int(retry_after) if retry_after and retry_after.isdecimal() else 0
        raw = details.get("suggestions")
        suggestions = [one_line(name) for name in raw] if isinstance(raw, list) else []
        hint = ""
        if suggestions and suggestions[0] not in message:
            hint = f"Did you mean {' or '.join(suggestions)}?"
        elif status == 401:
            hint = f"Sign in: {self._login_command}"
        elif status == 403:
            hint = f"Another user may: {self._login_command}"
        elif wait_s:
            hint = f"Try again in {wait_s} s."
        code = one_line(answer.get("code", ""))
        field = str(details.get("field", ""))
        return ApiError(
            message,
            status=status,
            code=code,
            hint=hint,
            retry_after_s=wait_s,
            field=field,
            details=details,
        )

    def _object(self, response: httpx.Response) -> Json:
        return self._decode(response.content)

    def _decode(self, data: bytes) -> Json:
        try:
            value = json.loads(data)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise CliError(f"{self.address.url} does not answer like ollamad", hint="Check --host.")
        return value

    @property
    def _login_command(self) -> str:
        return f"ollama-dist --host {self.address.url} auth login"


def login_of(answer: Json, *, username: str) -> Login:
    """The sign-in in an answer of `/auth/login` or `/auth/refresh`.

    Raises:
      CliError: the answer has no tokens.
    """
    token, refresh_token = answer.get("token"), answer.get("refresh_token")
    if not isinstance(token, str) or not isinstance(refresh_token, str):
        raise CliError("the daemon answered a sign-in without tokens")
    return Login(token, refresh_token, str(answer.get("expires_at") or ""), username)


def _expired(login: Login) -> bool:
    moment = parse_time(login.expires_at)
    return moment is not None and datetime.now(UTC) >= moment - EARLY_REFRESH


def _why(problem: Exception) -> str:
    """What the system said, without its number: `[Errno 111] Connection refused`."""
    text = one_line(problem).partition("] ")[2] or one_line(problem) or type(problem).__name__
    return text[:1].lower() + text[1:]
