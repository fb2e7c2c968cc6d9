"""From a request to the token ids that the model reads: template, tokenizer, and what to drop.

A chat that is too long loses its oldest messages, but never its system messages nor its last
one, as in Ollama.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from ollamad.core.inference import Failed, GenerateRequest, InferenceError, Message, ToolCall
from ollamad.engine.process import Runner
from ollamad.engine.spec import ModelSpec


class Prompt(NamedTuple):
    """What the model reads: the token ids, and the messages that they stand for."""

    ids: list[int]
    messages: list[Message]  # none when the prompt is raw


async def read_prompt(
    runner: Runner, request: GenerateRequest, spec: ModelSpec, limit: int
) -> Prompt:
    """The prompt of a request, at most `limit` tokens of it.

    Raises:
      InferenceError: the prompt is too long (and nothing may be dropped).
    """
    if request.raw:
        ids = list(request.context) + await _tokenize(runner, request.prompt, bool(request.context))
        return Prompt(_checked(ids, limit), [])
    messages = _conversation(request, spec)
    if request.messages is not None:
        return await _fitted(runner, messages, request, limit)
    text = await _render(runner, messages, request)
    ids = list(request.context) + await _tokenize(runner, text, bool(request.context))
    return Prompt(_checked(ids, limit), messages)


def template_arguments(request: GenerateRequest, messages: Sequence[Message]) -> dict[str, Any]:
    """What a chat template is given, in llama-server's terms."""
    arguments: dict[str, Any] = {"messages": [_templated(message) for message in messages]}
    if request.tools:
        arguments["tools"] = msgspec.Raw(request.tools.encode())
    if request.think:
        kwargs: dict[str, Any] = {"enable_thinking": request.think != "off"}
        if request.think not in ("on", "off"):
            kwargs["reasoning_effort"] = request.think
        arguments["chat_template_kwargs"] = kwargs
    return arguments


async def _fitted(
    runner: Runner, messages: Sequence[Message], request: GenerateRequest, limit: int
) -> Prompt:
    async def without(dropped: int) -> Prompt:
        kept = [
            message
            for index, message in enumerate(messages)
            if index >= dropped or message.role == "system"
        ]
        return Prompt(await _tokenize(runner, await _render(runner, kept, request), False), kept)

    prompt = await without(0)
    if len(prompt.ids) <= limit or not request.truncate or len(messages) == 1:
        _checked(prompt.ids, limit)
        return prompt
    # The fewest messages to drop, by bisection: each look is a template and a tokenization.
    too_few, enough = 0, len(messages) - 1
    best = await without(enough)
    _checked(best.ids, limit)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        prompt = await without(middle)
        if len(prompt.ids) <= limit:
            enough, best = middle, prompt
        else:
            too_few = middle
    return best


async def _render(runner: Runner, messages: Sequence[Message], request: GenerateRequest) -> str:
    return await runner.client.apply_template(template_arguments(request, messages))


async def _tokenize(runner: Runner, text: str, continued: bool) -> list[int]:
    """Token ids of a prompt's text; `continued` if other ids come before it."""
    ids = await runner.client.tokenize(text, add_special=not continued, parse_special=True)
    bos = runner.empty_prompt
    if len(bos) == 1 and ids[:2] == bos * 2:
        del ids[0]  # the text began with what the tokenizer adds
    return ids


def _conversation(request: GenerateRequest, spec: ModelSpec) -> list[Message]:
    """The messages of a request, behind what the model itself begins every conversation with."""
    system = spec.system
    own = () if request.context else spec.messages
    if request.messages is not None:
        messages = [*own, *request.messages]
        if any(message.role == "system" for message in messages):
            system = None
    else:
        messages = [*own, Message("user", request.prompt)]
        if request.system is not None:
            system = request.system
    return [Message("system", system), *messages] if system else messages


def _templated(message: Message) -> dict[str, Any]:
    """A message in the form that templates know, which is OpenAI's."""
    shown: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.thinking:
        shown["reasoning_content"] = message.thinking
    if message.tool_calls:
        shown["tool_calls"] = [_templated_call(call) for call in message.tool_calls]
    if message.tool_name:
        shown["name"] = message.tool_name
    if message.tool_call_id:
        shown["tool_call_id"] = message.tool_call_id
    return shown


def _templated_call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _checked(ids: list[int], limit: int) -> list[int]:
    if len(ids) > limit:
        raise too_long(len(ids), limit + 1)
    return ids


def too_long(tokens: int, context_length: int) -> InferenceError:
    """The error of a prompt that does not fit."""
    return InferenceError(
        Failed(
            code="PROMPT_TOO_LONG",
            message=f"the prompt has {tokens} tokens, but the context holds {context_length} "
            "with the answer; shorten it or raise num_ctx",
            status=400,
            details={"prompt_tokens": tokens, "context_length": context_length},
        )
    )
