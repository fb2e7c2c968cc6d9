"""What `/api/v1` answers, as types: the OpenAPI document is made of them, and so are the answers.

Times are RFC 3339 in UTC. Keys are those of docs/spec/api.md, and some more.
"""

from typing import Self

import msgspec


class Done(msgspec.Struct, frozen=True):
    """It was done."""

    message: str


class UserInfo(msgspec.Struct, frozen=True):
    """A user. `id` is the username."""

    id: str
    username: str
    role: str
    created_at: str


class UserList(msgspec.Struct, frozen=True):
    users: list[UserInfo]


class OneUser(msgspec.Struct, frozen=True):
    user: UserInfo


class KeyUse(msgspec.Struct, frozen=True):
    """What a key has used in the period that runs."""

    requests: int
    tokens: int


class KeyInfo(msgspec.Struct, frozen=True):
    """An API key, without its secret."""

    id: str
    name: str
    role: str
    created_at: str
    created_by: str
    expires_at: str | None
    expired: bool
    request_quota: int | None
    token_quota: int | None
    quota_period: str
    used: KeyUse
    resets_at: str | None  # when the period ends; null for `total`


class NewKeyInfo(KeyInfo, frozen=True, kw_only=True):
    """A new API key, whole. It is shown this once."""

    key: str

    @classmethod
    def of(cls, info: KeyInfo, key: str) -> Self:
        return cls(**msgspec.structs.asdict(info), key=key)


class KeyList(msgspec.Struct, frozen=True):
    keys: list[KeyInfo]
