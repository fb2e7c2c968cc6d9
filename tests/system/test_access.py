"""Who may do what, over several nodes: sign-ins, their end, and the loopback rule."""

import base64
import json
import re
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import httpx
import jwt
import pytest

import ollamad
from tests.system.conftest import open_cluster
from tests.system.harness import Cluster, Node, ok, refused, run_cli, wait_until

PASSWORD = "correct horse battery staple"
SECRET = "s" * 40
TOKEN_TTL_S = 20 * 60


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes whose admin has a password that was given."""
    settings = {"OLLAMAD_ADMIN_PASSWORD": PASSWORD, "OLLAMAD_AUTH__TOKEN_TTL": f"{TOKEN_TTL_S}s"}
    for cluster in open_cluster(tmp_path_factory, **settings):
        cluster.found()
        cluster.grow()
        yield cluster


def sign_in(node: Node, username: str, password: str) -> dict[str, str]:
    body = {"username": username, "password": password}
    pair: dict[str, str] = node.post("/auth/login", body, token="")
    return pair


def login(node: Node) -> dict[str, str]:
    answer = sign_in(node, "admin", PASSWORD)
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
    wait_until("it is over on the other node too", lambda: who(first, fresh["token"]) == 401, 2)


def test_a_refresh_token_works_once_and_its_reuse_ends_the_session(two: Cluster) -> None:
    first, second = two.nodes
    tokens = login(first)
    fresh = first.post("/auth/refresh", {"refresh_token": tokens["refresh"]}, token="")
    reused = second.request(
        "POST", "/auth/refresh", json={"refresh_token": tokens["refresh"]}, token=""
    )
    refused(reused, 401, "UNAUTHORIZED")
    dies(second, fresh["token"])


def test_a_wrong_password_and_an_unknown_user_look_the_same(two: Cluster) -> None:
    node = two.nodes[1]
    answers = [
        node.request("POST", "/auth/login", json={"username": name, "password": "no"}, token="")
        for name in ("admin", "nobody")
    ]
    for answer in answers:
        refused(answer, 401, "INVALID_CREDENTIALS")
    assert answers[0].json() == answers[1].json()


def test_guessing_a_password_is_slowed_down_at_each_node(two: Cluster) -> None:
    first, second = two.nodes
    body = {"username": "mallory", "password": "guess"}
    codes = []
    while "TOO_MANY_ATTEMPTS" not in codes and len(codes) < 20:
        answer = second.request("POST", "/auth/login", json=body, token="")
        codes.append(answer.json()["code"])
    assert len(codes) > 10, "a person who mistypes is not refused"
    details = refused(answer, 429, "TOO_MANY_ATTEMPTS")
    assert int(answer.headers["Retry-After"]) == details["retry_after"] <= 6
    assert login(second), "at another account"
    elsewhere = first.request("POST", "/auth/login", json=body, token="")
    refused(elsewhere, 401, "INVALID_CREDENTIALS")


def test_a_token_lives_as_long_as_is_set(two: Cluster) -> None:
    begun = time.time()
    pair = sign_in(two.nodes[0], "admin", PASSWORD)
    claims = jwt.decode(pair["token"], options={"verify_signature": False})
    assert claims["exp"] - claims["iat"] == TOKEN_TTL_S
    ends = datetime.fromisoformat(pair["expires_at"]).timestamp()
    assert begun + TOKEN_TTL_S - 1 <= ends <= time.time() + TOKEN_TTL_S + 1


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


def dies(node: Node, token: str) -> None:
    """Another node's changes are here in a moment."""
    wait_until("the token is dead", lambda: who(node, token) == 401, 3)


def test_users_are_the_clusters_and_what_they_hold_dies_with_them(two: Cluster) -> None:
    first, second = two.nodes
    added = run_cli(
        first,
        "users",
        "add",
        "eve",
        "--role",
        "operator",
        "--password-stdin",
        input=f"{PASSWORD}\n",
    )
    assert added.returncode == 0, added.stderr
    pair = wait_until("eve is known", lambda: sign_in(second, "eve", PASSWORD))
    assert who(first, pair["token"]) == who(second, pair["token"]) == 200
    refused(second.request("GET", "/users", token=pair["token"]), 403, "FORBIDDEN")

    # Another role holds for the token that she has.
    promoted = run_cli(first, "users", "role", "eve", "admin")
    assert promoted.returncode == 0, promoted.stderr
    wait_until(
        "eve is an admin",
        lambda: second.request("GET", "/users", token=pair["token"]).is_success,
    )
    second.post("/users/eve/role", {"role": "operator"})
    refused(second.request("GET", "/users", token=pair["token"]), 403, "FORBIDDEN")

    # Her own password: the current one first.
    home = two.directory / "eve"
    for words, stdin in (
        (("auth", "login", "-u", "eve", "--password-stdin"), f"{PASSWORD}\n"),
        (("users", "passwd", "eve", "--password-stdin"), f"another horse\n{PASSWORD}\n"),
    ):
        done = run_cli(second, *words, input=stdin, home=home)
        assert done.returncode == 0, done.stderr
    assert who(second, pair["token"]) == 401
    dies(first, pair["token"])
    spent = first.request(
        "POST", "/auth/refresh", json={"refresh_token": pair["refresh_token"]}, token=""
    )
    refused(spent, 401, "UNAUTHORIZED")

    fresh = sign_in(first, "eve", "another horse")
    second.delete("/users/eve")
    assert who(second, fresh["token"]) == 401
    dies(first, fresh["token"])
    names = [user["username"] for user in second.get("/users")["users"]]
    assert names == ["admin"]
    refused(second.request("DELETE", "/users/admin"), 409, "LAST_ADMIN")


def requests_of(node: Node, key_id: str) -> Any:
    """What a node knows of the requests of a key."""
    return next(k for k in node.get("/keys")["keys"] if k["id"] == key_id)["used"]["requests"]


def test_a_keys_quota_is_the_whole_clusters_and_survives_a_kill(two: Cluster) -> None:
    first, second = two.nodes
    made = first.post("/keys", {"name": "agent", "request_quota": 30})
    wait_until("the key is known", lambda: who(second, made["key"]) == 200)
    served: list[float] = []
    for number in range(400):
        node = two.nodes[number % 2]
        answer = node.request("GET", "/models", token=made["key"])
        if answer.status_code == 200:
            served.append(time.monotonic())
        elif len(served) > 30 and time.monotonic() - served[-1] > 1.5:
            break
        else:
            assert answer.status_code == 429
        time.sleep(0.02)
    used = 1 + len(served)  # with the one above
    assert used >= 30, "nobody is refused early"
    assert served[-1] - served[28] < 3, "the nodes tell each other within about a second"
    for node in two.nodes:
        details = refused(node.request("GET", "/models", token=made["key"]), 429, "QUOTA_EXCEEDED")
        assert details["limit"] == 30
        wait_until("it shows what was used", lambda n=node: requests_of(n, made["id"]) == used, 3)
    second.kill()
    second.start()
    wait_until(
        "the counts are back",
        lambda: second.request("GET", "/models", token=made["key"]).status_code == 429,
        5,
    )
    first.delete(f"/keys/{made['id']}")
    assert who(first, made["key"]) == 401
    dies(second, made["key"])


def test_limits_count_each_caller_for_itself(cluster: Cluster) -> None:
    cluster.environment |= {
        "OLLAMAD_RATE_LIMITS__GENERAL": "40",
        "OLLAMAD_RATE_LIMITS__MODEL_OPS": "3",
        "OLLAMAD_ADMIN_PASSWORD": PASSWORD,
    }
    node = cluster.found()
    token = login(node)["access"]
    operations = [node.request("DELETE", "/models/none", token=token) for _ in range(4)]
    assert [each.status_code for each in operations] == [404, 404, 404, 429]
    assert operations[0].headers["RateLimit-Limit"] == "3"
    assert 1 <= int(operations[3].headers["Retry-After"]) <= 20
    answers = [node.request("GET", "/nodes", token=token) for _ in range(60)]
    assert {each.status_code for each in answers} == {200, 429}
    assert all("RateLimit-Remaining" in each.headers for each in answers)
    refusals = [each for each in answers if each.status_code == 429]  # the last may be let in again
    assert {each.json()["code"] for each in refusals} == {"RATE_LIMITED"}
    assert who(node, node.admin_token()) == 200, "another caller"
    # Programs of Ollama are bounded by other means.
    with httpx.Client(base_url=node.url) as client:
        assert all(client.get("/api/tags").status_code == 200 for _ in range(60))


def test_a_secret_of_ones_own_signs_the_tokens(cluster: Cluster) -> None:
    cluster.environment |= {"OLLAMA_JWT_SECRET": SECRET, "OLLAMAD_ADMIN_PASSWORD": PASSWORD}
    node = cluster.found()
    tokens = login(node)
    assert who(node, tokens["access"]) == 200

    # Who has it may sign, but only what is for this cluster, and of now.
    claims = jwt.decode(tokens["access"], options={"verify_signature": False})

    def signed(**changes: object) -> str:
        return jwt.encode(claims | changes, SECRET, "HS256")

    assert who(node, signed()) == 200
    for changes, code in (
        ({"aud": "another cluster"}, "UNAUTHORIZED"),
        ({"iss": "another program"}, "UNAUTHORIZED"),
        ({"exp": int(time.time()) - 1}, "TOKEN_EXPIRED"),
        ({"iat": int(time.time()) + 3600}, "UNAUTHORIZED"),
        ({"typ": "refresh"}, "UNAUTHORIZED"),
    ):
        refused(node.request("GET", "/nodes", token=signed(**changes)), 401, code)

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
    assert set(version["engine_versions"]) == {"ctransformers", "xllamacpp"}


def test_a_browser_gets_the_dashboard_and_keeps_its_files(two: Cluster) -> None:
    url = two.asked.url
    with httpx.Client(base_url=url, headers={"X-Forwarded-For": "192.0.2.1"}) as client:
        assert client.get("/").text == "Ollama is running"
        assert client.head("/").headers["Content-Type"].startswith("text/plain")
        accept = "text/html,application/xhtml+xml,*/*;q=0.8"
        page = client.get("/", headers={"Accept": accept})
        files = re.findall(r'(?:src|href)="(dashboard/[^"]+)"', page.text)
        assert len(files) == 2
        for path in ("/", *files):
            headers = {"Accept": accept}
            whole = client.get(path, headers=headers)
            assert whole.status_code == 200
            headers["If-None-Match"] = whole.headers["ETag"]
            known = client.get(path, headers=headers)
            assert (known.status_code, known.content) == (304, b"")
            # The connection goes on behind it, and a browser does not take its file for empty.
            assert known.headers["Content-Length"] == str(len(whole.content))
        assert client.get("/api/v1/nodes").status_code == 401, "the data is not for everybody"
