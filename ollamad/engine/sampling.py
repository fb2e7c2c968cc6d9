"""How a request's options become the body of what the runner is asked."""

from collections.abc import Sequence
from typing import Any

import msgspec

from ollamad.core.inference import Failed, GenerateRequest, InferenceError, Options

# Where neither the request nor the model says anything: Ollama's defaults.
DEFAULTS = Options(
    num_keep=4,
    num_predict=-1,
    seed=-1,
    temperature=0.8,
    top_k=40,
    top_p=0.9,
    min_p=0.0,
    typical_p=1.0,
    repeat_last_n=64,
    repeat_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    mirostat=0,
    mirostat_tau=5.0,
    mirostat_eta=0.1,
    stop=(),
)

# Ollama's bound on an answer without a bound of its own, in contexts: a model that never ends
# must end.
MAX_CONTEXTS = 10

ANY_SLOT = -1  # the runner's choice

_ANY_JSON_OBJECT = msgspec.Raw(b'{"type":"object"}')


def completion_body(
    prompt: Sequence[int] | str | dict[str, Any],
    request: GenerateRequest,
    options: Options,
    limit: int,
    schema: msgspec.Raw | None,
    slot: int = ANY_SLOT,
) -> bytes:
    """The JSON body that asks the runner for a streamed completion of at most `limit` tokens.

    The prompt is token ids, a text, or a text with images.
    """
    body = _sampling(request, options, limit, schema)
    body["id_slot"] = slot
    body |= {"prompt": prompt, "return_tokens": True}
    if request.logprobs >= 0:
        # The token itself is told with at least one candidate.
        body["n_probs"] = max(1, request.logprobs)
    return msgspec.json.encode(body)


def chat_body(
    arguments: dict[str, Any],
    request: GenerateRequest,
    options: Options,
    limit: int,
    schema: msgspec.Raw | None,
    slot: int = ANY_SLOT,
) -> bytes:
    """The JSON body that asks the runner for a chat; `arguments` are the template's.

    It is streamed unless `comes_whole`.
    """
    body = _sampling(request, options, limit, schema)
    body["id_slot"] = slot
    body |= arguments | {"reasoning_format": "deepseek"}
    body["stream_options"] = {"include_usage": True}
    if "tools" in arguments:
        body["tool_choice"] = request.tool_choice or "auto"
        body["parallel_tool_calls"] = request.parallel_calls
    if request.logprobs >= 0:
        body |= {"logprobs": True, "top_logprobs": max(1, request.logprobs)}
    if comes_whole(request):
        body["stream"] = False
        del body["stream_options"], body["return_progress"]
    return msgspec.json.encode(body)


def comes_whole(request: GenerateRequest) -> bool:
    """Whether llama.cpp does not stream such a chat: with tools it tells logprobs at the end."""
    return bool(request.tools) and request.logprobs >= 0


def _sampling(
    request: GenerateRequest, options: Options, limit: int, schema: msgspec.Raw | None
) -> dict[str, Any]:
    chosen = options.over(DEFAULTS)
    any_seed = chosen.seed is None or chosen.seed < 0
    body: dict[str, Any] = {
        "stream": True,
        # What a cache holds of an earlier answer was computed token by token, and is rounded
        # differently from what is read: to run twice alike, a prompt is read whole both times.
        "cache_prompt": request.failover != "replay",
        # Something to write after each batch of the prompt: llama.cpp notices only by a failed
        # write that the client has gone.
        "return_progress": True,
        "n_predict": limit,
        "n_keep": chosen.num_keep,
        "seed": request.default_seed if any_seed else chosen.seed,
        "temperature": chosen.temperature,
        "top_k": chosen.top_k,
        "top_p": chosen.top_p,
        "min_p": chosen.min_p,
        "typical_p": chosen.typical_p,
        "repeat_last_n": chosen.repeat_last_n,
        "repeat_penalty": chosen.repeat_penalty,
        "presence_penalty": chosen.presence_penalty,
        "frequency_penalty": chosen.frequency_penalty,
        "mirostat": chosen.mirostat,
        "mirostat_tau": chosen.mirostat_tau,
        "mirostat_eta": chosen.mirostat_eta,
        "stop": [text for text in chosen.stop or () if text],
    }
    if schema is not None:
        body["json_schema"] = schema
    if request.logit_bias:
        body["logit_bias"] = request.logit_bias
    return body


def token_limit(options: Options, context_length: int) -> int:
    """How many tokens an answer may have at most."""
    limit = MAX_CONTEXTS * context_length
    wanted = options.num_predict or -1
    return min(wanted, limit) if wanted > 0 else limit


def kept_tokens(options: Options, prompt: int, begin: int) -> int:
    """How many tokens of a prompt stay when the context is full, of which `begin` are BOS."""
    keep = options.over(DEFAULTS).num_keep
    assert keep is not None
    return prompt if keep < 0 else min(prompt, keep + begin)


def json_schema(format_: str) -> msgspec.Raw | None:
    """What a request's `format` asks for: nothing, any object ("json"), or its own schema.

    Raises:
      InferenceError: it is neither "json" nor a JSON schema.
    """
    if not format_:
        return None
    if format_ == "json":
        return _ANY_JSON_OBJECT
    try:
        if isinstance(msgspec.json.decode(format_), dict):
            return msgspec.Raw(format_.encode())
    except msgspec.DecodeError:
        pass
    message = 'the format must be "json" or a JSON schema (an object)'
    raise InferenceError(Failed(code="INVALID_FORMAT", message=message, status=400))
