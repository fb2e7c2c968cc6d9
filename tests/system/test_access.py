"""Who may do what, over several nodes: sign-ins, their end, and the loopback rule."""

import base64
import json
import time
from collections.abc import Iterator

import httpx
import pytest

import ollamad
from tests.system.conftest import open_cluster
from tests.system.harness import Cluster, Node, ok, refused

PASSWORD = "correct horse battery staple"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes whose admin has a password that was given."""
    for cluster in open_cluster(tmp_path_factory, OLLAMAD_ADMIN_PASSWORD=PASSWORD):
        cluster.found()
        cluster.grow()
        yield cluster


def login(node: Node, password: str = PASSWORD) -> dict[str, str]:
    answer = node.post("/auth/login", {"username": "admin", "password": password}, token="")
    return {"access": answer["token"], "refresh": answer["refresh_token"]}


def who(node: Node, token: str) -> int:
    return node.request("GET", "/auth/me", token=token).status_code


def test_a_given_password_is_in_no_file(two: Cluster) -> None:
    node = two.nodes[0]
    assert not (node.data_dir / "admin-password").exists()
    assert PASSWORD not in node.log()
    for path in node.data_dir.rglob("*"):
        if path.is_file():
            assert PASSWORD.encode() not in path.read_bytes(), path


def test_a_sign_in_counts_on_every_node_until_it_ends_on_one(two: Cluster) -> None:
    first, second = two.nodes
    tokens = login(first)
    assert who(first, tokens["access"]) == who(second, tokens["access"]) == 200
    fresh = second.post("/auth/refresh", {"refresh_token": tokens["refresh"]}, token="")
    assert who(first, fresh["token"]) == 200
    second.post("/auth/logout", token=fresh["token"])
    assert who(second, fresh["token"]) == 401
    assert who(second, tokens["access"]) == 401, "the whole session is over"
    deadline = time.monotonic() + 2
    while who(first, fresh["token"]) != 401:
        assert time.monotonic() < deadline, "it is over on the other node too"


def test_a_refresh_token_works_once_and_its_reuse_ends_the_session(two: Cluster) -> None:
    first, second = two.nodes
    tokens = login(first)
    fresh = first.post("/auth/refresh", {"refresh_token": tokens["refresh"]}, token="")
    reused = second.request(
        "POST", "/auth/refresh", json={"refresh_token": tokens["refresh"]}, token=""
    )
    refused(reused, 401, "UNAUTHORIZED")
    assert who(second, fresh["token"]) == 401


def test_a_wrong_password_and_an_unknown_user_look_the_same(two: Cluster) -> None:
    node = two.nodes[1]
    answers = [
        node.request("POST", "/auth/login", json={"username": name, "password": "no"}, token="")
        for name in ("admin", "nobody")
    ]
    for answer in answers:
        refused(answer, 401, "INVALID_CREDENTIALS")
    assert answers[0].json() == answers[1].json()


def test_a_token_that_was_changed_is_worth_nothing(two: Cluster) -> None:
    node = two.nodes[0]
    head, body, signature = login(node)["access"].split(".")

    def encoded(value: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    claims = json.loads(base64.urlsafe_b64decode(body + "=="))
    forged = [
        f"{encoded({'alg': 'none', 'typ': 'JWT'})}.{body}.",
        f"{encoded({'alg': 'HS512', 'typ': 'JWT'})}.{body}.{signature}",
        f"{head}.{encoded(claims | {'exp': claims['exp'] + 9999})}.{signature}",
        f"{head}.{body}.{signature[:-4]}AAAA",
        f"{head}.{body}",
        "x",
    ]
    for token in forged:
        refused(node.request("GET", "/nodes", token=token), 401, "UNAUTHORIZED")


def test_the_local_token_is_for_its_own_node(two: Cluster) -> None:
    first, second = two.nodes
    assert who(first, first.admin_token()) == 200
    assert who(second, first.admin_token()) == 401


def test_loopback_may_ask_models_and_nothing_more(two: Cluster) -> None:
    node = two.nodes[0]
    assert node.get("/nodes", token="")
    assert node.get("/auth/me", token="")["user"]["role"] == "inference"
    for method, path in [
        ("POST", f"/nodes/{node.id}/drain"),
        ("DELETE", "/models/x"),
        ("POST", "/models/x/download"),
        ("POST", "/cluster/token"),
        ("POST", "/cluster/leave"),
        ("POST", "/cluster/join"),
    ]:
        answer = node.request(method, path, token="")
        details = refused(answer, 403, "FORBIDDEN")
        assert details["role"] == "inference"


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Origin": "https://evil.example"},
        {"X-Forwarded-For": "10.0.0.1"},
        {"Forwarded": "for=10.0.0.1"},
    ],
    ids=lambda headers: next(iter(headers)),
)
def test_a_proxy_or_a_foreign_page_is_not_loopback(two: Cluster, headers: dict[str, str]) -> None:
    node = two.nodes[0]
    refused(node.request("GET", "/nodes", token="", headers=headers), 401, "UNAUTHORIZED")
    assert ok(node.request("GET", "/health", token="", headers=headers))


def test_a_bad_token_is_refused_also_from_loopback(two: Cluster) -> None:
    refused(two.nodes[0].request("GET", "/nodes", token="nonsense"), 401, "UNAUTHORIZED")


def test_a_secret_of_ones_own_signs_the_tokens(cluster: Cluster) -> None:
    cluster.environment |= {"OLLAMA_JWT_SECRET": "s" * 40, "OLLAMAD_ADMIN_PASSWORD": PASSWORD}
    node = cluster.found()
    tokens = login(node)
    assert who(node, tokens["access"]) == 200
    node.environment["OLLAMA_JWT_SECRET"] = "t" * 40
    node.restart()
    assert who(node, tokens["access"]) == 401
    assert who(node, login(node)["access"]) == 200


def test_anybody_may_ask_for_the_version(two: Cluster) -> None:
    node = two.asked
    answer = httpx.get(f"{node.url}/api/v1/version", headers={"X-Forwarded-For": "192.0.2.1"})
    version = ok(answer)
    assert version["version"] == ollamad.__version__
    assert version["platform"].startswith("linux/")
    assert version["p2p_port"] == int(node.p2p.rpartition(":")[2])
    assert set(version["engine_versions"]) == {"xllamacpp"}
