"""The runner's server for ctransformers: the part of llama-server's protocol that it can serve.

It runs the files of 2023 that llama.cpp no longer opens. One request is generated at a time; the
others wait. What the library lacks (grammars, chats with tools, images, most samplers) is refused
with a clear error rather than left out.

Only the standard library and ctransformers are imported: the start is part of every load.
"""

import argparse
import codecs
import ctypes
import hashlib
import http.server
import json
import math
import os
import select
import socket
import socketserver
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

BATCH = 64  # tokens evaluated before somebody looks whether the client is still there
MAX_BODY_BYTES = 64 << 20
BACKLOG = 512  # as many as may queue for a model
SPARE_TOKENS = 8  # beside one for each byte: BOS and the space in front
ENCODING = "utf-8"

# What the library cannot do, by the field that asks for it, and what means "not asked".
UNSUPPORTED = {
    "json_schema": (None, {}),
    "grammar": (None, ""),
    "logit_bias": (None, []),
    "n_probs": (None, 0),
    "image_data": (None, []),
    "multimodal_data": (None, []),
    "min_p": (None, 0),
    "typical_p": (None, 1),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "mirostat": (None, 0),
}


class Refusal(Exception):
    """The request cannot be served; goes to the client in llama-server's form."""

    def __init__(self, message: str, type_: str = "not_supported_error", **fields: int) -> None:
        super().__init__(message)
        self.body = {"error": {"code": 400, "message": message, "type": type_, **fields}}


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


def serve(arguments: argparse.Namespace) -> int:
    """Serve one model; returns the exit code if it cannot be loaded."""
    try:
        model = Model(arguments)
    except (RuntimeError, ValueError, OSError, ImportError) as error:
        _complain(f"ctransformers cannot load the model: {error}")
        return 1
    Path(arguments.socket).unlink(missing_ok=True)
    with _Server(arguments.socket, model) as server:
        server.serve_forever()
    return 0


class Model:
    """The library's model and the tokens that it has evaluated."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        if arguments.adapter or arguments.projector:
            raise ValueError("it has no adapters and no projectors")
        from ctransformers.llm import LLM, Config

        config = Config(context_length=arguments.ctx, gpu_layers=0)
        self._llm = LLM(arguments.model, arguments.legacy_type, config=config)
        # Models of before GGUF have a fixed one in the file.
        self.context_length: int = min(arguments.ctx, self._llm.context_length)
        self.chat_template: str = arguments.chat_template
        self.embeds: bool = arguments.embedding
        self._threads: int = arguments.threads
        self._batch: int = min(arguments.batch or BATCH, BATCH)
        self._evaluated: list[int] = []
        # One generation at a time, and within it one call of the library at a time.
        self.slot = threading.Lock()
        self._library = threading.Lock()

    def tokenize(self, text: str, *, add_special: bool) -> list[int]:
        data = text.encode()
        if b"\0" in data:
            raise Refusal("the text has a NUL character, where ctransformers would end it")
        has_bos = add_special and self._llm.model_type in ("llama", "falcon", "gguf")
        # Not the library's own `tokenize`: it counts characters where it needs bytes, and writes
        # beyond its buffer when there are more tokens than characters.
        buffer = (ctypes.c_int * (len(data) + SPARE_TOKENS))()
        with self._library:
            count = self._llm.ctransformers_llm_tokenize(data, has_bos, buffer)
        return list(buffer[:count])

    def spell(self, token: int) -> bytes:
        if not 0 <= token < self._llm.vocab_size:
            raise Refusal(f"there is no token {token}", "invalid_request_error")
        with self._library:
            data: bytes = self._llm.ctransformers_llm_detokenize(token)
        return data

    def is_end(self, token: int) -> bool:
        return bool(self._llm.is_eos_token(token))

    def evaluate(self, tokens: Sequence[int], progress: Callable[[int], None]) -> int:
        """Have these tokens, and nothing behind them, evaluated; returns how many were already."""
        for token in tokens:
            if not 0 <= token < self._llm.vocab_size:
                raise Refusal(f"there is no token {token}", "invalid_request_error")
        known = 0
        # At least one is evaluated again: scores are there for the last one only.
        longest = min(len(self._evaluated), len(tokens) - 1)
        while known < longest and self._evaluated[known] == tokens[known]:
            known += 1
        del self._evaluated[known:]
        for start in range(known, len(tokens), self._batch):
            self._append(tokens[start : start + self._batch])
            progress(min(start + self._batch, len(tokens)))
        return known

    def append(self, token: int, keep: int) -> None:
        """Evaluate one more; a full context drops the older half of what is behind `keep`."""
        if len(self._evaluated) >= self.context_length:
            kept = self._evaluated[: max(0, min(keep, self.context_length // 2))]
            rest = self._evaluated[len(kept) :]
            tokens = kept + rest[len(rest) // 2 :]
            self.evaluate(tokens, lambda _: None)
        self._append([token])

    def _append(self, tokens: Sequence[int]) -> None:
        count = len(tokens)
        array = (ctypes.c_int * count)(*tokens)
        with self._library:
            done = self._llm.ctransformers_llm_batch_eval(
                array, count, len(self._evaluated), count, self._threads
            )
        if not done:
            self._evaluated.clear()
            raise Refusal("ctransformers failed to evaluate the tokens", "server_error")
        self._evaluated += tokens

    def sample(self, options: dict[str, Any], seed: int) -> int:
        penalty = float(options.get("repeat_penalty", 1.0))
        last_n = int(options.get("repeat_last_n", 64))
        last = self._evaluated[-last_n:] if last_n > 0 else self._evaluated
        if penalty == 1.0 or last_n == 0:
            last = []
        temperature = float(options.get("temperature", 0.8))
        top_k = int(options.get("top_k", 40))
        if temperature <= 0:  # the likeliest
            top_k, temperature = 1, 1.0
        array = (ctypes.c_int * len(last))(*last)
        with self._library:
            return int(
                self._llm.ctransformers_llm_sample(
                    array,
                    len(last),
                    top_k if top_k > 0 else self._llm.vocab_size,
                    float(options.get("top_p", 0.95)),
                    temperature,
                    penalty,
                    # The library begins its generator anew for every token: with one seed all
                    # tokens would get the same luck. By position, an answer that is continued
                    # elsewhere goes on with the luck that it would have had.
                    _mixed(seed, len(self._evaluated)),
                )
            )

    def embed(self, tokens: Sequence[int]) -> list[float]:
        """The mean of the tokens' vectors, of length 1."""
        if not tokens:
            raise Refusal("there is nothing to embed", "invalid_request_error")
        total: list[float] = []
        self._evaluated.clear()
        for token in tokens:
            # The library tells the vector of the last token only.
            self.evaluate([*self._evaluated, token], lambda _: None)
            with self._library:
                vector = list(self._llm.embeddings)
            if not vector:
                raise Refusal(
                    f"ctransformers makes no embeddings with a {self._llm.model_type} model"
                )
            total = [a + b for a, b in zip(total or [0.0] * len(vector), vector, strict=True)]
        norm = math.sqrt(sum(number * number for number in total)) or 1.0
        return [number / norm for number in total]

    def render(self, question: dict[str, Any]) -> str:
        """A chat as a prompt: by the model's Jinja template, else in plain words."""
        if question.get("tools"):
            raise Refusal("ctransformers has no tools; run the model with another engine")
        messages = question["messages"]
        if any(not isinstance(message["content"], str) for message in messages):
            raise Refusal("ctransformers reads text only, no images")
        if self.chat_template:
            from jinja2 import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment

            environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
            try:
                return environment.from_string(self.chat_template).render(
                    messages=messages, add_generation_prompt=True, bos_token="", eos_token=""
                )
            except TemplateError as error:
                raise Refusal(f"the chat template fails: {error}") from None
        if [message["role"] for message in messages] == ["user"]:
            return str(messages[0]["content"])
        turns = [f"### {m['role'].capitalize()}:\n{m['content']}\n\n" for m in messages]
        return "".join(turns) + "### Assistant:\n"


class Completion:
    """One generation: what llama-server would tell of it, event by event."""

    def __init__(self, model: Model, question: dict[str, Any]) -> None:
        for field, neutral in UNSUPPORTED.items():
            if question.get(field) not in neutral:
                raise Refusal(f"ctransformers does not know {field}; leave it out")
        prompt = question.get("prompt", [])
        self._prompt = (
            model.tokenize(prompt, add_special=True) if isinstance(prompt, str) else prompt
        )
        if not self._prompt:
            raise Refusal("the prompt is empty", "invalid_request_error")
        if len(self._prompt) >= model.context_length:
            raise Refusal(
                "the prompt exceeds the context",
                "exceed_context_size_error",
                n_prompt_tokens=len(self._prompt),
                n_ctx=model.context_length,
            )
        self._model = model
        self._options = question
        limit = int(question.get("n_predict", -1))
        self._limit = limit if limit >= 0 else sys.maxsize
        seed = int(question.get("seed", -1))
        self._seed = seed if seed >= 0 else int.from_bytes(os.urandom(4), "little")
        self._stops = [text for text in question.get("stop") or () if text]

    def events(self, tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Tell each event; returns the last one."""
        model, prompt = self._model, self._prompt
        started = time.perf_counter()

        def progress(processed: int) -> None:
            told = {"total": len(prompt), "cache": 0, "processed": processed}
            tell({"content": "", "tokens": [], "stop": False, "prompt_progress": told})

        cached = model.evaluate(prompt, progress)
        evaluated = time.perf_counter()
        decoder = codecs.getincrementaldecoder(ENCODING)(errors="ignore")
        held = ""  # text that waits, with its tokens, until no stop string can begin in it
        text = ""  # all that was said
        count = 0
        stop_type = "limit"
        while count < self._limit:
            token = model.sample(self._options, self._seed)
            count += 1
            event: dict[str, Any] = {"tokens": [token], "tokens_predicted": count, "stop": False}
            if model.is_end(token):
                text += held
                tell(event | {"content": held})
                stop_type = "eos"
                break
            held += decoder.decode(model.spell(token))
            at = min((i for stop in self._stops if (i := held.find(stop)) >= 0), default=-1)
            if at >= 0:
                text += held[:at]
                tell(event | {"content": held[:at]})
                stop_type = "word"
                break
            # A text goes out with all of its tokens and nobody else's: who goes on with these
            # tokens elsewhere goes on behind this text.
            unfinished, _ = decoder.getstate()
            said = ""
            if not unfinished and not any(_overlap(held, stop) for stop in self._stops):
                said, held = held, ""
            text += said
            tell(event | {"content": said})
            if count < self._limit:
                model.append(token, int(self._options.get("n_keep", 0)))
        if stop_type == "limit":
            text += held
        now = time.perf_counter()
        return {
            "content": "" if self._options.get("stream") else text,
            "tokens": [],
            "stop": True,
            "stop_type": stop_type,
            "tokens_predicted": count,
            "tokens_evaluated": len(prompt),
            "timings": {
                "cache_n": cached,
                "prompt_n": len(prompt) - cached,
                "prompt_ms": 1000 * (evaluated - started),
                "predicted_n": count,
                "predicted_ms": 1000 * (now - evaluated),
            },
        }


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = BACKLOG

    def __init__(self, path: str, model: Model) -> None:
        self.model = model
        super().__init__(path, _Handler)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def address_string(self) -> str:
        return "daemon"  # a Unix socket has no address, where the base class wants a pair

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        model = self.server.model
        match self.path:
            case "/health":
                self._answer(200, {"status": "ok"})
            case "/slots":
                self._answer(200, [{"id": 0, "is_processing": model.slot.locked()}])
            case "/props":
                settings = {"n_ctx": model.context_length}
                props = {"total_slots": 1, "default_generation_settings": settings}
                self._answer(200, props | {"chat_template": model.chat_template})
            case _:
                self._answer(404, Refusal(f"there is no route {self.path}").body)

    def do_POST(self) -> None:
        try:
            question = self._question()
            model = self.server.model
            match self.path:
                case "/tokenize":
                    ids = model.tokenize(
                        question["content"], add_special=bool(question.get("add_special"))
                    )
                    self._answer(200, {"tokens": ids})
                case "/detokenize":
                    data = b"".join(model.spell(token) for token in question["tokens"])
                    self._answer(200, {"content": data.decode(errors="ignore")})
                case "/apply-template":
                    self._answer(200, {"prompt": model.render(question)})
                case "/completion":
                    self._complete(question)
                case "/v1/embeddings" | "/embeddings":
                    self._embed(question)
                case _:
                    raise Refusal(f"ctransformers does not serve {self.path}")
        except Refusal as refusal:
            self._answer(400, refusal.body)
        except (KeyError, TypeError, ValueError) as error:
            self._answer(
                400, Refusal(f"malformed request: {error!r}", "invalid_request_error").body
            )
        except (ClientGone, OSError):
            self.close_connection = True

    def _question(self) -> dict[str, Any]:
        length = int(self.headers.get("Content-Length", 0))
        if length > MAX_BODY_BYTES:
            raise Refusal("the request is too large", "invalid_request_error")
        question = json.loads(self.rfile.read(length) or b"{}")
        if not isinstance(question, dict):
            raise ValueError("not an object")
        return question

    def _complete(self, question: dict[str, Any]) -> None:
        completion = Completion(self.server.model, question)
        streams = bool(question.get("stream"))
        tokens: list[int] = []

        def tell(event: dict[str, Any]) -> None:
            self._check_client()
            if streams:
                if "prompt_progress" not in event or question.get("return_progress"):
                    self._send_event(event)
            else:
                tokens.extend(event["tokens"])

        with self._slot():
            if streams:
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                try:
                    self._send_event(completion.events(tell))
                except Refusal as refusal:
                    self._send_event(refusal.body)
                self.wfile.write(b"0\r\n\r\n")
            else:
                last = completion.events(tell)
                self._answer(200, last | {"tokens": tokens})

    def _embed(self, question: dict[str, Any]) -> None:
        model = self.server.model
        inputs = question["input"]
        if isinstance(inputs, str) or (inputs and isinstance(inputs[0], int)):
            inputs = [inputs]
        data = []
        with self._slot():
            for index, given in enumerate(inputs):
                self._check_client()
                tokens = (
                    model.tokenize(given, add_special=True) if isinstance(given, str) else given
                )
                vector = model.embed(tokens)
                data.append({"index": index, "embedding": vector, "object": "embedding"})
        self._answer(200, {"object": "list", "data": data})

    def _slot(self) -> "_Slot":
        return _Slot(self.server.model.slot, self._check_client)

    def _check_client(self) -> None:
        """Raises ClientGone if the connection was closed."""
        connection: socket.socket = self.connection
        readable, _, _ = select.select([connection], [], [], 0)
        if readable and not connection.recv(1, socket.MSG_PEEK):
            raise ClientGone

    def _send_event(self, event: dict[str, Any]) -> None:
        data = b"data: " + json.dumps(event).encode() + b"\n\n"
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def _answer(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class _Slot:
    """The only slot; who waits for it and goes away leaves the queue."""

    LOOK_S = 0.1

    def __init__(self, lock: threading.Lock, check: Callable[[], None]) -> None:
        self._lock = lock
        self._check = check

    def __enter__(self) -> None:
        while not self._lock.acquire(timeout=self.LOOK_S):
            self._check()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def _mixed(seed: int, position: int) -> int:
    digest = hashlib.blake2b(struct.pack("<QQ", seed & 0xFFFFFFFFFFFFFFFF, position), digest_size=4)
    return int.from_bytes(digest.digest(), "little") & 0x7FFFFFFF


def _complain(message: str) -> None:
    print(f"0.00.000.000 E {message}", file=sys.stderr, flush=True)
