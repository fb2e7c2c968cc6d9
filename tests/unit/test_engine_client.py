"""The client against servers that misbehave, byte by byte."""

import contextlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from ollamad.engine import llama_client
from ollamad.engine.llama_client import LlamaClient, RunnerGone, RunnerRefused, RunnerStalled

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
FIRST = b'data: {"content":"a","tokens":[5],"tokens_predicted":1}\n\n'
# Its token is none: llama.cpp sends a default value.
PROGRESS = b'data: {"content":"","tokens":[0],"prompt_progress":{"total":9,"processed":5}}\n\n'
LAST = b'data: {"stop":true,"stop_type":"limit"}\n\n'
DEADLINE_S = 10

Handler = Callable[[trio.SocketStream], Awaitable[None]]


def chunk(data: bytes, extension: bytes = b"") -> bytes:
    return b"%x%b\r\n%b\r\n" % (len(data), extension, data)


@contextlib.asynccontextmanager
async def client_of(directory: Path, handler: Handler) -> AsyncIterator[LlamaClient]:
    """A client of a server whose every connection is the handler's."""
    path = directory / "s"
    listener = trio.socket.socket(trio.socket.AF_UNIX)
    await listener.bind(str(path))
    listener.listen()
    client = LlamaClient(path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, handler, [trio.SocketListener(listener)])
        with trio.fail_after(DEADLINE_S):
            yield client
        client.close()
        nursery.cancel_scope.cancel()


def answering(data: bytes, byte_by_byte: bool = False) -> Handler:
    """Reads a request, answers with these bytes, closes."""

    async def handler(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some()
            for part in [bytes([byte]) for byte in data] if byte_by_byte else [data]:
                await stream.send_all(part)
                await trio.lowlevel.checkpoint()

    return handler


@pytest.mark.parametrize("byte_by_byte", [False, True])
async def test_a_stream_in_any_cut(tmp_path: Path, byte_by_byte: bool):
    both = FIRST + LAST
    cut = 20
    data = HEAD + chunk(b": still here\n\n") + chunk(PROGRESS)
    data += chunk(both[:cut], b";x=1") + chunk(both[cut:])
    async with client_of(tmp_path, answering(data, byte_by_byte)) as client:
        stream = await client.open_completion(b"{}")
        first = await stream.receive()
        assert (first.content, first.tokens, first.tokens_predicted) == ("a", [5], 1)
        last = await stream.receive()
        assert (last.stop, last.stop_type) == (True, "limit")
        stream.close()


@pytest.mark.parametrize(
    "data",
    [
        HEAD + chunk(FIRST),
        HEAD + chunk(FIRST) + b"0\r\n\r\n",
        HEAD + chunk(FIRST) + chunk(LAST)[:-9],
        HEAD + chunk(FIRST) + b"zz\r\n",
        HEAD + chunk(FIRST) + chunk(b"data: {no json}\n\n"),
        HEAD + chunk(FIRST) + b"7fffffff\r\n",
    ],
    ids=["closed", "ended", "cut", "no chunk", "no json", "endless"],
)
async def test_a_broken_stream_is_an_error_after_what_came(tmp_path: Path, data: bytes):
    async with client_of(tmp_path, answering(data)) as client:
        stream = await client.open_completion(b"{}")
        assert (await stream.receive()).content == "a"
        with pytest.raises(RunnerGone):
            await stream.receive()
        stream.close()


@pytest.mark.parametrize("data", [b"", b"HTTP/1.1 200", b"nonsense\r\n\r\n"])
async def test_no_answer_is_an_error(tmp_path: Path, data: bytes):
    async with client_of(tmp_path, answering(data)) as client:
        with pytest.raises(RunnerGone):
            await client.open_completion(b"{}")
        with pytest.raises(RunnerGone):
            await client.tokenize("x", add_special=True, parse_special=True)
        assert not await client.is_ready()


async def test_an_error_inside_a_stream(tmp_path: Path):
    error = b'data: {"error":{"code":500,"message":"no luck"}}\n\n'
    async with client_of(tmp_path, answering(HEAD + chunk(error))) as client:
        stream = await client.open_completion(b"{}")
        with pytest.raises(RunnerRefused, match="no luck"):
            await stream.receive()
        stream.close()


@pytest.mark.parametrize(
    ("body", "message"),
    [(b'{"error":{"message":"too long","n_ctx":7}}', "too long"), (b"oops", "oops")],
)
async def test_an_error_instead_of_an_answer(tmp_path: Path, body: bytes, message: str):
    data = b"HTTP/1.1 400 Bad\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    async with client_of(tmp_path, answering(data)) as client:
        with pytest.raises(RunnerRefused, match=message) as caught:
            await client.open_completion(b"{}")
        assert caught.value.status == 400
        with pytest.raises(RunnerRefused, match=message):
            await client.detokenize([1])


async def test_nobody_listens(tmp_path: Path):
    client = LlamaClient(tmp_path / "missing")
    assert not await client.is_ready()
    with pytest.raises(RunnerGone, match="cannot connect"):
        await client.open_completion(b"{}")


async def test_a_runner_that_takes_connections_late_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "s"
    listener = trio.socket.socket(trio.socket.AF_UNIX)
    await listener.bind(str(path))
    listener.listen(0)
    client = LlamaClient(path)
    answers: list[bool] = []

    async def ask() -> None:
        answers.append(await client.is_ready())

    async with trio.open_nursery() as nursery:
        with trio.fail_after(DEADLINE_S):
            async with trio.open_nursery() as questions:
                for _ in range(8):
                    questions.start_soon(ask)
                await trio.sleep(0.05)  # the kernel keeps one or two of them
                handler = answering(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                nursery.start_soon(trio.serve_listeners, handler, [trio.SocketListener(listener)])
        assert answers == [True] * 8
        client.close()
        nursery.cancel_scope.cancel()
    monkeypatch.setattr(llama_client, "CONNECT_PATIENCE_S", 0.05)
    deaf = trio.socket.socket(trio.socket.AF_UNIX)
    await deaf.bind(str(tmp_path / "deaf"))
    deaf.listen(0)
    client = LlamaClient(tmp_path / "deaf")
    with trio.fail_after(DEADLINE_S), deaf:
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(ask_in_vain, client)
            await trio.sleep(0.2)
            nursery.cancel_scope.cancel()


async def ask_in_vain(client: LlamaClient) -> None:
    with pytest.raises(RunnerGone):
        await client.tokenize("a", add_special=True, parse_special=False)


async def test_connections_are_used_again_and_replaced_when_the_server_closed_them(
    tmp_path: Path,
):
    answer = b'HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n{"content":"y"}'
    requests_on: list[int] = []

    async def two_requests_each(stream: trio.SocketStream) -> None:
        requests_on.append(0)
        number = len(requests_on) - 1
        async with stream:
            for _ in range(2):
                if not await stream.receive_some():
                    return
                requests_on[number] += 1
                await stream.send_all(answer)

    async with client_of(tmp_path, two_requests_each) as client:
        for _ in range(5):
            assert await client.detokenize([1]) == "y"
    assert requests_on == [2, 2, 1]


async def test_a_cancelled_question_closes_its_connection(tmp_path: Path):
    closed = trio.Event()

    async def silent(stream: trio.SocketStream) -> None:
        async with stream:
            while await stream.receive_some():
                pass
        closed.set()

    async with client_of(tmp_path, silent) as client:
        with trio.move_on_after(0.05):
            await client.detokenize([1])
        await closed.wait()
        with trio.move_on_after(0.05):
            await client.open_completion(b"{}")


async def test_silence_is_what_is_waited_for_and_not_said(
    tmp_path: Path, mock_clock: trio.testing.MockClock
):
    speak = trio.Event()

    async def handler(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some()
            await stream.send_all(HEAD + chunk(FIRST))
            while not speak.is_set():
                await stream.send_all(chunk(b": still here\n\n"))
                await trio.sleep(1)
            await stream.send_all(chunk(FIRST) + chunk(LAST))

    async with client_of(tmp_path, handler) as client, trio.open_nursery() as nursery:
        assert client.silence_s(trio.current_time()) == 0
        stream = await client.open_completion(b"{}")
        await stream.receive()
        mock_clock.jump(5)
        assert (
            client.silence_s(trio.current_time()) == 0
        )  # nobody waits: a client may read as slowly as it likes
        nursery.start_soon(stream.receive)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(3)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert (
            client.silence_s(trio.current_time()) >= 3
        )  # what only keeps the connection alive says nothing
        speak.set()
        mock_clock.jump(1)
        while client.silence_s(trio.current_time()):
            await trio.testing.wait_all_tasks_blocked(0.01)
        stream.close()


async def test_only_what_was_decoded_breaks_the_silence(
    tmp_path: Path, mock_clock: trio.testing.MockClock
):
    bodies = {
        b"/detokenize": b'{"content":"y"}',
        b"/v1/embeddings": b'{"data":[{"index":0,"embedding":[1.0]}]}',
    }

    async def handler(stream: trio.SocketStream) -> None:
        async with stream:
            asked = bytes(await stream.receive_some()).split()[1]
            if asked not in bodies:
                await stream.send_all(HEAD + chunk(FIRST))
                await trio.sleep_forever()
            body = bodies[asked]
            await stream.send_all(
                b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            )

    async with client_of(tmp_path, handler) as client, trio.open_nursery() as nursery:
        stream = await client.open_completion(b"{}")
        await stream.receive()
        nursery.start_soon(stream.receive)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(3)
        assert await client.detokenize([1]) == "y"  # by an HTTP thread: it says nothing of the loop
        assert client.silence_s(trio.current_time()) >= 3
        await client.embed([[1]])
        assert (
            client.silence_s(trio.current_time()) < 3
        )  # who waits behind others that get on is no hang
        assert len(client.overdue(trio.current_time(), 3, math.inf)) == 1
        nursery.cancel_scope.cancel()
    stream.close()


@pytest.mark.parametrize("streams", [True, False])
async def test_who_is_given_up_hears_it_at_once(tmp_path: Path, streams: bool):
    async def handler(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some()
            if streams:
                await stream.send_all(HEAD + chunk(FIRST))
            await trio.sleep_forever()

    async with client_of(tmp_path, handler) as client, trio.open_nursery() as nursery:

        async def ask() -> None:
            if not streams:
                with pytest.raises(RunnerStalled):
                    await client.detokenize([1])
                return
            stream = await client.open_completion(b"{}")
            await stream.receive()
            with pytest.raises(RunnerStalled):
                await stream.receive()
            stream.close()

        nursery.start_soon(ask)
        while client.silence_s(trio.current_time()) < 0.05:  # noqa: ASYNC110
            await trio.sleep(0.01)
        assert client.overdue(trio.current_time(), 1000, 1000) == []
        (wait,) = client.overdue(trio.current_time(), 0.01, 0.01)
        wait.abandon()


@pytest.mark.parametrize(
    ("said", "what"),
    [
        (b"", "first"),
        (HEAD + chunk(PROGRESS), "first"),
        (HEAD + chunk(PROGRESS) + chunk(FIRST), "next"),
        (b"", "whole"),
    ],
)
async def test_who_may_have_to_wait_is_told_from_who_is_forgotten(
    tmp_path: Path, mock_clock: trio.testing.MockClock, said: bytes, what: str
):
    async def handler(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some()
            await stream.send_all(said)
            await trio.sleep_forever()

    async with client_of(tmp_path, handler) as client, trio.open_nursery() as nursery:

        async def ask() -> None:
            if what == "whole":
                await client.ask_chat(b"{}")
            with contextlib.closing(await client.open_completion(b"{}")) as stream:
                while True:
                    await stream.receive()

        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked(0.05)
        mock_clock.jump(3)
        assert client.silence_s(trio.current_time()) == 3
        assert bool(client.overdue(trio.current_time(), next_s=3, first_s=9)) == (what == "next")
        assert bool(client.overdue(trio.current_time(), next_s=9, first_s=3)) == (what == "first")
        nursery.cancel_scope.cancel()
