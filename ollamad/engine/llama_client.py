"""A client of llama.cpp's server protocol on a Unix socket, with little work for each token.

HTTP/1.1 with h11 on a trio stream; foreign errors are translated here. It knows nothing of
models, slots or processes. The paths and fields are llama-server's own, so that a binary built
elsewhere serves as well.
"""

import math
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import h11
import msgspec
import trio

RECEIVE_BYTES = 1 << 16
MAX_IDLE_CONNECTIONS = 2  # each one occupies a thread of the runner
# A busy runner takes connections late, and the kernel keeps few (cpp-httplib asks for five).
CONNECT_PATIENCE_S = 5.0
CONNECT_STEP_S = 0.005
IDLE_CONNECTION_S = 2.0  # llama.cpp's server closes them after five seconds
MAX_ANSWER_BYTES = 256 << 20  # 32 embeddings of 8,192 numbers are 6 MiB; a template is small
MAX_EVENT_BYTES = 64 << 20  # of a stream; the last one repeats the whole prompt
# What passes through the runner's decode loop. Its HTTP threads answer the rest, also when the
# loop hangs.
DECODED = frozenset(("/completion", "/v1/chat/completions", "/v1/embeddings"))
# Some versions of llama-server (b10434; no more b11549) read every answer with a parser, which
# refuses what is no UTF-8 (llama.cpp's issue 27543): the tokens were computed, but are not told.
UNPARSED = "does not match the expected"

# What is waited for: the first sign of an answer, its next token, or all of it. Prompts are read in
# batches, those of lower slots first, so the first may be long in coming while others are served;
# a next token is part of every batch.
Awaited = Literal["first", "next", "whole"]

T = TypeVar("T")


class RunnerGone(Exception):
    """The connection broke or could not be made: the runner has most likely died."""


class RunnerStalled(RunnerGone):
    """The runner answers others, but not this request."""


class RunnerRefused(Exception):
    """The runner answered with an error."""

    def __init__(self, status: int, error: "ErrorBody") -> None:
        super().__init__(error.message)
        self.status = status
        self.error = error


class ErrorBody(msgspec.Struct):
    """llama-server's description of an error."""

    message: str = "no reason given"
    type: str = ""
    code: int = 500
    n_prompt_tokens: int = 0
    n_ctx: int = 0

    @property
    def is_unparsed(self) -> bool:
        """Whether the model spoke, and what it said could not be read."""
        return UNPARSED in self.message


class _ErrorAnswer(msgspec.Struct):
    error: ErrorBody = msgspec.field(default_factory=ErrorBody)


class Timings(msgspec.Struct, gc=False):
    """What a completion cost; times in milliseconds."""

    cache_n: int = 0
    prompt_n: int = 0
    prompt_ms: float = 0.0
    predicted_n: int = 0
    predicted_ms: float = 0.0


class Progress(msgspec.Struct, gc=False):
    """How far the evaluation of a prompt is, in tokens."""

    total: int = 0
    processed: int = 0


class Candidate(msgspec.Struct):
    """A token that could have been written."""

    bytes: list[int] = []
    logprob: float = 0.0


class Probability(msgspec.Struct):
    """How likely a token was; `top_logprobs` has the likeliest ones."""

    id: int = 0
    bytes: list[int] = []
    logprob: float = 0.0
    top_logprobs: list[Candidate] = []


class CompletionEvent(msgspec.Struct):
    """One line of a streamed `/completion`; the one with `stop` is the last."""

    content: str = ""
    tokens: list[int] = []
    stop: bool = False
    tokens_predicted: int = 0  # so far
    tokens_evaluated: int = 0  # the prompt's
    stop_type: str = ""  # eos, limit or word
    stopping_word: str = ""
    timings: Timings | None = None
    error: ErrorBody | None = None
    prompt_progress: Progress | None = None  # then the rest says nothing
    completion_probabilities: list[Probability] = []


class _Props(msgspec.Struct):
    media_marker: str = ""


class _Tokens(msgspec.Struct):
    tokens: list[int]


class _Content(msgspec.Struct):
    content: str


class _Prompt(msgspec.Struct):
    prompt: str


class _Embedding(msgspec.Struct):
    index: int
    embedding: tuple[float, ...]


class _Embeddings(msgspec.Struct):
    data: list[_Embedding]


class Slot(msgspec.Struct):
    """One of the runner's places for a running request."""

    id: int
    is_processing: bool


class FunctionDelta(msgspec.Struct):
    name: str = ""
    arguments: str = ""


class CallDelta(msgspec.Struct):
    """A bit of a call: its name comes whole with its beginning, its arguments in pieces."""

    index: int = 0
    function: FunctionDelta = msgspec.field(default_factory=FunctionDelta)


class Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[CallDelta] = []


class Logprobs(msgspec.Struct):
    content: list[Probability] | None = None


class Choice(msgspec.Struct):
    delta: Delta = msgspec.field(default_factory=Delta)
    finish_reason: str | None = None  # stop, length or tool_calls
    logprobs: Logprobs | None = None


class Usage(msgspec.Struct):
    completion_tokens: int = 0
    prompt_tokens: int = 0


class ChatEvent(msgspec.Struct):
    """One line of a streamed `/v1/chat/completions`; usage and timings come behind the last."""

    choices: list[Choice] = []
    usage: Usage | None = None
    timings: Timings | None = None
    error: ErrorBody | None = None
    prompt_progress: Progress | None = None  # then the rest says nothing


class _Call(msgspec.Struct):
    function: FunctionDelta


class _ChatMessage(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[_Call] = []


class _ChatChoice(msgspec.Struct):
    message: _ChatMessage
    finish_reason: str | None = None
    logprobs: Logprobs | None = None


class _WholeChat(msgspec.Struct):
    choices: list[_ChatChoice]
    usage: Usage | None = None
    timings: Timings | None = None


_decode_event = msgspec.json.Decoder(CompletionEvent).decode
_decode_chat_event = msgspec.json.Decoder(ChatEvent).decode


class LlamaClient:
    """Speaks to the runner behind one socket. Cancelling a call closes its connection.

    Every call raises RunnerGone if the runner is not there or goes away, RunnerRefused if it
    answers with an error.
    """

    def __init__(self, socket_path: Path) -> None:
        self._path = str(socket_path)
        self._idle: list[_Connection] = []
        self._waits: set[_Wait] = set()
        self._heard_at = 0.0

    def silence_s(self, now: float) -> float:
        """Seconds that all who wait have heard nothing by `now`; zero when nothing is waited for.

        What keeps a connection alive without saying anything is silence, and so is what the
        decode loop has no part in.
        """
        if not self._waits:
            return 0.0
        first = min(wait.since for wait in self._waits)
        return now - max(first, self._heard_at)

    def overdue(self, now: float, next_s: float, first_s: float) -> list["_Wait"]:
        """The waits that last so many seconds by `now`: `next_s` for a next token, `first_s` else.

        Those for whole answers are never among them: that they are silent says nothing.
        """
        patience = {"first": first_s, "next": next_s, "whole": math.inf}
        return [wait for wait in self._waits if now - wait.since >= patience[wait.what]]

    async def is_ready(self) -> bool:
        """Whether the model is loaded. False also while nobody listens yet."""
        try:
            status, _ = await self._request("GET", "/health")
        except RunnerGone:
            return False
        return status == 200

    async def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """The token ids of a text; `add_special` adds BOS (and EOS) where the model wants it."""
        question = {"content": text, "add_special": add_special, "parse_special": parse_special}
        return (await self._ask("/tokenize", question, _Tokens)).tokens

    async def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of some token ids, with the text of special tokens."""
        return (await self._ask("/detokenize", {"tokens": list(tokens)}, _Content)).content

    async def apply_template(self, arguments: Mapping[str, Any]) -> str:
        """The prompt that the model's chat template makes of `messages` and what else it gets."""
        return (await self._ask("/apply-template", arguments, _Prompt)).prompt

    async def media_marker(self) -> str:
        """What stands in a prompt for an image; nobody can guess it."""
        status, body = await self._request("GET", "/props")
        return _answer(status, body, _Props).media_marker

    async def embed(self, inputs: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
        """One vector, L2-normalised, for each input of token ids, in their order."""
        answer = await self._ask("/v1/embeddings", {"input": inputs}, _Embeddings)
        answer.data.sort(key=lambda item: item.index)
        return [item.embedding for item in answer.data]

    async def ignores_schema(self, schema: msgspec.Raw, impossible: int, slot: int) -> bool:
        """Whether a completion comes out as a token that the schema forbids at the start."""
        question = {
            "id_slot": slot,
            "prompt": [impossible],
            "json_schema": schema,
            "logit_bias": [[impossible, 1000]],
            "n_predict": 1,
            "temperature": 0,
            "return_tokens": True,
        }
        return impossible in (await self._ask("/completion", question, CompletionEvent)).tokens

    async def probe_text(self, tokens: Sequence[int]) -> None:
        """Have one token generated, to see that the model works."""
        body = {"prompt": tokens, "n_predict": 1, "stream": True, "cache_prompt": False}
        stream = await self.open_completion(msgspec.json.encode(body))
        try:
            while not (await stream.receive()).stop:
                pass
        except RunnerRefused as refusal:
            if not refusal.error.is_unparsed:
                raise
        finally:
            stream.close()

    async def slots(self) -> list[Slot]:
        """What the runner's slots are doing."""
        status, body = await self._request("GET", "/slots")
        return _answer(status, body, list[Slot])

    async def open_completion(self, body: bytes) -> "CompletionStream":
        """Send a `/completion` request (JSON with `stream`) on a connection of its own.

        Returns when the runner has begun to answer, which is after the prompt's evaluation.
        """
        return CompletionStream(await self._open_stream("/completion", body), self)

    async def open_chat(self, body: bytes) -> "ChatStream":
        """The same for `/v1/chat/completions`: the runner tells thoughts and calls apart."""
        return ChatStream(await self._open_stream("/v1/chat/completions", body), self)

    async def ask_chat(self, body: bytes) -> ChatEvent:
        """The whole answer of `/v1/chat/completions` to a body that asks for no stream, as one
        event."""
        status, answer = await self._request("POST", "/v1/chat/completions", body, "whole")
        whole = _answer(status, answer, _WholeChat)
        choices = []
        for choice in whole.choices:
            said = choice.message
            calls = [CallDelta(index, call.function) for index, call in enumerate(said.tool_calls)]
            delta = Delta(said.content, said.reasoning_content, calls)
            choices.append(Choice(delta, choice.finish_reason, choice.logprobs))
        return ChatEvent(choices, whole.usage, whole.timings)

    async def _open_stream(self, target: str, body: bytes) -> "_Connection":
        connection = await self._connect()
        try:
            with self.waits(connection):
                status = await connection.send("POST", target, body)
                if status != 200:
                    raise RunnerRefused(status, _error_of(await connection.read_all()))
        except BaseException:
            connection.close()
            raise
        return connection

    def waits(self, connection: "_Connection", what: Awaited = "first") -> "_Wait":
        """A context in which this connection's answer is waited for."""
        return _Wait(self, connection, what)

    def begin_wait(self, wait: "_Wait") -> None:
        wait.since = trio.current_time()
        self._waits.add(wait)

    def end_wait(self, wait: "_Wait", *, heard: bool) -> None:
        self._waits.remove(wait)
        if heard:
            self._heard_at = trio.current_time()

    def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            self._idle.pop().close()

    async def _ask(self, target: str, question: object, answer_type: type[T]) -> T:
        status, body = await self._request("POST", target, msgspec.json.encode(question))
        return _answer(status, body, answer_type)

    async def _request(
        self, method: str, target: str, body: bytes = b"", what: Awaited = "first"
    ) -> tuple[int, bytes]:
        while (connection := self._take_idle()) is not None:
            try:
                return await self._exchange(connection, method, target, body, what)
            except RunnerStalled:
                raise
            except RunnerGone:
                continue  # closed meanwhile; the next one is tried, a new one at last
        return await self._exchange(await self._connect(), method, target, body, what)

    async def _exchange(
        self, connection: "_Connection", method: str, target: str, body: bytes, what: Awaited
    ) -> tuple[int, bytes]:
        try:
            with self.waits(connection, what) as wait:
                status = await connection.send(method, target, body)
                answer = await connection.read_all()
                wait.hears_loop = status == 200 and target in DECODED
            reusable = connection.reset()
        except BaseException:
            connection.close()
            raise
        if reusable and len(self._idle) < MAX_IDLE_CONNECTIONS:
            self._idle.append(connection)
        else:
            connection.close()
        return status, answer

    def _take_idle(self) -> "_Connection | None":
        while self._idle:
            connection = self._idle.pop()
            if trio.current_time() - connection.last_used < IDLE_CONNECTION_S:
                return connection
            connection.close()
        return None

    async def _connect(self) -> "_Connection":
        await trio.lowlevel.checkpoint()
        connection = socket.socket(socket.AF_UNIX)
        connection.setblocking(False)
        try:
            give_up_at = trio.current_time() + CONNECT_PATIENCE_S
            while True:
                try:
                    connection.connect(self._path)  # a Unix socket connects at once or not at all
                    break
                except BlockingIOError:
                    if trio.current_time() >= give_up_at:
                        raise
                    await trio.sleep(CONNECT_STEP_S)
        except OSError as error:
            connection.close()
            raise RunnerGone(f"cannot connect to the runner: {error}") from error
        except BaseException:
            connection.close()
            raise
        return _Connection(connection)


class _Wait:
    """Something is waited for while its context is open."""

    __slots__ = ("_client", "_connection", "hears_loop", "since", "what")

    def __init__(self, client: LlamaClient, connection: "_Connection", what: Awaited) -> None:
        self._client = client
        self._connection = connection
        self.what: Awaited = what
        self.since = 0.0  # when this silence began
        self.hears_loop = True  # an answer shows that the decode loop works

    def abandon(self) -> None:
        """End the request; who waits hears RunnerStalled."""
        self._connection.abandon()

    def __enter__(self) -> Self:
        self._client.begin_wait(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Who gave up waiting has heard nothing.
        self._client.end_wait(self, heard=kind is None and self.hears_loop)


class _EventStream:
    """A running answer. Whoever opened it must close it; closing early cancels it.

    The chunked coding is undone here and the socket is read without trio's stream: both are on
    the path of every token, beside a llama.cpp that wants all cores. That saves a third of the
    CPU time that a token costs here with h11 and SocketStream (185 to 125 µs, four streams).
    """

    def __init__(self, connection: "_Connection", client: LlamaClient) -> None:
        self._connection = connection
        self._wait = client.waits(connection)
        self._socket = connection.stdlib_socket
        self._coded = connection.take_over()  # bytes in the chunked coding
        self._text = bytearray()  # what is left of an event that came in several chunks

    async def _next_data(self) -> bytes:
        """The data of the next event.

        Raises:
          RunnerGone: the stream ended without its last event.
        """
        while True:
            line = self._next_line()
            if line is None:
                return await self._wait_for_data()
            if line.startswith(b"data: "):
                return line[6:]
            # else the blank line after an event, or a comment that keeps it alive

    async def _wait_for_data(self) -> bytes:
        with self._wait:
            while True:
                line = self._next_line()
                if line is None:
                    await self._read()
                elif line.startswith(b"data: "):
                    return line[6:]

    def close(self) -> None:
        """Close the connection; the runner stops a generation that is not over."""
        self._connection.close()

    def _next_line(self) -> bytes | None:
        """The next whole line, or None if more bytes are needed."""
        while (end := self._text.find(b"\n")) < 0:
            if not self._next_chunk():
                return None
        line = bytes(self._text[:end])
        del self._text[: end + 1]
        return line

    def _next_chunk(self) -> bool:
        """Move the data of the next chunk to the text; false if it is not complete yet."""
        head = self._coded.find(b"\r\n")
        if head < 0:
            return False
        try:
            size = int(self._coded[:head].partition(b";")[0], 16)
        except ValueError:
            raise RunnerGone("the runner's stream is not in chunks") from None
        start = head + 2
        if size == 0:
            raise RunnerGone("the runner ended the stream in the middle")
        if len(self._text) + size > MAX_EVENT_BYTES:
            raise RunnerGone("the runner sent an endless event")
        if len(self._coded) < start + size + 2:
            return False
        self._text += self._coded[start : start + size]
        del self._coded[: start + size + 2]
        return True

    async def _read(self) -> None:
        try:
            await trio.lowlevel.wait_readable(self._socket)
            data = self._socket.recv(RECEIVE_BYTES)
        except trio.ClosedResourceError:
            raise self._connection.stalled() from None
        except BlockingIOError:
            return
        except OSError as error:
            raise RunnerGone(f"the runner closed the connection: {error}") from error
        if not data:
            raise RunnerGone("the runner closed the connection in the middle")
        self._coded += data


class CompletionStream(_EventStream):
    """A running completion: its tokens."""

    async def receive(self) -> CompletionEvent:
        """The next event.

        Raises:
          RunnerGone: the stream ended without its last event.
          RunnerRefused: the runner gave up on the request.
        """
        while True:
            event = _decoded(_decode_event, await self._next_data())
            if event.error is not None:
                raise RunnerRefused(event.error.code, event.error)
            if event.prompt_progress is None:
                self._wait.what = "next"
                return event


class ChatStream(_EventStream):
    """A running chat: its text, thoughts and calls.

    Not every token is heard: of a call llama.cpp tells what it understands so far.
    """

    async def receive(self) -> ChatEvent | None:
        """The next event; None at the end.

        Raises:
          RunnerGone: the stream ended without its last event.
          RunnerRefused: the runner gave up on the request.
        """
        while (data := await self._next_data()) != b"[DONE]":
            event = _decoded(_decode_chat_event, data)
            if event.error is not None:
                raise RunnerRefused(event.error.code, event.error)
            if event.prompt_progress is None:
                return event
        return None


class _Connection:
    """One HTTP/1.1 connection. After an error or a cancellation it can only be closed."""

    def __init__(self, stdlib_socket: socket.socket) -> None:
        self.stdlib_socket = stdlib_socket
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(stdlib_socket))
        self._http = h11.Connection(h11.CLIENT)
        self._abandoned = False
        self.last_used = 0.0

    def abandon(self) -> None:
        """Have whoever waits for an answer hear RunnerStalled."""
        self._abandoned = True
        self._stream.socket.close()

    def stalled(self) -> RunnerGone:
        if self._abandoned:
            return RunnerStalled("it answers others, but not this request")
        return RunnerGone("the connection to the runner was closed")

    async def send(self, method: str, target: str, body: bytes) -> int:
        """Send a request; returns the answer's status when its head has arrived."""
        headers = [("Host", "runner"), ("Content-Length", str(len(body)))]
        if body:
            headers.append(("Content-Type", "application/json"))
        request = h11.Request(method=method, target=target, headers=headers)
        data = self._http.send(request) or b""
        data += self._http.send(h11.Data(data=body)) or b""
        data += self._http.send(h11.EndOfMessage()) or b""
        try:
            await self._stream.send_all(data)
        except trio.ClosedResourceError:
            raise self.stalled() from None
        except trio.BrokenResourceError as error:
            raise RunnerGone(f"the runner closed the connection: {error}") from error
        while True:
            event = await self._next_event()
            if isinstance(event, h11.Response):
                return event.status_code
            if not isinstance(event, h11.InformationalResponse):
                raise RunnerGone("the runner closed the connection without an answer")

    async def receive_body(self) -> bytes:
        """The next part of the answer's body; empty at its end."""
        event = await self._next_event()
        return bytes(event.data) if isinstance(event, h11.Data) else b""

    async def read_all(self) -> bytes:
        """The answer's whole body."""
        parts = bytearray()
        while data := await self.receive_body():
            parts += data
            if len(parts) > MAX_ANSWER_BYTES:
                raise RunnerGone("the runner's answer is too long")
        return bytes(parts)

    def take_over(self) -> bytearray:
        """What has come of the body already; the caller reads the rest off the socket."""
        return bytearray(self._http.trailing_data[0])

    def reset(self) -> bool:
        """Get ready for another request; false if the connection is spent."""
        if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return False
        self._http.start_next_cycle()
        self.last_used = trio.current_time()
        return True

    def close(self) -> None:
        """Close at once, without waiting."""
        self._stream.socket.close()

    async def _next_event(self) -> object:
        while True:
            try:
                event = self._http.next_event()
                if event is not h11.NEED_DATA:
                    return event
                self._http.receive_data(await self._stream.receive_some(RECEIVE_BYTES))
            except h11.RemoteProtocolError as error:
                raise RunnerGone(f"the runner broke off: {error}") from error
            except trio.ClosedResourceError:
                raise self.stalled() from None
            except trio.BrokenResourceError as error:
                raise RunnerGone(f"the runner closed the connection: {error}") from error


def _decoded(decode: Callable[[bytes], T], data: bytes) -> T:
    try:
        return decode(data)
    except msgspec.DecodeError as error:
        raise RunnerGone(f"the runner sent what is no event: {error}") from error


def _answer(status: int, body: bytes, answer_type: type[T]) -> T:
    if status != 200:
        raise RunnerRefused(status, _error_of(body))
    try:
        return msgspec.json.decode(body, type=answer_type)
    except msgspec.DecodeError as error:
        raise RunnerGone(f"the runner's answer cannot be read: {error}") from error


def _error_of(body: bytes) -> ErrorBody:
    try:
        return msgspec.json.decode(body, type=_ErrorAnswer).error
    except msgspec.DecodeError:
        return ErrorBody(message=body[:200].decode(errors="replace") or "no reason given")
