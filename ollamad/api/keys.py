"""Handlers: API keys; and what it means that a key has a quota."""

import math
from datetime import datetime

from ollamad.api.apikeys import new_key
from ollamad.api.asgi import Reply
from ollamad.api.bodies import KeyBody, invalid
from ollamad.api.calls import Call, reply, rfc3339
from ollamad.api.limits import too_many
from ollamad.api.schemas import Done, KeyInfo, KeyList, KeyUse, NewKeyInfo
from ollamad.api.services import Services
from ollamad.core.commands import AddKey, DeleteKey
from ollamad.core.quota import PERIODS, window_end
from ollamad.core.state import ROLES, ApiKey

# A quota of all time never returns; a client that asks once a day does no harm.
HOPELESS_S = 86400.0


async def list_keys(call: Call) -> Reply:
    keys = sorted(call.services.cluster.state.api_keys.values(), key=lambda k: (k.created_at, k.id))
    return reply(KeyList([_shown(call.services, key) for key in keys]))


async def create_key(call: Call) -> Reply:
    body = await call.body(KeyBody, optional=True)
    if body.role not in ROLES:
        raise invalid("role", f"role must be one of {', '.join(ROLES)}", expected=" | ".join(ROLES))
    if body.quota_period not in PERIODS:
        raise invalid(
            "quota_period",
            f"quota_period must be one of {', '.join(PERIODS)}",
            expected=" | ".join(PERIODS),
        )
    caller = call.caller
    assert caller is not None  # the route needs a role
    now = call.services.wall()
    made = new_key()
    key = ApiKey(
        id=made.id,
        name=body.name,
        secret_sha256=made.secret_sha256,
        role=body.role,
        created_at=now,
        created_by=caller.username,
        expires_at=_expiry(body, now),
        request_quota=body.request_quota,
        token_quota=body.token_quota,
        period=body.quota_period,
    )
    await call.propose(AddKey(key))
    return reply(NewKeyInfo.of(_shown(call.services, key), made.text), 201)


async def delete_key(call: Call, key_id: str) -> Reply:
    await call.propose(DeleteKey(key_id), id=key_id)
    return reply(Done(f"API key {key_id} is deleted"))


def spend_request(services: Services, key: ApiKey) -> None:
    """Count a request of a key.

    Raises:
      ServiceError: 429, one of its quotas is used up.
    """
    now = services.wall()
    used = services.keys.used(key)
    for what, limit, count in (
        ("requests", key.request_quota, used.requests),
        ("tokens", key.token_quota, used.tokens),
    ):
        if limit is not None and count >= limit:
            end = window_end(key.period, now)
            when = "never" if end is None else f"at {rfc3339(math.ceil(end))}"
            span = "in all" if end is None else f"a {key.period}"
            raise too_many(
                "QUOTA_EXCEEDED",
                f"this API key may use {limit} {what} {span} and has used {count}; "
                f"it gets more {when}",
                HOPELESS_S if end is None else end - now,
                quota=what,
                limit=limit,
                used=count,
                period=key.period,
            )
    services.keys.count(key, requests=1)


def _expiry(body: KeyBody, now: float) -> float | None:
    if body.expires_at is None:
        return None if body.ttl_seconds is None else now + body.ttl_seconds
    if body.ttl_seconds is not None:
        raise invalid("expires_at", "give expires_at or ttl_seconds, not both")
    try:
        moment = datetime.fromisoformat(body.expires_at)
        seconds = moment.timestamp() if moment.tzinfo else math.nan
    except (ValueError, OverflowError):
        seconds = math.nan
    if not seconds > now:
        raise invalid(
            "expires_at",
            "expires_at must be a time to come with its zone, such as 2030-01-15T10:00:00Z",
            expected="RFC 3339",
        )
    return seconds


def _shown(services: Services, key: ApiKey) -> KeyInfo:
    now = services.wall()
    used, end = services.keys.used(key), window_end(key.period, now)
    return KeyInfo(
        id=key.id,
        name=key.name,
        role=key.role,
        created_at=rfc3339(key.created_at),
        created_by=key.created_by,
        expires_at=None if key.expires_at is None else rfc3339(key.expires_at),
        expired=key.expires_at is not None and key.expires_at <= now,
        request_quota=key.request_quota,
        token_quota=key.token_quota,
        quota_period=key.period,
        used=KeyUse(used.requests, used.tokens),
        resets_at=None if end is None else rfc3339(end),
    )
