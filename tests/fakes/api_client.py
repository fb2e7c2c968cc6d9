"""Asks an API app without a socket, as a given role or from a given address."""

import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import msgspec
import trio

from ollamad.api.app import ApiApp, ApiSettings, build_app
from ollamad.api.auth import AuthSettings
from ollamad.api.dialects import error_body_for
from ollamad.api.limits import RateLimits
from ollamad.api.openapi import ERROR_TYPES as ERRORS
from ollamad.api.reference import BASE, DOCS, LINES
from tests.fakes.api_services import World, make_world

REMOTE = ("192.0.2.7", 4711)
LOOPBACK = ("127.0.0.1", 4711)


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    data: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.data)

    @property
    def code(self) -> str:
        return str(self.json["code"])

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.data.splitlines()]

    @property
    def parts(self) -> list[Any]:
        """The lines of a stream, or the data of its events."""
        if self.headers["content-type"].startswith(LINES):
            return self.lines
        found = [line.removeprefix(b"data: ") for line in self.data.splitlines() if line]
        return [json.loads(text) for text in found if text.startswith(b"{")]


class ApiClient:
    """One app over fakes. Calls come from afar, with a token of `role` unless it is None."""

    def __init__(
        self, world: World | None = None, *, role: str | None = "admin", **settings: Any
    ) -> None:
        self.world = world or make_world()
        self.role = role
        auth = settings.pop("auth", AuthSettings())
        settings.setdefault("rate_limits", RateLimits(0, 0, 0))  # time stands still here
        self.app: ApiApp = build_app(self.world.services, ApiSettings(auth=auth, **settings))

    @classmethod
    def of_model(cls, *capabilities: str) -> "ApiClient":
        """A client whose model can do that."""
        client = cls()
        models = client.world.cluster.state.models
        for key, known in models.items():
            details = msgspec.structs.replace(known.details, capabilities=capabilities)
            models[key] = msgspec.structs.replace(known, details=details)
        return client

    def token(self, role: str) -> str:
        """An access token of the user that is named like its role."""
        return self.app.api.auth.open_session(self.world.cluster.state.users[role]).access

    async def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        role: str | None = "",
        peer: tuple[str, int] = REMOTE,
        headers: dict[str, str] | None = None,
        data: bytes | None = None,
    ) -> Answer:
        role = self.role if role == "" else role
        sent = dict(headers or {})
        if role is not None:
            sent["Authorization"] = f"Bearer {self.token(role)}"
        if body is not None:
            data = json.dumps(body).encode()
            sent.setdefault("Content-Type", "application/json")
        whole = path == "/" or path.startswith(("//", "/api/", "/v1/", "root:"))
        full = path.removeprefix("root:") if whole else f"/api/v1{path}"
        answer = await exchange(self.app, method, full, sent, data or b"", peer)
        self.check(method, full, answer)
        return answer

    def check(self, method: str, path: str, answer: Answer) -> None:
        """Hold an answer against its type: every key there, and no other; so for its errors, and
        for each line or event of a stream."""
        path = unquote(path.partition("?")[0])
        if not answer.data:
            return
        if answer.status >= 400 and path != f"{BASE}/health":
            matches(answer.json, ERRORS[error_body_for(path)])
            return
        endpoint, _ = self.app.routes.match(path, method)
        doc = DOCS[endpoint]
        content = answer.headers["content-type"].partition(";")[0]
        if content == doc.stream:
            for part in answer.parts:
                matches(part, *doc.parts)
        elif content == "application/json" and (kind := doc.answers.get(answer.status)):
            matches(answer.json, kind)


def matches(value: Any, *kinds: Any) -> None:
    """Whether the value is of one of these types, whole.

    Raises:
      AssertionError: it is not.
    """
    problems = []
    for kind in kinds:
        try:
            typed = msgspec.convert(value, kind)
        except msgspec.ValidationError as problem:
            problems.append(f"{kind.__name__}: {problem}")
            continue
        if json.loads(msgspec.json.encode(typed)) == value:
            return
        problems.append(f"more than {kind.__name__} says")
    raise AssertionError(f"{problems}: {value}")


async def exchange(
    app: ApiApp,
    method: str,
    path: str,
    headers: dict[str, str],
    data: bytes,
    peer: tuple[str, int],
) -> Answer:
    """One request by ASGI, as hypercorn would make it."""
    raw = [(b"host", b"localhost")]
    if data:
        raw.append((b"content-length", b"%d" % len(data)))
    raw += [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    path, _, query = path.partition("?")
    scope = {
        "type": "http",
        "http_version": "1.1",
        "asgi": {"spec_version": "2.1", "version": "3.0"},
        "method": method,
        "scheme": "http",
        "path": unquote(path),
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": raw,
        "client": peer,
        "server": ("127.0.0.1", 8080),
        "state": {},
        "extensions": {},
    }
    incoming = [{"type": "http.request", "body": data, "more_body": False}]
    sent: list[Any] = []

    async def receive() -> Any:
        await trio.lowlevel.checkpoint()
        return incoming.pop() if incoming else await trio.sleep_forever()

    async def send(message: Any) -> None:
        await trio.lowlevel.checkpoint()
        sent.append(message)

    await app(scope, receive, send)  # type: ignore[arg-type]
    start, *bodies = sent
    assert [message["more_body"] for message in bodies] == [True] * (len(bodies) - 1) + [False]
    return Answer(
        start["status"],
        {name.decode(): value.decode() for name, value in start["headers"]},
        b"".join(message["body"] for message in bodies),
    )
