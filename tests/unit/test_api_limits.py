"""Rate limits of `/api/v1`, and of tries to log in."""

import pytest

from ollamad.api.limits import (
    LOGINS_OF_ACCOUNT,
    LOGINS_OF_ADDRESS,
    LOGINS_OF_PAIR,
    LoginGuard,
    RateLimits,
    address_group,
)
from ollamad.api.services import ServiceError
from tests.fakes.api_client import LOOPBACK, REMOTE, Answer, ApiClient
from tests.fakes.api_services import PASSWORD

OTHER = ("192.0.2.8", 1)


def limits(answer: Answer) -> tuple[int, int, int]:
    names = ("limit", "remaining", "reset")
    return tuple(int(answer.headers[f"ratelimit-{name}"]) for name in names)  # type: ignore[return-value]


async def test_every_answer_says_what_is_left_and_the_last_one_when_to_come_again() -> None:
    client = ApiClient(rate_limits=RateLimits(general=3))
    seen = [await client.call("GET", "/docs", role=None) for _ in range(4)]
    assert [answer.status for answer in seen] == [200, 200, 200, 429]
    assert [limits(answer) for answer in seen] == [(3, 2, 20), (3, 1, 40), (3, 0, 60), (3, 0, 60)]
    refused = seen[-1]
    assert refused.code == "RATE_LIMITED"
    assert refused.headers["retry-after"] == "20"
    assert refused.json["details"] == {"limit": 3, "retry_after": 20}
    client.world.clock.now += 20
    assert (await client.call("GET", "/docs", role=None)).status == 200
    assert (await client.call("GET", "/docs", role=None)).status == 429


async def test_probes_are_never_turned_away() -> None:
    client = ApiClient(rate_limits=RateLimits(general=1))
    assert (await client.call("GET", "/docs", role=None)).status == 200
    assert (await client.call("GET", "/docs", role=None)).status == 429
    for path in ("/health", "/version"):
        for _ in range(3):
            answer = await client.call("GET", path, role=None)
            assert (answer.status, limits(answer)[:2]) == (200, (1, 0))


async def test_who_is_refused_takes_nothing_from_others_of_that_address() -> None:
    client = ApiClient(rate_limits=RateLimits(general=1))
    bad = {"Authorization": "Bearer x"}
    seen = [await client.call("GET", "/nodes", role=None, headers=dict(bad)) for _ in range(2)]
    assert [answer.status for answer in seen] == [401, 429]
    body = {"username": "admin", "password": PASSWORD}
    assert (await client.call("POST", "/auth/login", body, role=None)).status == 200


async def test_who_must_refresh_a_token_is_told_whatever_others_there_do() -> None:
    client = ApiClient(rate_limits=RateLimits(general=1))
    old = {"Authorization": f"Bearer {client.token('viewer')}"}
    client.world.clock.now += 3600
    bad = {"Authorization": "Bearer x"}
    for headers, status in ((bad, 401), (bad, 429), (old, 401), (old, 401)):
        answer = await client.call("GET", "/nodes", role=None, headers=dict(headers))
        assert (answer.status, limits(answer)[:2]) == (status, (1, 0))
    assert answer.code == "TOKEN_EXPIRED"


async def test_a_browser_that_asks_first_is_told_and_not_counted() -> None:
    client = ApiClient(rate_limits=RateLimits(general=1))
    page = {"Origin": "http://localhost:3000"}
    for _ in range(2):
        answer = await client.call("OPTIONS", "/nodes", role=None, headers=dict(page))
        assert (answer.status, limits(answer)) == (204, (1, 1, 0))
    answer = await client.call("OPTIONS", "/api/tags", role=None, headers=dict(page))
    assert (answer.status, "ratelimit-limit" in answer.headers) == (204, False)


async def test_the_contracts_numbers_are_the_defaults() -> None:
    assert RateLimits() == RateLimits(general=100, model_ops=10, websocket=5)
    client = ApiClient(rate_limits=RateLimits())
    first = await client.call("GET", "/nodes")
    assert limits(first) == (100, 99, 1)
    for _ in range(99):
        assert (await client.call("GET", "/nodes", role=None, peer=LOOPBACK)).status == 200


async def test_identities_are_tokens_else_addresses() -> None:
    client = ApiClient(rate_limits=RateLimits(general=1))
    token = {"Authorization": f"Bearer {client.token('viewer')}"}
    other = {"Authorization": f"Bearer {client.token('viewer')}"}

    async def status(headers: dict[str, str], peer: tuple[str, int]) -> int:
        call = client.call("GET", "/auth/me", role=None, headers=headers, peer=peer)
        return (await call).status

    assert await status(token, REMOTE) == 200
    assert await status(token, OTHER) == 429
    assert await status(other, REMOTE) == 200
    assert await status({}, LOOPBACK) == 200
    assert await status({}, LOOPBACK) == 429
    assert await status({"Authorization": "Bearer x"}, OTHER) == 401
    assert await status({"Authorization": "Bearer y"}, OTHER) == 429


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/models/llama2/download", None),
        ("DELETE", "/models/smollm2:135m", None),
        ("POST", "/models", {"name": "x", "files": {"a": "sha256:" + "a" * 64}}),
        ("POST", "/models/smollm2:135m/copy", {"destination": "x"}),
        ("POST", "/models/smollm2:135m/push", {"destination": "registry.example/me/x"}),
        ("PUT", "/models/smollm2:135m/replicas", {"replicas": 2}),
    ],
)
async def test_model_operations_have_a_limit_of_their_own(
    method: str, path: str, body: object
) -> None:
    client = ApiClient(rate_limits=RateLimits(general=100, model_ops=2))
    token = {"Authorization": f"Bearer {client.token('admin')}"}
    seen = [await client.call(method, path, body, role=None, headers=dict(token)) for _ in range(3)]
    assert [answer.status == 429 for answer in seen] == [False, False, True]
    assert [limits(answer)[:2] for answer in seen] == [(2, 1), (2, 0), (2, 0)]
    assert seen[-1].headers["retry-after"] == "30"
    read = await client.call("GET", "/models", role=None, headers=token)
    assert (read.status, limits(read)[:2]) == (200, (100, 97))  # the refusal cost nothing


async def test_a_limit_of_0_is_none_and_shows_nothing() -> None:
    client = ApiClient(rate_limits=RateLimits(general=0, model_ops=0))
    for _ in range(3):
        answer = await client.call("POST", "/models/llama2/download")
        assert answer.status == 200
        assert "ratelimit-limit" not in answer.headers
    only = ApiClient(rate_limits=RateLimits(general=0, model_ops=1))
    assert "ratelimit-limit" not in (await only.call("GET", "/models")).headers
    assert limits(await only.call("POST", "/models/llama2/download")) == (1, 0, 60)


async def test_errors_of_the_framework_count_too() -> None:
    client = ApiClient(rate_limits=RateLimits(general=2))
    missing = await client.call("GET", "/nope", role=None)
    assert (missing.status, limits(missing)[1]) == (404, 1)
    assert (await client.call("PATCH", "/nodes", role=None)).status == 405
    assert (await client.call("GET", "/nope", role=None)).status == 429


async def test_the_other_surfaces_have_no_rate_limit() -> None:
    client = ApiClient(rate_limits=RateLimits(general=1, model_ops=1))
    for path in ("/api/tags", "/v1/models", "/api/nope", "/"):
        for _ in range(3):
            answer = await client.call("GET", path)
            assert answer.status != 429
            assert "ratelimit-limit" not in answer.headers


@pytest.mark.parametrize("field", ["general", "model_ops", "websocket"])
def test_negative_limits_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match="0 or more"):
        RateLimits(**{field: -1})


@pytest.mark.parametrize(
    ("peer", "group"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8::1", "2001:db8::/64"),
        ("2001:db8::ffff:1", "2001:db8::/64"),
        ("2001:db8:0:1::1", "2001:db8:0:1::/64"),
        ("", ""),
    ],
)
def test_an_ipv6_host_cannot_choose_another_address(peer: str, group: str) -> None:
    assert address_group(peer) == group


# Logging in


async def login(client: ApiClient, name: str, password: str, peer: tuple[str, int]) -> Answer:
    body = {"username": name, "password": password}
    return await client.call("POST", "/auth/login", body, role=None, peer=peer)


@pytest.mark.parametrize("name", ["admin", "nobody"])
async def test_guessing_is_slowed_down_alike_for_accounts_that_exist_and_not(name: str) -> None:
    client = ApiClient()
    for _ in range(LOGINS_OF_PAIR):
        assert (await login(client, name, "wrong", REMOTE)).code == "INVALID_CREDENTIALS"
    refused = await login(client, name, PASSWORD, REMOTE)
    assert (refused.status, refused.code) == (429, "TOO_MANY_ATTEMPTS")
    assert refused.headers["retry-after"] == str(60 // LOGINS_OF_PAIR)
    # Its owner, elsewhere, is not locked out.
    elsewhere = await login(client, name, PASSWORD, OTHER)
    assert elsewhere.status == (200 if name == "admin" else 401)
    client.world.clock.now += 60 / LOGINS_OF_PAIR
    assert (await login(client, name, "wrong", REMOTE)).status == 401


async def test_what_is_refused_costs_no_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    client = ApiClient()
    checked: list[str] = []
    hasher = client.app.api.auth._hasher
    monkeypatch.setattr(
        type(hasher), "verify", lambda self, known, password: checked.append(known) or False
    )
    for _ in range(LOGINS_OF_PAIR + 5):
        await login(client, "admin", "wrong", REMOTE)
    assert len(checked) == LOGINS_OF_PAIR


def tries(guard: LoginGuard, username: str, address: str, limit: int = 1000) -> int:
    for count in range(limit):
        try:
            guard.attempt(username, address)
        except ServiceError:
            return count
    return limit


def test_an_address_and_an_account_are_bounded_too() -> None:
    guard = LoginGuard(lambda: 0.0)
    assert sum(tries(guard, f"user{i}", "a", 1) for i in range(200)) == LOGINS_OF_ADDRESS
    guard = LoginGuard(lambda: 0.0)
    assert sum(tries(guard, "admin", f"a{i}", 1) for i in range(200)) == LOGINS_OF_ACCOUNT


def test_success_forgives_the_pair_but_not_the_address() -> None:
    guard = LoginGuard(lambda: 0.0)
    assert tries(guard, "me", "a", 9) == 9
    guard.success("me", "a")
    assert tries(guard, "me", "a") == LOGINS_OF_PAIR
    for _ in range(200):  # an account of one's own is no way to more tries at others
        guard.success("me", "a")
    assert sum(tries(guard, f"user{i}", "a", 1) for i in range(200)) < LOGINS_OF_ADDRESS - 18
