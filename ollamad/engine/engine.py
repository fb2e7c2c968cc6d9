"""Serves inferences with the models of this node: what the scheduler calls.

From a request in core's terms to a runner and back: load, wait for a slot, render and tokenize,
stream. Which models stay in memory is the pool's affair, sampling llama.cpp's.
"""

import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence

import msgspec
import trio

from ollamad.core import prefix
from ollamad.core.inference import (
    Chunk,
    Embeddings,
    EmbedRequest,
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerateRequest,
    InferenceError,
    LoadedModel,
    Options,
)
from ollamad.core.weights import XLLAMACPP, Choice
from ollamad.engine import check
from ollamad.engine.accelerators import NO_ACCELERATORS, Accelerators
from ollamad.engine.assembly import Assembler, Gap, Piece
from ollamad.engine.chat import ChatAssembler
from ollamad.engine.llama_client import CompletionEvent, RunnerGone, RunnerRefused, Timings
from ollamad.engine.pool import Resident, RunnerPool, queue_full
from ollamad.engine.process import Runner
from ollamad.engine.prompt import (
    Prompt,
    prompt_ids,
    read_prompt,
    shifted,
    template_arguments,
    too_long,
)
from ollamad.engine.sampling import (
    ANY_SLOT,
    chat_body,
    comes_whole,
    completion_body,
    json_schema,
    kept_tokens,
    token_limit,
)
from ollamad.engine.spec import (
    EngineSettings,
    ModelSpec,
    RunnerConfig,
    choose,
    runner_config,
)

# Inputs in one question to the runner, and their tokens: bounds its answer, lets others in between,
# and it is silent no longer than a slow machine needs for that many: 35 tokens a second are enough
# to be heard within `stall_timeout_s`, a tenth of that before it is given up.
EMBED_GROUP = 32
EMBED_GROUP_TOKENS = 2048
MAX_SPELLINGS = 1024  # remembered of one model's untold tokens, a few hundred bytes each
MAX_SCHEMAS = 64  # remembered of one model, some kilobytes each
NS_PER_MS = 1_000_000
CONTEXT_STEP = 256  # tokens; llama.cpp rounds a context up to so many
LOOK_STEP_S = 0.02  # between two looks at a slot that was left: about a token of a small model
TOO_LONG = "exceed_context_size_error"  # llama.cpp's word for a prompt that is
# Behind one of these llama.cpp tells why a template in Jinja failed, and before it where: of what
# the template refuses, and of what it cannot do. Its status depends on the model's family.
TEMPLATE_FAILED = ("Jinja Exception: ", "\nError: ")
# llama.cpp answers 500 to these, which who asks can mend.
UNREADABLE = ("Failed to parse messages: ", "Failed to parse tools: ", "JSON schema error at ")
NO_OPTIONS = Options()
NO_PROMPT = prefix.Prompt(0)


class Engine:
    """The models of this node. Start `run`, then call the rest from any task."""

    def __init__(
        self,
        settings: EngineSettings,
        free_memory: Callable[[], int],
        accelerators: Accelerators = NO_ACCELERATORS,
    ) -> None:
        self._settings = settings
        self._checking = trio.Lock()  # one file at a time
        self._pool = RunnerPool(settings, free_memory, accelerators)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the runners until cancelled; then they are killed.

        Raises:
          ValueError: the runtime directory's path is too long for Unix sockets.
        """
        await self._pool.run(task_status=task_status)

    @contextlib.asynccontextmanager
    async def generate(
        self, spec: ModelSpec, request: GenerateRequest
    ) -> AsyncIterator[trio.abc.ReceiveChannel[Event]]:
        """Generate text: chunks, then one Finished or Failed, then the end of the channel.

        Nothing begins before the first `receive`. Leaving the block early, or cancelling it,
        frees the slot at once and stops the runner's work after the step that it is in. The
        channel reads straight from the runner: it holds no buffer, so who does not receive
        slows nobody but the own generation. One task may receive at a time.
        """
        async with contextlib.aclosing(self._events(spec, request)) as events:
            yield _Events(events)

    async def embed(self, spec: ModelSpec, request: EmbedRequest) -> Embeddings:
        """One vector for each input: the mean over its tokens for a generative model.

        An input longer than the context, for a generative model longer than `num_batch` (512
        if nobody says), is cut if `request.truncate`.

        Raises:
          InferenceError: with what the client should see.
        """
        started = time.perf_counter_ns()
        options = request.options.over(spec.options)
        config = runner_config(spec, options, self._settings, embedding=True)
        async with self._resident(spec, config, request.keep_alive_s) as resident:
            load_duration = time.perf_counter_ns() - started
            async with _slot(resident, NO_PROMPT, self._settings.max_queue):
                inputs = await _embedding_inputs(resident, request)
                vectors: list[tuple[float, ...]] = []
                for group in _groups(inputs):
                    vectors += await resident.runner.client.embed(group)
            self._pool.finished_well(resident)
        return Embeddings(
            vectors=tuple(vectors),
            prompt_eval_count=sum(map(len, inputs)),
            total_duration=time.perf_counter_ns() - started,
            load_duration=load_duration,
        )

    async def load(
        self, spec: ModelSpec, options: Options = NO_OPTIONS, keep_alive_s: float | None = None
    ) -> None:
        """Bring a model into memory.

        Raises:
          InferenceError: it cannot be loaded.
        """
        embedding = "completion" not in spec.details.capabilities
        config = runner_config(
            spec, options.over(spec.options), self._settings, embedding=embedding
        )
        async with self._resident(spec, config, keep_alive_s):
            pass

    async def unload(self, name: str) -> bool:
        """Drop a model from memory, after its last running answer if there is one.

        Returns whether it was loaded.
        """
        return await self._pool.unload(name)

    def loaded(self) -> tuple[LoadedModel, ...]:
        """The models in memory."""
        return self._pool.loaded()

    @property
    def places(self) -> int:
        """How many more models can be loaded, by their number, before another one has to leave.

        A model that makes embeddings beside text counts twice.
        """
        return self._pool.places

    def usable_vram(self, free_vram: Sequence[int]) -> int:
        """Bytes that models can have on GPUs of which so many are free on each."""
        return self._pool.usable_vram(free_vram)

    def estimate(self, spec: ModelSpec, options: Options = NO_OPTIONS) -> int:
        """Bytes of memory that the model would take with these options, generating text.

        Raises:
          InferenceError: an option is out of range.
        """
        config = runner_config(spec, options.over(spec.options), self._settings)
        return self._pool.record.estimate(spec, config).total

    def choice(self, spec: ModelSpec) -> Choice:
        """The engine that runs a model here, and why.

        Raises:
          InferenceError: this node has none for it.
        """
        return choose(spec, spec.options, self._settings)

    async def objection(self, spec: ModelSpec) -> str:
        """Why this node could not run a model, as far as its files tell; empty if nothing does.

        Nothing is loaded; see `check.py`.
        """
        try:
            engine = self.choice(spec).engine
        except InferenceError as error:
            return error.failure.message
        if engine != XLLAMACPP:
            return ""
        async with self._checking:
            settings = self._settings
            socket_path = settings.runtime_dir / "check.sock"
            reason = await check.refusal(settings.runner_command, spec.gguf_path, socket_path)
        return f"{spec.name} cannot be run: {reason}" if reason else ""

    @contextlib.asynccontextmanager
    async def _resident(
        self, spec: ModelSpec, config: RunnerConfig, keep_alive_s: float | None
    ) -> AsyncIterator[Resident]:
        """A model in memory that stays there meanwhile; the runner's faults are translated."""
        resident = await self._pool.acquire(spec, config, keep_alive_s)
        try:
            yield resident
        except RunnerGone as lost:
            raise InferenceError(await resident.runner.died(lost)) from None
        except RunnerRefused as refusal:
            raise _translated(refusal) from None
        finally:
            self._pool.release(resident)

    async def _events(
        self, spec: ModelSpec, request: GenerateRequest
    ) -> AsyncGenerator[Event, None]:
        started = time.perf_counter_ns()
        try:
            if request.only_loads:
                yield await self._load_only(spec, request, started)
                return
            options = request.options.over(spec.options)
            config = runner_config(spec, options, self._settings)
            async with self._resident(spec, config, request.keep_alive_s) as resident:
                load_duration = time.perf_counter_ns() - started
                async with self._seat(resident, request) as seat:
                    schema = json_schema(request.format)
                    if schema is not None and not request.only_counts:
                        await _check_schema(resident, seat, schema)
                    work = _Work(
                        resident.runner, spec, request, options, config, schema, seat.number
                    )
                    texts: list[str] = []
                    async with contextlib.aclosing(work.events()) as events:
                        async for event in events:
                            if isinstance(event, Chunk):
                                texts.append(event.text)
                            elif isinstance(event, Finished):
                                after = prefix.prompt_after(
                                    request, spec.digest, texts, event.context
                                )
                                seat.held += (after,)
                                seat.over = True
                                self._pool.finished_well(resident)
                                event = msgspec.structs.replace(
                                    event,
                                    total_duration=time.perf_counter_ns() - started,
                                    load_duration=load_duration,
                                )
                            yield event
        except InferenceError as error:
            yield error.failure

    @contextlib.asynccontextmanager
    async def _seat(self, resident: Resident, request: GenerateRequest) -> AsyncIterator["_Seat"]:
        if request.only_counts:  # that needs the tokenizer, which is always free
            yield _Seat()
            return
        beginning = prefix.prompt_of(request, resident.spec.digest)
        async with _slot(resident, beginning, self._settings.max_queue) as seat:
            # A runner that takes longer is judged as ever, by what it says to who asks it.
            with trio.move_on_after(self._settings.stall_timeout_s):
                await _until_idle(resident, seat.number)
            yield seat

    async def _load_only(self, spec: ModelSpec, request: GenerateRequest, started: int) -> Finished:
        reason: FinishReason = "load"
        if request.keep_alive_s == 0:
            await self.unload(spec.name)
            reason = "unload"
        else:
            await self.load(spec, request.options, request.keep_alive_s)
        duration = time.perf_counter_ns() - started
        return Finished(
            reason=reason,
            total_duration=duration,
            load_duration=duration if reason == "load" else 0,
        )


class _Work:
    """One generation of a runner that has a slot for it; durations are told by who owns it."""

    def __init__(
        self,
        runner: Runner,
        spec: ModelSpec,
        request: GenerateRequest,
        options: Options,
        config: RunnerConfig,
        schema: msgspec.Raw | None,
        slot: int,
    ) -> None:
        self._runner = runner
        self._spec = spec
        self._request = request
        self._options = options
        self._config = config
        self._schema = schema
        self._slot = slot

    async def events(self) -> AsyncGenerator[Event, None]:
        request = self._request
        # What needs the prompt's ids or its length beforehand.
        exactly = bool(request.resume or request.said or request.context or request.only_counts)
        exactly = exactly or not request.shift
        # The runner's contexts are whole steps; within one, only we know what is too long.
        exactly = exactly or self._config.context_length % CONTEXT_STEP > 0
        said = False
        while True:
            answer = await self._begin(exactly=exactly)
            try:
                async with contextlib.aclosing(answer) as events:
                    async for event in events:
                        said = True
                        yield event
                return
            except RunnerRefused as refusal:
                # What is too long is refused before it is read.
                if exactly or said or refusal.error.type != TOO_LONG:
                    raise
            exactly = True

    async def _begin(self, *, exactly: bool) -> AsyncGenerator[Event, None]:
        """The answer, of which nothing is asked yet."""
        request, config = self._request, self._config
        prompt = await read_prompt(self._runner, request, self._spec, config, exactly=exactly)
        if request.only_counts:
            return _counted(prompt)
        limit = token_limit(self._options, config.context_length)
        if not request.shift:
            limit = min(limit, config.context_length - len(prompt.ids))
        if request.is_parsed:
            arguments = template_arguments(request, prompt.messages)
            body = chat_body(arguments, request, self._options, limit, self._schema, self._slot)
            return self._chat(body)
        return self._complete(prompt, limit)

    async def _chat(self, body: bytes) -> AsyncGenerator[Event, None]:
        """An answer whose thoughts and calls are told apart."""
        assembler = ChatAssembler(self._request.logprobs)
        if comes_whole(self._request):
            for output in assembler.feed(await self._runner.client.ask_chat(body)):
                yield output
            yield _chat_finished(assembler)
            return
        stream = await self._runner.client.open_chat(body)
        try:
            while (event := await stream.receive()) is not None:
                for output in assembler.feed(event):
                    yield output
        finally:
            stream.close()
        yield _chat_finished(assembler)

    async def _complete(self, prompt: Prompt, limit: int) -> AsyncGenerator[Event, None]:
        """An answer token by token."""
        request, runner = self._request, self._runner
        resume = request.resume
        limit -= request.said_tokens + len(resume)
        if request.said:
            resume = (*await _read_on(runner, request.said), *resume)
        resumed = len(resume)
        asked = await prompt.asked(runner, resume)
        if resumed:
            is_full = len(prompt.ids) + resumed >= self._config.context_length
            if limit <= 0 or (is_full and not (request.shift and isinstance(asked, list))):
                # The answer was complete but for the word that it is.
                ids = (*prompt.ids, *resume)
                context = ids if _can_go_on(request) else ()
                yield Finished("length", prompt_eval_count=prompt.length, context=context)
                return
            if is_full and isinstance(asked, list):
                keep = kept_tokens(self._options, len(prompt.ids), len(runner.empty_prompt))
                left = shifted(asked, self._config.context_length, keep)
                resumed -= len(asked) - len(left)
                asked = left
        body = completion_body(asked, request, self._options, limit, self._schema, self._slot)
        emitted: list[int] = []
        stream = await runner.client.open_completion(body)
        try:
            assembler = Assembler(request.logprobs)
            while not (event := await stream.receive()).stop:
                for piece in assembler.feed(event):
                    chunk = await _complete(runner, piece)
                    emitted += chunk.tokens
                    yield chunk
        finally:
            stream.close()
        pieces, kept = assembler.finish(event.stop_type)
        if kept:
            text = await runner.client.detokenize(kept)
            pieces.append(Chunk(text, tuple(kept), assembler.likely))
        for piece in pieces:
            chunk = await _complete(runner, piece)
            emitted += chunk.tokens
            yield chunk
        context = ()
        if _can_go_on(request):
            context = (*await prompt_ids(runner, prompt), *resume, *emitted)
        yield _finished(event, context, resumed=resumed)


async def _counted(prompt: Prompt) -> AsyncGenerator[Event, None]:
    yield Finished("stop", prompt_eval_count=prompt.length)


class _Events(trio.abc.ReceiveChannel[Event]):
    """A generation as a channel that is read on demand."""

    def __init__(self, events: AsyncGenerator[Event, None]) -> None:
        self._events = events

    async def receive(self) -> Event:
        try:
            return await anext(self._events)
        except StopAsyncIteration:
            raise trio.EndOfChannel from None

    async def aclose(self) -> None:
        await self._events.aclose()
        await trio.lowlevel.checkpoint()


@dataclasses.dataclass(slots=True)
class _Seat:
    """A slot that a request has, and what it will hold of it."""

    number: int = ANY_SLOT
    held: tuple[prefix.Prompt, ...] = ()
    over: bool = False  # the runner has said its last for it


@contextlib.asynccontextmanager
async def _slot(
    resident: Resident, beginning: prefix.Prompt, max_queue: int
) -> AsyncIterator[_Seat]:
    """One of the runner's slots, first come, first served."""
    if resident.slots.value == 0 and resident.queued >= max_queue:
        raise queue_full()
    resident.queued += 1
    try:
        await resident.slots.acquire()
    finally:
        resident.queued -= 1
    resident.busy += 1
    seat = _Seat(resident.caches.take(beginning), (beginning,))
    try:
        yield seat
    finally:
        resident.busy -= 1
        resident.caches.give_back(seat.number, *seat.held, left=not seat.over)
        resident.slots.release()


async def _until_idle(resident: Resident, number: int) -> None:
    """Wait while the runner is still at work for who has left a slot before the end.

    It notices that behind a batch, or within a second if it does not stream. llama.cpp gives a slot
    that is asked for by its number what it has cached of the new prompt at once, also while it
    reads another one there. With nothing left to read it then finds no end of that: if it is the
    shorter one it spins until it notices, if both are as long it aborts.
    """
    if not resident.caches.was_left(number):
        return
    client = resident.runner.client
    while any(  # noqa: ASYNC110
        slot.id == number and slot.is_processing for slot in await client.slots()
    ):
        await trio.sleep(LOOK_STEP_S)


@contextlib.contextmanager
def _spare_slot(resident: Resident, seat: _Seat) -> Iterator[int]:
    """Where something short can run before the seat's prompt does, and least is lost by it."""
    try:
        resident.slots.acquire_nowait()
    except trio.WouldBlock:
        yield seat.number
        return
    number = resident.caches.take_spare(seat.number, seat.held[0])
    left = True
    try:
        yield number
        left = False
    finally:
        if number != seat.number:
            resident.caches.give_back(number, left=left)
        resident.slots.release()


async def _check_schema(resident: Resident, seat: _Seat, schema: msgspec.Raw) -> None:
    """Refuse a schema that llama.cpp cannot enforce: it would go on without, and only log it.

    It is found out by asking for a token that begins no JSON value. Once for each schema.
    """
    runner = resident.runner
    if bytes(schema) in runner.schemas:
        return
    (*_, impossible) = await runner.client.tokenize("x", add_special=False, parse_special=False)
    with _spare_slot(resident, seat) as slot:
        is_ignored = await runner.client.ignores_schema(schema, impossible, slot)
    if is_ignored:
        reason = next((line for line in runner.errors()[::-1] if "schema" in line), "")
        message = "the format is a JSON schema that llama.cpp cannot enforce"
        message += f": {reason}" if reason else ""
        raise InferenceError(Failed(code="INVALID_FORMAT", message=message, status=400))
    while len(runner.schemas) >= MAX_SCHEMAS:
        runner.schemas.pop()
    runner.schemas.add(bytes(schema))


async def _complete(runner: Runner, piece: Piece) -> Chunk:
    """The piece as a chunk, with the ids that the runner did not tell looked up."""
    if isinstance(piece, Chunk):
        return piece
    ids = runner.spellings.get(piece)
    if ids is None:
        ids = await _spell(runner, piece)
        while len(runner.spellings) >= MAX_SPELLINGS:
            del runner.spellings[next(iter(runner.spellings))]
        runner.spellings[piece] = ids
    return Chunk(piece.text, ids, piece.logprobs)


async def _spell(runner: Runner, gap: Gap) -> tuple[int, ...]:
    """The ids of a gap: how the tokenizer spells its text, if that fits what is known.

    Models write almost always as their tokenizer reads. When one did not (a grammar can make it
    spell a character otherwise), the tokenizer's ids are taken nevertheless: they stand for the
    same text.
    """
    plain = await runner.client.tokenize(gap.text, add_special=False, parse_special=False)
    if gap.fits(plain):
        return tuple(plain)
    # SentencePiece puts a space before a text; after a line end it does not.
    after_line = await runner.client.tokenize(
        "\n" + gap.text, add_special=False, parse_special=False
    )
    tail = after_line[-len(gap.ids) :]
    return tuple(tail if gap.fits(tail) else plain)


async def _read_on(runner: Runner, text: str) -> list[int]:
    """The ids of a text that stands behind others."""
    # SentencePiece puts a space before a text; behind a line end it does not.
    line = await runner.client.tokenize("\n", add_special=False, parse_special=False)
    ids = await runner.client.tokenize("\n" + text, add_special=False, parse_special=False)
    if ids[: len(line)] == line:
        return ids[len(line) :]
    return await runner.client.tokenize(text, add_special=False, parse_special=False)


def _groups(inputs: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    """The inputs in their order, as many at a time as one question may have."""
    group: list[list[int]] = []
    tokens = 0
    for ids in inputs:
        if group and (len(group) == EMBED_GROUP or tokens + len(ids) > EMBED_GROUP_TOKENS):
            yield group
            group, tokens = [], 0
        group.append(ids)
        tokens += len(ids)
    if group:
        yield group


async def _embedding_inputs(resident: Resident, request: EmbedRequest) -> list[list[int]]:
    limit = resident.config.context_length
    client = resident.runner.client
    inputs = []
    for text in request.inputs:
        ids = await client.tokenize(text, add_special=True, parse_special=False)
        if not ids:
            message = "there is nothing to embed: an input is empty"
            raise InferenceError(Failed(code="EMPTY_INPUT", message=message, status=400))
        if len(ids) > limit:
            if not request.truncate:
                raise too_long(len(ids), limit)
            # What the tokenizer puts at the end (a separator) stays there.
            bare = await client.tokenize(text, add_special=False, parse_special=False)
            end = ids[-1:] if ids[-1:] != bare[-1:] else []
            ids = ids[: limit - len(end)] + end
        inputs.append(ids)
    return inputs


def _chat_finished(chat: ChatAssembler) -> Finished:
    return Finished(
        reason="length" if chat.reason == "length" else "stop",
        prompt_eval_count=chat.usage.prompt_tokens,
        prompt_eval_duration=int(chat.timings.prompt_ms * NS_PER_MS),
        eval_count=chat.usage.completion_tokens,
        eval_duration=int(chat.timings.predicted_ms * NS_PER_MS),
        prompt_cached_count=chat.timings.cache_n,
    )


def _can_go_on(request: GenerateRequest) -> bool:
    """Whether a later request can go on from the ids of this one: they cannot tell an image."""
    return request.messages is None and not request.raw and not request.images


def _finished(event: CompletionEvent, context: tuple[int, ...], *, resumed: int) -> Finished:
    timings = event.timings or Timings()
    return Finished(
        reason="length" if event.stop_type == "limit" else "stop",
        prompt_eval_count=event.tokens_evaluated - resumed,
        prompt_eval_duration=int(timings.prompt_ms * NS_PER_MS),
        eval_count=event.tokens_predicted,
        eval_duration=int(timings.predicted_ms * NS_PER_MS),
        context=context,
        prompt_cached_count=timings.cache_n,
        stop_text=event.stopping_word,
    )


def _translated(refusal: RunnerRefused) -> InferenceError:
    """What the client should see of an error that the runner answered with."""
    error = refusal.error
    if error.type == TOO_LONG:
        return too_long(error.n_prompt_tokens, error.n_ctx)
    for mark in TEMPLATE_FAILED:
        _, found, said = error.message.rpartition(mark)
        if found:
            message = f"the model's template does not take this conversation: {said.strip()}"
            return InferenceError(Failed(code="INVALID_REQUEST", message=message, status=400))
    if 400 <= refusal.status < 500 or error.message.startswith(UNREADABLE):
        return InferenceError(Failed(code="INVALID_REQUEST", message=error.message, status=400))
    message = error.message
    if error.is_unparsed:
        message += "; this llama-server cannot tell text that is no UTF-8, newer builds can"
    return InferenceError(Failed(code="ENGINE_ERROR", message=message))
