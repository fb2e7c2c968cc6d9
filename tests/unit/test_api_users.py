"""Users and API keys: made, listed, changed, deleted; and what dies with them."""

import datetime
from typing import Any

import pytest

from ollamad.api.app import BASE
from ollamad.api.generation import Meter
from ollamad.core.commands import AddKey, AddUser, SetPassword
from ollamad.core.inference import Chunk, Failed, Finished, GenerateRequest, Message
from tests.fakes.api_client import Answer, ApiClient
from tests.fakes.api_services import FINISHED, NOW, PASSWORD

NEW = "another horse"


async def make_user(client: ApiClient, username: str = "eve", **changes: Any) -> Answer:
    body = {"username": username, "password": NEW, "role": "operator"} | changes
    return await client.call("POST", "/users", body)


async def login(client: ApiClient, username: str, password: str = NEW) -> Answer:
    body = {"username": username, "password": password}
    return await client.call("POST", "/auth/login", body, role=None)


async def me(client: ApiClient, token: str) -> Answer:
    headers = {"Authorization": f"Bearer {token}"}
    return await client.call("GET", "/auth/me", role=None, headers=headers)


async def make_key(client: ApiClient, **body: Any) -> Any:
    answer = await client.call("POST", "/keys", body)
    assert answer.status == 201, answer.data
    return answer.json


async def use(client: ApiClient, key: str, path: str = "/nodes", body: Any = None) -> Answer:
    headers = {"Authorization": f"Bearer {key}"}
    return await client.call("POST" if body else "GET", path, body, role=None, headers=headers)


# Users


async def test_a_user_is_made_signs_in_and_is_listed_without_the_hash() -> None:
    client = ApiClient()
    made = await make_user(client)
    shown = {"id": "eve", "username": "eve", "role": "operator"}
    assert made.status == 201
    assert made.json == {"user": shown | {"created_at": "2024-01-15T10:00:00Z"}}
    signed_in = await login(client, "eve")
    assert signed_in.json["user"] == shown
    listed = await client.call("GET", "/users")
    assert made.json["user"] in listed.json["users"]
    assert [u["username"] for u in listed.json["users"]] == sorted(client.world.cluster.state.users)
    assert b"argon2" not in listed.data
    proposed = client.world.cluster.proposed[-1]
    assert isinstance(proposed, AddUser)
    assert proposed.user.password_hash.startswith("$argon2id$")


@pytest.mark.parametrize(
    ("changes", "status", "code", "field"),
    [
        ({"role": "root"}, 400, "INVALID_REQUEST", "role"),
        ({"role": None}, 400, "INVALID_REQUEST", "role"),
        ({"password": "seven77"}, 400, "INVALID_REQUEST", "password"),
        ({"password": "x" * 1025}, 400, "INVALID_REQUEST", "password"),
        ({"username": ""}, 400, "INVALID_REQUEST", "username"),
        ({"username": "a b"}, 400, "INVALID_USERNAME", "username"),
        ({"username": "../x"}, 400, "INVALID_USERNAME", "username"),
        ({"username": "nul\0"}, 400, "INVALID_USERNAME", "username"),
        ({"username": "local"}, 400, "INVALID_USERNAME", "username"),
        ({"username": "admin"}, 409, "USER_EXISTS", None),
    ],
    ids=str,
)
async def test_what_no_user_can_be(
    changes: dict[str, Any], status: int, code: str, field: str | None
) -> None:
    answer = await make_user(ApiClient(), **changes)
    assert (answer.status, answer.code) == (status, code)
    assert answer.json["details"].get("field") == field


async def test_a_deleted_users_tokens_are_dead_also_when_the_name_comes_back() -> None:
    client = ApiClient()
    await make_user(client)
    pair = (await login(client, "eve")).json
    assert (await me(client, pair["token"])).status == 200
    assert (await client.call("DELETE", "/users/eve")).status == 200
    await make_user(client)
    assert (await me(client, pair["token"])).status == 401
    body = {"refresh_token": pair["refresh_token"]}
    assert (await client.call("POST", "/auth/refresh", body, role=None)).status == 401
    gone = await client.call("DELETE", "/users/nobody")
    assert (gone.status, gone.code) == (404, "USER_NOT_FOUND")


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("DELETE", "/users/{}", None),
        ("DELETE", "/keys/{}", None),
        ("POST", "/users/{}/role", {"role": "viewer"}),
        ("POST", "/users", {"username": "{}", "password": "long enough", "role": "viewer"}),
    ],
)
async def test_names_without_end_are_not_remembered(method: str, path: str, body: Any) -> None:
    """The cluster keeps what it refused, for retries, with the names in it."""
    client = ApiClient()
    name = "x" * 257
    shown = {k: v.format(name) for k, v in body.items()} if body else None
    answer = await client.call(method, path.format(name), shown)
    assert (answer.status, answer.code) == (400, "INVALID_REQUEST")
    assert client.world.cluster.proposed == []


async def test_the_last_admin_stays() -> None:
    answer = await ApiClient().call("DELETE", "/users/admin")
    assert (answer.status, answer.code) == (409, "LAST_ADMIN")


async def test_a_new_role_holds_at_once_for_tokens_that_are_out() -> None:
    client = ApiClient()
    await make_user(client, role="viewer")
    token = (await login(client, "eve")).json["token"]
    headers = {"Authorization": f"Bearer {token}"}
    refused = await client.call("GET", "/users", role=None, headers=headers)
    assert refused.status == 403
    changed = await client.call("POST", "/users/eve/role", {"role": "admin"})
    assert changed.json == {"message": "User eve has the role admin now"}
    assert (await client.call("GET", "/users", role=None, headers=headers)).status == 200
    assert (await me(client, token)).json["user"]["role"] == "admin"
    taken = await client.call("POST", "/users/eve/role", {"role": "viewer"}, role="operator")
    assert (taken.status, taken.code) == (403, "FORBIDDEN")
    assert (await client.call("POST", "/users/eve/role", {"role": "viewer"})).status == 200
    assert (await client.call("GET", "/users", role=None, headers=headers)).status == 403


@pytest.mark.parametrize(
    ("username", "role", "status", "code"),
    [
        ("eve", "root", 400, "INVALID_REQUEST"),
        ("nobody", "viewer", 404, "USER_NOT_FOUND"),
        ("admin", "operator", 409, "LAST_ADMIN"),
    ],
)
async def test_roles_that_cannot_be(username: str, role: str, status: int, code: str) -> None:
    client = ApiClient()
    await make_user(client)
    answer = await client.call("POST", f"/users/{username}/role", {"role": role})
    assert (answer.status, answer.code) == (status, code)


async def test_a_new_password_ends_all_sessions() -> None:
    client = ApiClient()
    await make_user(client)
    pair = (await login(client, "eve")).json
    changed = await client.call("POST", "/users/eve/password", {"password": "third horse"})
    assert changed.status == 200
    assert (await me(client, pair["token"])).status == 401
    body = {"refresh_token": pair["refresh_token"]}
    assert (await client.call("POST", "/auth/refresh", body, role=None)).status == 401
    assert (await login(client, "eve")).status == 401
    fresh = (await login(client, "eve", "third horse")).json
    assert (await me(client, fresh["token"])).status == 200


async def test_one_sets_ones_own_password_by_knowing_it() -> None:
    client = ApiClient()
    path, body = "/users/viewer/password", {"password": NEW}
    unproved = await client.call("POST", path, body, role="viewer")
    assert (unproved.status, unproved.json["details"]["field"]) == (400, "current_password")
    wrong = await client.call("POST", path, body | {"current_password": "x"}, role="viewer")
    assert (wrong.status, wrong.code) == (401, "INVALID_CREDENTIALS")
    short = {"password": "x", "current_password": PASSWORD}
    assert (await client.call("POST", path, short, role="viewer")).status == 400
    assert not client.world.cluster.proposed
    right = await client.call("POST", path, body | {"current_password": PASSWORD}, role="viewer")
    assert right.status == 200
    assert isinstance(client.world.cluster.proposed[-1], SetPassword)


async def test_nobody_but_an_admin_sets_another_password() -> None:
    client = ApiClient()
    body = {"password": NEW, "current_password": PASSWORD}
    for role in ("viewer", "inference", "operator"):
        answer = await client.call("POST", "/users/admin/password", body, role=role)
        assert (answer.status, answer.code) == (403, "FORBIDDEN")
    # Nor a key whose name looks like a user.
    key = await make_key(client, name="viewer", role="operator")
    assert (await use(client, key["key"], "/users/viewer/password", body)).status == 403
    unknown = await client.call("POST", "/users/nobody/password", body)
    assert (unknown.status, unknown.code) == (404, "USER_NOT_FOUND")


async def test_the_log_tells_who_changed_what_and_what_became_of_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "ollamad.api.audit")
    client = ApiClient()
    body = {"password": NEW, "current_password": PASSWORD}
    # No name makes a line of its own, and who may not, does not seem to.
    path = "/users/x%0A12:00:00%20INFO%20%20api.audit:%20admin/password"
    refused = await client.call("POST", path, body, role="viewer")
    done = await client.call("POST", "/users/viewer/password", body, role="viewer")
    await client.call("GET", "/users")
    ids = [answer.headers["x-request-id"] for answer in (refused, done)]
    assert caplog.messages == [
        f"viewer at 192.0.2.7: POST {BASE}{path}, request {ids[0]}: 403",
        f"viewer at 192.0.2.7: POST {BASE}/users/viewer/password, request {ids[1]}: 200",
    ]


# Keys


async def test_a_key_is_shown_once_kept_as_a_hash_and_works_until_it_is_deleted() -> None:
    client = ApiClient()
    made = await make_key(client, name="agent", role="inference")
    key = made.pop("key")
    assert made == {
        "id": made["id"],
        "name": "agent",
        "role": "inference",
        "created_at": "2024-01-15T10:00:00Z",
        "created_by": "admin",
        "expires_at": None,
        "expired": False,
        "request_quota": None,
        "token_quota": None,
        "quota_period": "total",
        "used": {"requests": 0, "tokens": 0},
        "resets_at": None,
    }
    listed = await client.call("GET", "/keys")
    assert listed.json == {"keys": [made]}
    proposed = client.world.cluster.proposed[-1]
    assert isinstance(proposed, AddKey)
    _, _, secret = key.split("_", 2)  # may have more of them
    assert secret not in str(proposed)
    assert secret.encode() not in listed.data
    who = (await me(client, key)).json
    assert who["user"] == {"id": "key:agent", "username": "key:agent", "role": "inference"}
    assert (await use(client, key, "/keys")).status == 403
    for bad in (
        key[:-1],
        key + "x",
        key.replace(made["id"], "0" * 12),
        "odk_",
        f"odk_{made['id']}",
    ):
        assert (await use(client, bad)).status == 401, bad
    assert (await client.call("DELETE", f"/keys/{made['id']}")).status == 200
    assert (await use(client, key)).status == 401
    again = await client.call("DELETE", f"/keys/{made['id']}")
    assert (again.status, again.code) == (404, "KEY_NOT_FOUND")


async def test_a_key_dies_at_its_time() -> None:
    client = ApiClient()
    by_ttl = await make_key(client, ttl_seconds=60)
    by_date = await make_key(client, expires_at="2024-01-15T11:00:30+01:00")
    assert by_ttl["expires_at"] == "2024-01-15T10:01:00Z"
    assert by_date["expires_at"] == "2024-01-15T10:00:30Z"
    client.world.clock.now += 30
    assert (await use(client, by_ttl["key"])).status == 200
    late = await use(client, by_date["key"])
    assert (late.status, late.code) == (401, "TOKEN_EXPIRED")
    listed = {k["id"]: k["expired"] for k in (await client.call("GET", "/keys")).json["keys"]}
    assert listed == {by_ttl["id"]: False, by_date["id"]: True}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"role": "root"}, "role"),
        ({"quota_period": "week"}, "quota_period"),
        ({"ttl_seconds": 0}, "ttl_seconds"),
        ({"ttl_seconds": "1h"}, "ttl_seconds"),
        ({"expires_at": "tomorrow"}, "expires_at"),
        ({"expires_at": "2024-01-15T09:59:59Z"}, "expires_at"),
        ({"expires_at": "2030-01-15T10:00:00"}, "expires_at"),
        ({"expires_at": "2030-01-15T10:00:00Z", "ttl_seconds": 60}, "expires_at"),
        ({"request_quota": -1}, "request_quota"),
        ({"token_quota": 1.5}, "token_quota"),
        ({"name": "x" * 129}, "name"),
    ],
    ids=str,
)
async def test_what_no_key_can_be(body: dict[str, Any], field: str) -> None:
    answer = await ApiClient().call("POST", "/keys", body)
    assert (answer.status, answer.code) == (400, "INVALID_REQUEST")
    assert answer.json["details"]["field"] == field


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (f"{BASE}/nodes", None),
        (f"{BASE}/generate", {"model": "smollm2:135m", "prompt": "x"}),
        ("/api/tags", None),
        ("/api/chat", {"model": "smollm2:135m", "messages": [], "stream": False}),
        ("/v1/models", None),
        ("/v1/completions", {"model": "smollm2:135m", "prompt": "x"}),
    ],
)
async def test_a_request_quota_holds_on_every_surface(path: str, body: Any) -> None:
    client = ApiClient()
    made = await make_key(client, request_quota=2, quota_period="hour")
    for _ in range(2):
        assert (await use(client, made["key"], path, body)).status == 200
    refused = await use(client, made["key"], path, body)
    assert refused.status == 429
    assert refused.headers["retry-after"] == "3600"
    if path.startswith(BASE):
        assert refused.code == "QUOTA_EXCEEDED"
        assert refused.json["details"] == {
            "quota": "requests",
            "limit": 2,
            "used": 2,
            "period": "hour",
            "retry_after": 3600,
        }
    assert (await client.call("GET", "/keys")).json["keys"][0]["used"]["requests"] == 2
    client.world.clock.now += 3600
    assert (await use(client, made["key"], path, body)).status == 200


async def test_a_token_quota_counts_prompts_answers_and_embeddings() -> None:
    client = ApiClient()
    made = await make_key(client, token_quota=60)
    body = {"model": "smollm2:135m", "prompt": "x"}
    assert (await use(client, made["key"], "/generate", body)).status == 200
    one = FINISHED.prompt_eval_count + FINISHED.eval_count
    assert (await client.call("GET", "/keys")).json["keys"][0]["used"]["tokens"] == one
    assert (await use(client, made["key"], "/embeddings", body)).status == 200
    assert (await use(client, made["key"], "/generate", body | {"stream": True})).status == 200
    assert (await client.call("GET", "/keys")).json["keys"][0]["used"]["tokens"] == 2 * one + 4
    refused = await use(client, made["key"], "/generate", body)
    assert (refused.status, refused.code) == (429, "QUOTA_EXCEEDED")
    assert refused.json["details"]["quota"] == "tokens"
    assert refused.headers["retry-after"] == "86400"
    other = await make_key(client)
    assert (await use(client, other["key"], "/generate", body)).status == 200


class Events:
    def __init__(self, *events: Any) -> None:
        self._events = list(events)

    async def receive(self) -> Any:
        return self._events.pop(0)

    def receive_nowait(self) -> Any:
        return self._events.pop(0)


async def test_an_answer_that_ends_early_costs_what_was_made_of_it() -> None:
    asked = GenerateRequest("m", messages=(Message("user", "x" * 40),), context=())
    meter = Meter(asked, Events(Chunk("a b", (1, 2)), Chunk("c"), Failed("LOST", "gone")))
    for _ in range(3):
        await meter.receive()
    assert meter.tokens == 10 + 2 + 1
    ended = Meter(asked, Events(Chunk("a", (1,)), Finished("stop", 0, 0, 12, 0, 5)))
    ended.receive_nowait()
    ended.receive_nowait()
    assert ended.tokens == 17


async def test_the_time_of_a_window_is_told() -> None:
    client = ApiClient()
    made = await make_key(client, request_quota=0, quota_period="month")
    assert made["resets_at"] == "2024-02-01T00:00:00Z"
    refused = await use(client, made["key"])
    february = datetime.datetime(2024, 2, 1, tzinfo=datetime.UTC).timestamp()
    assert refused.headers["retry-after"] == str(int(february - NOW))
    assert "it gets more at 2024-02-01T00:00:00Z" in refused.json["error"]
