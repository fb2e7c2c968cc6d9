"""A runner without a model: the few llama-server routes that the engine speaks.

Run as `python -m tests.fakes.fake_runner` with a runner's arguments. Its "GGUF" is a JSON file
that says how it behaves (`Behaviour`), so that one engine can have good and bad models. A token
is a character, its id the code point; BOS is 1. What a completion does stands in its prompt:

- `endless`: tokens until the client closes
- `crash`: two tokens, then the process ends with exit code 9 and a last word
- `mute`: a token, and then nothing more
- `refuse`: an error, as for a bad grammar
- `script`: the events of the behaviour
- `echo` at its beginning: the prompt itself, with each picture's bytes in angle brackets
- else the tokens of `abcde`, at most `n_predict`

A chat sends the events of `chat`, or without any the request itself as text; one that is not to be
streamed is answered with `whole_chat`, if its request is as llama.cpp takes it.

It enforces every JSON schema but that of type `banana`. If it `lingers` in slots that clients have
left, it crashes when it is asked for one of them by its number, as llama.cpp can.
"""

import argparse
import base64
import functools
import os
import sys
from pathlib import Path
from typing import Any

import h11
import msgspec
import trio

BOS = 1
BOS_TEXT = "<s>"
MARKER = "[image]"
WIDTH = 3  # of the embeddings


class Behaviour(msgspec.Struct):
    exit_code: int | None = None  # ends with it while "loading"
    last_words: str = ""
    never_ready: bool = False
    ready_with: str = ""  # not before there is this file
    broken: bool = False  # loads, and crashes with the first token
    most_layers: int | None = None  # "loads" no more of them on GPUs
    script: list[dict[str, Any]] = []
    chat: list[dict[str, Any]] = []
    whole_chat: dict[str, Any] = {}
    spellings: dict[str, list[int]] = {}  # what /tokenize says of these texts
    lingers: int = 0  # it notices that a client has gone when it was asked for its slots so often
    tries_schemas_in: int | None = None  # enforces none that is tried in another slot


class FakeRunner:
    def __init__(self, arguments: argparse.Namespace, behaviour: Behaviour) -> None:
        self.arguments = arguments
        self.behaviour = behaviour
        self.working: list[int] = []  # in these slots
        self.lingering: dict[int, int] = {}  # slots that were left, and looks until that is noticed

    async def serve_connection(self, stream: trio.SocketStream) -> None:
        connection = h11.Connection(h11.SERVER)

        async def next_event() -> Any:
            while (event := connection.next_event()) is h11.NEED_DATA:
                connection.receive_data(await stream.receive_some(65536))
            return event

        async def send(*events: Any) -> None:
            await stream.send_all(b"".join(connection.send(event) or b"" for event in events))

        async def answer(status: int, value: object) -> None:
            body = msgspec.json.encode(value)
            headers = [("Content-Length", str(len(body)))]
            head = h11.Response(status_code=status, headers=headers)
            await send(head, h11.Data(data=body), h11.EndOfMessage())

        try:
            while True:
                request = await next_event()
                if not isinstance(request, h11.Request):
                    return
                body = b""
                while isinstance(part := await next_event(), h11.Data):
                    body += bytes(part.data)
                question = msgspec.json.decode(body) if body else {}
                target = request.target.decode()
                prompt = question.get("prompt", [])
                told = prompt if isinstance(prompt, str | dict) else text_of(prompt)
                refuses = "refuse" in told
                length = self.length_of(question)
                if question.get("stream") and length >= self.arguments.ctx:
                    error = {"type": "exceed_context_size_error", "message": "too long"}
                    error |= {"n_prompt_tokens": length, "n_ctx": self.arguments.ctx}
                    await answer(400, {"error": error})
                elif question.get("stream") and not refuses:
                    headers = [("Transfer-Encoding", "chunked")]
                    await send(h11.Response(status_code=200, headers=headers))
                    slot = self.slot_of(question)
                    self.working.append(slot)
                    try:
                        await (self.complete if "prompt" in question else self.chat)(question, send)
                    except trio.BrokenResourceError:
                        if self.behaviour.lingers:
                            self.lingering[slot] = self.behaviour.lingers
                        raise
                    finally:
                        self.working.remove(slot)
                    await send(h11.EndOfMessage())
                else:
                    await answer(*self.answer(target, question))
                connection.start_next_cycle()
        except (trio.BrokenResourceError, h11.RemoteProtocolError):
            pass
        finally:
            await trio.aclose_forcefully(stream)

    def answer(self, target: str, question: dict[str, Any]) -> tuple[int, object]:
        match target:
            case "/health":
                file = self.behaviour.ready_with
                loading = self.behaviour.never_ready or (file and not Path(file).exists())
                return (503 if loading else 200), {}
            case "/slots":
                for slot in self.lingering:
                    self.lingering[slot] -= 1
                self.lingering = {slot: left for slot, left in self.lingering.items() if left > 0}
                busy = {*self.working, *self.lingering}
                count = self.arguments.parallel
                return 200, [{"id": i, "is_processing": i in busy} for i in range(count)]
            case "/tokenize":
                ids = self.tokens_of(question["content"], add_special=question["add_special"])
                return 200, {"tokens": ids}
            case "/detokenize":
                is_bos = question["tokens"] == [BOS]
                return 200, {"content": BOS_TEXT if is_bos else text_of(question["tokens"])}
            case "/apply-template":
                lines = [f"{m['role']}:{m['content']}\n" for m in question["messages"]]
                return 200, {"prompt": "".join(lines)}
            case "/completion" if not question.get("stream"):
                wanted = self.behaviour.tries_schemas_in
                enforces = question["json_schema"].get("type") != "banana"
                enforces = enforces and wanted in (None, question["id_slot"])
                return 200, {"tokens": [ord("{")] if enforces else question["prompt"]}
            case "/props":
                return 200, {"media_marker": MARKER}
            case "/v1/chat/completions" if "stream_options" not in question:
                assert question["logprobs"]
                return 200, self.behaviour.whole_chat
            case "/v1/embeddings":
                vectors = [
                    {"index": index, "embedding": [float(len(ids))] * WIDTH}
                    for index, ids in enumerate(question["input"])
                ]
                return 200, {"data": vectors[::-1]}
            case _:
                return 400, {"error": {"code": 400, "message": "failed to parse grammar"}}

    def slot_of(self, question: dict[str, Any]) -> int:
        """Where a completion runs."""
        slot: int = question.get("id_slot", -1)
        if self.behaviour.lingers and slot in (*self.working, *self.lingering):
            os._exit(9)
        return slot if slot >= 0 else len(self.working)

    def length_of(self, question: dict[str, Any]) -> int:
        """How many tokens a streamed answer has to read; 0 where that is not looked at."""
        match question:
            case {"prompt": str(text)}:
                return len(self.tokens_of(text, add_special=True))
            case {"messages": list(messages), "stream": True}:
                return sum(len(str(m["content"])) + len(m["role"]) + 2 for m in messages)
        return 0

    def tokens_of(self, text: str, *, add_special: bool) -> list[int]:
        spelling = self.behaviour.spellings.get(text)
        return [BOS] * add_special + (spelling or [ord(character) for character in text])

    async def chat(self, question: dict[str, Any], send: Any) -> None:
        echo = {"choices": [{"delta": {"content": msgspec.json.encode(question).decode()}}]}
        for event in self.behaviour.chat or [echo]:
            await send(h11.Data(data=b"data: " + msgspec.json.encode(event) + b"\n\n"))
        await send(h11.Data(data=b"data: [DONE]\n\n"))

    async def complete(self, question: dict[str, Any], send: Any) -> None:
        asked = question["prompt"]
        if isinstance(asked, str):
            asked = self.tokens_of(asked, add_special=True)
        if isinstance(asked, dict):  # with pictures, which are told by their numbers
            pictures = [f"<{base64.b64decode(each).decode()}>" for each in asked["multimodal_data"]]
            text = asked["prompt_string"]
            for picture in pictures:
                text = text.replace(MARKER, picture, 1)
            asked = [ord(character) for character in text]
        prompt = text_of(asked)

        async def tell(event: dict[str, Any]) -> None:
            await send(h11.Data(data=b"data: " + msgspec.json.encode(event) + b"\n\n"))

        if "script" in prompt:
            for event in self.behaviour.script:
                await tell(event)
            return
        if self.behaviour.broken:
            os._exit(9)
        answer = "ab" if "crash" in prompt else "abcde"[: question["n_predict"]]
        if prompt.startswith("echo"):
            answer = prompt
        count = 0
        while count < len(answer) or "endless" in prompt:
            character = answer[count % len(answer)]
            count += 1
            await tell(
                {"content": character, "tokens": [ord(character)], "tokens_predicted": count}
            )
            await trio.sleep(0.001)
            if "mute" in prompt:
                await trio.sleep_forever()
        if "crash" in prompt:
            print("0.00.000.001 E fake: out of luck", file=sys.stderr, flush=True)
            os._exit(9)
        await tell(
            {
                "stop": True,
                "stop_type": "limit" if count == question["n_predict"] else "eos",
                "tokens_predicted": count,
                "tokens_evaluated": len(asked),
                "timings": {"cache_n": 2, "prompt_ms": 1.5, "predicted_ms": 2.5},
            }
        )


def text_of(ids: list[int]) -> str:
    return "".join(chr(id_) for id_ in ids if id_ != BOS)


async def exit_with_stdin() -> None:
    await trio.to_thread.run_sync(sys.stdin.buffer.read, abandon_on_cancel=True)
    os._exit(0)


async def main(arguments: argparse.Namespace) -> None:
    behaviour = msgspec.json.decode(Path(arguments.model).read_bytes(), type=Behaviour)  # noqa: ASYNC240
    if behaviour.most_layers is not None and arguments.gpu_layers > behaviour.most_layers:
        os._exit(1)
    if behaviour.exit_code is not None:
        print(behaviour.last_words, file=sys.stderr, flush=True)
        os._exit(behaviour.exit_code)
    listener = trio.socket.socket(trio.socket.AF_UNIX)
    await listener.bind(arguments.socket)
    listener.listen()
    runner = FakeRunner(arguments, behaviour)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(exit_with_stdin)
        serve = functools.partial(trio.serve_listeners, runner.serve_connection)
        nursery.start_soon(serve, [trio.SocketListener(listener)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket")
    parser.add_argument("--model")
    parser.add_argument("--parallel", type=int)
    parser.add_argument("--ctx", type=int)
    parser.add_argument("--gpu-layers", type=int)
    parser.add_argument("--list-devices", action="store_true")
    if parser.parse_known_args()[0].list_devices:
        print("CPU: a processor\nCUDA0: a GPU")
        sys.exit()
    trio.run(main, parser.parse_known_args()[0])
