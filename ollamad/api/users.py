"""Handlers: users, their passwords and their roles."""

import secrets

from ollamad.api.asgi import Reply
from ollamad.api.bodies import MIN_PASSWORD_LENGTH, PasswordBody, RoleBody, UserBody, invalid
from ollamad.api.calls import Call, reply, rfc3339
from ollamad.api.schemas import Done, OneUser, UserInfo, UserList
from ollamad.api.services import ServiceError
from ollamad.core.commands import AddUser, DeleteUser, SetPassword, SetRole
from ollamad.core.state import ROLES, User


async def list_users(call: Call) -> Reply:
    users = call.services.cluster.state.users.values()
    return reply(UserList([_shown(user) for user in sorted(users, key=lambda u: u.username)]))


async def create_user(call: Call) -> Reply:
    body = await call.body(UserBody)
    _check_role(body.role)
    _check_password(body.password)
    user = User(
        body.username,
        await call.api.auth.hash_password(body.password),
        body.role,
        call.services.wall(),
        generation=secrets.token_hex(8),
    )
    await call.propose(AddUser(user), username=user.username)
    return reply(OneUser(_shown(user)), 201)


async def delete_user(call: Call, username: str) -> Reply:
    await call.propose(DeleteUser(username), username=username)
    return reply(Done(f"User {username} is deleted; their tokens are dead"))


async def set_password(call: Call, username: str) -> Reply:
    """Of anybody, for an admin; of oneself, for everybody who knows the one that is in force."""
    caller = call.caller
    assert caller is not None  # the route needs a role
    is_self = bool(caller.session) and caller.username == username
    if not caller.may("admin") and not is_self:
        raise ServiceError(
            403,
            "FORBIDDEN",
            "only an admin may set the password of another user",
            {"required": "admin", "role": caller.role},
        )
    body = await call.body(PasswordBody)
    _check_password(body.password)
    if not caller.may("admin"):
        # Otherwise a stolen token would be good for more than its half hour.
        await _check_current(call, username, body.current_password)
    hashed = await call.api.auth.hash_password(body.password)
    command = SetPassword(username, hashed, secrets.token_hex(8))
    await call.propose(command, username=username)
    return reply(Done(f"The password of {username} is changed; log in again"))


async def set_role(call: Call, username: str) -> Reply:
    """What a user may do, from the next request on: tokens do not say it."""
    body = await call.body(RoleBody)
    _check_role(body.role)
    await call.propose(SetRole(username, body.role), username=username)
    return reply(Done(f"User {username} has the role {body.role} now"))


async def _check_current(call: Call, username: str, password: str | None) -> None:
    if password is None:
        raise invalid("current_password", "current_password is missing", expected="str")
    guard = call.api.logins
    guard.attempt(username, call.address)
    if await call.api.auth.check_password(username, password) is None:
        raise ServiceError(401, "INVALID_CREDENTIALS", "current_password is wrong")
    guard.success(username, call.address)


def _check_role(role: str) -> None:
    if role not in ROLES:
        roles = ", ".join(ROLES)
        raise invalid("role", f"role must be one of {roles}", expected=" | ".join(ROLES))


def _check_password(password: str) -> None:
    if len(password) < MIN_PASSWORD_LENGTH:
        raise invalid(
            "password",
            f"password must have at least {MIN_PASSWORD_LENGTH} characters",
            expected=f"{MIN_PASSWORD_LENGTH} characters or more",
        )


def _shown(user: User) -> UserInfo:
    return UserInfo(user.username, user.username, user.role, rfc3339(user.created_at))
