"""Asks an API app without a socket, as a given role or from a given address."""

import json
from dataclasses import dataclass
from typing import Any

from ollamad.api.app import ApiApp, ApiSettings, build_app
from ollamad.api.auth import AuthSettings
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


class ApiClient:
    """One app over fakes. Calls come from afar, with a token of `role` unless it is None."""

    def __init__(
        self, world: World | None = None, *, role: str | None = "admin", **settings: Any
    ) -> None:
        self.world = world or make_world()
        self.role = role
        auth = settings.pop("auth", AuthSettings())
        self.app: ApiApp = build_app(self.world.services, ApiSettings(auth=auth, **settings))

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
        full = path if path.startswith("//") or path == "/" else f"/api/v1{path}"
        response = await self.app.test_client().open(
            full, method=method, headers=sent, data=data, scope_base={"client": peer}
        )
        content = await response.get_data(as_text=False)
        return Answer(
            response.status_code, {k.lower(): v for k, v in response.headers.items()}, content
        )
