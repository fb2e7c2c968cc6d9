"""One link between two nodes: exchanges side by side, cancellation, failures, slow readers."""

import gc
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import trio
from trio.testing import MockClock, lockstep_stream_pair, memory_stream_pair, wait_all_tasks_blocked

from ollamad.core.ids import NodeId
from ollamad.peers.link import (
    HELLO_TIMEOUT_S,
    MAX_BACKLOG,
    MAX_HANDLERS,
    MAX_HELD,
    MAX_OUTBOX,
    MESSAGE_OVERHEAD,
    Budget,
    Handler,
    HandlerError,
    Link,
    LinkClosed,
    RemoteFailure,
    Stream,
)
from ollamad.wire.codec import encode
from ollamad.wire.mux import (
    HEADER,
    MAX_MESSAGE,
    MAX_STREAMS,
    WINDOW,
    Hello,
    IncompatibleVersion,
    Kind,
    MuxConnection,
    ProtocolError,
    StreamReset,
    TooManyStreams,
)

A, B = NodeId("A"), NodeId("B")


async def echo(peer: NodeId, request: bytes, stream: Stream) -> None:
    await stream.send(request)
    while (message := await stream.receive()) is not None:
        await stream.send(message)


async def silent(peer: NodeId, request: bytes, stream: Stream) -> None:
    await trio.sleep_forever()


@asynccontextmanager
async def linked(
    *, pair: Callable[[], Any] = memory_stream_pair, **handlers: Handler
) -> AsyncIterator[tuple[Link, Link]]:
    """The dialler's and the acceptor's side of a link that runs."""
    one, other = pair()
    dialler = Link(one, B, dialler=True, version="1.0")
    acceptor = Link(
        other, A, dialler=False, version="1.0", handlers={"echo": echo, "silent": silent} | handlers
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(acceptor.run)
        await nursery.start(dialler.run)
        yield dialler, acceptor
        nursery.cancel_scope.cancel()


async def ask(link: Link, method: str, request: bytes) -> bytes | None:
    stream = link.open(method, request)
    await stream.send_eof()
    answer = await stream.receive()
    stream.close()
    return answer


async def test_an_exchange_of_messages_both_ways() -> None:
    async with linked() as (link, other):
        stream = link.open("echo", b"first")
        await stream.send(b"second")
        await stream.send(b"")
        await stream.send_eof()
        got = [await stream.receive() for _ in range(4)]
        assert got == [b"first", b"second", b"", None]
        assert await stream.receive() is None
        stream.close()
        await wait_all_tasks_blocked()
        assert link.mux.open_streams == other.mux.open_streams == 0
        assert not link._streams
        assert not other._streams
        assert link.peer_hello == Hello(1, 1, "1.0")


async def test_the_handler_knows_who_asks() -> None:
    seen = list[NodeId]()

    async def whoami(peer: NodeId, request: bytes, stream: Stream) -> None:
        seen.append(peer)

    async with linked(whoami=whoami) as (link, _):
        assert await ask(link, "whoami", b"") is None
    assert seen == [A]


async def test_many_exchanges_at_once_do_not_mix() -> None:
    async with linked() as (link, other), trio.open_nursery() as nursery:
        checked = list[int]()

        async def talk(number: int) -> None:
            stream = link.open("echo", b"")
            assert await stream.receive() == b""
            for turn in range(5):
                await stream.send(f"{number}.{turn}".encode() * number)
                assert await stream.receive() == f"{number}.{turn}".encode() * number
            stream.close()
            checked.append(number)

        for number in range(100):
            nursery.start_soon(talk, number)
        with trio.fail_after(10):
            while len(checked) < 100:
                await wait_all_tasks_blocked()
        assert other.mux.open_streams == 0


async def test_a_large_message_and_more_than_the_window() -> None:
    async with linked() as (link, _):
        stream = link.open("echo", b"")
        await stream.receive()
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                for number in range(6):
                    await stream.send(bytes([number]) * MAX_MESSAGE)

            nursery.start_soon(send)
            for number in range(6):
                assert await stream.receive() == bytes([number]) * MAX_MESSAGE
        with pytest.raises(ValueError, match="over"):
            await stream.send(bytes(MAX_MESSAGE + 1))
        await stream.send(b"still usable")
        assert await stream.receive() == b"still usable"


async def test_messages_can_be_taken_without_waiting() -> None:
    async with linked() as (link, _):
        stream = link.open("echo", b"one")
        assert stream.receive_nowait() is None
        await wait_all_tasks_blocked()
        assert stream.receive_nowait() == b"one"
        assert stream.receive_nowait() is None


# Failures of the other side.


async def test_a_method_that_nobody_has() -> None:
    async with linked() as (link, _):
        with pytest.raises(RemoteFailure, match="no-such") as caught:
            await ask(link, "no-such", b"")
        assert caught.value.code == "UNKNOWN_METHOD"
        assert await ask(link, "echo", b"x") == b"x"


async def test_a_handler_that_refuses() -> None:
    async def refuse(peer: NodeId, request: bytes, stream: Stream) -> None:
        await stream.send(b"before")
        raise HandlerError("FORBIDDEN", "not you")

    async with linked(refuse=refuse) as (link, _):
        stream = link.open("refuse", b"")
        assert await stream.receive() == b"before"
        for _ in range(2):
            with pytest.raises(RemoteFailure, match="not you") as caught:
                await stream.receive()
            assert caught.value.code == "FORBIDDEN"
        with pytest.raises(RemoteFailure):
            await stream.send(b"x")


async def test_a_handler_that_crashes_harms_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    async def crash(peer: NodeId, request: bytes, stream: Stream) -> None:
        raise KeyError("bug")

    async with linked(crash=crash) as (link, other):
        bystander = link.open("echo", b"x")
        with pytest.raises(RemoteFailure, match="bug") as caught:
            await ask(link, "crash", b"")
        assert caught.value.code == "INTERNAL"
        assert await bystander.receive() == b"x"
        assert not other._scopes.keys() - {1}
    assert "crash failed for A" in caplog.text


async def test_a_handler_that_ends_early_ends_the_exchange() -> None:
    async def short(peer: NodeId, request: bytes, stream: Stream) -> None:
        await stream.send(b"only")

    async with linked(short=short) as (link, other):
        stream = link.open("short", b"")
        assert await stream.receive() == b"only"
        assert await stream.receive() is None
        await wait_all_tasks_blocked()
        with pytest.raises(RemoteFailure):
            await stream.send(b"to nobody")
        stream.close()
        assert other.mux.open_streams == 0


async def test_what_came_before_a_failure_is_still_read() -> None:
    async with linked() as (link, other):
        stream = link.open("echo", b"one")
        await stream.send(b"two")
        await wait_all_tasks_blocked()
        other.close()
        await wait_all_tasks_blocked()
        assert [await stream.receive(), await stream.receive()] == [b"one", b"two"]
        with pytest.raises(LinkClosed):
            await stream.receive()


# Cancellation.


async def test_a_cancelled_receive_leaves_the_exchange_usable() -> None:
    async with linked() as (link, _):
        stream = link.open("echo", b"")
        await stream.receive()
        with trio.move_on_after(0.01) as scope:
            await stream.receive()
        assert scope.cancelled_caught
        await stream.send(b"next")
        assert await stream.receive() == b"next"


async def test_a_cancelled_send_sends_whole_or_nothing() -> None:
    got = list[bytes]()
    read = trio.Event()

    async def late(peer: NodeId, request: bytes, stream: Stream) -> None:
        await read.wait()
        while (message := await stream.receive()) is not None:
            got.append(message)

    async with linked(late=late) as (link, _):
        stream = link.open("late", b"")
        await stream.send(b"a" * MAX_MESSAGE)  # takes the whole window
        with trio.move_on_after(0.01) as scope:
            await stream.send(b"b" * 10)
        assert scope.cancelled_caught
        read.set()
        await stream.send(b"c" * 10)
        await stream.send_eof()
        assert await stream.receive() is None
        assert got == [b"a" * MAX_MESSAGE, b"c" * 10]
        assert await ask(link, "echo", b"x") == b"x"


async def test_a_cancelled_call_cancels_the_handler_and_leaves_the_link() -> None:
    state = list[str]()

    async def watch(peer: NodeId, request: bytes, stream: Stream) -> None:
        state.append("began")
        try:
            await trio.sleep_forever()
        finally:
            state.append("ended")

    async with linked(watch=watch) as (link, other):
        stream = link.open("watch", b"")
        await wait_all_tasks_blocked()
        stream.close()
        await wait_all_tasks_blocked()
        assert state == ["began", "ended"]
        assert not other._scopes
        with pytest.raises(LinkClosed):
            await stream.receive()
        with pytest.raises(LinkClosed):
            await stream.send(b"")
        await stream.send_eof()  # says nothing, harms nothing
        assert await ask(link, "echo", b"x") == b"x"


async def test_a_handler_is_not_begun_for_an_exchange_that_was_given_up() -> None:
    began = list[int]()

    async def work(peer: NodeId, request: bytes, stream: Stream) -> None:
        began.append(1)

    async with linked(work=work) as (link, other):
        link.open("work", b"").close()  # both frames arrive together
        assert await ask(link, "echo", b"x") == b"x"
        assert not other._streams
    assert began == []


# The connection.


async def test_a_peer_that_vanishes_fails_every_exchange() -> None:
    async with linked() as (link, other):
        streams = [link.open("silent", b"") for _ in range(3)]
        failures = list[str]()

        async def wait(stream: Stream) -> None:
            with pytest.raises(LinkClosed, match="lost"):
                await stream.receive()
            failures.append("lost")

        async with trio.open_nursery() as nursery:
            for stream in streams:
                nursery.start_soon(wait, stream)
            await wait_all_tasks_blocked()
            other.close()
        assert len(failures) == 3
        assert link.is_closed
        with pytest.raises(LinkClosed):
            link.open("echo", b"")
        link.write(b"x")
        assert not link._outbox


async def test_handlers_end_with_their_link() -> None:
    ended = trio.Event()

    async def watch(peer: NodeId, request: bytes, stream: Stream) -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    async with linked(watch=watch) as (link, _):
        link.open("watch", b"")
        await wait_all_tasks_blocked()
        link.close()
        with trio.fail_after(1):
            await ended.wait()


async def test_a_sender_that_waits_for_credit_sees_the_peer_vanish() -> None:
    async with linked() as (link, other):
        stream = link.open("silent", b"")
        await stream.send(bytes(MAX_MESSAGE))
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                with pytest.raises(LinkClosed):
                    await stream.send(b"x")

            nursery.start_soon(send)
            await wait_all_tasks_blocked()
            other.close()


async def test_too_many_exchanges_are_refused_here_and_leave_the_link() -> None:
    async with linked() as (link, _):
        streams = [link.open("silent", b"") for _ in range(MAX_STREAMS)]
        with pytest.raises(TooManyStreams):
            link.open("echo", b"")
        streams[0].close()
        assert await ask(link, "echo", b"x") == b"x"


@pytest.mark.parametrize(
    "garbage",
    [
        HEADER.pack(Kind.MESSAGE, 99, 0),
        HEADER.pack(77, 0, 0),
        HEADER.pack(Kind.OPEN, 1, 0xFFFFFFFF),
    ],
)
async def test_a_peer_that_breaks_the_protocol_is_cut_off(garbage: bytes) -> None:
    ours, theirs = memory_stream_pair()
    link = Link(ours, A, dialler=False, version="1.0", handlers={"echo": echo})
    await theirs.send_all(MuxConnection(dialler=True, version="1.0").hello() + garbage)
    with pytest.raises(ProtocolError):
        await link.run()
    assert link.is_closed
    with pytest.raises(trio.ClosedResourceError):
        await ours.receive_some(1)


@pytest.mark.parametrize(
    ("first", "error"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", ProtocolError),
        (
            HEADER.pack(Kind.HELLO, 0, len(encode(Hello(99, 98, "9.0"))))
            + encode(Hello(99, 98, "9.0")),
            IncompatibleVersion,
        ),
        (None, LinkClosed),
    ],
)
async def test_who_does_not_greet_is_no_peer(first: bytes | None, error: type[Exception]) -> None:
    ours, theirs = memory_stream_pair()
    link = Link(ours, B, dialler=True, version="1.0")
    if first is None:
        await theirs.aclose()
    else:
        await theirs.send_all(first)
    with pytest.raises(error):
        await link.run()
    assert link.is_closed


async def test_a_link_that_closes_as_the_hello_arrives_never_started() -> None:
    """As when the peer dies then, and our own hello cannot be sent any more."""
    ours, theirs = memory_stream_pair()
    await theirs.send_all(MuxConnection(dialler=False, version="1.0").hello())

    class Closing(trio.abc.Stream):
        async def receive_some(self, max_bytes: int | None = None) -> bytes:
            data = bytes(await ours.receive_some(max_bytes))
            link.close()
            return data

        async def send_all(self, data: object) -> None:
            await trio.sleep_forever()

        async def wait_send_all_might_not_block(self) -> None:
            await trio.lowlevel.checkpoint()

        async def aclose(self) -> None:
            await ours.aclose()

    link = Link(Closing(), B, dialler=True, version="1.0")
    async with trio.open_nursery() as nursery:
        with pytest.raises(LinkClosed):
            await nursery.start(link.run)
    assert link.peer_hello is not None


async def test_silence_instead_of_a_hello(mock_clock: MockClock) -> None:
    mock_clock.autojump_threshold = 0
    ours, _theirs = memory_stream_pair()
    link = Link(ours, B, dialler=True, version="1.0")
    with pytest.raises(ProtocolError, match="no hello"):
        await link.run()
    assert trio.current_time() == pytest.approx(HELLO_TIMEOUT_S)


# Slow readers.


async def test_a_slow_reader_holds_up_only_its_own_exchange() -> None:
    async with linked() as (link, other):
        slow = link.open("silent", b"")
        sent = 0

        async def push() -> None:
            nonlocal sent
            while True:
                await slow.send(bytes(10_000))
                sent += 10_000

        async with trio.open_nursery() as nursery:
            nursery.start_soon(push)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert WINDOW <= sent <= WINDOW + MAX_MESSAGE
        assert await ask(link, "echo", b"x" * 100_000) == b"x" * 100_000
        inbox = sum(map(len, other._streams[1]._inbox))
        assert inbox == sent


async def test_what_waits_for_a_stalled_connection_is_bounded() -> None:
    ours, theirs = lockstep_stream_pair()  # takes bytes only when the other side reads
    link = Link(ours, B, dialler=True, version="1.0")
    async with trio.open_nursery() as nursery:
        hello = MuxConnection(dialler=False, version="1.0").hello()
        nursery.start_soon(theirs.send_all, hello)
        await nursery.start(link.run)
        progress = list[int]()

        async def push() -> None:
            stream = link.open("x", b"")
            while True:
                await stream.send(bytes(60_000))
                progress.append(1)

        for _ in range(20):
            nursery.start_soon(push)
        await wait_all_tasks_blocked()
        assert link.is_congested
        assert len(link._outbox) <= MAX_OUTBOX + MAX_MESSAGE
        stalled = len(progress)
        # When the peer reads again, everybody goes on.
        with trio.move_on_after(2):
            while len(progress) < stalled + 40:
                await theirs.receive_some(1 << 20)
        assert len(progress) >= stalled + 40
        nursery.cancel_scope.cancel()


async def test_closing_frees_those_who_wait_for_a_stalled_connection() -> None:
    ours, theirs = lockstep_stream_pair()
    link = Link(ours, B, dialler=True, version="1.0")
    async with trio.open_nursery() as nursery:
        hello = MuxConnection(dialler=False, version="1.0").hello()
        nursery.start_soon(theirs.send_all, hello)
        await nursery.start(link.run)
        ended = list[int]()

        async def push() -> None:
            stream = link.open("x", b"")
            try:
                while True:
                    await stream.send(bytes(500_000))
            except LinkClosed:
                ended.append(1)

        for _ in range(10):
            nursery.start_soon(push)
        await wait_all_tasks_blocked()
        assert link.is_congested
        link.close()
        await wait_all_tasks_blocked()
        assert len(ended) == 10


async def test_cancelling_the_link_in_mid_send_closes_the_transport() -> None:
    ours, theirs = lockstep_stream_pair()
    link = Link(ours, B, dialler=True, version="1.0")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert link.is_closed
    with pytest.raises(trio.BrokenResourceError):
        await theirs.send_all(b"x")


# A peer that is hostile, or broken: what it can make this side hold is bounded.


class Hostile:
    """The dialling end of a link, without our code on it: sends any frames, reads when told."""

    def __init__(self, link: Link, end: Any) -> None:
        self.link = link
        self.end = end
        self.mux = MuxConnection(dialler=True, version="1.0")

    async def send(self, data: bytes) -> None:
        await self.end.send_all(data)
        await wait_all_tasks_blocked()

    async def open(self, method: str, request: bytes) -> int:
        number, data = self.mux.open(method, request)
        await self.send(data)
        return number

    async def resets(self) -> list[str]:
        """The codes of the exchanges that were refused since the last call."""
        with trio.move_on_after(0.01):
            while data := await self.end.receive_some(1 << 20):
                events = self.mux.receive_data(data)
                return [e.reset.code for e in events if isinstance(e, StreamReset)]
        return []


@asynccontextmanager
async def attacked(*, budget: Budget | None = None, **handlers: Handler) -> AsyncIterator[Hostile]:
    ours, theirs = memory_stream_pair()
    handlers = {"silent": silent} | handlers
    link = Link(ours, B, dialler=False, version="1.0", handlers=handlers, budget=budget)

    async def run() -> None:
        with suppress(ProtocolError):
            await link.run()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        hostile = Hostile(link, theirs)
        await hostile.send(hostile.mux.hello())
        await hostile.resets()  # its hello
        yield hostile
        nursery.cancel_scope.cancel()


async def test_the_requests_of_all_exchanges_are_bounded() -> None:
    async with attacked(echo=echo) as hostile:
        refused = list[str]()
        for _ in range(MAX_HELD // MAX_MESSAGE + 5):
            await hostile.open("silent", bytes(MAX_MESSAGE - 10))
            refused += await hostile.resets()
        assert refused == ["OVERLOADED"] * 6
        held = hostile.link._budget.held
        assert MAX_HELD - 2 * MAX_MESSAGE < held <= MAX_HELD
        # What is small still gets in, and what is given back can be used again.
        await hostile.send(hostile.mux.reset(1, "X", ""))
        assert hostile.link._budget.held == held - (MAX_MESSAGE - 10) - MESSAGE_OVERHEAD
        assert await hostile.open("silent", bytes(MAX_MESSAGE - 10))
        assert await hostile.resets() == []
        assert hostile.link._budget.held == held


async def test_the_unread_messages_of_all_exchanges_are_bounded() -> None:
    async with attacked() as hostile:
        ended = list[str]()
        for _ in range(MAX_HELD // MAX_MESSAGE + 5):
            number = await hostile.open("silent", b"")
            await hostile.send(hostile.mux.message(number, bytes(MAX_MESSAGE)))
            ended += await hostile.resets()
        assert ended == ["OVERLOADED"] * len(ended)
        assert len(ended) == 6
        held = sum(len(m) for s in hostile.link._streams.values() for m in s._inbox)
        assert held <= hostile.link._budget.held <= MAX_HELD
        assert len(hostile.link._scopes) == hostile.link.mux.open_streams, "handlers end too"


async def test_what_a_handler_has_read_counts_until_it_ends() -> None:
    """It may collect the parts of a long request."""
    collected = list[bytes]()

    async def collect(peer: NodeId, request: bytes, stream: Stream) -> None:
        while (message := await stream.receive()) is not None:
            collected.append(message)

    async with attacked(collect=collect) as hostile:
        number = await hostile.open("collect", b"")
        while hostile.mux.open_streams:
            before = hostile.link._budget.held
            assert before == sum(len(m) + MESSAGE_OVERHEAD for m in [b"", *collected])
            await hostile.send(hostile.mux.message(number, bytes(MAX_MESSAGE)))
            while hostile.mux.open_streams and not hostile.mux.can_send(number):
                hostile.mux.receive_data(await hostile.end.receive_some(1 << 20))
            assert before < MAX_HELD
        assert len(collected) == MAX_HELD // MAX_MESSAGE - 1
        assert hostile.link._budget.held == 0, "its handler was ended"


async def test_links_with_one_budget_share_it() -> None:
    budget = Budget()
    async with attacked(budget=budget) as one, attacked(budget=budget) as other:
        for _ in range(MAX_HELD // MAX_MESSAGE):
            await one.open("silent", bytes(MAX_MESSAGE - 10))
        assert await other.open("silent", bytes(MAX_MESSAGE - 10))
        assert await other.resets() == ["OVERLOADED"]
        await one.end.aclose()
        await wait_all_tasks_blocked()
        assert budget.held == 0, "with the link everything is given back"
        assert await other.open("silent", bytes(MAX_MESSAGE - 10))
        assert await other.resets() == []


async def test_empty_messages_count_with_what_they_take() -> None:
    async with attacked() as hostile:
        number = await hostile.open("silent", b"")
        for _ in range(1000):
            await hostile.end.send_all(hostile.mux.message(number, b""))
        await wait_all_tasks_blocked()
        assert hostile.link._budget.held == (1 + 1000) * MESSAGE_OVERHEAD


async def test_nothing_is_held_when_all_was_read_and_ended() -> None:
    async with linked() as (link, other):
        for size in (0, 1, 100_000):
            assert await ask(link, "echo", bytes(size)) == bytes(size)
        stream = link.open("echo", b"x" * 1000)
        await stream.send(b"y" * 1000)
        assert await stream.receive() == b"x" * 1000
        await wait_all_tasks_blocked()
        assert link._budget.held == 1000 + MESSAGE_OVERHEAD, "the second answer is unread"
        assert other._budget.held == 2 * (1000 + MESSAGE_OVERHEAD), "its handler may keep all"
        stream.close()
        await wait_all_tasks_blocked()
        assert link._budget.held == other._budget.held == 0
        with pytest.raises(RemoteFailure):
            await ask(link, "nobody has this", b"x")
        await wait_all_tasks_blocked()
        assert link._budget.held == other._budget.held == other._handling == 0


async def test_what_came_before_a_failure_is_read_and_counted_once() -> None:
    async def say_and_fail(peer: NodeId, request: bytes, stream: Stream) -> None:
        await stream.send(b"said")
        raise HandlerError("NO", "why")

    async with linked(fail=say_and_fail) as (link, other):
        stream = link.open("fail", b"")
        await wait_all_tasks_blocked()
        assert link._budget.held == other._budget.held == 0
        assert await stream.receive() == b"said"
        assert link._budget.held == 0


async def test_opening_and_resetting_in_a_loop_makes_no_more_handlers() -> None:
    """HTTP/2's "rapid reset": handlers that still clean up count."""
    running = 0

    async def slow_to_end(peer: NodeId, request: bytes, stream: Stream) -> None:
        nonlocal running
        running += 1
        try:
            await trio.sleep_forever()
        finally:
            with trio.move_on_after(5, shield=True):
                await free.wait()
            running -= 1

    free = trio.Event()
    async with attacked(slow=slow_to_end) as hostile:
        for _ in range(3 * MAX_HANDLERS // 100):
            opened = [hostile.mux.open("slow", b"") for _ in range(100)]
            await hostile.send(b"".join(data for _, data in opened))
            await hostile.send(b"".join(hostile.mux.reset(n, "X", "") for n, _ in opened))
        assert running == MAX_HANDLERS
        assert hostile.link._budget.held == MAX_HANDLERS * MESSAGE_OVERHEAD, "as long as they run"
        free.set()
        await wait_all_tasks_blocked()
        assert running == hostile.link._handling == hostile.link._budget.held == 0
        await hostile.open("slow", b"")
        assert running == 1


@pytest.mark.parametrize("kind", ["unknown methods", "refused exchanges"])
async def test_answers_do_not_pile_up_for_a_peer_that_does_not_read(kind: str) -> None:
    async def refuse(peer: NodeId, request: bytes, stream: Stream) -> None:
        raise HandlerError("NO", "n" * 1000)

    ours, theirs = lockstep_stream_pair()
    link = Link(ours, B, dialler=False, version="1.0", handlers={"refuse": refuse})
    hostile = MuxConnection(dialler=True, version="1.0")
    method = "refuse" if kind == "refused exchanges" else "x" * 200
    most = 0

    async def attack() -> None:
        nonlocal most
        await theirs.send_all(hostile.hello())
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while most < 2 * MAX_BACKLOG:  # else nobody stops it
                for _ in range(100):
                    data = hostile.open(method, b"")[1]
                    hostile._streams.clear()  # it forgets what it asked
                    await theirs.send_all(data)
                most = max(most, len(link._outbox))

    with pytest.RaisesGroup(pytest.RaisesExc(ProtocolError, match="does not read")):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(attack)
            await link.run()
    assert link.is_closed
    assert MAX_OUTBOX < most < 2 * MAX_BACKLOG


@pytest.mark.parametrize(
    "flood", [HEADER.pack(Kind.CREDIT, 1, 4) + bytes(4), HEADER.pack(Kind.MESSAGE, 2, 1) + b"x"]
)
async def test_frames_without_effect_leave_nothing_behind(flood: bytes) -> None:
    """Credit of nothing, and late messages of an exchange that is over."""
    async with attacked(echo=echo) as hostile:
        await hostile.open("silent", b"")
        second = await hostile.open("silent", b"")
        await hostile.send(hostile.mux.reset(second, "X", ""))
        held = hostile.link._budget.held
        for _ in range(20):
            await hostile.send(flood * 5000)
        assert hostile.link._budget.held == held
        assert len(hostile.link._outbox) == 0
        assert len(hostile.link.mux._buffer) == 0
        assert not hostile.link._streams[1]._inbox
        assert not hostile.link.is_closed


async def test_a_retired_link_closes_with_its_last_exchange() -> None:
    async with linked() as (link, other):
        first, second = link.open("silent", b""), link.open("silent", b"")
        link.retire()
        first.close()
        await wait_all_tasks_blocked()
        assert not link.is_closed
        other.end_stream(2, "DONE", "")
        await wait_all_tasks_blocked()
        assert link.is_closed
        assert other.is_closed
        with pytest.raises(RemoteFailure):
            await second.receive()


async def test_a_retired_link_that_is_idle_closes_at_once() -> None:
    async with linked() as (link, _):
        link.retire()
        assert link.is_closed


@pytest.mark.parametrize(
    "end", ["reset", "link lost", "no room", "peer's end", "protocol error", "broken link"]
)
async def test_what_a_handler_held_is_free_as_soon_as_it_ends(end: str) -> None:
    """Not at some later collection of cycles: megabytes would pile up until then."""

    class Held(bytearray):
        """Something large."""

    async def broken() -> None:
        raise trio.BrokenResourceError("reset by peer")

    alive = list[weakref.ref[Held]]()

    async def collect(peer: NodeId, request: bytes, stream: Stream) -> None:
        whole = Held(request)
        alive.append(weakref.ref(whole))
        while (message := await stream.receive()) is not None:
            whole += message

    gc.collect()
    gc.disable()
    try:
        async with attacked(collect=collect) as hostile:
            await hostile.open("collect", b"")
            number = await hostile.open("collect", b"x")
            await hostile.send(hostile.mux.message(number, b"y"))
            held = alive[-1]
            assert held() == b"xy"
            if end == "reset":
                await hostile.send(hostile.mux.reset(number, "X", ""))
            elif end == "link lost":
                await hostile.end.aclose()
                await wait_all_tasks_blocked()
            elif end == "no room":
                hostile.link._shed(number)
                await wait_all_tasks_blocked()
            elif end == "protocol error":
                await hostile.send(b"\xff" * 20)
            elif end == "broken link":
                stream: Any = hostile.link._transport
                stream.receive_stream.receive_some_hook = broken
                await hostile.send(hostile.mux.open("silent", b"")[1])
            else:
                await hostile.send(hostile.mux.end(number))
            assert held() is None
    finally:
        gc.enable()


async def test_a_link_is_free_as_soon_as_it_has_failed() -> None:
    ours, theirs = memory_stream_pair()
    await theirs.send_all(MuxConnection(dialler=True, version="1.0").hello() + b"\xff" * 20)
    link = Link(ours, B, dialler=False, version="1.0")
    gone = weakref.ref(link)
    gc.collect()
    gc.disable()
    try:
        with suppress(ProtocolError):
            await link.run()
        del link
        await trio.lowlevel.checkpoint()
        assert gone() is None
    finally:
        gc.enable()
