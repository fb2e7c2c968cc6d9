"""Handlers of Ollama's API that answer with a model: generate, chat, embed, embeddings.

Field names, defaults, statuses and texts are Ollama's, so that its clients work unchanged.
"""

import math
from collections.abc import Sequence
from typing import Any

from ollamad.api.asgi import Reply
from ollamad.api.bodies import (
    checked_template,
    format_text,
    invalid,
    keep_alive_s,
    read_logprobs,
    read_options,
)
from ollamad.api.calls import Call, reply
from ollamad.api.conversation import read_images, read_messages, read_tools, think_mode
from ollamad.api.dialects import ollama_error
from ollamad.api.generation import (
    LineLayout,
    Whole,
    answer,
    durations,
    embed,
    encode,
    failovers_of,
)
from ollamad.api.ollama_bodies import (
    ChatBody,
    EmbedBody,
    EmbeddingsBody,
    GenerateBody,
)
from ollamad.api.services import ServiceError
from ollamad.core.inference import EmbedRequest, Finished, GenerateRequest
from ollamad.core.names import parse_name
from ollamad.core.state import Model


class OllamaLayout(LineLayout):
    """Ollama's lines: what is zero or empty is left out."""

    def failure(self, error: ServiceError) -> bytes:
        return encode(ollama_error(error)) + b"\n"

    def whole(self, said: Whole, end: Finished) -> dict[str, Any]:
        body = self.opening(said) | {"done": True, "done_reason": end.reason}
        if end.context and not self._chat:
            body["context"] = end.context
        told = {name: value for name, value in durations(end).items() if value}
        return body | told | failovers_of(end)


async def generate(call: Call) -> Reply | None:
    body = await call.body(GenerateBody, any_type=True)
    model = await find(call, body.model, f"model '{body.model or ''}' not found")
    if body.raw and (body.template or body.system or body.context):
        raise invalid("raw", "raw mode does not support template, system, or context")
    think = read_think(model, body.model, body.think)
    if body.images:
        require_capability(model, "vision")
    request = GenerateRequest(
        model=model.name,
        prompt=body.prompt or "",
        # Whether the model can fill in shows in its vocabulary, which its runner knows.
        suffix="" if body.raw else body.suffix or "",
        template=checked_template(body.template),
        images=read_images(body.images),
        system=body.system,
        context=body.context or (),
        raw=body.raw is True,
        think=think,
        format=format_text(body.format),
        options=read_options(body.options),
        keep_alive_s=keep_alive_s(body.keep_alive),
        truncate=body.truncate is not False,
        shift=body.shift is not False,
        logprobs=read_logprobs(body.logprobs, body.top_logprobs),
    )
    if not request.only_unloads:
        require_completion(model, body.model, "generate")
    layout = OllamaLayout(body.model or model.name, chat=False, wall=call.services.wall)
    # Loading and unloading is answered with one object, streamed or not.
    stream = body.stream is not False and not request.only_loads
    return await answer(call, request, layout, stream=stream)


async def chat(call: Call) -> Reply | None:
    body = await call.body(ChatBody, any_type=True)
    if not body.model:
        raise invalid("model", "model is required")
    model = await find(call, body.model, f"model '{body.model}' not found")
    think = read_think(model, body.model, body.think)
    if body.tools:
        require_capability(model, "tools")
    if any(message.images for message in body.messages or ()):
        require_capability(model, "vision")
    request = GenerateRequest(
        model=model.name,
        messages=read_messages(body.messages),
        tools=read_tools(body.tools),
        think=think,
        format=format_text(body.format),
        options=read_options(body.options),
        keep_alive_s=keep_alive_s(body.keep_alive),
        truncate=body.truncate is not False,
        shift=body.shift is not False,
        logprobs=read_logprobs(body.logprobs, body.top_logprobs),
    )
    if not request.only_unloads:
        require_completion(model, body.model, "chat")
    layout = OllamaLayout(body.model, chat=True, wall=call.services.wall)
    stream = body.stream is not False and not request.only_loads
    return await answer(call, request, layout, stream=stream)


async def embed_texts(call: Call) -> Reply:
    body = await call.body(EmbedBody, any_type=True)
    model = await _find_embedding(call, body.model)
    if body.dimensions is not None and body.dimensions < 0:
        raise invalid("dimensions", "dimensions must not be negative")
    # An empty text alone only loads the model; among others it is one.
    inputs = ((body.input,) if body.input else ()) if isinstance(body.input, str) else body.input
    request = EmbedRequest(
        model=model.name,
        inputs=inputs or (),
        options=read_options(body.options),
        keep_alive_s=keep_alive_s(body.keep_alive),
        truncate=body.truncate is not False,
    )
    shown: dict[str, Any] = {"model": body.model}
    if not inputs:
        await _load(call, request)
        return reply(shown | {"embeddings": []})
    embedded = await embed(call, request)
    result = embedded.embeddings
    vectors: Sequence[Sequence[float]] = result.vectors
    if body.dimensions:
        vectors = [shortened(vector, body.dimensions) for vector in vectors]
    shown["embeddings"] = vectors
    counts = {
        "total_duration": result.total_duration,
        "load_duration": result.load_duration,
        "prompt_eval_count": result.prompt_eval_count,
    }
    shown |= {name: value for name, value in counts.items() if value}
    return reply(shown, headers={"X-Ollamad-Node": embedded.node_id})


async def embed_prompt(call: Call) -> Reply:
    """`/api/embeddings`, the older form."""
    body = await call.body(EmbeddingsBody, any_type=True)
    model = await _find_embedding(call, body.model)
    request = EmbedRequest(
        model=model.name,
        inputs=(body.prompt or "",),
        options=read_options(body.options),
        keep_alive_s=keep_alive_s(body.keep_alive),
    )
    if not body.prompt:
        await _load(call, request)
        return reply({"embedding": []})
    embedded = await embed(call, request)
    [vector] = embedded.embeddings.vectors
    return reply({"embedding": vector}, headers={"X-Ollamad-Node": embedded.node_id})


async def find(call: Call, name: str | None, missing: str) -> Model:
    """The model of that name.

    Raises:
      ServiceError: 404 with the text `missing`, also for what is no name.
    """
    try:
        return await call.find_model(name or "")
    except ServiceError as error:
        if error.status in (400, 404):
            raise ServiceError(404, "MODEL_NOT_FOUND", missing, error.details) from None
        raise


def require_capability(model: Model, capability: str) -> None:
    """Refuse what the model cannot do, in Ollama's words.

    Raises:
      ServiceError: 400.
    """
    if capability not in model.details.capabilities:
        raise ServiceError(
            400,
            "NOT_SUPPORTED",
            f"{parse_name(model.name).full} does not support {capability}",
            {"model": model.name, "capability": capability},
        )


def require_completion(model: Model, asked: str | None, word: str) -> None:
    """Refuse to have a model write that only embeds. `word`: chat or generate.

    Raises:
      ServiceError: 400. (Each node that holds it would fail to load it otherwise.)
    """
    _require(model, asked, "completion", word)


def read_think(model: Model, asked: str | None, think: bool | str | None) -> str:
    """How the model, which was asked for by that name, is to think.

    Raises:
      ServiceError: 400, it cannot, or `think` is no way to think.
    """
    mode = think_mode(think, thinks="thinking" in model.details.capabilities)
    if think and not mode:
        _require(model, asked, "thinking", "thinking")
    return mode


async def _find_embedding(call: Call, name: str | None) -> Model:
    return await find(call, name, f'model "{name or ""}" not found, try pulling it first')


async def _load(call: Call, request: EmbedRequest) -> None:
    """Load the model (or unload it, with a keep-alive of 0) without asking it anything."""
    loading = GenerateRequest(
        request.model, options=request.options, keep_alive_s=request.keep_alive_s
    )
    async with call.services.inference.generate(loading):
        pass


def _require(model: Model, asked: str | None, capability: str, word: str) -> None:
    if capability not in model.details.capabilities:
        raise ServiceError(
            400, "NOT_SUPPORTED", f'"{asked}" does not support {word}', {"model": model.name}
        )


def shortened(vector: Sequence[float], width: int) -> Sequence[float]:
    """The first numbers of a vector, of length 1 again."""
    if width >= len(vector):
        return vector
    short = vector[:width]
    length = math.sqrt(sum(number * number for number in short))
    return [number / length for number in short] if length else short
