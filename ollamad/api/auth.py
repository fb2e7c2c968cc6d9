"""Who calls, and what they may do: JSON Web Tokens, API keys, sessions, the loopback rule.

A session begins with a login and carries an id (`sid`). Its access tokens are short-lived;
its refresh token is spent by use and replaced (rotation, RFC 9700): a second use of a spent
one means that two parties hold it, and ends the session. Ended sessions and spent tokens are
in the replicated state, so they are dead on every node. A user's role is read from the state
at every request, so a changed or deleted user needs no new token to lose a right; a token
names the user's generation, which is another one after a new password.

An API key is a token without a session: `apikeys.py` says how it is made, and the state holds
its hash.

Algorithms are fixed to HS256; issuer, audience (the cluster), expiry, id and purpose of every
token are checked, the time with the daemon's own clock.
"""

import dataclasses
import functools
import ipaddress
import platform
import secrets
from base64 import b64encode
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

import argon2
import jwt
import msgspec
import trio

from ollamad.api.apikeys import PREFIX, find_key
from ollamad.api.origins import Origins
from ollamad.api.services import Cluster, ServiceError, Unavailable
from ollamad.core.commands import Rejected, Revoke
from ollamad.core.state import ROLES, ApiKey, ClusterState, Role, User

ALGORITHM = "HS256"
ISSUER = "ollamad"
MIN_SECRET_BYTES = 32  # RFC 7518: an HS256 key is at least as long as its hash
REFRESH_TTL_S = 7 * 86400.0
LOCAL_TOKEN_TTL_S = 365 * 86400.0  # the file is renewed at each start of the daemon
# Nodes' clocks differ by a little; a token must not be refused for it.
CLOCK_SKEW_S = 30.0
# One argon2id check takes 64 MiB and a core for some 50 ms.
PASSWORD_THREADS = 2
MAX_PASSWORDS_WAITING = 64  # checks that wait for a thread; more would wait for seconds

_DEFAULT_ORIGINS = Origins()

Purpose = Literal["access", "refresh", "local"]

# A proxy adds one of these; then the peer's address says nothing about the client.
FORWARDING_HEADERS = (
    "Forwarded",
    "X-Forwarded-For",
    "X-Forwarded-Host",
    "X-Forwarded-Proto",
    "X-Real-Ip",
    "Via",
)
LOCAL_DOMAINS = (".localhost", ".local", ".internal")  # no stranger can have a name in these


@dataclasses.dataclass(frozen=True, slots=True)
class AuthSettings:
    """Settings of `auth.*`.

    Raises:
      ValueError: a value that would make authentication weaker than it looks.
    """

    loopback_role: str = "inference"  # a role, or "none"
    jwt_secret: bytes | None = None  # replaces the cluster's own key; the same on all nodes
    access_ttl_s: float = 1800.0

    def __post_init__(self) -> None:
        if self.loopback_role not in (*ROLES, "none"):
            raise ValueError(f"auth.loopback_role must be none or one of {', '.join(ROLES)}")
        if self.jwt_secret is not None and len(self.jwt_secret) < MIN_SECRET_BYTES:
            raise ValueError(f"OLLAMA_JWT_SECRET must have at least {MIN_SECRET_BYTES} bytes")
        if not 900 <= self.access_ttl_s <= 3600:
            raise ValueError("auth.access_ttl must be between 15 minutes and 1 hour")


@dataclasses.dataclass(frozen=True, slots=True)
class Identity:
    """Who calls. `session` is empty for callers that did not log in."""

    username: str
    role: Role
    session: str = ""
    expires_at: float = 0.0  # Unix seconds; 0 if it does not expire
    key: ApiKey | None = None
    token_id: str = ""  # what its requests are counted by; empty without a token
    owns_node: bool = False  # may read this node's data directory, where the token is from

    def may(self, role: Role) -> bool:
        return ROLES.index(self.role) >= ROLES.index(role)


@dataclasses.dataclass(frozen=True, slots=True)
class TokenPair:
    """What a login or a refresh gives."""

    access: str
    refresh: str
    expires_at: float  # of the access token


class Claims(msgspec.Struct, frozen=True):
    """What a token of ours says, beside issuer and audience."""

    sub: str
    sid: str
    jti: str
    typ: Purpose
    iat: int
    exp: int
    gen: str = ""  # the user's generation
    # Of a local token only; another's role stands in the state.
    role: Literal["", "viewer", "inference", "operator", "admin"] = ""
    node: str = ""


class Headers(Protocol):
    """The headers of a request; names are compared without case."""

    def get(self, key: str, /) -> str | None: ...


class Auth:
    """Checks and makes tokens for one cluster."""

    def __init__(
        self,
        cluster: Cluster,
        settings: AuthSettings,
        wall: Callable[[], float],
        origins: Origins = _DEFAULT_ORIGINS,
    ) -> None:
        self._cluster = cluster
        self._origins = origins
        self._settings = settings
        self._wall = wall
        self._hasher = argon2.PasswordHasher()
        self._nobody = _unknowable_hash(self._hasher)
        self._threads = trio.CapacityLimiter(PASSWORD_THREADS)

    def identify(
        self, headers: Headers, peer: str, *, ignores_placeholders: bool = False
    ) -> Identity | None:
        """Who sent a request with these headers from this address; None for nobody known.

        Clients of OpenAI and Anthropic cannot send no key, so those for Ollama send any word, or
        an empty one. If asked to ignore it, what has not the form of a token of ours is as good as
        none where the loopback rule holds.

        Raises:
          ServiceError: 401, a token was sent and is not good (the loopback rule is no way out).
        """
        token = _token_of(headers)
        if token is not None and (_may_be_ours(token) or not ignores_placeholders):
            return self._identity_of(token)
        role = self._settings.loopback_role
        if role != "none" and is_local_request(headers, peer, self._origins):
            return Identity("local", role)
        return None if token is None else self._identity_of(token)

    async def check_password(self, username: str, password: str) -> User | None:
        """The user if the password is right. Takes as long when there is no such user."""
        self._refuse_crowd()
        user = self._cluster.state.users.get(username)
        known = user.password_hash if user else self._nobody
        right = await trio.to_thread.run_sync(
            _verify, self._hasher, known, password, limiter=self._threads
        )
        return user if right else None

    async def hash_password(self, password: str) -> str:
        """The argon2id hash of a new password."""
        self._refuse_crowd()
        return await trio.to_thread.run_sync(self._hasher.hash, password, limiter=self._threads)

    def _refuse_crowd(self) -> None:
        if self._threads.statistics().tasks_waiting >= MAX_PASSWORDS_WAITING:
            raise Unavailable("too many sign-ins at once; try again", code="BUSY")

    def open_session(self, user: User) -> TokenPair:
        """The first tokens of a new session."""
        return self._mint_pair(user, secrets.token_urlsafe(16))

    async def refresh(self, token: str) -> tuple[User, TokenPair]:
        """Spend a refresh token for a new pair.

        Raises:
          ServiceError: 401 for a token that is spent, expired, ended or not ours; 503.
        """
        claims = self._read(token, "refresh")
        user = self._user(claims)
        if claims.jti not in self._cluster.state.revoked:
            spend = Revoke(claims.jti, claims.exp + CLOCK_SKEW_S)
            if not isinstance(await self._cluster.propose(spend), Rejected):
                return user, self._mint_pair(user, claims.sid)
        await self.end_session(claims.sid)
        raise _unauthorized(
            "this refresh token was used before; its session is ended, log in again"
        )

    async def end_session(self, session: str) -> None:
        """Kill every token of a session, on every node.

        Raises:
          ServiceError: 503, it could not be replicated.
        """
        # No token of the session that exists now outlives a refresh token made now.
        end = self._wall() + REFRESH_TTL_S + 2 * CLOCK_SKEW_S
        await self._cluster.propose(Revoke(session, end))

    def _identity_of(self, token: str) -> Identity:
        if not token:
            raise _no_token()
        if (key := find_key(self._cluster.state, token)) is not None:
            if key.expires_at is not None and key.expires_at <= self._wall():
                raise ServiceError(401, "TOKEN_EXPIRED", "this API key has expired; make another")
            return Identity(
                f"key:{key.name or key.id}",
                key.role,
                expires_at=key.expires_at or 0.0,
                key=key,
                token_id=f"key:{key.id}",
            )
        claims = self._read(token, "access", "local")
        if claims.jti in self._cluster.state.revoked:
            raise _unauthorized("this token was revoked")
        if claims.typ == "local":
            if claims.node != self._cluster.node_id or not claims.role:
                raise _unauthorized("this token belongs to another node")
            return Identity(
                claims.sub,
                claims.role,
                expires_at=claims.exp,
                token_id=claims.sid,
                owns_node=True,
            )
        user = self._user(claims)
        return Identity(user.username, user.role, claims.sid, claims.exp, token_id=claims.sid)

    def _user(self, claims: Claims) -> User:
        user = self._cluster.state.users.get(claims.sub)
        if user is None:
            raise _unauthorized("this user does not exist any more")
        if claims.gen != user.generation:
            raise _unauthorized("the password was changed since; log in again")
        return user

    def _read(self, token: str, *purposes: Purpose) -> Claims:
        claims = read_token(token, self._cluster.state, self._settings, self._wall())
        if claims.typ not in purposes:
            raise _unauthorized(f"a token for {claims.typ} cannot be used here")
        if claims.sid in self._cluster.state.revoked:
            raise _unauthorized("this session has ended; log in again")
        return claims

    def _mint_pair(self, user: User, session: str) -> TokenPair:
        now = self._wall()
        expires_at = now + self._settings.access_ttl_s
        shared = {"sub": user.username, "sid": session, "gen": user.generation}
        state = self._cluster.state
        return TokenPair(
            access=_mint(state, self._settings, shared, "access", now, expires_at),
            refresh=_mint(state, self._settings, shared, "refresh", now, now + REFRESH_TTL_S),
            expires_at=expires_at,
        )


def _token_of(headers: Headers) -> str | None:
    """The token of a request, which may be empty; None if it has none.

    Raises:
      ServiceError: 401, an Authorization of another kind.
    """
    authorization = headers.get("Authorization")
    if authorization is not None:
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer":
            raise _no_token()
        authorization = token.strip()
    key = headers.get("X-Api-Key")  # as Anthropic's clients send it, some with an empty bearer
    return authorization if authorization or key is None else key.strip()


def _may_be_ours(token: str) -> bool:
    """Whether it has the form of an API key or of a JWT."""
    return token.startswith(PREFIX) or token.count(".") == 2


def mint_local_token(
    state: ClusterState, settings: AuthSettings, node_id: str, *, now: float
) -> str:
    """A token with role admin that only this node accepts, for its owner's 0600 file.

    Raises:
      ValueError: the cluster has not been founded yet.
    """
    claims = {"sub": "local", "role": "admin", "node": node_id, "sid": secrets.token_urlsafe(16)}
    return _mint(state, settings, claims, "local", now, now + LOCAL_TOKEN_TTL_S)


def hash_password(password: str) -> str:
    """The argon2id hash of a password, in PHC form. Takes some 50 ms: run it in a thread."""
    return argon2.PasswordHasher().hash(password)


def read_token(token: str, state: ClusterState, settings: AuthSettings, now: float) -> Claims:
    """The claims of a token that is whole, ours, for this cluster, and of its time.

    Raises:
      ServiceError: 401, saying only what the token's owner may know; 503 while nothing is known.
    """
    key = _key(state, settings)
    if key is None:
        # A node that starts again is here too: its clients' tokens are good, it cannot tell yet.
        raise Unavailable(
            "this node is in no cluster, or has not heard from it since its start; try again",
            code="NOT_READY",
            retry_after_s=1,
        )
    try:
        payload = jwt.decode(
            token,
            key,
            algorithms=[ALGORITHM],
            issuer=ISSUER,
            audience=state.cluster_id,
            options={
                "require": ["iss", "aud", "exp", "iat", "jti", "sub", "sid", "typ"],
                # The time is checked below, with the clock that was passed in.
                "verify_exp": False,
                "verify_iat": False,
                "verify_nbf": False,
            },
        )
        claims = msgspec.convert(payload, Claims)
    except (jwt.InvalidTokenError, msgspec.ValidationError):
        raise _unauthorized("the token is not valid") from None
    if claims.exp <= now:
        raise ServiceError(401, "TOKEN_EXPIRED", "the token has expired; refresh it or log in")
    if claims.iat > now + CLOCK_SKEW_S:
        raise _unauthorized("the token is from the future; check the nodes' clocks")
    return claims


def is_local_request(headers: Headers, peer: str, origins: Origins = _DEFAULT_ORIGINS) -> bool:
    """Whether a request comes from a program on this host, and from no proxy or web page.

    A page of a foreign site that resolves its own name to 127.0.0.1 (DNS rebinding) is told
    by its `Host`; one that simply calls us is told by its `Origin`. `origins` are not foreign.
    """
    if not is_loopback_address(peer):
        return False
    if any(headers.get(name) is not None for name in FORWARDING_HEADERS):
        return False
    host = headers.get("Host") or headers.get(":Authority")
    if host is None or not _is_loopback_host(host):
        return False
    origin = headers.get("Origin")
    return origin is None or _is_loopback_origin(origin) or origins.allows(origin)


@functools.lru_cache(maxsize=256)
def is_foreign_host(text: str) -> bool:
    """Whether a `Host` names another machine, by the rule of Ollama.

    That is how a page of a foreign site is told that resolves its own name to 127.0.0.1. An
    address tells nothing: no page can make it its own.
    """
    try:
        name = urlsplit(f"//{text}").hostname or ""
    except ValueError:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        own = ("", "localhost", platform.node().lower())
        return name not in own and not name.endswith(LOCAL_DOMAINS)
    return False


def _mint(
    state: ClusterState,
    settings: AuthSettings,
    claims: Mapping[str, Any],
    purpose: Purpose,
    now: float,
    expires_at: float,
) -> str:
    key = _key(state, settings)
    if key is None:
        raise ValueError("there is no key before the cluster is founded")
    return jwt.encode(
        {
            **claims,
            "iss": ISSUER,
            "aud": state.cluster_id,
            "iat": int(now),
            "exp": int(expires_at),
            "jti": secrets.token_urlsafe(16),
            "typ": purpose,
        },
        key,
        algorithm=ALGORITHM,
    )


def _key(state: ClusterState, settings: AuthSettings) -> bytes | None:
    """The signing key; None before the cluster is founded (an empty key would sign anything)."""
    key = settings.jwt_secret or state.jwt_key
    return key if state.cluster_id and len(key) >= MIN_SECRET_BYTES else None


def _verify(hasher: argon2.PasswordHasher, known: str, password: str) -> bool:
    try:
        return hasher.verify(known, password)
    except (argon2.exceptions.VerificationError, argon2.exceptions.InvalidHashError):
        return False


def _unknowable_hash(hasher: argon2.PasswordHasher) -> str:
    """A hash that no known password has, of the same cost as a real one, made without a hash."""
    salt = secrets.token_bytes(hasher.salt_len)
    digest = secrets.token_bytes(hasher.hash_len)
    cost = f"m={hasher.memory_cost},t={hasher.time_cost},p={hasher.parallelism}"
    return f"$argon2id$v=19${cost}${_base64(salt)}${_base64(digest)}"


def _base64(data: bytes) -> str:
    return b64encode(data).decode().rstrip("=")


@functools.lru_cache(maxsize=256)
def is_loopback_address(text: str) -> bool:
    """Whether it is an address that only this host's own programs reach."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


@functools.lru_cache(maxsize=256)
def _is_loopback_host(text: str) -> bool:
    """Whether `host`, `host:port` or `[v6]:port` names this machine's loopback."""
    try:
        parts = urlsplit(f"//{text}")
        name, _ = parts.hostname, parts.port
    except ValueError:
        return False
    if not name or parts.path or parts.query or parts.username is not None:
        return False
    return name == "localhost" or is_loopback_address(name)


@functools.lru_cache(maxsize=256)
def _is_loopback_origin(text: str) -> bool:
    scheme, separator, host = text.partition("://")
    return bool(separator) and scheme in ("http", "https") and _is_loopback_host(host)


def _no_token() -> ServiceError:
    return _unauthorized("send the token as `Authorization: Bearer TOKEN`")


def _unauthorized(message: str) -> ServiceError:
    return ServiceError(401, "UNAUTHORIZED", message)
