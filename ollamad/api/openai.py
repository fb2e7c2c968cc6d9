"""Handlers of OpenAI's API (`/v1`): chat, completions, embeddings, models.

Shapes, defaults and the order of a stream's events are OpenAI's, so that its clients work with
another base URL. A completion's prompt is read as it is, without the model's template.
"""

import base64
import struct
from collections.abc import Sequence
from typing import Any

import msgspec

from ollamad.api.asgi import Reply
from ollamad.api.bodies import fold_seed, invalid
from ollamad.api.calls import Call, reply, rfc3339
from ollamad.api.choices import answer_all
from ollamad.api.generation import answer, embed
from ollamad.api.ollama import find, require_capability, require_completion, shortened
from ollamad.api.openai_bodies import (
    ChatBody,
    CompletionBody,
    EmbeddingBody,
    offered_tools,
    read_messages,
)
from ollamad.api.openai_layouts import ChatLayout, CompletionLayout, begun, waiting
from ollamad.core.inference import EmbedRequest, GenerateRequest
from ollamad.core.names import parse_name
from ollamad.core.state import Model


async def list_models(call: Call) -> Reply:
    models = call.services.cluster.state.models.values()
    newest_first = sorted(models, key=lambda model: (-model.modified_at, model.name))
    rows = [_describe(model) for model in newest_first]
    # What follows `data` is Anthropic's, whose clients ask here as well.
    pages = {
        "has_more": False,
        "first_id": rows[0]["id"] if rows else None,
        "last_id": rows[-1]["id"] if rows else None,
    }
    return reply({"object": "list", "data": rows} | pages)


async def show_model(call: Call, name: str) -> Reply:
    return reply(_describe(await _find(call, name)))


async def chat(call: Call) -> Reply | None:
    body = await call.body(ChatBody, any_type=True)
    body.check()
    model = await _find(call, body.model)
    require_completion(model, body.model, "chat")
    if body.tools:
        require_capability(model, "tools")
    tools, choice = offered_tools(body.tools or (), body.tool_choice)
    request = GenerateRequest(
        model=model.name,
        messages=read_messages(body.messages),
        tools=tools,
        tool_choice=choice,
        parallel_calls=body.parallel_tool_calls is not False,
        think=body.think(thinks="thinking" in model.details.capabilities),
        format=body.response_format.as_text if body.response_format else "",
        options=body.options(),
        logprobs=body.candidates,
        logit_bias=body.biases,
    )
    if request.has_images:
        require_capability(model, "vision")

    def layout(index: int) -> ChatLayout:
        return ChatLayout(call, body.model, index=index, includes_usage=body.includes_usage)

    stream = body.stream is True
    if body.count == 1:
        return await answer(
            call, request, layout(0), stream=stream, waiting=waiting, on_begin=begun
        )
    return await answer_all(
        call,
        _tries(request, body.count),
        layout,
        prompts=1,
        keep=body.count,
        tells_logprobs=True,
        stream=stream,
    )


async def complete(call: Call) -> Reply | None:
    body = await call.body(CompletionBody, any_type=True)
    model = await _find(call, body.model)
    require_completion(model, body.model, "generate")
    prompts, tries = body.prompts, body.tries
    request = GenerateRequest(
        model=model.name,
        raw=not body.suffix,
        suffix=body.suffix or "",
        options=body.options(),
        logprobs=body.candidates,
        logit_bias=body.biases,
    )

    def layout(index: int) -> CompletionLayout:
        return CompletionLayout(
            call,
            body.model,
            index=index,
            includes_usage=body.includes_usage,
            echo=str(prompts[index // body.count]) if body.echo else "",
        )

    stream = body.stream is True
    requests = [_with_prompt(request, prompt) for prompt in prompts]
    if tries * len(requests) == 1:
        return await answer(
            call, requests[0], layout(0), stream=stream, waiting=waiting, on_begin=begun
        )
    if tries > body.count and body.candidates < 0:
        requests = [msgspec.structs.replace(each, logprobs=0) for each in requests]
    return await answer_all(
        call,
        [each for request in requests for each in _tries(request, tries)],
        layout,
        prompts=len(prompts),
        keep=body.count,
        tells_logprobs=body.candidates >= 0,
        stream=stream,
    )


def _with_prompt(request: GenerateRequest, prompt: str | tuple[int, ...]) -> GenerateRequest:
    if isinstance(prompt, str):
        return msgspec.structs.replace(request, prompt=prompt)
    return msgspec.structs.replace(request, context=prompt)


def _tries(request: GenerateRequest, count: int) -> list[GenerateRequest]:
    """The request as often; with a seed, each has one of its own, the first the one given."""
    seed = request.options.seed
    if seed is None or seed < 0:
        return [request] * count
    return [
        msgspec.structs.replace(
            request,
            options=msgspec.structs.replace(request.options, seed=fold_seed(seed + number)),
        )
        for number in range(count)
    ]


async def embeddings(call: Call) -> Reply:
    body = await call.body(EmbeddingBody, any_type=True)
    model = await _find(call, body.model)
    if body.encoding_format not in (None, "float", "base64"):
        raise invalid(
            "encoding_format",
            "encoding_format must be float or base64",
            expected="float | base64",
        )
    if body.dimensions is not None and body.dimensions < 1:
        raise invalid("dimensions", "dimensions must be 1 or more", expected="integer")
    embedded = await embed(call, EmbedRequest(model=model.name, inputs=body.inputs))
    result = embedded.embeddings
    rows = []
    for index, vector in enumerate(result.vectors):
        numbers = shortened(vector, body.dimensions) if body.dimensions else vector
        shown = _base64(numbers) if body.encoding_format == "base64" else numbers
        rows.append({"object": "embedding", "index": index, "embedding": shown})
    count = result.prompt_eval_count
    shown_whole = {
        "object": "list",
        "data": rows,
        "model": body.model,
        "usage": {"prompt_tokens": count, "total_tokens": count},
    }
    return reply(shown_whole, headers={"X-Ollamad-Node": embedded.node_id})


async def _find(call: Call, name: str) -> Model:
    return await find(call, name, f"model {name!r} not found")


def _describe(model: Model) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": int(model.modified_at),
        "owned_by": parse_name(model.name).namespace,
        # As Anthropic has it.
        "type": "model",
        "display_name": model.name,
        "created_at": rfc3339(model.modified_at),
    }


def _base64(numbers: Sequence[float]) -> str:
    """Little-endian 32-bit floats, which is what OpenAI's own client asks for."""
    return base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()
