"""What every handler works with: the settings, the services, the caller; and how it replies."""

import dataclasses
import ipaddress
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, suppress
from datetime import UTC, datetime
from typing import Any, TypeVar

import msgspec
import trio

from ollamad.api.asgi import Reply, Request
from ollamad.api.auth import Auth, AuthSettings, Identity
from ollamad.api.bodies import decode_body
from ollamad.api.dialects import ErrorBody
from ollamad.api.hub import Hub
from ollamad.api.limits import LoginGuard, RateLimits, Throttle, address_group
from ollamad.api.metrics import RequestStats
from ollamad.api.services import NoQuorum, ServiceError, Services
from ollamad.core.commands import AnyCommand, Rejected
from ollamad.core.names import InvalidName, ModelName, nearest, parse_name
from ollamad.core.state import Member, Model

# A chat that fills a context of a million tokens is about 4 MB of text; JSON escapes and
# schemas may double that. Far more is a mistake, or an upload that belongs to /blobs.
MAX_JSON_BYTES = 32 << 20
# Of whoever may be a stranger, who sends a name and a password, or a token.
MAX_PUBLIC_JSON_BYTES = 64 << 10
# So many bodies that are larger than this are read and decoded at once, the others wait: strangers
# to each other must not be able to fill the memory together.
LARGE_JSON_BYTES = 256 << 10
MAX_LARGE_BODIES = 8
# Bytes of large bodies whose requests are not over. They wait in the queue with all they bring.
MAX_HELD_BYTES = 256 << 20
BODY_TIMEOUT_S = 60.0  # a JSON body that takes longer to arrive holds a connection for nothing
# Of a user or a key. The cluster remembers its refusals for a while, with the names in them.
MAX_NAME_CHARS = 256
CATCH_UP_TIMEOUT_S = 2.0  # before a 404: two elections' worth

_encode = msgspec.json.Encoder().encode
Body = TypeVar("Body")

# Rejections of the state machine that are not a conflict (409).
_REJECTION_STATUS = {
    "NODE_NOT_FOUND": 404,
    "MODEL_NOT_FOUND": 404,
    "USER_NOT_FOUND": 404,
    "KEY_NOT_FOUND": 404,
    "INVALID_MODEL_NAME": 400,
    "INVALID_USERNAME": 400,
    "INVALID_ROLE": 400,
    "NO_CLUSTER": 503,
}
# Those that are about one field of the body.
_REJECTED_FIELD = {"INVALID_USERNAME": "username", "INVALID_ROLE": "role"}
NO_DETAILS: Mapping[str, str] = {}


@dataclasses.dataclass(frozen=True, slots=True)
class ApiSettings:
    """The settings of the API, as the daemon's configuration gives them."""

    auth: AuthSettings = dataclasses.field(default_factory=AuthSettings)
    rate_limits: RateLimits = dataclasses.field(default_factory=RateLimits)
    deadline_s: float = 60.0  # for everything but inference and uploads
    inference_deadline_s: float | None = None  # None: a generation may take as long as it takes
    metrics_public: bool = False  # Prometheus needs no token
    origins: tuple[str, ...] = ()  # of web pages that may call, beside those of this host
    # A node without quorum for longer than an election takes is unhealthy.
    election_timeout_s: float = 2.0


class Budget:
    """How many bytes of large bodies this API holds."""

    def __init__(self) -> None:
        self.held = 0

    def take(self, size: int) -> None:
        """Hold so many more, until they are given back.

        Raises:
          ServiceError: 503, they are too many.
        """
        if self.held + size > MAX_HELD_BYTES:
            raise ServiceError(
                503,
                "TOO_MANY_LARGE_BODIES",
                f"requests with {self.held >> 20} MiB wait at this node already, of "
                f"{MAX_HELD_BYTES >> 20} MiB that may; try another node, or later",
                {"limit_bytes": MAX_HELD_BYTES},
                retry_after_s=5,
            )
        self.held += size

    def give_back(self, size: int) -> None:
        self.held -= size


@dataclasses.dataclass(frozen=True, slots=True)
class Api:
    """One API: what its handlers share."""

    settings: ApiSettings
    services: Services
    auth: Auth
    throttle: Throttle
    logins: LoginGuard
    http_stats: RequestStats
    inference_stats: RequestStats
    hub: Hub
    started: float  # on the monotonic clock
    openapi: Callable[[], bytes]  # the document of all routes
    large_bodies: trio.Semaphore = dataclasses.field(
        default_factory=lambda: trio.Semaphore(MAX_LARGE_BODIES)
    )
    budget: Budget = dataclasses.field(default_factory=Budget)


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """One request on its way through a handler."""

    api: Api
    request: Request
    caller: Identity | None  # None on routes that need no authentication
    _held: list[int] = dataclasses.field(default_factory=list)  # bytes that it took of the budget

    def __enter__(self) -> "Call":
        return self

    def __exit__(self, *exc: object) -> None:
        for size in self._held:
            self.api.budget.give_back(size)

    @property
    def services(self) -> Services:
        return self.api.services

    @property
    def address(self) -> str:
        """Where the request comes from, as limits count it."""
        return address_group(peer_of(self.request))

    def spend_tokens(self, count: int) -> None:
        """Count tokens, also for the caller's key, if it is one."""
        self.api.inference_stats.tokens += count
        if self.caller is not None and self.caller.key is not None and count > 0:
            self.services.keys.count(self.caller.key, tokens=count)

    async def body(
        self, kind: type[Body], *, optional: bool = False, any_type: bool = False
    ) -> Body:
        """Read and decode the JSON body; with `any_type` whatever its Content-Type says.

        Raises:
          ServiceError: 400 malformed or mistyped, 408 too slow, 413 too large, 415 no JSON, 503
            too many large ones at once.
        """
        request = self.request
        expected = request.body.expected_length
        mimetype = request.mimetype
        # No type at all is taken for JSON; a wrong one is a mistake that should be told.
        if not any_type and mimetype and mimetype != "application/json" and expected != 0:
            raise ServiceError(
                415,
                "UNSUPPORTED_MEDIA_TYPE",
                f"send JSON with Content-Type: application/json, not {mimetype}",
                {"content_type": mimetype, "expected": "application/json"},
            )
        most = MAX_PUBLIC_JSON_BYTES if self.caller is None else MAX_JSON_BYTES
        if expected is not None and expected > most:
            raise _too_large(most)
        async with AsyncExitStack() as room:
            data = await self._read_body(most, room)
            if len(data) > LARGE_JSON_BYTES:
                self.api.budget.take(len(data))
                self._held.append(len(data))
            if not data.strip():
                if not optional:
                    raise ServiceError(400, "INVALID_REQUEST", "missing request body")
                data = b"{}"
            return decode_body(data, kind)

    async def _read_body(self, most: int, room: AsyncExitStack) -> bytes:
        """The bytes. For many of them it gets a place among those who may hold so much."""
        parts = []
        size = 0
        waits = has_place = False
        with trio.move_on_after(BODY_TIMEOUT_S) as scope:
            async for part in self.request.body:
                parts.append(part)
                size += len(part)
                if size > most:
                    raise _too_large(most)
                if size > LARGE_JSON_BYTES and not has_place:
                    waits = True
                    await room.enter_async_context(self.api.large_bodies)
                    waits, has_place = False, True
        if scope.cancelled_caught and waits:
            raise ServiceError(
                503,
                "TOO_MANY_LARGE_BODIES",
                f"{MAX_LARGE_BODIES} bodies of more than {LARGE_JSON_BYTES >> 10} KiB are on their "
                "way to this node already; try another node, or later",
                {"limit": MAX_LARGE_BODIES, "limit_bytes": LARGE_JSON_BYTES},
                retry_after_s=5,
            )
        if scope.cancelled_caught:
            raise ServiceError(
                408,
                "REQUEST_TIMEOUT",
                "the request's body did not arrive in time",
                {"limit_s": BODY_TIMEOUT_S, "received_bytes": size},
            )
        return b"".join(parts)

    async def find_model(self, name: str) -> Model:
        """The model of that name. That there is none is said only of the current state.

        Raises:
          ServiceError: 400 for what is no name, 404 with the nearest names.
        """
        parsed = read_name(name)
        model = self.services.cluster.state.models.get(parsed.key)
        if model is None:
            await self._catch_up()
            models = self.services.cluster.state.models
            model = models.get(parsed.key)
        if model is None:
            suggestions = nearest(str(parsed), [known.name for known in models.values()])
            hint = f"; did you mean {' or '.join(suggestions)}?" if suggestions else ""
            raise ServiceError(
                404,
                "MODEL_NOT_FOUND",
                f"model {str(parsed)!r} not found{hint}",
                {"model": str(parsed), "suggestions": suggestions},
            )
        return model

    async def find_member(self, reference: str) -> Member:
        """The member with that id, name or unique id prefix, looked for as a model is.

        Raises:
          ServiceError: 404.
        """
        member = self.services.cluster.state.find_member(reference)
        if member is None:
            await self._catch_up()
            member = self.services.cluster.state.find_member(reference)
        if member is None:
            raise ServiceError(
                404,
                "NODE_NOT_FOUND",
                f"there is no node {reference!r} in this cluster (or the prefix is not unique)",
                {"node": reference},
            )
        return member

    async def _catch_up(self) -> None:
        """Another node may have acknowledged a moment ago what this one has not seen yet."""
        if self.services.cluster.has_quorum:
            with suppress(NoQuorum):
                await self.services.cluster.read_barrier(CATCH_UP_TIMEOUT_S)

    async def propose(self, command: AnyCommand, **details: str) -> None:
        """Replicate a command; the details are the names in it.

        Raises:
          ServiceError: 400, a name is too long; it was rejected, with these details, or there is
            no quorum.
        """
        for field, name in details.items():
            if len(name) > MAX_NAME_CHARS:
                message = f"{field} is longer than {MAX_NAME_CHARS} characters"
                raise ServiceError(400, "INVALID_REQUEST", message, {"field": field})
        outcome = await self.services.cluster.propose(command)
        if isinstance(outcome, Rejected):
            raise rejection_error(outcome, details)


Handler = Callable[..., Awaitable[Reply | None]]


def peer_of(request: Request) -> str:
    """The address at the other end of the connection; empty if there is none."""
    return str((request.scope.get("client") or ("", 0))[0])


def read_name(text: str, field: str = "model") -> ModelName:
    """Parse a model name.

    Raises:
      ServiceError: 400 INVALID_MODEL_NAME.
    """
    try:
        return parse_name(text)
    except InvalidName as error:
        raise ServiceError(400, "INVALID_MODEL_NAME", str(error), {"field": field}) from None


def rejection_error(rejected: Rejected, details: Mapping[str, str] = NO_DETAILS) -> ServiceError:
    """The error that a client sees for a command that the state refused."""
    status = _REJECTION_STATUS.get(rejected.code, 409)
    if (field := _REJECTED_FIELD.get(rejected.code)) is not None:
        details = {"field": field}
    return ServiceError(status, rejected.code, rejected.message, details)


def reply(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Reply:
    """A JSON answer."""
    return Reply(_encode(body), status, headers=headers or {})


def error_reply(error: ServiceError, body: ErrorBody) -> Reply:
    """The answer that an error becomes, worded as its surface does."""
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return reply(body(error), error.status, headers)


def rfc3339(unix: float) -> str:
    """Unix seconds as `2024-01-15T10:00:00Z`."""
    return datetime.fromtimestamp(int(unix), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def is_host_port(text: str) -> bool:
    """Whether the text is `host:port` with a name or an IP address (IPv6 in brackets)."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        return False
    if host.startswith("[") and host.endswith("]"):
        try:
            return ipaddress.ip_address(host[1:-1]).version == 6
        except ValueError:
            return False
    return bool(host) and all(c.isascii() and (c.isalnum() or c in ".-_") for c in host)


def _too_large(most: int) -> ServiceError:
    shown = f"{most >> 20} MiB" if most >= 1 << 20 else f"{most >> 10} KiB"
    return ServiceError(
        413, "BODY_TOO_LARGE", f"the body is larger than {shown}", {"limit_bytes": most}
    )
