"""The route table of the API, and the Quart app that is built from it.

One row a route: method, path, the weakest role that may use it (None: nobody needs to be
known), and the handler. What is not in the table does not exist.
"""

import dataclasses
import functools
import logging
from collections.abc import Awaitable, Callable

import trio
from quart_trio import QuartTrio
from werkzeug.exceptions import MethodNotAllowed

from ollamad.api import (
    anthropic,
    distribution,
    docs,
    inference,
    keys,
    models,
    nodes,
    ollama,
    ollama_models,
    openai,
    pages,
    prometheus,
    responses,
    sessions,
    status,
    users,
)
from ollamad.api.asgi import Connection, Reply, Request
from ollamad.api.auth import Auth, Identity, is_foreign_host
from ollamad.api.bodies import invalid
from ollamad.api.calls import Api, ApiSettings, Call, Handler, error_reply, peer_of
from ollamad.api.dialects import error_body_for, native_error
from ollamad.api.errors import as_service_error
from ollamad.api.feed import Feed
from ollamad.api.hub import Hub
from ollamad.api.limits import (
    LoginGuard,
    RateLimits,
    Throttle,
    address_group,
    headers_of,
    rate_limited,
)
from ollamad.api.metrics import RequestStats
from ollamad.api.origins import Origins, preflight_headers
from ollamad.api.reference import BASE
from ollamad.api.services import NoQuorum, ServiceError, Services, Unavailable
from ollamad.api.websocket import Sockets
from ollamad.core.state import Role

audit = logging.getLogger("ollamad.api.audit")

METRICS = "/metrics"  # for Prometheus; JSON is below BASE
PUBLIC = None
READ_TIMEOUT_S = 5.0  # for the majority to confirm a consistent read

View = Callable[..., Awaitable[Reply | None]]  # takes the request and the path's arguments


@dataclasses.dataclass(frozen=True, slots=True)
class Route:
    """One row of the table. `bounded`: the general deadline holds for it. `model_op`: the stricter
    rate limit does, too. `counted`: false for what probes ask, which no limit may turn away."""

    method: str
    path: str
    role: Role | None
    handler: Handler
    bounded: bool = True
    model_op: bool = False
    counted: bool = True


ROUTES = (
    Route("GET", "/", PUBLIC, pages.root, bounded=False),
    Route("GET", "/dashboard/dashboard.js", PUBLIC, pages.page_file("dashboard.js")),
    Route("GET", "/dashboard/node.js", PUBLIC, pages.page_file("node.js")),
    Route("GET", "/dashboard/chat.js", PUBLIC, pages.page_file("chat.js")),
    Route("GET", "/dashboard/dashboard.css", PUBLIC, pages.page_file("dashboard.css")),
    Route("GET", METRICS, "viewer", prometheus.metrics),
    Route("GET", f"{BASE}/health", PUBLIC, status.health, bounded=False, counted=False),
    Route("GET", f"{BASE}/version", PUBLIC, status.version, bounded=False, counted=False),
    Route("GET", f"{BASE}/openapi.json", "viewer", docs.openapi),
    Route("GET", f"{BASE}/docs", PUBLIC, pages.page_file("docs.html")),
    Route("GET", f"{BASE}/docs/docs.js", PUBLIC, pages.page_file("docs.js")),
    Route("GET", f"{BASE}/docs/docs.css", PUBLIC, pages.page_file("docs.css")),
    Route("POST", f"{BASE}/auth/login", PUBLIC, sessions.login),
    Route("POST", f"{BASE}/auth/refresh", PUBLIC, sessions.refresh),
    Route("POST", f"{BASE}/auth/logout", "viewer", sessions.logout),
    Route("GET", f"{BASE}/auth/me", "viewer", sessions.me),
    Route("GET", f"{BASE}/users", "admin", users.list_users),
    Route("POST", f"{BASE}/users", "admin", users.create_user),
    Route("DELETE", f"{BASE}/users/<username>", "admin", users.delete_user),
    # One's own; an admin may set anybody's.
    Route("POST", f"{BASE}/users/<username>/password", "viewer", users.set_password),
    Route("POST", f"{BASE}/users/<username>/role", "admin", users.set_role),
    Route("GET", f"{BASE}/keys", "admin", keys.list_keys),
    Route("POST", f"{BASE}/keys", "admin", keys.create_key),
    Route("DELETE", f"{BASE}/keys/<key_id>", "admin", keys.delete_key),
    Route("GET", f"{BASE}/cluster/status", "viewer", status.cluster_status),
    Route("GET", f"{BASE}/cluster/leader", "viewer", status.cluster_leader),
    Route("GET", f"{BASE}/cluster/consensus", "viewer", status.consensus),
    Route("POST", f"{BASE}/cluster/join", "admin", status.cluster_join),
    Route("POST", f"{BASE}/cluster/leave", "admin", status.cluster_leave, bounded=False),
    Route("POST", f"{BASE}/cluster/token", "admin", status.cluster_token),
    Route("GET", f"{BASE}/cluster/snapshot", "admin", status.cluster_snapshot),
    Route("GET", f"{BASE}/metrics", "viewer", status.metrics),
    Route("GET", f"{BASE}/nodes", "viewer", nodes.list_nodes),
    Route("GET", f"{BASE}/nodes/<reference>", "viewer", nodes.show_node),
    Route("POST", f"{BASE}/nodes/<reference>/drain", "operator", nodes.drain),
    Route("POST", f"{BASE}/nodes/<reference>/undrain", "operator", nodes.undrain),
    # Names may hold slashes, written as %2F or as they are.
    Route("GET", f"{BASE}/models", "viewer", models.list_models),
    # Unbounded: adapters may have to go to a node that holds the base.
    Route("POST", f"{BASE}/models", "operator", models.create_model, bounded=False, model_op=True),
    Route("GET", f"{BASE}/models/<path:name>", "viewer", models.show_model),
    Route("DELETE", f"{BASE}/models/<path:name>", "operator", models.delete_model, model_op=True),
    Route(
        "POST",
        f"{BASE}/models/<path:name>/download",
        "operator",
        models.download_model,
        model_op=True,
    ),
    Route(
        "POST",
        f"{BASE}/models/<path:name>/copy",
        "operator",
        models.copy_model,
        model_op=True,
    ),
    Route(
        "POST",
        f"{BASE}/models/<path:name>/push",
        "operator",
        models.push_model,
        model_op=True,
    ),
    Route(
        "PUT",
        f"{BASE}/models/<path:name>/replicas",
        "operator",
        models.ask_replicas,
        model_op=True,
    ),
    Route("GET", f"{BASE}/distribution", "viewer", distribution.show),
    Route("POST", f"{BASE}/distribution/auto-configure", "operator", distribution.configure),
    Route("HEAD", f"{BASE}/blobs/<digest>", "operator", models.has_blob),
    Route("POST", f"{BASE}/blobs/<digest>", "operator", models.upload_blob, bounded=False),
    Route("GET", f"{BASE}/transfers", "viewer", models.list_transfers),
    Route("GET", f"{BASE}/transfers/<transfer_id>", "viewer", models.show_transfer),
    Route("POST", f"{BASE}/transfers/<transfer_id>/cancel", "operator", models.cancel_transfer),
    Route("POST", f"{BASE}/generate", "inference", inference.generate, bounded=False),
    Route("POST", f"{BASE}/chat", "inference", inference.chat, bounded=False),
    Route("POST", f"{BASE}/embeddings", "inference", inference.embeddings, bounded=False),
    Route("POST", f"{BASE}/explain", "viewer", inference.explain),
    # What Ollama's clients speak. (A route for GET answers HEAD, too.)
    Route("GET", "/api/version", PUBLIC, ollama_models.version),
    Route("GET", "/api/tags", "viewer", ollama_models.tags),
    Route("GET", "/api/ps", "viewer", ollama_models.ps),
    Route("POST", "/api/show", "viewer", ollama_models.show),
    Route("POST", "/api/generate", "inference", ollama.generate, bounded=False),
    Route("POST", "/api/chat", "inference", ollama.chat, bounded=False),
    Route("POST", "/api/embed", "inference", ollama.embed_texts, bounded=False),
    Route("POST", "/api/embeddings", "inference", ollama.embed_prompt, bounded=False),
    Route("POST", "/api/pull", "operator", ollama_models.pull, bounded=False),
    Route("POST", "/api/push", "operator", ollama_models.push, bounded=False),
    Route("POST", "/api/create", "operator", ollama_models.create, bounded=False),
    Route("POST", "/api/copy", "operator", ollama_models.copy),
    Route("DELETE", "/api/delete", "operator", ollama_models.delete),
    Route("HEAD", "/api/blobs/<digest>", "operator", ollama_models.head_blob),
    Route("POST", "/api/blobs/<digest>", "operator", ollama_models.put_blob, bounded=False),
    # What OpenAI's clients speak.
    Route("GET", "/v1/models", "viewer", openai.list_models),
    Route("GET", "/v1/models/<path:name>", "viewer", openai.show_model),
    Route("POST", "/v1/chat/completions", "inference", openai.chat, bounded=False),
    Route("POST", "/v1/completions", "inference", openai.complete, bounded=False),
    Route("POST", "/v1/embeddings", "inference", openai.embeddings, bounded=False),
    Route("POST", "/v1/responses", "inference", responses.respond, bounded=False),
    # What Anthropic's clients speak.
    Route("POST", "/v1/messages", "inference", anthropic.create_message, bounded=False),
    Route("POST", "/v1/messages/count_tokens", "inference", anthropic.count_tokens, bounded=False),
)


class ApiApp(QuartTrio):
    """Quart with this API's connection and request; `stats` counts every request.

    `websockets` is the part of it that connections go to which ask for a WebSocket (see http.py);
    `api.hub.run` and `feed.run` are the tasks that it needs.

    A request takes one explicit way: routed, checked, handled. Quart's request context, hooks,
    signals and sessions are left out of it, because they would cost a third of a small
    request and hide what happens to it.
    """

    asgi_http_class = Connection
    request_class = Request

    def __init__(self, api: Api, origins: Origins) -> None:
        super().__init__("ollamad", static_folder=None)
        self.api = api
        self.origins = origins
        self.stats = api.http_stats
        self.clock = api.services.monotonic
        self.views: dict[str, View] = {}
        self.routes = self.url_map.bind("")  # no route depends on the Host
        self.feed = Feed(api)
        self.websockets = Sockets(
            api.hub,
            self.feed,
            api.auth,
            api.services.cluster,
            functools.partial(keys.spend_request, api.services),
        )

    def change_limits(self, limits: RateLimits) -> None:
        """Other rate limits from now on."""
        self.api.throttle.change(limits)
        self.api.hub.limit = limits.websocket

    async def reply_to(self, request: Request) -> Reply | None:
        """Answer one request; whatever goes wrong is an error answer. None: it was streamed."""
        reply: Reply | None = None
        try:
            reply = await self._reply_to(request)
            return reply
        finally:
            if request.changed_by:
                _log_change(request, reply.status if reply is not None else request.status_sent)

    async def _reply_to(self, request: Request) -> Reply | None:
        try:
            if request.method == "OPTIONS" and request.cors_headers:
                if _has_limits(request.path):
                    _look(self.api, request, address_group(peer_of(request)))
                asked = request.headers.get("Access-Control-Request-Headers")
                return Reply(b"", 204, headers=preflight_headers(asked))
            endpoint, arguments = self.routes.match(request.path, request.method)
            return await self.views[endpoint](request, **arguments)
        except Exception as error:
            error = self._limited(request, error)
            if isinstance(error, NoQuorum) and not error.details:
                error.details["voters_missing"] = status.missing_voters(self.api.services.cluster)
            return _error_reply(error, request.id, request.path)
        except BaseExceptionGroup as error:
            _, rest = error.split(trio.Cancelled)
            if rest is None:
                raise  # the client went away
            return _error_reply(rest, request.id, request.path)

    def _limited(self, request: Request, error: Exception) -> Exception:
        """Count what was refused before anybody was known: by its address, and apart from what
        is answered there, since others may be behind the same proxy.

        A token that has expired was good, and its owner must hear so to refresh it, whatever the
        others there did.
        """
        if request.limit_headers or not _has_limits(request.path):
            return error
        identity = f"refused {address_group(peer_of(request))}"
        if isinstance(error, ServiceError) and error.code == "TOKEN_EXPIRED":
            _look(self.api, request, identity)
            return error
        try:
            _take(self.api, request, identity, model_op=False)
        except ServiceError as refusal:
            return refusal
        return error


def build_app(services: Services, settings: ApiSettings) -> ApiApp:
    """The app for these services. Starts nothing."""
    origins = Origins(settings.origins)
    api = Api(
        settings=settings,
        services=services,
        auth=Auth(services.cluster, settings.auth, services.wall, origins),
        throttle=Throttle(settings.rate_limits, services.monotonic),
        logins=LoginGuard(services.monotonic),
        http_stats=RequestStats(services.monotonic),
        inference_stats=RequestStats(services.monotonic),
        hub=Hub(settings.rate_limits.websocket),
        started=services.monotonic(),
        openapi=_document,
    )
    app = ApiApp(api, origins)
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False
    app.config["RESPONSE_TIMEOUT"] = None  # Quart's 60 s would cut a long answer
    app.url_map.merge_slashes = False  # a redirect is no answer to a mistyped path
    for route in ROUTES:
        if route.path == METRICS and settings.metrics_public:
            route = dataclasses.replace(route, role=PUBLIC)
        endpoint = f"{route.method} {route.path}"
        app.add_url_rule(route.path, endpoint, methods=[route.method])
        app.views[endpoint] = _view(api, route)
    return app


@functools.cache
def _document() -> bytes:
    return docs.encoded(ROUTES)


def _view(api: Api, route: Route) -> View:
    limited = _has_limits(route.path)
    is_foreign = error_body_for(route.path) is not native_error
    is_ollamas = is_foreign or route.path == "/"

    async def view(request: Request, **arguments: str) -> Reply | None:
        caller = None
        peer = peer_of(request)
        needs_token = (
            is_ollamas
            and request.only_local
            and _has_foreign_host(request)
            # The page holds nothing secret, and who comes through a proxy signs in on it.
            and not (route.path == "/" and pages.wants_page(request))
        )
        if route.role is not None or needs_token:
            if not api.services.cluster.is_caught_up:
                raise Unavailable(
                    "this node has just started and asks the others what it missed; try again",
                    code="NOT_READY",
                    retry_after_s=1,
                )
            caller = api.auth.identify(request.headers, peer, ignores_placeholders=is_foreign)
        if needs_token and caller is None:
            raise ServiceError(
                403,
                "FORBIDDEN",
                "the Host of this request is no name of this machine, as that of a page which "
                "only says it is; ask localhost, or send a token",
            )
        if limited:
            identity = (caller.token_id if caller else "") or address_group(peer)
            if route.counted:
                _take(api, request, identity, model_op=route.model_op)
            else:
                _look(api, request, identity)
        if route.role is not None:
            caller = _authorize(caller, route.role)
            if caller.key is not None:
                keys.spend_request(api.services, caller.key)
        if _is_change(route):
            request.changed_by = f"{caller.username if caller else 'somebody'} at {peer}"
        with Call(api, request, caller) as call:
            if not route.bounded:
                return await route.handler(call, **arguments)
            with trio.move_on_after(api.settings.deadline_s):
                if route.method != "GET" or route.role is PUBLIC:
                    return await route.handler(call, **arguments)
                return await _read(call, route.handler, arguments)
        raise ServiceError(
            408,
            "REQUEST_TIMEOUT",
            f"the request took longer than {api.settings.deadline_s:g} s",
            {"limit_s": api.settings.deadline_s},
        )

    return view


async def _read(call: Call, handler: Handler, arguments: dict[str, str]) -> Reply | None:
    """Answer from the local state and say how old it may be; with `?consistent=true`, not old."""
    cluster = call.services.cluster
    match call.request.args.get("consistent", "false"):
        case "true":
            await cluster.read_barrier(READ_TIMEOUT_S)
        case "false":
            pass
        case _:
            raise invalid("consistent", "consistent must be true or false", expected="boolean")
    reply = await handler(call, **arguments)
    if reply is not None and (age_ms := status.state_age_ms(cluster)) is not None:
        reply.headers["X-State-Age-Ms"] = str(age_ms)
    return reply


def _has_foreign_host(request: Request) -> bool:
    host = request.headers.get("Host")
    return host is not None and is_foreign_host(host)


def _is_change(route: Route) -> bool:
    """Whether it changes something; what only reads or asks a model does not."""
    is_password = route.path == f"{BASE}/users/<username>/password"
    return route.method not in ("GET", "HEAD") and (
        is_password or route.role in ("operator", "admin")
    )


def _log_change(request: Request, status: int) -> None:
    """Who changed what, by which request, and what became of it. `status`: 0 without an answer."""
    path = request.scope["raw_path"].decode("latin-1")  # as it was sent, without line breaks
    audit.info(
        "%s: %s %s, request %s: %s",
        request.changed_by,
        request.method,
        path,
        request.id,
        status or "no answer",
    )


def _has_limits(path: str) -> bool:
    return path.startswith(f"{BASE}/")


def _take(api: Api, request: Request, identity: str, *, model_op: bool) -> None:
    """Count a request, and tell what is left.

    Raises:
      ServiceError: 429.
    """
    allowance = api.throttle.take(identity, model_op=model_op)
    if allowance is not None:
        request.limit_headers = headers_of(allowance)
        if allowance.wait_s > 0:
            raise rate_limited(allowance)


def _look(api: Api, request: Request, identity: str) -> None:
    """Tell what is left, without counting."""
    if (allowance := api.throttle.look(identity)) is not None:
        request.limit_headers = headers_of(allowance)


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


def _error_reply(error: BaseException, request_id: str, path: str) -> Reply:
    response = error_reply(as_service_error(error, request_id), error_body_for(path))
    if isinstance(error, MethodNotAllowed) and error.valid_methods:
        response.headers["Allow"] = ", ".join(sorted(error.valid_methods))
    return response


__all__ = ["BASE", "ROUTES", "ApiApp", "ApiSettings", "Route", "build_app"]
