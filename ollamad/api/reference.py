"""What the OpenAPI document says of each route, beside what the route table knows.

A route that is not in here is still in the document, without schemas; a test of this project says
so, so that it does not stay like that.
"""

import dataclasses
from typing import Any, get_args

from ollamad.api import (
    anthropic_answers,
    anthropic_bodies,
    bodies,
    messages,
    ollama_answers,
    ollama_bodies,
    openai_answers,
    openai_bodies,
    responses_bodies,
    schemas,
)
from ollamad.core.alerts import AlertKind, Level
from ollamad.core.events import ModelEventKind, NodeEventKind
from ollamad.core.explanation import Explanation

BASE = "/api/v1"
LINES = "application/x-ndjson"
EVENTS = "text/event-stream"
BYTES = "application/octet-stream"

MODEL = "smollm2:135m"
NODE = "QmfWpAxuSE1jGTSgcZbtmtTYW8BNoXrXpi8GQsroFjW73d"
DIGEST = "sha256:" + "fe938a13" * 8


@dataclasses.dataclass(frozen=True, slots=True)
class Doc:
    """One operation.

    `answers` maps a success's status to its type, `stream` is the content type of a streamed
    answer and `parts` the types of its lines or events, `errors` are statuses beside those that
    follow from the route itself.
    """

    tag: str
    summary: str
    text: str = ""
    body: Any = None
    optional_body: bool = False
    raw_body: bool = False
    answers: dict[int, Any] = dataclasses.field(default_factory=dict)
    stream: str = ""
    parts: tuple[Any, ...] = ()
    content: str = "application/json"
    also: str = ""  # another content type, for who asks for that
    errors: tuple[int, ...] = ()
    example: Any = None  # a request's body


def _or(literal: Any) -> str:
    *most, last = [f"`{value}`" for value in get_args(literal)]
    return f"{', '.join(most)} or {last}"


def _ok(kind: Any) -> dict[int, Any]:
    return {200: kind}


def _made(kind: Any) -> dict[int, Any]:
    return {201: kind}


_INFERENCE_TEXT = (
    "With `stream` the answer is NDJSON: one object a line, the last with `done: true`, or an "
    "error in the shape of every error."
)

TAGS = {
    "Status": "The node and the cluster: who is there, who leads, how busy.",
    "Signing in": "Sessions. An access token lives half an hour, a refresh token once.",
    "Users": "Who may sign in, and what as.",
    "API keys": "Tokens for programs, with a role, an expiry and quotas.",
    "Nodes": "The machines of the cluster.",
    "Models": "The models of the whole cluster; any node will do.",
    "Transfers": "Models on their way from an origin or between nodes.",
    "Inference": "Answers of models. Any node takes any request and finds who serves it.",
    "Ollama": 'The protocol of Ollama\'s clients. Errors are `{"error"}`.',
    "OpenAI": "The protocol of OpenAI's clients. Errors have OpenAI's shape.",
    "Anthropic": "The protocol of Anthropic's clients. Errors have Anthropic's shape.",
    "Other": "What has no description yet.",
}

DOCS: dict[str, Doc] = {
    "GET /": Doc(
        "Status",
        "A sign of life, or the dashboard",
        "`Ollama is running`, as text; the dashboard's page for browsers.",
        content="text/plain",
        also="text/html",
        errors=(403,),
    ),
    "GET /dashboard/dashboard.js": Doc(
        "Status", "The dashboard's script", content="text/javascript"
    ),
    "GET /dashboard/node.js": Doc("Status", "A part of it", content="text/javascript"),
    "GET /dashboard/chat.js": Doc("Status", "A part of it", content="text/javascript"),
    "GET /dashboard/dashboard.css": Doc("Status", "The dashboard's style", content="text/css"),
    "GET /metrics": Doc("Status", "What this node measures, for Prometheus", content="text/plain"),
    f"GET {BASE}/health": Doc(
        "Status",
        "Whether this node can serve",
        "503 while it cannot: without a quorum for longer than an election, or in no cluster.",
        answers={200: schemas.Health, 503: schemas.Health},
    ),
    f"GET {BASE}/version": Doc("Status", "Versions of this node", answers=_ok(schemas.Version)),
    f"GET {BASE}/openapi.json": Doc("Status", "This document", answers=_ok(None)),
    f"GET {BASE}/docs": Doc("Status", "A page that shows it", content="text/html"),
    f"GET {BASE}/docs/docs.js": Doc("Status", "Its script", content="text/javascript"),
    f"GET {BASE}/docs/docs.css": Doc("Status", "Its style", content="text/css"),
    f"GET {BASE}/cluster/status": Doc(
        "Status", "The cluster as this node sees it", answers=_ok(schemas.ClusterStatus)
    ),
    f"GET {BASE}/cluster/leader": Doc(
        "Status", "Who leads", "503 while nobody does.", answers=_ok(schemas.Leader)
    ),
    f"GET {BASE}/cluster/consensus": Doc(
        "Status", "This node's place in the replicated log", answers=_ok(schemas.ConsensusInfo)
    ),
    f"GET {BASE}/cluster/snapshot": Doc(
        "Status",
        "The replicated state, for `ollamad backup`",
        "With the cluster's keys, so for the token of this node's data directory only.",
        answers=_ok(bytes),
        content=BYTES,
    ),
    f"GET {BASE}/metrics": Doc("Status", "What this node measures", answers=_ok(schemas.Metrics)),
    f"POST {BASE}/cluster/join": Doc(
        "Nodes",
        "Let in a node that waits with a join token",
        body=bodies.JoinBody,
        answers=_ok(schemas.Moved),
        errors=(409,),
        example={"node_id": NODE, "address": "192.168.1.101:8080"},
    ),
    f"POST {BASE}/cluster/leave": Doc(
        "Nodes",
        "Take a node out for good",
        "What only that node holds is copied first.",
        body=bodies.LeaveBody,
        answers=_ok(schemas.Moved),
        errors=(404, 409),
        example={"node_id": NODE},
    ),
    f"POST {BASE}/cluster/token": Doc(
        "Nodes",
        "Make a token that lets nodes join",
        body=bodies.JoinTokenBody,
        optional_body=True,
        answers=_made(schemas.JoinTokenAnswer),
        example={"ttl_seconds": 3600},
    ),
    f"POST {BASE}/auth/login": Doc(
        "Signing in",
        "Sign in with a password",
        "Tries are bounded by account and address, whether the account exists or not.",
        body=bodies.LoginBody,
        answers=_ok(schemas.TokenAnswer),
        errors=(401,),
        example={"username": "admin", "password": "correct horse"},
    ),
    f"POST {BASE}/auth/refresh": Doc(
        "Signing in",
        "Spend a refresh token for a new pair",
        "Used twice, it ends its whole session, on every node.",
        body=bodies.RefreshBody,
        answers=_ok(schemas.TokenAnswer),
        errors=(401,),
        example={"refresh_token": "eyJhbGciOiJIUzI1NiIs…"},
    ),
    f"POST {BASE}/auth/logout": Doc(
        "Signing in", "End this session on every node", answers=_ok(schemas.Done)
    ),
    f"GET {BASE}/auth/me": Doc("Signing in", "Who the caller is", answers=_ok(schemas.Me)),
    f"GET {BASE}/users": Doc("Users", "All users", answers=_ok(schemas.UserList)),
    f"POST {BASE}/users": Doc(
        "Users",
        "Make a user",
        body=bodies.UserBody,
        answers=_made(schemas.OneUser),
        errors=(409,),
        example={"username": "eve", "password": "correct horse", "role": "operator"},
    ),
    f"DELETE {BASE}/users/<username>": Doc(
        "Users",
        "Delete a user",
        "Their tokens are dead. The last admin stays (409).",
        answers=_ok(schemas.Done),
        errors=(409,),
    ),
    f"POST {BASE}/users/<username>/password": Doc(
        "Users",
        "Set a password",
        "An admin sets anybody's; others their own, with `current_password`. It ends all sessions "
        "of the user.",
        body=bodies.PasswordBody,
        answers=_ok(schemas.Done),
        example={"password": "another horse", "current_password": "correct horse"},
    ),
    f"POST {BASE}/users/<username>/role": Doc(
        "Users",
        "Change what a user may do",
        "It holds from the next request on, also for tokens that are out. The last admin stays one "
        "(409).",
        body=bodies.RoleBody,
        answers=_ok(schemas.Done),
        errors=(409,),
        example={"role": "operator"},
    ),
    f"GET {BASE}/keys": Doc(
        "API keys", "All keys, with what they have used", answers=_ok(schemas.KeyList)
    ),
    f"POST {BASE}/keys": Doc(
        "API keys",
        "Make a key",
        "`key` is shown this once. The quotas are for `quota_period` and the whole cluster; a key "
        "may exceed them by what other nodes served in the last second.",
        body=bodies.KeyBody,
        optional_body=True,
        answers=_made(schemas.NewKeyInfo),
        errors=(409,),
        example={
            "name": "agent",
            "role": "inference",
            "request_quota": 1000,
            "token_quota": 1000000,
            "quota_period": "day",
        },
    ),
    f"DELETE {BASE}/keys/<key_id>": Doc("API keys", "Delete a key", answers=_ok(schemas.Done)),
    f"GET {BASE}/nodes": Doc("Nodes", "All nodes", answers=_ok(schemas.NodeList)),
    f"GET {BASE}/nodes/<reference>": Doc("Nodes", "One node", answers=_ok(schemas.OneNode)),
    f"POST {BASE}/nodes/<reference>/drain": Doc(
        "Nodes", "Send a node no new requests", answers=_ok(schemas.Done)
    ),
    f"POST {BASE}/nodes/<reference>/undrain": Doc(
        "Nodes", "Let a drained node serve again", answers=_ok(schemas.Done)
    ),
    f"GET {BASE}/models": Doc("Models", "All models, newest first", answers=_ok(schemas.ModelList)),
    f"POST {BASE}/models": Doc(
        "Models",
        "Make a model as a Modelfile says, or of uploaded blobs",
        "Files that the Modelfile names are uploaded first, and told in `files`; 400 "
        "`FILES_NEEDED` lists those that are missing.",
        body=bodies.CreateBody,
        answers=_made(schemas.OneModel),
        errors=(404, 409),
        example={"name": "mine", "files": {"model.gguf": DIGEST}},
    ),
    f"GET {BASE}/models/<path:name>": Doc("Models", "One model", answers=_ok(schemas.OneModel)),
    f"DELETE {BASE}/models/<path:name>": Doc(
        "Models", "Delete a model from every node", answers=_ok(schemas.Deleted), errors=(409,)
    ),
    f"POST {BASE}/models/<path:name>/download": Doc(
        "Models",
        "Start to fetch a model into the cluster",
        "Answers at once; while a transfer of it runs, with that one.",
        body=bodies.DownloadBody,
        optional_body=True,
        answers=_ok(schemas.Download),
        errors=(409,),
        example={"replicas": 2},
    ),
    f"POST {BASE}/models/<path:name>/copy": Doc(
        "Models",
        "Give a model another name, too",
        body=bodies.CopyBody,
        answers=_made(schemas.OneModel),
        errors=(409,),
        example={"destination": "mine"},
    ),
    f"POST {BASE}/models/<path:name>/push": Doc(
        "Models",
        "Start to send a model to a registry",
        "Answers at once. The destination is a name with the registry's host.",
        body=bodies.PushBody,
        optional_body=True,
        answers=_ok(schemas.Upload),
        example={"destination": "registry.lan:5000/me/mine"},
    ),
    f"PUT {BASE}/models/<path:name>/replicas": Doc(
        "Models",
        "Say how many copies there should be",
        "null: the cluster's default.",
        body=bodies.ReplicasBody,
        answers=_ok(schemas.ReplicasAnswer),
        errors=(409,),
        example={"replicas": 2},
    ),
    f"HEAD {BASE}/blobs/<digest>": Doc(
        "Models", "Whether this node has a blob", answers={200: None}
    ),
    f"POST {BASE}/blobs/<digest>": Doc(
        "Models",
        "Upload a blob to this node",
        "The body is the blob itself, of any size; 200 if it was there already.",
        raw_body=True,
        answers={200: schemas.Blob, 201: schemas.Blob},
        errors=(400,),
    ),
    f"GET {BASE}/distribution": Doc(
        "Models", "Whether the cluster spreads models by itself", answers=_ok(schemas.Distribution)
    ),
    f"POST {BASE}/distribution/auto-configure": Doc(
        "Models",
        "Have the cluster spread models by itself, or not",
        "Without it, only copies that were asked for are kept up.",
        body=bodies.AutoConfigureBody,
        answers=_ok(schemas.Configured),
        example={"enabled": True},
    ),
    f"GET {BASE}/transfers": Doc(
        "Transfers", "Active and recent transfers", answers=_ok(schemas.TransferList)
    ),
    f"GET {BASE}/transfers/<transfer_id>": Doc(
        "Transfers", "One transfer", answers=_ok(schemas.OneTransfer)
    ),
    f"POST {BASE}/transfers/<transfer_id>/cancel": Doc(
        "Transfers", "Cancel a transfer", answers=_ok(schemas.Cancelled), errors=(409,)
    ),
    f"POST {BASE}/generate": Doc(
        "Inference",
        "Complete a prompt",
        _INFERENCE_TEXT,
        body=bodies.GenerateBody,
        answers=_ok(schemas.GenerateAnswer),
        stream=LINES,
        parts=(schemas.GenerateLine, schemas.GenerateAnswer, schemas.ErrorAnswer),
        errors=(404, 409),
        example={"model": MODEL, "prompt": "Why is the sky blue?", "options": {"seed": 1}},
    ),
    f"POST {BASE}/chat": Doc(
        "Inference",
        "Go on with a chat",
        _INFERENCE_TEXT,
        body=bodies.ChatBody,
        answers=_ok(schemas.ChatAnswer),
        stream=LINES,
        parts=(schemas.ChatLine, schemas.ChatAnswer, schemas.ErrorAnswer),
        errors=(404, 409),
        example={"model": MODEL, "messages": [{"role": "user", "content": "Hello!"}]},
    ),
    f"POST {BASE}/embeddings": Doc(
        "Inference",
        "Embed texts",
        body=bodies.EmbedBody,
        answers=_ok(schemas.EmbeddingsAnswer),
        errors=(404,),
        example={"model": MODEL, "prompt": "Hello world"},
    ),
    f"POST {BASE}/explain": Doc(
        "Inference",
        "Where such a request would go now, and why",
        "Nothing is run.",
        body=bodies.ExplainBody,
        answers=_ok(Explanation),
        errors=(404,),
        example={"model": MODEL, "prompt": "Hello world"},
    ),
    "GET /api/version": Doc(
        "Ollama", "Version", answers=_ok(ollama_answers.OllamaVersion), errors=(403,)
    ),
    "GET /api/tags": Doc(
        "Ollama", "Models of the whole cluster", answers=_ok(ollama_answers.OllamaTags)
    ),
    "GET /api/ps": Doc(
        "Ollama", "Models in memory, of all nodes", answers=_ok(ollama_answers.OllamaPs)
    ),
    "POST /api/show": Doc(
        "Ollama",
        "What a model is made of",
        body=ollama_bodies.NamedBody,
        answers=_ok(ollama_answers.OllamaShown),
        errors=(404,),
        example={"model": MODEL},
    ),
    "POST /api/generate": Doc(
        "Ollama",
        "Complete a prompt",
        "Streams unless `stream` is false.",
        body=ollama_bodies.GenerateBody,
        answers=_ok(ollama_answers.OllamaGeneration),
        stream=LINES,
        parts=(
            ollama_answers.OllamaGeneration,
            ollama_answers.OllamaError,
        ),
        errors=(404,),
        example={"model": MODEL, "prompt": "Why is the sky blue?", "stream": False},
    ),
    "POST /api/chat": Doc(
        "Ollama",
        "Go on with a chat",
        "Streams unless `stream` is false.",
        body=ollama_bodies.ChatBody,
        answers=_ok(ollama_answers.OllamaChat),
        stream=LINES,
        parts=(
            ollama_answers.OllamaChat,
            ollama_answers.OllamaError,
        ),
        errors=(404,),
        example={
            "model": MODEL,
            "messages": [{"role": "user", "content": "Hello!"}],
            "stream": False,
        },
    ),
    "POST /api/embed": Doc(
        "Ollama",
        "Embed texts",
        body=ollama_bodies.EmbedBody,
        answers=_ok(ollama_answers.OllamaEmbeddings),
        errors=(404,),
        example={"model": MODEL, "input": ["one", "two"]},
    ),
    "POST /api/embeddings": Doc(
        "Ollama",
        "Embed a text",
        body=ollama_bodies.EmbeddingsBody,
        answers=_ok(ollama_answers.OllamaEmbedding),
        errors=(404,),
        example={"model": MODEL, "prompt": "one"},
    ),
    "POST /api/pull": Doc(
        "Ollama",
        "Fetch a model, with the progress of the cluster's transfer",
        body=ollama_bodies.NamedBody,
        answers=_ok(ollama_answers.OllamaProgress),
        stream=LINES,
        parts=(
            ollama_answers.OllamaProgress,
            ollama_answers.OllamaError,
        ),
        errors=(404, 409),
        example={"model": MODEL, "stream": False},
    ),
    "POST /api/push": Doc(
        "Ollama",
        "Send a model to a registry",
        body=ollama_bodies.NamedBody,
        answers=_ok(ollama_answers.OllamaProgress),
        stream=LINES,
        parts=(
            ollama_answers.OllamaProgress,
            ollama_answers.OllamaError,
        ),
        errors=(404, 409),
        example={"model": MODEL, "stream": False},
    ),
    "POST /api/create": Doc(
        "Ollama",
        "Make a model of another one, or of uploaded files",
        body=ollama_bodies.CreateBody,
        answers=_ok(ollama_answers.OllamaProgress),
        stream=LINES,
        parts=(
            ollama_answers.OllamaProgress,
            ollama_answers.OllamaError,
        ),
        errors=(404, 409),
        example={"model": "mine", "from": MODEL, "system": "Be brief.", "stream": False},
    ),
    "POST /api/copy": Doc(
        "Ollama",
        "Give a model a second name",
        body=ollama_bodies.CopyBody,
        answers={200: None},
        errors=(404, 409),
        example={"source": MODEL, "destination": "mine"},
    ),
    "DELETE /api/delete": Doc(
        "Ollama",
        "Delete a model from every node",
        body=ollama_bodies.NamedBody,
        answers={200: None},
        errors=(404, 409),
        example={"model": MODEL},
    ),
    "HEAD /api/blobs/<digest>": Doc("Ollama", "Whether this node has a blob", answers={200: None}),
    "POST /api/blobs/<digest>": Doc(
        "Ollama", "Upload a blob to this node", raw_body=True, answers={200: None, 201: None}
    ),
    "GET /v1/models": Doc(
        "OpenAI", "Models of the whole cluster", answers=_ok(openai_answers.V1Models)
    ),
    "GET /v1/models/<path:name>": Doc("OpenAI", "One model", answers=_ok(openai_answers.V1Model)),
    "POST /v1/chat/completions": Doc(
        "OpenAI",
        "Go on with a chat",
        body=openai_bodies.ChatBody,
        answers=_ok(openai_answers.ChatCompletion),
        stream=EVENTS,
        parts=(
            openai_answers.ChatCompletionChunk,
            openai_answers.OpenaiError,
        ),
        errors=(404,),
        example={"model": MODEL, "messages": [{"role": "user", "content": "Hello!"}]},
    ),
    "POST /v1/completions": Doc(
        "OpenAI",
        "Complete a prompt",
        body=openai_bodies.CompletionBody,
        answers=_ok(openai_answers.TextCompletion),
        stream=EVENTS,
        parts=(
            openai_answers.TextCompletion,
            openai_answers.OpenaiError,
        ),
        errors=(404,),
        example={"model": MODEL, "prompt": "Why is the sky blue?"},
    ),
    "POST /v1/embeddings": Doc(
        "OpenAI",
        "Embed texts",
        body=openai_bodies.EmbeddingBody,
        answers=_ok(openai_answers.OpenaiEmbeddings),
        errors=(404,),
        example={"model": MODEL, "input": ["one", "two"]},
    ),
    "POST /v1/responses": Doc(
        "OpenAI",
        "Make a response",
        "No responses are kept: the whole conversation goes into `input`.",
        body=responses_bodies.ResponseBody,
        answers=_ok(openai_answers.ResponseAnswer),
        stream=EVENTS,
        parts=(openai_answers.ResponseEvent,),
        errors=(404,),
        example={"model": MODEL, "input": "Why is the sky blue?"},
    ),
    "POST /v1/messages": Doc(
        "Anthropic",
        "Go on with a conversation",
        body=anthropic_bodies.MessagesBody,
        answers=_ok(anthropic_answers.AnthropicMessage),
        stream=EVENTS,
        parts=(
            anthropic_answers.AnthropicEvent,
            anthropic_answers.AnthropicError,
        ),
        errors=(404,),
        example={
            "model": MODEL,
            "max_tokens": 100,
            "messages": [{"role": "user", "content": "Hello!"}],
        },
    ),
    "POST /v1/messages/count_tokens": Doc(
        "Anthropic",
        "Count the tokens of a conversation",
        body=anthropic_bodies.CountBody,
        answers=_ok(anthropic_answers.AnthropicCount),
        errors=(404,),
        example={"model": MODEL, "messages": [{"role": "user", "content": "Hello!"}]},
    ),
}

_SENT, _HEARD = messages.tables()
WEBSOCKET = f"""\
`GET /ws` and `GET /api/v1/ws` open a WebSocket. The token goes into the header `Authorization:
Bearer TOKEN` or the query (`?token=TOKEN`) and is checked before the upgrade (401); an address may
have `rate_limits.websocket` connections at once (429).

Messages are JSON objects with a `type`; their schemas are among those of this document, `WsPing` to
`WsDropped`. A client sends:

{_SENT}

The channels are {", ".join(f"`{name}`" for name in messages.CHANNELS)}.
On connect the server sends `cluster_status` and `metrics` once; after that only what is subscribed:

{_HEARD}

The `event_type` of a `node_event` is {_or(NodeEventKind)};
that of a `model_event` is {_or(ModelEventKind)}.
An `alert` is {_or(AlertKind)}, with a `level` of {_or(Level)}
and a `state` of `raised` or `cleared`.

What is not understood is answered with an `error`, whose `code` is INVALID_JSON, INVALID_MESSAGE,
UNKNOWN_TYPE, UNKNOWN_CHANNEL or FORBIDDEN, and the socket stays open. Times are Unix seconds. A
reader that is too slow loses old metrics first, is told how many messages were `dropped`, and is
closed with 1013 when it stays behind; 1008: its token is dead; 1001: the node stops.
"""
