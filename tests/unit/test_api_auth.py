"""Tokens, sessions, roles and the loopback rule, and the ways around them that must not work."""

import base64
import hmac
import json
import platform
import re
from typing import Any

import jwt
import pytest

from ollamad.api.app import BASE, ROUTES
from ollamad.api.auth import (
    CLOCK_SKEW_S,
    REFRESH_TTL_S,
    AuthSettings,
    hash_password,
    is_foreign_host,
    is_local_request,
    mint_local_token,
)
from ollamad.core.commands import Revoke
from ollamad.core.state import ROLES, User
from tests.fakes.api_client import LOOPBACK, REMOTE, Answer, ApiClient
from tests.fakes.api_services import NODE_1, NODE_2, NOW, PASSWORD, PASSWORD_HASH, make_world

KEY = b"k" * 32  # of the fake cluster


def claims(**changes: Any) -> dict[str, Any]:
    """A good access token's claims, changed; None leaves one out."""
    plain = {
        "iss": "ollamad",
        "aud": "c1",
        "sub": "admin",
        "sid": "s1",
        "jti": "j1",
        "typ": "access",
        "iat": int(NOW),
        "exp": int(NOW) + 900,
    }
    return {k: v for k, v in (plain | changes).items() if v is not None}


async def ask(client: ApiClient, token: str, path: str = "/auth/me") -> Answer:
    headers = {"Authorization": f"Bearer {token}"}
    return await client.call("GET", path, role=None, headers=headers)


async def login(client: ApiClient, username: str = "admin", password: str = PASSWORD) -> Answer:
    body = {"username": username, "password": password}
    return await client.call("POST", "/auth/login", body, role=None)


async def refresh(client: ApiClient, token: str) -> Answer:
    return await client.call("POST", "/auth/refresh", {"refresh_token": token}, role=None)


# Roles


def path_of(template: str) -> str:
    return re.sub("<.*?>", "x", template.removeprefix(BASE))


@pytest.mark.parametrize("role", [None, *ROLES])
@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
async def test_every_route_lets_in_its_role_and_those_above(route: Any, role: str | None) -> None:
    client = ApiClient()
    path = "/" if route.path == "/" else path_of(route.path)
    if path.endswith("/password"):
        path = f"/users/{role}/password"  # one's own
    answer = await client.call(route.method, path, role=role)
    if route.role is None or (role and ROLES.index(role) >= ROLES.index(route.role)):
        if route.path.endswith("/cluster/snapshot"):
            assert answer.code == "FORBIDDEN", "an admin from elsewhere does not get the keys"
            return
        refused = answer.status in (401, 403)
        assert not refused or answer.code == "INVALID_CREDENTIALS"
    else:
        assert answer.status == (401 if role is None else 403)
        if route.method != "HEAD" and route.path.startswith(BASE):
            assert answer.code == ("UNAUTHORIZED" if role is None else "FORBIDDEN")


def test_the_table_of_roles_is_the_contracts() -> None:
    """Written out again on purpose: a slip in the table must fail here."""
    expected = {
        None: "/ /health /version /auth/login /auth/refresh /api/version "
        "/docs /docs/docs.js /docs/docs.css "
        "/dashboard/dashboard.js /dashboard/node.js /dashboard/chat.js /dashboard/dashboard.css",
        "viewer": "/openapi.json /auth/logout /auth/me /users/<username>/password "
        "/cluster/status /cluster/leader /cluster/consensus /metrics /nodes "
        "/distribution /explain /nodes/<reference> /models /models/<path:name> "
        "/transfers /transfers/<transfer_id> "
        "/api/tags /api/ps /api/show /v1/models /v1/models/<path:name>",
        "inference": "/generate /chat /embeddings "
        "/api/generate /api/chat /api/embed /api/embeddings "
        "/v1/chat/completions /v1/completions /v1/embeddings /v1/responses "
        "/v1/messages /v1/messages/count_tokens",
        "operator": "/nodes/<reference>/drain /nodes/<reference>/undrain "
        "/models/<path:name>/download /distribution/auto-configure /blobs/<digest> "
        "/transfers/<transfer_id>/cancel "
        "/api/pull /api/push /api/create /api/copy /api/delete /api/blobs/<digest>",
        "admin": "/cluster/join /cluster/leave /cluster/token /cluster/snapshot "
        "/users /users/<username> /users/<username>/role /keys /keys/<key_id>",
    }
    by_path = {path: role for role, paths in expected.items() for path in paths.split()}
    for route in ROUTES:
        path = route.path.removeprefix(BASE)
        changes_models = path.startswith("/models") and route.method in ("POST", "PUT", "DELETE")
        assert route.role == ("operator" if changes_models else by_path[path]), route


# Tokens


async def test_a_good_token_is_taken() -> None:
    answer = await ask(ApiClient(), jwt.encode(claims(), KEY, "HS256"))
    assert answer.status == 200
    assert answer.json["user"] == {"id": "admin", "username": "admin", "role": "admin"}
    assert answer.json["expires_at"] == "2024-01-15T10:15:00Z"


@pytest.mark.parametrize(
    "changes",
    [
        {"iss": "somebody"},
        {"iss": None},
        {"aud": "another-cluster"},
        {"aud": None},
        {"exp": int(NOW)},
        {"exp": int(NOW) - 1},
        {"exp": None},
        {"exp": "tomorrow"},
        {"iat": int(NOW + CLOCK_SKEW_S) + 1},
        {"iat": None},
        {"iat": "never"},
        {"jti": None},
        {"sid": None},
        {"sub": None},
        {"sub": "nobody"},
        {"typ": "refresh"},
        {"typ": "other"},
        {"typ": None},
        {"typ": "local", "role": "admin", "node": NODE_2},
        {"typ": "local", "role": "admin"},
        {"typ": "local", "node": NODE_1},
        {"typ": "local", "role": "root", "node": NODE_1},
        {"sid": ["s"]},
        {"jti": {"a": 1}},
        {"typ": ["access"]},
    ],
    ids=str,
)
async def test_a_token_with_one_wrong_claim_is_refused(changes: dict[str, Any]) -> None:
    answer = await ask(ApiClient(), jwt.encode(claims(**changes), KEY, "HS256"))
    assert answer.status == 401, answer.data
    assert answer.headers["www-authenticate"] == "Bearer"


async def test_a_token_with_another_key_or_algorithm_is_refused() -> None:
    client = ApiClient()
    encoded = [
        base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode()
        for part in ({"alg": "none", "typ": "JWT"}, claims())
    ]
    good = jwt.encode(claims(), KEY, "HS256")
    head, body, signature = good.split(".")
    for token in (
        jwt.encode(claims(), b"x" * 32, "HS256"),
        jwt.encode(claims(), b"k" * 64, "HS512"),
        ".".join([*encoded, ""]),
        ".".join([*encoded, signature]),
        f"{head}.{body}.",
        f"{head}.{body}.{signature[:-4]}AAAA",
        good + "x",
        "x",
        "a.b.c",
    ):
        assert (await ask(client, token)).status == 401, token


def sign_with_the_empty_key(body: dict[str, Any]) -> str:
    """PyJWT itself refuses to."""
    parts = [
        base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=")
        for part in ({"alg": "HS256", "typ": "JWT"}, body)
    ]
    signature = hmac.digest(b"", b".".join(parts), "sha256")
    return b".".join([*parts, base64.urlsafe_b64encode(signature).rstrip(b"=")]).decode()


@pytest.mark.parametrize("cluster_id", ["", "c1"])
async def test_an_unfounded_cluster_takes_no_token_signed_with_the_empty_key(
    cluster_id: str,
) -> None:
    world = make_world()
    world.cluster.state.jwt_key = b""
    world.cluster.state.cluster_id = cluster_id
    forged = sign_with_the_empty_key(claims(aud=cluster_id))
    answer = await ask(ApiClient(world), forged)
    # Not 401: a node that has just started again may hold a good token of its cluster.
    assert (answer.status, answer.code) == (503, "NOT_READY")


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "Basic YWRtaW46eA==", "x"])
async def test_a_bad_authorization_header_is_no_way_to_the_loopback_role(header: str) -> None:
    client = ApiClient(role=None, auth=AuthSettings(loopback_role="admin"))
    headers = {"Authorization": header}
    answer = await client.call("GET", "/nodes", peer=LOOPBACK, headers=headers)
    assert answer.status == 401


WORDS = [
    {"Authorization": "Bearer ollama"},
    {"X-Api-Key": "sk-no-key-required"},
    {"Authorization": "Bearer "},  # a field for the key that was left empty
    {"Authorization": "Bearer"},
    {"X-Api-Key": ""},
]


@pytest.mark.parametrize("headers", WORDS)
@pytest.mark.parametrize("path", ["/v1/models", "/api/tags"])
async def test_any_word_will_do_for_a_client_that_must_send_a_key(
    path: str, headers: dict[str, str]
) -> None:
    """OpenAI's and Anthropic's send one, whatever, or none; only where none would be needed."""
    client = ApiClient(role=None)
    assert (await client.call("GET", path, peer=LOOPBACK, headers=headers)).status == 200
    assert (await client.call("GET", path, peer=REMOTE, headers=headers)).status == 401
    assert (await client.call("GET", "/nodes", peer=LOOPBACK, headers=headers)).status == 401
    proxied = headers | {"X-Forwarded-For": "192.0.2.1"}
    assert (await client.call("GET", path, peer=LOOPBACK, headers=proxied)).status == 401
    strict = ApiClient(role=None, auth=AuthSettings(loopback_role="none"))
    assert (await strict.call("GET", path, peer=LOOPBACK, headers=headers)).status == 401


@pytest.mark.parametrize("peer", [LOOPBACK, REMOTE])
@pytest.mark.parametrize("bearer", ["Bearer", "Bearer  "])
async def test_an_empty_bearer_does_not_hide_the_key_beside_it(
    bearer: str, peer: tuple[str, int]
) -> None:
    """Anthropic's client sends both where one of its two variables is set but empty."""
    client = ApiClient(role=None)
    headers = {"Authorization": bearer, "X-Api-Key": client.token("operator")}
    answer = await client.call("GET", "/auth/me", peer=peer, headers=headers)
    assert (answer.status, answer.json["user"]["role"]) == (200, "operator")
    headers["X-Api-Key"] = "odk_0011_x"  # what looks like a token must be one here too
    assert (await client.call("GET", "/v1/models", peer=peer, headers=headers)).status == 401


@pytest.mark.parametrize("token", ["odk_0011_x", "odk_", "a.b.c", "Basic x"])
async def test_what_looks_like_a_token_must_be_one(token: str) -> None:
    client = ApiClient(role=None)
    authorization = token if " " in token else f"Bearer {token}"
    headers = {"Authorization": authorization}
    assert (await client.call("GET", "/v1/models", peer=LOOPBACK, headers=headers)).status == 401


async def test_a_role_that_changes_holds_at_once() -> None:
    client = ApiClient()
    users = client.world.cluster.state.users
    token = client.token("admin")
    assert (await ask(client, token)).json["user"]["role"] == "admin"
    users["admin"] = User("admin", "x", "viewer", NOW)
    assert (await ask(client, token)).json["user"]["role"] == "viewer"
    del users["admin"]
    assert (await ask(client, token)).status == 401


async def test_a_secret_of_ones_own_replaces_the_clusters_key() -> None:
    secret = b"s" * 40
    client = ApiClient(auth=AuthSettings(jwt_secret=secret))
    assert (await ask(client, jwt.encode(claims(), secret, "HS256"))).status == 200
    assert (await ask(client, jwt.encode(claims(), KEY, "HS256"))).status == 401


@pytest.mark.parametrize(
    "settings",
    [{"jwt_secret": b"short"}, {"loopback_role": "root"}, {"access_ttl_s": 60.0}],
    ids=str,
)
def test_weak_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        AuthSettings(**settings)


async def test_the_local_token_is_admin_on_its_own_node_only() -> None:
    client = ApiClient()
    state = client.world.cluster.state
    token = mint_local_token(state, AuthSettings(), NODE_1, now=NOW)
    assert (await ask(client, token)).json["user"]["role"] == "admin"
    assert (await refresh(client, token)).status == 401
    elsewhere = mint_local_token(state, AuthSettings(), NODE_2, now=NOW)
    assert (await ask(client, elsewhere)).status == 401
    headers = {"Authorization": f"Bearer {token}"}
    out = await client.call("POST", "/auth/logout", role=None, headers=headers)
    assert (out.status, out.code) == (400, "NO_SESSION")


# Sessions


async def test_login_and_its_token() -> None:
    client = ApiClient()
    answer = await login(client, "operator")
    assert answer.status == 200
    assert answer.json["user"] == {"id": "operator", "username": "operator", "role": "operator"}
    assert answer.json["expires_at"] == "2024-01-15T10:30:00Z"
    assert (await ask(client, answer.json["token"])).status == 200
    client.world.clock.now += 1800
    late = await ask(client, answer.json["token"])
    assert (late.status, late.code) == (401, "TOKEN_EXPIRED")


async def test_wrong_credentials_are_told_apart_by_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    client = ApiClient()
    checked: list[str] = []
    hasher = client.app.api.auth._hasher
    monkeypatch.setattr(
        type(hasher), "verify", lambda self, known, password: checked.append(known) or False
    )
    answers = [await login(client, name, "wrong") for name in ("admin", "nobody")]
    assert answers[0].data == answers[1].data
    assert [a.status for a in answers] == [401, 401]
    assert answers[0].code == "INVALID_CREDENTIALS"
    assert checked == [PASSWORD_HASH, client.app.api.auth._nobody]  # one check for each


def test_the_hash_for_nobody_costs_what_a_real_one_does() -> None:
    real, nobody = hash_password("x"), ApiClient().app.api.auth._nobody
    assert real.rsplit("$", 2)[0] == nobody.rsplit("$", 2)[0]
    assert [len(part) for part in real.split("$")] == [len(part) for part in nobody.split("$")]


async def test_wrong_passwords_and_broken_hashes_are_refused() -> None:
    client = ApiClient()
    for password in ("", "Correct horse", PASSWORD + " ", "x" * 1024):
        assert (await login(client, "admin", password)).code == "INVALID_CREDENTIALS"
    client.world.cluster.state.users["odd"] = User("odd", "not a hash", "admin", NOW)
    assert (await login(client, "odd", "not a hash")).status == 401
    assert (await login(client, "admin", "x" * 1025)).code == "INVALID_REQUEST"


async def test_refresh_gives_a_new_pair_and_spends_the_old() -> None:
    client = ApiClient()
    first = (await login(client)).json
    second = await refresh(client, first["refresh_token"])
    assert second.status == 200
    assert second.json["token"] != first["token"]
    assert (await ask(client, second.json["token"])).status == 200
    spent = client.world.cluster.proposed[-1]
    assert isinstance(spent, Revoke)
    assert spent.expires_at == NOW + REFRESH_TTL_S + CLOCK_SKEW_S


async def test_a_refresh_token_used_twice_ends_the_session_for_the_thief_too() -> None:
    client = ApiClient()
    first = (await login(client)).json
    second = (await refresh(client, first["refresh_token"])).json
    again = await refresh(client, first["refresh_token"])
    assert (again.status, again.code) == (401, "UNAUTHORIZED")
    for token in (first["token"], second["token"]):
        assert (await ask(client, token)).status == 401
    assert (await refresh(client, second["refresh_token"])).status == 401
    other = (await login(client)).json  # another session of the same user goes on
    assert (await ask(client, other["token"])).status == 200


async def test_two_refreshes_at_once_spend_a_token_once() -> None:
    """The check of the state is only a short cut; what decides is the replicated command."""
    client = ApiClient()
    first = (await login(client)).json
    read = jwt.decode(first["refresh_token"], options={"verify_signature": False})
    propose = client.world.cluster.propose

    async def lose_the_race(command: Any) -> Any:
        if isinstance(command, Revoke) and command.id == read["jti"]:
            await propose(command)
        return await propose(command)

    client.world.cluster.propose = lose_the_race  # type: ignore[method-assign]
    assert (await refresh(client, first["refresh_token"])).status == 401
    assert read["sid"] in client.world.cluster.state.revoked


async def test_an_access_token_cannot_be_refreshed_nor_a_refresh_token_used() -> None:
    client = ApiClient()
    pair = (await login(client)).json
    assert (await refresh(client, pair["token"])).status == 401
    assert (await ask(client, pair["refresh_token"])).status == 401
    client.world.clock.now += REFRESH_TTL_S
    assert (await refresh(client, pair["refresh_token"])).status == 401


async def test_no_session_is_given_to_a_deleted_user() -> None:
    client = ApiClient()
    pair = (await login(client, "viewer")).json
    del client.world.cluster.state.users["viewer"]
    assert (await refresh(client, pair["refresh_token"])).status == 401


async def test_a_single_token_can_be_revoked_by_its_id() -> None:
    client = ApiClient()
    await client.world.cluster.propose(Revoke("j1", NOW + 900))
    assert (await ask(client, jwt.encode(claims(), KEY, "HS256"))).status == 401
    assert (await ask(client, jwt.encode(claims(jti="j2"), KEY, "HS256"))).status == 200


async def test_logout_kills_every_token_of_the_session() -> None:
    client = ApiClient()
    first = (await login(client)).json
    second = (await refresh(client, first["refresh_token"])).json
    headers = {"Authorization": f"Bearer {second['token']}"}
    out = await client.call("POST", "/auth/logout", role=None, headers=headers)
    assert (out.status, out.json) == (200, {"message": "Logged out"})
    for token in (first["token"], second["token"]):
        assert (await ask(client, token)).status == 401
    assert (await refresh(client, second["refresh_token"])).status == 401


async def test_without_quorum_a_refresh_fails_and_spends_nothing() -> None:
    client = ApiClient()
    pair = (await login(client)).json
    client.world.cluster.has_quorum = False
    answer = await refresh(client, pair["refresh_token"])
    assert (answer.status, answer.code) == (503, "NO_QUORUM")
    assert int(answer.headers["retry-after"]) > 0
    client.world.cluster.has_quorum = True
    assert (await refresh(client, pair["refresh_token"])).status == 200


# The loopback rule


@pytest.mark.parametrize("role", ["none", *ROLES])
async def test_loopback_gets_the_role_of_the_setting(role: str) -> None:
    client = ApiClient(role=None, auth=AuthSettings(loopback_role=role))
    answer = await client.call("GET", "/auth/me", peer=LOOPBACK)
    if role == "none":
        assert answer.status == 401
    else:
        assert answer.json["user"]["role"] == role
        assert answer.json["expires_at"] is None
    assert (await client.call("GET", "/auth/me", peer=REMOTE)).status == 401


async def test_loopback_may_infer_but_not_administer_by_default() -> None:
    client = ApiClient(role=None)
    body = {"model": "smollm2:135m"}
    assert (await client.call("POST", "/generate", body, peer=LOOPBACK)).status == 200
    assert (await client.call("POST", "/cluster/token", peer=LOOPBACK)).status == 403
    assert (await client.call("DELETE", "/models/smollm2:135m", peer=LOOPBACK)).status == 403


class Lower(dict[str, str]):
    """Headers as the framework gives them: names without case."""

    def __init__(self, **headers: str) -> None:
        super().__init__({k.lower().replace("_", "-"): v for k, v in headers.items()})

    def get(self, key: str, /) -> str | None:  # type: ignore[override]
        return super().get(key.lower())


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1"])
@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:8080", "localhost:8080", "127.0.0.1:1", "[::1]:8080", "127.3.4.5"],
)
def test_local_requests(peer: str, host: str) -> None:
    assert is_local_request(Lower(host=host), peer)
    assert is_local_request(Lower(host=host, origin="http://localhost:3000"), peer)
    assert is_local_request(Lower(host=host, origin="https://[::1]"), peer)


@pytest.mark.parametrize("peer", ["192.168.1.5", "::2", "", "localhost", "10.0.0.1", "<local>"])
def test_no_other_peer_is_local(peer: str) -> None:
    assert not is_local_request(Lower(host="localhost"), peer)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"host": ""},
        {"host": "evil.example"},
        {"host": "evil.example:8080"},
        {"host": "localhost.evil.example"},
        {"host": "127.0.0.1.evil.example"},
        {"host": "localhost@evil.example"},
        {"host": "user@localhost"},
        {"host": "localhost/x"},
        {"host": "localhost:x"},
        {"host": "192.168.1.5"},
        {"host": "0.0.0.0"},
        {"host": "[::1"},
        {"host": "localhost", "origin": "https://evil.example"},
        {"host": "localhost", "origin": "null"},
        {"host": "localhost", "origin": ""},
        {"host": "localhost", "origin": "http://localhost.evil.example"},
        {"host": "localhost", "origin": "ftp://localhost"},
        {"host": "localhost", "forwarded": "for=1.2.3.4"},
        {"host": "localhost", "x_forwarded_for": "127.0.0.1"},
        {"host": "localhost", "x_forwarded_host": "localhost"},
        {"host": "localhost", "x_forwarded_proto": "https"},
        {"host": "localhost", "x_real_ip": ""},
        {"host": "localhost", "via": "1.1 proxy"},
    ],
    ids=str,
)
def test_proxies_and_foreign_pages_are_not_local(headers: dict[str, str]) -> None:
    assert not is_local_request(Lower(**headers), "127.0.0.1")


@pytest.mark.parametrize(
    ("host", "foreign"),
    [
        ("", False),
        ("localhost", False),
        ("LOCALHOST:11434", False),
        ("127.0.0.1:11434", False),
        ("[::1]:11434", False),
        ("192.168.1.5", False),
        ("0.0.0.0", False),
        (platform.node(), False),
        ("host.docker.internal:11434", False),
        ("box.local", False),
        ("evil.example", True),
        ("evil.example:11434", True),
        ("localhost.evil.example", True),
        ("127.0.0.1.evil.example", True),
        ("local", True),
        ("[::1", True),
    ],
)
def test_foreign_hosts_are_told_as_ollama_does(host: str, foreign: bool) -> None:
    assert is_foreign_host(host) == foreign


async def test_the_rule_holds_in_the_app_too() -> None:
    client = ApiClient(role=None)
    for name, value in (("X-Forwarded-For", "1.2.3.4"), ("Origin", "https://evil.example")):
        answer = await client.call("GET", "/nodes", peer=LOOPBACK, headers={name: value})
        assert answer.status == 401, name
    token = {"X-Forwarded-For": "1.2.3.4", "Authorization": f"Bearer {client.token('viewer')}"}
    assert (await client.call("GET", "/nodes", peer=LOOPBACK, headers=token)).status == 200
