"""What no client should send: path tricks, NUL, bytes that are no text, tokens of the dead."""

import logging
from typing import Any

import pytest

from ollamad.api.app import BASE
from tests.fakes.api_client import REMOTE, ApiClient, exchange
from tests.fakes.api_services import PASSWORD

TRICKS = (
    "..", "../x", "../../etc/passwd", "a/../b", "a/../../../b", ".", "./a", "/etc/passwd", "~/x",
    "a\\..\\b", "..%2f..%2fx", "a:../b", "a:..", ".hidden", "a/.b", "a\0b", "\0", "a:b\0",
    "x" * 5000, "a/b/c/d", "host:99999999/a/b", "a b", "a\nb", "\x1b[31m", "\u202ea", "\ud800",
    "%00", "%2e%2e", "ä", "a#b", ":", "a:", "a@sha256:x", "C:\\x", "//a",
)  # fmt: skip


def quoted(text: str) -> str:
    from urllib.parse import quote

    return quote(text.encode("utf-8", "surrogatepass"), safe="")


@pytest.mark.parametrize("name", TRICKS)
async def test_a_name_with_a_trick_is_refused_everywhere_and_reaches_nothing(name: str) -> None:
    client = ApiClient()
    token = {"authorization": f"Bearer {client.token('admin')}"}
    path = quoted(name)
    for method, template in (
        ("GET", f"{BASE}/models/{{}}"),
        ("DELETE", f"{BASE}/models/{{}}"),
        ("POST", f"{BASE}/models/{{}}/download"),
        ("GET", "/v1/models/{}"),
    ):
        answer = await exchange(client.app, method, template.format(path), token, b"", REMOTE)
        assert answer.status in (400, 404), (method, template, answer.data)
    wire = name.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    for path, body in (
        (f"{BASE}/models", {"name": wire, "files": {"a": "sha256:" + "a" * 64}}),
        (f"{BASE}/generate", {"model": wire}),
        (f"{BASE}/chat", {"model": wire, "messages": []}),
        (f"{BASE}/embeddings", {"model": wire, "prompt": "x"}),
        ("/api/generate", {"model": wire}),
        ("/api/show", {"model": wire}),
        ("/api/copy", {"source": wire, "destination": wire}),
        ("/api/copy", {"source": "smollm2:135m", "destination": wire}),
        ("/api/create", {"model": wire, "from": "smollm2:135m", "stream": False}),
        ("/v1/completions", {"model": wire, "prompt": "x"}),
    ):
        answer = await client.call("POST", path, body)
        assert answer.status in (400, 404), (path, answer.data)
    made = [
        call for call in client.world.library.calls if call[0] in ("create", "derive", "delete")
    ]
    assert made == []
    assert client.world.inference.requests == []


@pytest.mark.parametrize(
    "body",
    [
        b"\xff\xfe",
        b'{"model": "\xff"}',
        b'{"model": "smollm2:135m", "prompt": "\xc3\x28"}',
        b'{"model": "\xed\xa0\x80"}',
        b'\x00{"model": "smollm2:135m"}',
        b'{"model": "smollm2:135m"}\x00',
        b'{"model"\x00: "smollm2:135m"}',
        '{"model": "smollm2:135m"}'.encode("utf-16"),
        b"\xef\xbb\xbf" + b'{"model": "smollm2:135m"}',
        b"[" * 200_000,
        b'{"model":' + b"[" * 200_000,
        b'{"model": NaN}',
        b'{"model": 1e999999}',
        b"nul",
    ],
    ids=lambda body: repr(body[:30]),
)
@pytest.mark.parametrize("path", ["/generate", "/api/generate", "/v1/completions", "/users"])
async def test_a_body_that_is_no_json_of_text_is_400(path: str, body: bytes) -> None:
    client = ApiClient()
    headers = {"Content-Type": "application/json"}
    answer = await client.call("POST", path, data=body, headers=headers)
    assert answer.status == 400, answer.data
    assert len(answer.data) < 2000
    assert client.world.inference.requests == []


async def test_nul_in_a_prompt_is_text_like_any_other() -> None:
    client = ApiClient()
    body = {"model": "smollm2:135m", "prompt": "a\0b"}
    assert (await client.call("POST", "/generate", body)).status == 200
    assert client.world.inference.requests[0].prompt == "a\0b"  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["nobody\0", "../admin", "admin ", "ADMIN", "admin%00", "é"])
async def test_names_of_users_and_keys_are_taken_literally(name: str) -> None:
    client = ApiClient()
    for path in (f"/users/{name}", f"/keys/{name}"):
        answer = await client.call("DELETE", path)
        assert answer.status == 404, answer.data
    body = {"username": name, "password": PASSWORD}
    assert (await client.call("POST", "/auth/login", body, role=None)).status == 401


async def test_a_password_that_no_utf8_holds_is_wrong_and_no_bug() -> None:
    client = ApiClient()
    data = b'{"username": "admin", "password": "\\ud800"}'
    answer = await client.call(
        "POST", "/auth/login", role=None, data=data, headers={"Content-Type": "application/json"}
    )
    assert answer.status in (400, 401)


@pytest.mark.parametrize(
    "token",
    ["\0", "odk_\0_x", "odk__", "odk_a_\xff", "e30.e30.", "....", "a" * 20_000, "\xff\xfe"],
    ids=lambda token: repr(token[:12]),
)
async def test_any_text_as_a_token_is_401(token: str) -> None:
    client = ApiClient()
    answer = await client.call(
        "GET", "/nodes", role=None, headers={"Authorization": f"Bearer {token}"}
    )
    assert answer.status == 401


async def test_errors_say_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    client = ApiClient()

    async def details(status: int, method: str, path: str, body: Any = None) -> Any:
        answer = await client.call(method, path, body)
        assert answer.status == status, answer.data
        return answer.json["details"]

    assert await details(405, "PATCH", "/nodes") == {"allowed": ["GET", "HEAD"]}
    assert await details(404, "DELETE", "/users/nobody") == {"username": "nobody"}
    assert await details(404, "DELETE", "/keys/none") == {"id": "none"}
    bad = {"username": "a b", "password": PASSWORD, "role": "viewer"}
    assert await details(400, "POST", "/users", bad) == {"field": "username"}
    assert (await details(404, "GET", "/models/smollm"))["suggestions"] == ["smollm2:135m"]
    typed = await client.call("POST", "/users", data=b"x", headers={"Content-Type": "text/plain"})
    assert typed.status == 415
    assert typed.json["details"] == {
        "content_type": "text/plain",
        "expected": "application/json",
    }
    client.world.cluster.has_quorum = False
    away = client.world.cluster.presences
    away.clear()
    lost = await details(503, "DELETE", "/users/viewer")
    assert lost == {"voters_missing": ["node_001", "node_002"]}


async def test_changes_are_logged_with_who_and_the_requests_id(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "ollamad.api")
    client = ApiClient()
    body = {"username": "eve", "password": "very secret", "role": "viewer"}
    answers = [
        await client.call("POST", "/users", body),
        await client.call("POST", "/users/eve/password", {"password": "more secret"}),
        await client.call("POST", "/auth/login", body | {"password": "more secret"}, role=None),
    ]
    wrong = {"username": "my password", "password": "x"}
    await client.call("POST", "/auth/login", wrong, role=None)
    await client.call("GET", "/users")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 4
    for line, answer in zip(lines, answers, strict=False):
        assert answer.headers["x-request-id"] in line
    assert lines[0].startswith(f"admin at {REMOTE[0]}: POST {BASE}/users, request ")
    assert lines[3] == f"{REMOTE[0]}: a wrong username or password"
    assert not any("secret" in line or "my password" in line for line in lines)
