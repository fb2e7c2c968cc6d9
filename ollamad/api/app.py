"""The route table of the API, and the Quart app that is built from it.

One row a route: method, path, the weakest role that may use it (None: nobody needs to be
known), and the handler. What is not in the table does not exist.
"""

import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any

import trio
from quart import request as current_request
from quart_trio import QuartTrio
from quart_trio.wrappers import TrioResponse
from werkzeug.exceptions import MethodNotAllowed

from ollamad.api import inference, models, nodes, sessions, status
from ollamad.api.asgi import Connection, Request
from ollamad.api.auth import Auth, Identity
from ollamad.api.calls import Api, ApiSettings, Call, Handler, error_reply
from ollamad.api.errors import as_service_error
from ollamad.api.metrics import RequestStats
from ollamad.api.services import ServiceError, Services
from ollamad.core.state import Role

BASE = "/api/v1"
PUBLIC = None


@dataclasses.dataclass(frozen=True, slots=True)
class Route:
    """One row of the table. `bounded`: the general deadline holds for it."""

    method: str
    path: str
    role: Role | None
    handler: Handler
    bounded: bool = True


ROUTES = (
    Route("GET", "/", PUBLIC, status.root),
    Route("GET", f"{BASE}/health", PUBLIC, status.health),
    Route("GET", f"{BASE}/version", PUBLIC, status.version),
    Route("POST", f"{BASE}/auth/login", PUBLIC, sessions.login),
    Route("POST", f"{BASE}/auth/refresh", PUBLIC, sessions.refresh),
    Route("POST", f"{BASE}/auth/logout", "viewer", sessions.logout),
    Route("GET", f"{BASE}/auth/me", "viewer", sessions.me),
    Route("GET", f"{BASE}/cluster/status", "viewer", status.cluster_status),
    Route("GET", f"{BASE}/cluster/leader", "viewer", status.cluster_leader),
    Route("POST", f"{BASE}/cluster/join", "admin", status.cluster_join),
    Route("POST", f"{BASE}/cluster/leave", "admin", status.cluster_leave),
    Route("POST", f"{BASE}/cluster/token", "admin", status.cluster_token),
    Route("GET", f"{BASE}/metrics", "viewer", status.metrics),
    Route("GET", f"{BASE}/nodes", "viewer", nodes.list_nodes),
    Route("GET", f"{BASE}/nodes/<reference>", "viewer", nodes.show_node),
    Route("POST", f"{BASE}/nodes/<reference>/drain", "operator", nodes.drain),
    Route("POST", f"{BASE}/nodes/<reference>/undrain", "operator", nodes.undrain),
    # Names may hold slashes, written as %2F or as they are.
    Route("GET", f"{BASE}/models", "viewer", models.list_models),
    Route("POST", f"{BASE}/models", "operator", models.create_model),
    Route("GET", f"{BASE}/models/<path:name>", "viewer", models.show_model),
    Route("DELETE", f"{BASE}/models/<path:name>", "operator", models.delete_model),
    Route("POST", f"{BASE}/models/<path:name>/download", "operator", models.download_model),
    Route("HEAD", f"{BASE}/blobs/<digest>", "operator", models.has_blob),
    Route("POST", f"{BASE}/blobs/<digest>", "operator", models.upload_blob, bounded=False),
    Route("GET", f"{BASE}/transfers", "viewer", models.list_transfers),
    Route("GET", f"{BASE}/transfers/<transfer_id>", "viewer", models.show_transfer),
    Route("POST", f"{BASE}/transfers/<transfer_id>/cancel", "operator", models.cancel_transfer),
    Route("POST", f"{BASE}/generate", "inference", inference.generate, bounded=False),
    Route("POST", f"{BASE}/chat", "inference", inference.chat, bounded=False),
    Route("POST", f"{BASE}/embeddings", "inference", inference.embeddings, bounded=False),
)


class ApiApp(QuartTrio):
    """Quart with this API's connection and request; `stats` counts every request."""

    asgi_http_class = Connection
    request_class = Request

    def __init__(self, api: Api) -> None:
        super().__init__("ollamad", static_folder=None)
        self.api = api
        self.stats = api.http_stats
        self.clock = api.services.monotonic


def build_app(services: Services, settings: ApiSettings) -> ApiApp:
    """The app for these services. Starts nothing."""
    api = Api(
        settings=settings,
        services=services,
        auth=Auth(services.cluster, settings.auth, services.wall),
        http_stats=RequestStats(services.monotonic),
        inference_stats=RequestStats(services.monotonic),
        started=services.monotonic(),
    )
    app = ApiApp(api)
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False
    app.config["RESPONSE_TIMEOUT"] = None  # Quart's 60 s would cut a long answer
    app.url_map.merge_slashes = False  # a redirect is no answer to a mistyped path
    for route in ROUTES:
        app.add_url_rule(
            route.path,
            endpoint=f"{route.method} {route.path}",
            view_func=_view(api, route),
            methods=[route.method],
        )
    app.register_error_handler(Exception, _on_error)
    return app


def _view(api: Api, route: Route) -> Callable[..., Awaitable[TrioResponse]]:
    async def view(**arguments: Any) -> TrioResponse:
        request: Any = current_request._get_current_object()  # type: ignore[attr-defined]
        assert isinstance(request, Request)
        caller = None
        if route.role is not None:
            peer = (request.scope.get("client") or ("", 0))[0]
            caller = _authorize(api.auth.identify(request.headers, peer), route.role)
        call = Call(api, request, caller)
        if not route.bounded:
            return await route.handler(call, **arguments)
        with trio.move_on_after(api.settings.deadline_s):
            return await route.handler(call, **arguments)
        raise ServiceError(408, "REQUEST_TIMEOUT", "the request took longer than its deadline")

    return view


def _authorize(caller: Identity | None, role: Role) -> Identity:
    if caller is None:
        raise ServiceError(401, "UNAUTHORIZED", "log in, or send a token")
    if not caller.may(role):
        raise ServiceError(
            403,
            "FORBIDDEN",
            f"this needs the role {role}; {caller.username} has {caller.role}",
            {"required": role, "role": caller.role},
        )
    return caller


async def _on_error(error: Exception) -> TrioResponse:
    request_id = getattr(current_request, "id", "")
    response = error_reply(as_service_error(error, request_id))
    if isinstance(error, MethodNotAllowed) and error.valid_methods:
        response.headers["Allow"] = ", ".join(sorted(error.valid_methods))
    return response


__all__ = ["BASE", "ROUTES", "ApiApp", "ApiSettings", "Route", "build_app"]
