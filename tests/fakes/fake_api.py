"""A daemon's REST API without a daemon: a real small HTTP server for tests of clients.

Three nodes, one of them offline, and two models, as data that a test may change before it
asks. Every request is kept in `requests`; `answers` overrides a route.
"""

import contextlib
import copy
import hashlib
import json
import select
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

ALPHA = "QmAlpha1111111111111111111111111111111111111111"
BETA = "QmBeta22222222222222222222222222222222222222222"
GAMMA = "QmGamma3333333333333333333333333333333333333333"
DIGEST = "sha256:" + "fe938a13" * 8
LEAVE_TIMEOUT_S = 20.0  # how long a held stream waits for its client to go

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Request:
    """What a client sent; `path` is as it was on the wire, below `/api/v1`."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def token(self) -> str | None:
        return self.headers.get("authorization", "").removeprefix("Bearer ") or None


@dataclass(frozen=True, slots=True)
class Answer:
    """A canned answer; `body` is sent as it is when it is bytes."""

    status: int
    body: Json | bytes
    headers: dict[str, str] = field(default_factory=dict)


def error(status: int, message: str, code: str = "CODE", **details: Any) -> Answer:
    """An answer in the API's error format."""
    return Answer(status, {"error": message, "code": code, "details": details})


def node(identity: str, name: str, **changes: Any) -> Json:
    """A node as `GET /nodes` and `GET /nodes/:id` show it."""
    return {
        "id": identity,
        "name": name,
        "address": "192.168.1.100:8080",
        "status": "online",
        "is_leader": False,
        "draining": False,
        "version": "0.1.0",
        "last_seen": "2024-01-15T10:00:00Z",
        "models": ["smollm2:135m"],
        "capacity": {"cpu_cores": 8, "memory_gb": 32, "disk_gb": 500, "gpu_count": 0},
        "usage": {
            "cpu_usage": 0.45,
            "memory_usage": 0.67,
            "disk_usage": 0.23,
            "gpu_usage": 0.12,
            "cpu": 45.2,
            "memory": 67.8,
            "bandwidth": 12500.0,
        },
        "gpus": [],
        "loaded": [],
        **changes,
    }


def model(name: str, **changes: Any) -> Json:
    """A model as `GET /models` and `GET /models/:name` show it."""
    return {
        "name": name,
        "size": 98_100_000,
        "digest": DIGEST,
        "modified_at": "2024-01-15T10:00:00Z",
        "status": "available",
        "inference_ready": True,
        "replicas": [ALPHA, BETA],
        "desired": [ALPHA, BETA],
        "loaded_on": [ALPHA],
        "layers": [],
        "details": {
            "parent_model": "",
            "format": "gguf",
            "family": "llama",
            "families": ["llama"],
            "parameter_size": "134.52M",
            "quantization_level": "Q4_1",
        },
        **changes,
    }


def transfer(identity: str, **changes: Any) -> Json:
    """A transfer as `GET /transfers` shows it."""
    return {
        "id": identity,
        "model_name": "smollm2:135m",
        "type": "download",
        "status": "active",
        "progress": 45.2,
        "speed": 2_415_919,
        "eta": 120,
        "peer_id": "",
        "node_id": ALPHA,
        "bytes_done": 44_300_000,
        "bytes_total": 98_100_000,
        "error": "",
        **changes,
    }


def loaded(name: str, **changes: Any) -> Json:
    """A model in a node's memory."""
    return {
        "name": name,
        "size": 1_100_000_000,
        "size_vram": 0,
        "context_length": 4096,
        "expires_at": "2999-01-01T00:00:00Z",
        "busy": 1,
        "queued": 0,
        **changes,
    }


class FakeApi:
    """The server and its data. Use it as a context manager; `url` is where it listens."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.answers: dict[tuple[str, str], Answer] = {}
        self.refuse_once: dict[tuple[str, str], Answer] = {}  # the next answer, and then no more
        self.refusals: list[Answer] = []  # of attempts to create a model
        self.nodes = [
            node(ALPHA, "alpha", is_leader=True, loaded=[loaded("smollm2:135m")]),
            node(BETA, "beta", draining=True),
            node(GAMMA, "gamma", status="offline", models=[]),
        ]
        self.models = [model("smollm2:135m"), model("team/llama3.2:latest", replicas=[BETA])]
        # Each GET /transfers takes the next of them; the last one stays.
        self.transfers: list[list[Json]] = [[transfer("transfer_001")]]
        self.token_address = "127.0.0.1:9000"
        self.cluster: Json = {
            "node_id": ALPHA,
            "is_leader": True,
            "leader": ALPHA,
            "peers": 2,
            "status": "healthy",
            "cluster_id": "c-1",
            "has_quorum": True,
            "voters": [ALPHA, BETA, GAMMA],
            "cluster_size": 3,
            "nodes_online": 2,
            "term": 7,
        }
        self.consensus: Json = {"disk_full": False, "disk_hangs": False}
        self.version = dict(_VERSION)
        self.tokens: set[str | None] | None = None  # None: whoever asks may do everything
        self.refresh_tokens: dict[str, str] = {}  # refresh token -> the token that it makes
        self.blobs: set[str] = set()
        self.explanation: Json = {}
        self.pieces = ["Hello", ", ", "world\u2028", "!"]
        self.thoughts: list[str] = []  # before the pieces, which count no tokens then
        self.stream_error = ""  # sent in band behind the pieces
        self.cut_stream = False  # hang up behind the pieces
        self.end_early = False  # end the stream in order, but without `done`
        self.hold_stream = False  # behind the pieces, wait for the client to leave
        self.client_left = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "FakeApi":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def asked(self, method: str, path: str) -> list[Request]:
        """The requests of that method and path so far."""
        return [each for each in self.requests if (each.method, each.path) == (method, path)]

    def handle(self, request: Request) -> Answer:
        """The answer to anything but a stream."""
        key = (request.method, request.path)
        canned = self.refuse_once.pop(key, None) or self.answers.get(key)
        if canned is not None:
            return canned
        parts = [unquote(part) for part in request.path.strip("/").split("/")]
        refused = self._authenticate(request, parts)
        if refused is not None:
            return refused
        match request.method, parts:
            case "GET", ["health"]:
                return Answer(200, {"status": "healthy"})
            case "GET", ["version"]:
                return Answer(200, self.version)
            case "GET", ["cluster", "status"]:
                return Answer(200, self.cluster)
            case "GET", ["cluster", "consensus"]:
                return Answer(200, self.consensus)
            case "GET", ["cluster", "leader"]:
                return Answer(200, {"leader": self.cluster["leader"]})
            case "POST", ["cluster", "token"]:
                return Answer(
                    201,
                    {
                        "token": "T0KEN",
                        "expires_at": "2030-01-01T00:00:00Z",
                        "command": f"ollamad start --join T0KEN@{self.token_address}",
                    },
                )
            case "POST", ["cluster", "join" | "leave" as action]:
                done = {"join": "Node joined cluster", "leave": "Node left cluster"}
                return Answer(200, {"message": done[action]})
            case "GET", ["nodes"]:
                return Answer(200, {"nodes": self.nodes})
            case _, ["nodes", reference, *action]:
                return self._node(reference, action)
            case "GET", ["models"]:
                return Answer(200, {"models": self.models})
            case "POST", ["models"] if self.refusals:
                return self.refusals.pop(0)
            case "POST", ["models"]:
                made = model(request.json["name"])
                self.models.append(made)
                return Answer(201, {"model": made})
            case _, ["models", name, *action]:
                return self._model(request.method, name, action)
            case "GET", ["transfers"]:
                current = self.transfers[0]
                if len(self.transfers) > 1:
                    self.transfers.pop(0)
                return Answer(200, {"transfers": current})
            case "GET", ["transfers", identity]:
                for each in self.transfers[0]:
                    if each["id"] == identity:
                        return Answer(200, {"transfer": each})
                return error(404, f"transfer '{identity}' not found", "TRANSFER_NOT_FOUND")
            case _, ["blobs", digest]:
                return self._blob(request, digest)
            case "POST", ["generate" | "chat" as kind]:
                return Answer(200, self._whole(kind, request.json["model"]))
            case "POST", ["explain"]:
                return Answer(200, self.explanation)
            case "POST", ["embeddings"]:
                return Answer(200, {"model": request.json["model"], "embedding": [0.6, -0.8]})
        return error(404, "no such route", "NOT_FOUND")

    def _authenticate(self, request: Request, parts: list[str]) -> Answer | None:
        match parts:
            case ["auth", "login"]:
                if request.json != {"username": "admin", "password": "secret"}:
                    return error(401, "wrong user name or password", "INVALID_CREDENTIALS")
                return Answer(200, self._pair("token-1", "refresh-1"))
            case ["auth", "refresh"]:
                token = self.refresh_tokens.pop(request.json["refresh_token"], None)
                if token is None:
                    return error(401, "the refresh token is not valid", "INVALID_TOKEN")
                return Answer(200, self._pair(token, f"refresh-of-{token}"))
            case ["health"] | ["version"]:
                return None
        if self.tokens is not None and request.token not in self.tokens:
            return error(401, "authentication required", "UNAUTHORIZED")
        match parts:
            case ["auth", "me"]:
                return Answer(200, {"user": {"id": "u1", "username": "admin", "role": "admin"}})
            case ["auth", "logout"]:
                if self.tokens is not None:
                    self.tokens.discard(request.token)
                return Answer(200, {"message": "Logged out"})
        return None

    def _pair(self, token: str, refresh_token: str) -> Json:
        if self.tokens is not None:
            self.tokens.add(token)
        self.refresh_tokens[refresh_token] = f"{token}+"
        return {
            "token": token,
            "refresh_token": refresh_token,
            "expires_at": "2999-01-01T00:00:00Z",
            "user": {"id": "u1", "username": "admin", "role": "admin"},
        }

    def _node(self, reference: str, action: list[str]) -> Answer:
        for each in self.nodes:
            if reference in (each["id"], each["name"]) or each["id"].startswith(reference):
                match action:
                    case []:
                        return Answer(200, {"node": each})
                    case ["drain"]:
                        return Answer(200, {"message": f"Node {reference} is being drained"})
                    case ["undrain"]:
                        return Answer(200, {"message": f"Node {reference} is no longer draining"})
        return error(404, f"node '{reference}' not found", "NODE_NOT_FOUND")

    def _model(self, method: str, name: str, action: list[str]) -> Answer:
        if method == "POST" and action == ["push"]:
            return Answer(
                200,
                {
                    "status": "uploading",
                    "model": name,
                    "destination": "reg.lan/me/x:latest",
                    "message": "Model upload started",
                    "transfer_id": "transfer_001",
                },
            )
        if method == "POST" and action == ["copy"]:
            return Answer(201, {"model": model("other:latest")})
        if method == "POST" and action == ["download"]:
            return Answer(
                200,
                {
                    "status": "downloading",
                    "model": name,
                    "message": "Model download started",
                    "transfer_id": "transfer_001",
                },
            )
        for each in self.models:
            if each["name"] == name and method == "PUT" and action == ["replicas"]:
                return Answer(200, {"message": f"{name} should have other copies", "model": each})
            if each["name"] == name and method == "GET":
                return Answer(200, {"model": each})
            if each["name"] == name and method == "DELETE":
                self.models.remove(each)
                return Answer(200, {"message": f"Successfully deleted model {name}"})
        known = [each["name"] for each in self.models]
        return error(404, f"model '{name}' not found", "MODEL_NOT_FOUND", suggestions=known[:1])

    def _blob(self, request: Request, digest: str) -> Answer:
        if request.method == "HEAD":
            return Answer(200 if digest in self.blobs else 404, b"")
        got = f"sha256:{hashlib.sha256(request.body).hexdigest()}"
        if got != digest:
            return error(400, f'digest mismatch, expected "{digest}", got "{got}"')
        self.blobs.add(digest)
        return Answer(201, {})

    def _whole(self, kind: str, name: str) -> Json:
        return {**self.piece(kind, name, "".join(self.pieces)), "done": True, "eval_count": 4}

    def piece(self, kind: str, name: str, text: str) -> Json:
        """One object of a stream."""
        content: Json = {"response": text}
        if kind == "chat":
            content = {"message": {"role": "assistant", "content": text}}
        return {"model": name, "created_at": "2024-01-15T10:00:00Z", "done": False, **content}


_VERSION = {
    "version": "0.1.0",
    "build_time": "2024-01-15T10:00:00Z",
    "git_commit": "abc123def456",
    "go_version": "",
    "platform": "linux/amd64",
    "api_version": "v1",
}


def _handler_of(api: FakeApi) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def serve(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            request = Request(
                self.command,
                self.path.removeprefix("/api/v1"),
                {name.lower(): value for name, value in self.headers.items()},
                self.rfile.read(length),
            )
            api.requests.append(request)
            streams = request.path in ("/generate", "/chat") and request.json.get("stream")
            answer = api.handle(request)
            if streams and answer.status == 200:
                self.stream(request)
            else:
                self.send(copy.deepcopy(answer))

        do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = serve

        def send(self, answer: Answer) -> None:
            body = answer.body
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(answer.status)
            self.send_header("Content-Type", "application/json; charset=utf-8")
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def stream(self, request: Request) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/x-ndjson")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for line in self.lines(request):
                # Not escaped, so that line ends of Unicode are in the data as they are.
                data = json.dumps(line, ensure_ascii=False).encode() + b"\n"
                # Two chunks: a line may arrive in parts.
                for part in (data[:7], data[7:]):
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
            if api.hold_stream:
                self.wait_for_leave()
            elif api.cut_stream:
                self.close_connection = True
            else:
                self.wfile.write(b"0\r\n\r\n")

        def lines(self, request: Request) -> Iterator[Json]:
            kind, name = request.path[1:], request.json["model"]
            first = request.json.get("resume_from", 0)
            for thought in api.thoughts:
                line = api.piece(kind, name, "")
                line.get("message", line)["thinking"] = thought
                yield line
            counts = "request_id" in request.json and not api.thoughts
            for token, text in enumerate(api.pieces[first:], first + 1):
                named = {"token": token} if counts else {}
                yield api.piece(kind, name, text) | named
            if api.stream_error:
                yield {"error": api.stream_error}
            elif not (api.hold_stream or api.cut_stream or api.end_early):
                yield {**api.piece(kind, name, ""), "done": True, "done_reason": "stop"}

        def wait_for_leave(self) -> None:
            ready, _, _ = select.select([self.connection], [], [], LEAVE_TIMEOUT_S)
            with contextlib.suppress(OSError):
                if ready and self.connection.recv(1, socket.MSG_PEEK) == b"":
                    api.client_left.set()
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    return Handler
