"""Handlers: log in, refresh, log out, and who am I."""

import logging

from ollamad.api.asgi import Reply
from ollamad.api.auth import TokenPair
from ollamad.api.bodies import LoginBody, RefreshBody
from ollamad.api.calls import Call, reply, rfc3339
from ollamad.api.schemas import Done, Me, SessionUser, TokenAnswer
from ollamad.api.services import ServiceError
from ollamad.core.state import User

audit = logging.getLogger("ollamad.api.audit")
refused = logging.getLogger("ollamad.api.refused")  # of strangers: see `logs.FROM_OUTSIDE`


async def login(call: Call) -> Reply:
    body = await call.body(LoginBody)
    call.api.logins.attempt(body.username, call.address)
    user = await call.api.auth.check_password(body.username, body.password)
    if user is None:
        # Not the name that was given: it may be a password in the wrong field.
        refused.warning("%s: a wrong username or password", call.address)
        raise ServiceError(401, "INVALID_CREDENTIALS", "the username or the password is wrong")
    call.api.logins.success(body.username, call.address)
    audit.info("%s at %s: signed in, request %s", user.username, call.address, call.request.id)
    return reply(_pair(user, call.api.auth.open_session(user)))


async def refresh(call: Call) -> Reply:
    body = await call.body(RefreshBody)
    user, pair = await call.api.auth.refresh(body.refresh_token)
    return reply(_pair(user, pair))


async def logout(call: Call) -> Reply:
    caller = call.caller
    if caller is None or not caller.session:
        raise ServiceError(400, "NO_SESSION", "this caller did not log in, so it cannot log out")
    await call.api.auth.end_session(caller.session)
    return reply(Done("Logged out"))


async def me(call: Call) -> Reply:
    caller = call.caller
    assert caller is not None  # the route needs a role
    return reply(
        Me(
            SessionUser(caller.username, caller.username, caller.role),
            rfc3339(caller.expires_at) if caller.expires_at else None,
        )
    )


def _pair(user: User, pair: TokenPair) -> TokenAnswer:
    return TokenAnswer(
        token=pair.access,
        refresh_token=pair.refresh,
        expires_at=rfc3339(pair.expires_at),
        user=SessionUser(user.username, user.username, user.role),
    )
