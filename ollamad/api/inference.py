"""Handlers of `/api/v1`: generate, chat and embeddings, whole and streamed."""

from typing import Any

import msgspec

from ollamad.api.asgi import Reply
from ollamad.api.bodies import ChatBody, EmbedBody, GenerateBody
from ollamad.api.calls import Call, reply
from ollamad.api.generation import LineLayout, answer, embed
from ollamad.api.ollama import read_think, require_capability
from ollamad.core.inference import GenerateRequest


async def generate(call: Call) -> Reply | None:
    body = await call.body(GenerateBody)
    return await _answer(call, body, body.request())


async def chat(call: Call) -> Reply | None:
    body = await call.body(ChatBody)
    return await _answer(call, body, body.request())


async def embeddings(call: Call) -> Reply:
    body = await call.body(EmbedBody)
    request = body.request()
    request = msgspec.structs.replace(request, model=(await call.find_model(request.model)).name)
    embedded = await embed(call, request)
    result = embedded.embeddings
    shown: dict[str, Any] = {"model": request.model, "embedding": result.vectors[0]}
    if body.input is not None:
        shown["embeddings"] = result.vectors
    shown |= {
        "total_duration": result.total_duration,
        "load_duration": result.load_duration,
        "prompt_eval_count": result.prompt_eval_count,
    }
    return reply(shown, headers={"X-Ollamad-Node": embedded.node_id})


async def _answer(
    call: Call, body: GenerateBody | ChatBody, request: GenerateRequest
) -> Reply | None:
    model = await call.find_model(request.model)
    if request.tools:
        require_capability(model, "tools")
    think = read_think(model, body.model, body.think)
    request = msgspec.structs.replace(request, model=model.name, think=think)
    chat = request.messages is not None
    layout = LineLayout(request.model, chat=chat, wall=call.services.wall)
    return await answer(call, request, layout, stream=body.stream)
