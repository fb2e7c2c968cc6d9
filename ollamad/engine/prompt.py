"""From a request to what the model reads: template, tokenizer, images, and what to drop.

A chat that is too long loses its oldest messages, but never its system messages nor its last
one, as in Ollama. Templates in Ollama's language are rendered here, those in Jinja by the runner.
"""

import base64
import datetime
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec
import trio

from ollamad.core.gotemplate import TemplateError
from ollamad.core.inference import Failed, GenerateRequest, InferenceError, Message, ToolCall
from ollamad.core.names import parse_name
from ollamad.core.ollama_template import ChatTemplate
from ollamad.engine.process import Runner
from ollamad.engine.spec import ModelSpec, RunnerConfig

log = logging.getLogger(__name__)

MAX_TEMPLATES = 64  # parsed ones that are remembered, some kilobytes each
IMAGE_TOKENS = 768  # what an image is taken for until the runner has seen it; as in Ollama
# Tokens around the texts before and behind what is filled in: what llama.cpp itself looks for.
INFILL_TOKENS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # noqa: RUF001 DeepSeek
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
    ("<PRE>", "<SUF>", "<MID>"),
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # GLM
)

_renderers = trio.CapacityLimiter(2)  # threads: a long chat must not hold the event loop up


class Prompt(NamedTuple):
    """What the model reads: the token ids, and the messages that they stand for.

    With images there is a text instead, with a marker where each of them belongs; also where
    nobody asked for the ids.
    """

    ids: list[int]
    messages: list[Message]  # none when the prompt is raw
    length: int  # in tokens; only about so many if there are images, 0 if nobody asked
    text: str = ""
    images: tuple[bytes, ...] = ()

    async def asked(
        self, runner: Runner, resume: Sequence[int]
    ) -> list[int] | str | dict[str, Any]:
        """The prompt as the runner is asked, behind which the answer begins with `resume`."""
        if not self.images:
            if self.text and not resume:
                bos = await _bos_text(runner)
                return self.text.removeprefix(bos) if bos else self.text
            return [*self.ids, *resume]
        begun = await runner.client.detokenize(resume) if resume else ""
        return {
            "prompt_string": self.text + begun,
            "multimodal_data": [base64.b64encode(image).decode() for image in self.images],
        }


async def read_prompt(
    runner: Runner,
    request: GenerateRequest,
    spec: ModelSpec,
    config: RunnerConfig,
    *,
    exactly: bool = True,
) -> Prompt:
    """The prompt of a request, with room for a token of the answer.

    If not `exactly`, the ids are left to the runner, and it may be too long: the runner will say
    so. That is the quick way, since each question to the runner delays the first token.

    Raises:
      InferenceError: the prompt is too long (and nothing may be dropped), its template is wrong,
        or it asks for what the model cannot do.
    """
    limit = config.context_length - 1
    if request.has_images and not config.projector_path:
        raise _cannot(spec, "vision")
    template = None if request.is_parsed else _template_of(request, spec)
    reader = _Reader(runner, request, template)
    if not exactly and not request.suffix and not request.has_images:
        if request.raw:
            return Prompt([], [], 0, request.prompt)
        messages = _conversation(request, spec)
        # With thoughts and calls to be told apart, llama.cpp makes the prompt itself.
        text = "" if request.is_parsed else await reader.render(messages)
        return Prompt([], messages, 0, text)
    if request.suffix:
        ids = await reader.infill(spec)
        return _checked(Prompt(ids, [], len(ids)), limit)
    if request.raw:
        message = Message("user", request.prompt, images=request.images)
        text = await reader.marked(message)
        return _checked(await reader.read(text, [message], is_raw=True), limit)
    messages = _conversation(request, spec)
    if request.messages is not None:
        return await _fitted(reader, messages, request, limit)
    return _checked(await reader.read(await reader.render(messages), messages), limit)


class _Reader:
    """Makes prompts of one request."""

    def __init__(
        self, runner: Runner, request: GenerateRequest, template: ChatTemplate | None
    ) -> None:
        self._runner = runner
        self._request = request
        self._template = template

    async def render(self, messages: Sequence[Message]) -> str:
        """The text of a conversation, with a marker for each image."""
        if self._request.has_images and not self._request.is_parsed:
            messages = [
                msgspec.structs.replace(message, content=await self.marked(message), images=())
                for message in messages
            ]
        if self._template is None:
            arguments = template_arguments(self._request, messages)
            return await self._runner.client.apply_template(arguments)
        return await _rendered(functools.partial(self._template.render, messages))

    async def marked(self, message: Message) -> str:
        """The message's text behind a marker for each of its images."""
        if not message.images:
            return message.content
        if not self._runner.media_marker:
            self._runner.media_marker = await self._runner.client.media_marker()
        return self._runner.media_marker * len(message.images) + message.content

    async def infill(self, spec: ModelSpec) -> list[int]:
        """Token ids that ask for what belongs between prompt and suffix."""
        request = self._request
        if self._template is not None and self._template.takes_suffix:
            fill_in = functools.partial(self._template.fill_in, request.prompt, request.suffix)
            return await _tokenize(self._runner, await _rendered(fill_in), False)
        around = await _infill_tokens(self._runner)
        if around is None:
            raise _cannot(spec, "insert")
        prefix, suffix = [
            await self._runner.client.tokenize(text, add_special=False, parse_special=False)
            for text in (request.prompt, request.suffix)
        ]
        before, behind, middle = around
        return [*self._runner.empty_prompt, before, *prefix, behind, *suffix, middle]

    async def read(self, text: str, messages: list[Message], *, is_raw: bool = False) -> Prompt:
        """The prompt of a text that stands for these messages."""
        context = self._request.context
        images = tuple(image for message in messages for image in message.images)
        shown = [] if is_raw else messages
        ids = [*context, *await _tokenize(self._runner, text, bool(context))]
        length = len(ids) + IMAGE_TOKENS * len(images)
        if images and not self._request.is_parsed:
            before = await self._runner.client.detokenize(context) if context else ""
            return Prompt([], shown, length, before + text, images)
        return Prompt(ids, shown, length)


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
    reader: _Reader, messages: list[Message], request: GenerateRequest, limit: int
) -> Prompt:
    async def without(dropped: int) -> Prompt:
        kept = [
            message
            for index, message in enumerate(messages)
            if index >= dropped or message.role == "system"
        ]
        return await reader.read(await reader.render(kept), kept)

    best = await without(0)
    if best.length > limit and request.truncate and len(messages) > 1:
        # The fewest messages to drop, by bisection: each look is a template and a tokenization.
        too_few, enough = 0, len(messages) - 1
        best = await without(enough)
        while enough - too_few > 1 and best.length <= limit:
            middle = (too_few + enough) // 2
            tried = await without(middle)
            if tried.length <= limit:
                enough, best = middle, tried
            else:
                too_few = middle
    return _checked(best, limit)


def _template_of(request: GenerateRequest, spec: ModelSpec) -> ChatTemplate | None:
    """The template in Ollama's language that makes the prompt; None: the runner's makes it."""
    today = datetime.date.today()
    if request.template:
        try:
            return _parsed(request.template, today)
        except TemplateError as error:
            raise _bad_template(error) from None
    if not spec.template or "{%" in spec.template:
        return None
    try:
        return _parsed(spec.template, today)
    except TemplateError as error:
        log.warning("the template of %s is not used: %s", spec.name, error)
        return None


@functools.lru_cache(MAX_TEMPLATES)
def _parsed(source: str, today: datetime.date) -> ChatTemplate:
    yesterday = today - datetime.timedelta(days=1)
    return ChatTemplate(source, today=today.isoformat(), yesterday=yesterday.isoformat())


async def _rendered(render: Callable[[], str]) -> str:
    try:
        return await trio.to_thread.run_sync(render, limiter=_renderers)
    except TemplateError as error:
        raise _bad_template(error) from None


def _bad_template(error: TemplateError) -> InferenceError:
    message = f"the template cannot be used: {error}"
    return InferenceError(Failed("INVALID_TEMPLATE", message, 400, {"field": "template"}))


async def _infill_tokens(runner: Runner) -> tuple[int, int, int] | None:
    """The ids of the tokens around prefix and suffix; None if the model has none."""
    if not runner.infill_known:
        runner.infill_known = True
        for texts in INFILL_TOKENS:
            ids: list[int] = []
            for text in texts:
                ids += await runner.client.tokenize(text, add_special=False, parse_special=True)
            if len(ids) == len(texts):
                before, behind, middle = ids
                runner.infill = (before, behind, middle)
                break
    return runner.infill


def _cannot(spec: ModelSpec, capability: str) -> InferenceError:
    message = f"{parse_name(spec.name).full} does not support {capability}"
    details: dict[str, Any] = {"model": spec.name, "capability": capability}
    return InferenceError(Failed("NOT_SUPPORTED", message, 400, details))


async def _bos_text(runner: Runner) -> str:
    """The text of what the tokenizer puts before everything; empty if that is nothing."""
    if runner.bos_text is None:
        is_one = len(runner.empty_prompt) == 1
        runner.bos_text = await runner.client.detokenize(runner.empty_prompt) if is_one else ""
    return runner.bos_text


async def prompt_ids(runner: Runner, prompt: Prompt) -> list[int]:
    """The token ids of a prompt, looked up if nobody asked for them before."""
    if prompt.text and not prompt.images:
        return await _tokenize(runner, prompt.text, False)
    return prompt.ids


async def _tokenize(runner: Runner, text: str, continued: bool) -> list[int]:
    """Token ids of a prompt's text; `continued` if other ids come before it."""
    ids = await runner.client.tokenize(text, add_special=not continued, parse_special=True)
    bos = runner.empty_prompt
    if len(bos) == 1 and ids[:2] == bos * 2:
        del ids[0]  # the text began with what the tokenizer adds
    return ids


def shifted(ids: Sequence[int], context_length: int, keep: int) -> list[int]:
    """What llama.cpp has left in its context of a sequence that is longer: the first `keep` tokens
    stay, and whenever it is full the older half of the others goes."""
    left = list(ids)
    keep = min(keep, context_length - 4)
    while len(left) >= context_length - 1:
        del left[keep : keep + max(1, (context_length - 1 - keep) // 2)]
    return left


def _conversation(request: GenerateRequest, spec: ModelSpec) -> list[Message]:
    """The messages of a request, behind what the model itself begins every conversation with."""
    system = spec.system
    own = () if request.context else spec.messages
    if request.messages is not None:
        messages = [*own, *request.messages]
        if any(message.role == "system" for message in messages):
            system = None
    else:
        messages = [*own, Message("user", request.prompt, images=request.images)]
        if request.system is not None:
            system = request.system
    return [Message("system", system), *messages] if system else messages


def _templated(message: Message) -> dict[str, Any]:
    """A message in the form that templates know, which is OpenAI's."""
    shown: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.images:
        # llama.cpp wants a type, and finds out itself what the file is.
        pictures = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}
            for encoded in map(bytes.decode, map(base64.b64encode, message.images))
        ]
        shown["content"] = [*pictures, {"type": "text", "text": message.content}]
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


def _checked(prompt: Prompt, limit: int) -> Prompt:
    # How long images are is only guessed; if they are too long, the runner will say so.
    has_images = any(message.images for message in prompt.messages) or prompt.images
    if prompt.length > limit and not has_images:
        raise too_long(prompt.length, limit + 1)
    return prompt


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
