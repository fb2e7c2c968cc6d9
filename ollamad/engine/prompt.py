"""From a request to the token ids that the model reads: template, tokenizer, and what to drop.

A chat that is too long loses its oldest messages, but never its system messages nor its last
one, as in Ollama.
"""

from collections.abc import Sequence

from ollamad.core.inference import Failed, GenerateRequest, InferenceError, Message
from ollamad.engine.process import Runner
from ollamad.engine.spec import ModelSpec


async def prompt_ids(
    runner: Runner, request: GenerateRequest, spec: ModelSpec, limit: int
) -> list[int]:
    """The token ids of a request's prompt, at most `limit` of them.

    Raises:
      InferenceError: the prompt is too long (and nothing may be dropped).
    """
    if request.raw:
        ids = list(request.context) + await _tokenize(runner, request.prompt, bool(request.context))
        return _checked(ids, limit)
    if request.messages is not None:
        return await _chat_ids(runner, _conversation(request.messages, spec), request, limit)
    own = request.system if request.system is not None else spec.system
    messages = [Message("system", own)] if own else []
    if not request.context:
        messages += spec.messages
    messages.append(Message("user", request.prompt))
    text = await runner.client.apply_template(messages)
    ids = list(request.context) + await _tokenize(runner, text, bool(request.context))
    return _checked(ids, limit)


async def _chat_ids(
    runner: Runner, messages: Sequence[Message], request: GenerateRequest, limit: int
) -> list[int]:
    async def ids_without(dropped: int) -> list[int]:
        kept = [
            message
            for index, message in enumerate(messages)
            if index >= dropped or message.role == "system"
        ]
        return await _tokenize(runner, await runner.client.apply_template(kept), False)

    ids = await ids_without(0)
    if len(ids) <= limit or not request.truncate or len(messages) == 1:
        return _checked(ids, limit)
    # The fewest messages to drop, by bisection: each look is a template and a tokenization.
    too_few, enough = 0, len(messages) - 1
    best = _checked(await ids_without(enough), limit)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        ids = await ids_without(middle)
        if len(ids) <= limit:
            enough, best = middle, ids
        else:
            too_few = middle
    return best


async def _tokenize(runner: Runner, text: str, continued: bool) -> list[int]:
    """Token ids of a prompt's text; `continued` if other ids come before it."""
    ids = await runner.client.tokenize(text, add_special=not continued, parse_special=True)
    bos = runner.empty_prompt
    if len(bos) == 1 and ids[:2] == bos * 2:
        del ids[0]  # the text began with what the tokenizer adds
    return ids


def _conversation(messages: tuple[Message, ...], spec: ModelSpec) -> tuple[Message, ...]:
    """The messages behind the model's own ones, and behind its system prompt if they have none."""
    messages = (*spec.messages, *messages)
    if not spec.system or any(message.role == "system" for message in messages):
        return messages
    return (Message("system", spec.system), *messages)


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
