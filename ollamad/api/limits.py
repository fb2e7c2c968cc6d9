"""How often somebody may ask: the rate limits of `/api/v1`, and of tries to log in.

Each node counts what it is asked itself. The surfaces of Ollama and OpenAI have no rate limit,
since one agent alone makes more than 100 calls a minute: admission and the quotas of API keys
bound them.
"""

import dataclasses
import functools
import ipaddress
import math
from collections.abc import Callable

from ollamad.api.services import ServiceError
from ollamad.core.ratelimit import Allowance, RateLimit

PERIOD_S = 60.0
# Tries to log in, a minute. From one address to one account: a person who mistypes, and no more.
LOGINS_OF_PAIR = 10
LOGINS_OF_ACCOUNT = 30  # from anywhere: guessing from many addresses gains little
LOGINS_OF_ADDRESS = 60  # to any account; each costs a core 50 ms


@dataclasses.dataclass(frozen=True, slots=True)
class RateLimits:
    """Settings of `rate_limits.*`; 0 switches one off.

    Raises:
      ValueError: one is negative.
    """

    general: int = 100  # requests a minute
    model_ops: int = 10  # of those, changes of models
    websocket: int = 5  # connections at once of an address

    def __post_init__(self) -> None:
        if min(self.general, self.model_ops, self.websocket) < 0:
            raise ValueError("rate_limits.* must be 0 or more")


class Throttle:
    """The general limit and that of model operations, per identity."""

    def __init__(self, limits: RateLimits, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._limits: dict[str, RateLimit] = {}
        self.change(limits)

    def change(self, limits: RateLimits) -> None:
        """Other limits from now on; what was counted so far is forgotten."""
        self._limits = {
            name: RateLimit(count, PERIOD_S)
            for name, count in (("general", limits.general), ("model_ops", limits.model_ops))
            if count
        }

    def look(self, identity: str) -> Allowance | None:
        """What is left of the general limit, without counting or refusing anything."""
        limit = self._limits.get("general")
        if limit is None:
            return None
        return dataclasses.replace(limit.look(identity, self._clock()), wait_s=0.0)

    def take(self, identity: str, *, model_op: bool) -> Allowance | None:
        """Count a request; what is left then of the limit that is nearest, or None without one.

        An allowance without anything `remaining` that has a wait is a refusal, which costs nothing:
        `wait_s` is only set then.
        """
        now = self._clock()
        names = ("general", "model_ops") if model_op else ("general",)
        limits = [self._limits[name] for name in names if name in self._limits]
        seen = [limit.look(identity, now) for limit in limits]
        refused = max(seen, key=lambda each: each.wait_s, default=None)
        if refused is None or refused.wait_s > 0:
            return refused
        for limit in limits:
            limit.allow(identity, now)
        left = [dataclasses.replace(limit.look(identity, now), wait_s=0.0) for limit in limits]
        return min(left, key=lambda each: each.remaining)


class LoginGuard:
    """Bounds guessing of passwords. Knows nothing of which accounts exist."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._pair = RateLimit(LOGINS_OF_PAIR, PERIOD_S)
        self._account = RateLimit(LOGINS_OF_ACCOUNT, PERIOD_S)
        self._address = RateLimit(LOGINS_OF_ADDRESS, PERIOD_S)

    def attempt(self, username: str, address: str) -> None:
        """Count a try, before anything is compared.

        Raises:
          ServiceError: 429, there were too many.
        """
        now = self._clock()
        limits = (
            (self._address, address),
            (self._account, username),
            (self._pair, (username, address)),
        )
        wait_s = max(limit.look(identity, now).wait_s for limit, identity in limits)
        if wait_s > 0:
            raise too_many(
                "TOO_MANY_ATTEMPTS", "too many tries to log in; wait before the next one", wait_s
            )
        for limit, identity in limits:
            limit.allow(identity, now)

    def success(self, username: str, address: str) -> None:
        """The password was right. Only the pair is forgiven: whoever has an account of their own
        could otherwise try those of others without end."""
        self._pair.forgive((username, address))


def headers_of(allowance: Allowance) -> tuple[tuple[bytes, bytes], ...]:
    """The `RateLimit-*` headers."""
    return (
        (b"ratelimit-limit", b"%d" % allowance.limit),
        (b"ratelimit-remaining", b"%d" % allowance.remaining),
        (b"ratelimit-reset", b"%d" % math.ceil(allowance.reset_s)),
    )


def rate_limited(allowance: Allowance) -> ServiceError:
    """429 for a request that was refused."""
    wait_s = math.ceil(allowance.wait_s)
    return too_many(
        "RATE_LIMITED",
        f"more than {allowance.limit} of these requests in a minute; try again in {wait_s} s",
        allowance.wait_s,
        limit=allowance.limit,
    )


def too_many(code: str, message: str, wait_s: float, **details: int | str) -> ServiceError:
    """429 with what to wait for, in the header and in the details."""
    seconds = max(1, math.ceil(wait_s))
    return ServiceError(429, code, message, {**details, "retry_after": seconds})


@functools.lru_cache(maxsize=1024)
def address_group(peer: str) -> str:
    """What counts as one address: of IPv6 the network that one host may choose from."""
    try:
        address = ipaddress.ip_address(peer)
    except ValueError:
        return peer
    if isinstance(address, ipaddress.IPv4Address):
        return peer
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))
