"""Meshes in memory: calls, one link for many, both sides dialling, losses, versions."""

import msgspec
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ollamad.core.ids import NodeId
from ollamad.peers.link import (
    HELLO_TIMEOUT_S,
    MAX_OUTBOX,
    HandlerError,
    RemoteFailure,
    Stream,
)
from ollamad.peers.mesh import MAX_LINKS_PER_MEMBER, Mesh
from ollamad.peers.tls import PeerUnreachable
from ollamad.wire import mux
from ollamad.wire.mux import MAX_MESSAGE, MAX_STREAM_ID, MAX_STREAMS
from tests.fakes.peer_net import PeerNet

A, B, C = NodeId("A"), NodeId("B"), NodeId("C")


class Question(msgspec.Struct):
    number: int


@pytest.fixture
async def net(nursery: trio.Nursery) -> PeerNet:
    return PeerNet(nursery)


async def two(net: PeerNet) -> tuple[Mesh, Mesh]:
    a, b = await net.add(A), await net.add(B)
    b.answer("double", Question, lambda peer, question: 2 * question.number)
    b.answer("who", type(None), lambda peer, _: peer)
    return a, b


async def double(mesh: Mesh, number: int = 21) -> int:
    return await mesh.call(B, "double", Question(number), int)


async def test_a_call_is_answered(net: PeerNet) -> None:
    a, _ = await two(net)
    assert await double(a) == 42
    assert await a.call(B, "who", None, str) == A


async def test_an_async_answer(net: PeerNet) -> None:
    a, b = await two(net)

    async def slow(peer: NodeId, question: Question) -> int:
        await trio.lowlevel.checkpoint()
        return question.number + 1

    b.answer("slow", Question, slow)
    assert await a.call(B, "slow", Question(1), int) == 2


async def test_many_calls_at_once_share_one_link(net: PeerNet) -> None:
    a, _ = await two(net)
    net.dial_gate = trio.Event()
    answers = list[int]()

    async def ask(number: int) -> None:
        answers.append(await double(a, number))

    async with trio.open_nursery() as nursery:
        for number in range(50):
            nursery.start_soon(ask, number)
        await wait_all_tasks_blocked()
        net.dial_gate.set()
    assert sorted(answers) == [2 * n for n in range(50)]
    assert net.dials == [(A, B)]


async def test_bulk_has_a_link_of_its_own(net: PeerNet) -> None:
    a, _ = await two(net)
    await double(a)
    async with a.open(B, "who", b"\xc0", bulk=True) as stream:
        assert await stream.receive() is not None
    assert net.dials == [(A, B), (A, B)]
    assert a.connected == 1


async def test_a_caller_that_gives_up_dialling_leaves_the_others(net: PeerNet) -> None:
    a, _ = await two(net)
    net.dial_gate = trio.Event()
    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as impatient:

            async def give_up() -> None:
                await wait_all_tasks_blocked()
                impatient.cancel()

            nursery.start_soon(give_up)
            await double(a)
        net.dial_gate.set()
    assert await double(a) == 42


async def test_both_dial_at_the_same_time(net: PeerNet) -> None:
    a, b = await two(net)
    a.answer("double", Question, lambda peer, question: 3 * question.number)
    net.dial_gate = trio.Event()
    answers = dict[NodeId, int]()

    async def ask(mesh: Mesh, me: NodeId, peer: NodeId) -> None:
        answers[me] = await mesh.call(peer, "double", Question(1), int)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, a, A, B)
        nursery.start_soon(ask, b, B, A)
        await wait_all_tasks_blocked()
        net.dial_gate.set()
    assert answers == {A: 2, B: 3}
    assert sorted(net.dials) == [(A, B), (B, A)]
    assert a.connected == b.connected == 1


# What fails, and how.


async def test_an_unknown_node(net: PeerNet) -> None:
    a, _ = await two(net)
    with pytest.raises(PeerUnreachable, match="not a member"):
        await a.call(NodeId("nobody"), "double", Question(1), int)


async def test_a_node_that_is_down_and_comes_back(net: PeerNet) -> None:
    a, _ = await two(net)
    net.down.add(B)
    with pytest.raises(PeerUnreachable, match="refuses"):
        await double(a)
    net.down.clear()
    assert await double(a) == 42


async def test_a_node_of_another_protocol(
    net: PeerNet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = await two(net)
    real = mux.MuxConnection.hello

    def hello(self: mux.MuxConnection) -> bytes:
        if self._dialler:
            return real(self)
        newer = mux.encode(mux.Hello(mux.PROTOCOL + 7, mux.PROTOCOL + 7, "9.0"))
        return mux._frame(mux.Kind.HELLO, 0, newer)

    told: list[set[NodeId]] = []
    a.on_compatibility = lambda: told.append(set(a.incompatible))
    with monkeypatch.context() as patch:
        patch.setattr(mux.MuxConnection, "hello", hello)
        for _ in range(3):
            with pytest.raises(PeerUnreachable, match=r"version 9\.0.*install the same version"):
                await double(a)
        await wait_all_tasks_blocked()
        assert a.connected == b.connected == 0
    # It is said once, and again when it fits.
    lines = [record.getMessage() for record in caplog.records if "does not fit" in record.msg]
    assert len(lines) == 1, lines
    assert "B is shut out, its version does not fit: " in lines[0]
    assert await double(a) == 42
    assert told == [{B}, set()]
    assert a.incompatible == {}


async def test_a_node_that_says_nothing(net: PeerNet, autojump_clock: MockClock) -> None:
    a, _ = await two(net)
    net.mute.add(B)
    with pytest.raises(PeerUnreachable, match="no hello"):
        await double(a)
    assert trio.current_time() == pytest.approx(HELLO_TIMEOUT_S)


@pytest.mark.parametrize(
    ("method", "request_", "code"),
    [
        ("no-such", None, "UNKNOWN_METHOD"),
        ("double", "text", "MALFORMED"),
        ("double", None, "MALFORMED"),
        ("refuse", None, "FORBIDDEN"),
        ("crash", None, "INTERNAL"),
        ("nothing", None, "NO_ANSWER"),
    ],
)
async def test_a_node_that_refuses(
    net: PeerNet, method: str, request_: object, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = await two(net)

    def refuse(peer: NodeId, _: None) -> int:
        raise HandlerError("FORBIDDEN", "no")

    async def nothing(peer: NodeId, request: bytes, stream: Stream) -> None:
        pass

    b.answer("refuse", type(None), refuse)
    b.answer("crash", type(None), lambda peer, _: 1 // 0)
    b.handle("nothing", nothing)
    with pytest.raises(RemoteFailure) as caught:
        await a.call(B, method, request_, int)
    assert caught.value.code == code
    assert await double(a) == 42
    assert net.dials == [(A, B)]


async def test_an_answer_of_another_type(net: PeerNet) -> None:
    a, _ = await two(net)
    with pytest.raises(RemoteFailure) as caught:
        await a.call(B, "double", Question(1), str)
    assert caught.value.code == "MALFORMED"


async def test_a_link_that_breaks_in_mid_call_is_dialled_anew(net: PeerNet) -> None:
    a, b = await two(net)

    async def hang(peer: NodeId, request: bytes, stream: Stream) -> None:
        await trio.sleep_forever()

    b.handle("hang", hang)
    async with trio.open_nursery() as nursery:

        async def cut() -> None:
            await wait_all_tasks_blocked()
            net.cut(B)

        nursery.start_soon(cut)
        with pytest.raises(PeerUnreachable, match="lost"):
            await a.call(B, "hang", None, int)
    await wait_all_tasks_blocked()
    assert a.connected == b.connected == 0
    assert await double(a) == 42
    assert len(net.dials) == 2


async def test_a_peer_that_breaks_the_protocol_loses_its_link_only(
    net: PeerNet, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = await two(net)
    c = await net.add(C)
    await double(a)
    assert await c.call(B, "who", None, str) == C
    a._links[B, False].write(mux.HEADER.pack(99, 0, 0))
    await wait_all_tasks_blocked()
    assert "closing the link of A" in caplog.text
    assert b.connected == 1
    assert await c.call(B, "who", None, str) == C
    assert await double(a) == 42


async def test_too_many_exchanges_with_a_node(net: PeerNet) -> None:
    a, b = await two(net)

    async def hang(peer: NodeId, request: bytes, stream: Stream) -> None:
        await trio.sleep_forever()

    b.handle("hang", hang)

    async def occupy() -> None:
        async with a.open(B, "hang", b""):
            await trio.sleep_forever()

    await double(a)
    async with trio.open_nursery() as nursery:
        for _ in range(MAX_STREAMS):
            nursery.start_soon(occupy)
        await wait_all_tasks_blocked()
        with pytest.raises(PeerUnreachable, match="exchanges are open"):
            await double(a)
        nursery.cancel_scope.cancel()
    assert await double(a) == 42
    assert net.dials == [(A, B)]


async def test_leaving_an_exchange_cancels_it_there(net: PeerNet) -> None:
    a, b = await two(net)
    ended = trio.Event()

    async def watch(peer: NodeId, request: bytes, stream: Stream) -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    b.handle("watch", watch)
    async with a.open(B, "watch", b""):
        await wait_all_tasks_blocked()
    with trio.fail_after(1):
        await ended.wait()


async def test_a_link_without_stream_ids_is_replaced_and_ends_with_its_exchanges(
    net: PeerNet,
) -> None:
    a, b = await two(net)
    heard = list[bytes]()

    async def listen(peer: NodeId, request: bytes, stream: Stream) -> None:
        while (message := await stream.receive()) is not None:
            heard.append(message)

    b.handle("listen", listen)
    await double(a)
    old = a._links[B, False]
    old.mux._last_stream = MAX_STREAM_ID - 1
    async with a.open(B, "listen", b"") as last:
        async with trio.open_nursery() as nursery:
            for number in range(10):  # at once: one dials for all of them
                nursery.start_soon(double, a, number)
        assert net.dials == [(A, B)] * 2
        assert not old.is_closed
        await last.send(b"still heard")
        await wait_all_tasks_blocked()
        assert heard == [b"still heard"]
    await wait_all_tasks_blocked()
    assert old.is_closed
    assert len(b._inbound[A].links) == 1
    assert await double(a) == 42
    assert net.dials == [(A, B)] * 2


async def test_a_retired_link_is_dropped_with_the_others(net: PeerNet) -> None:
    a, b = await two(net)

    async def hang(peer: NodeId, request: bytes, stream: Stream) -> None:
        await trio.sleep_forever()

    b.handle("hang", hang)
    async with a.open(B, "hang", b""):
        old = a._links[B, False]
        old.mux._last_stream = MAX_STREAM_ID
        await double(a)
        assert not old.is_closed
        a.drop(B)
        assert old.is_closed
    await wait_all_tasks_blocked()
    assert a.connected == b.connected == 0
    assert not a._outbound


async def test_requests_wait_for_a_peer_that_does_not_read(net: PeerNet) -> None:
    """Requests are long; what waits for the socket stays within a bound all the same."""
    a, _ = await two(net)
    await double(a)
    link = a._links[B, False]
    waiting = list[int]()

    async def ask() -> None:
        async with a.open(B, "unknown", bytes(MAX_MESSAGE // 2)) as stream:
            waiting.append(len(link._outbox))
            with pytest.raises(RemoteFailure):
                await stream.receive()

    async with trio.open_nursery() as nursery:
        for _ in range(40):
            nursery.start_soon(ask)
    assert len(waiting) == 40
    assert max(waiting) <= MAX_OUTBOX + MAX_MESSAGE


async def test_the_links_of_a_member_share_what_they_may_hold(net: PeerNet) -> None:
    a, b = await two(net)
    c = await net.add(C)
    await double(a)
    await double(c)
    async with a.open(B, "unknown", b"", bulk=True):
        await wait_all_tasks_blocked()
        first, second = b._inbound[A].links
        assert first._budget is second._budget
        assert first._budget is not b._inbound[C].links[0]._budget


async def test_a_member_has_only_so_many_links(net: PeerNet) -> None:
    _, b = await two(net)
    c = await net.add(C)
    assert await c.call(B, "who", None, str) == C
    streams = [await net.dial(A, B) for _ in range(MAX_LINKS_PER_MEMBER + 3)]
    await wait_all_tasks_blocked()
    assert len(b._inbound[A].links) == MAX_LINKS_PER_MEMBER
    ended = list[int]()
    for number, stream in enumerate(streams):
        with trio.move_on_after(0.05):
            while await stream.receive_some(100):
                pass
            ended.append(number)
    assert ended == [0, 1, 2], "the oldest"
    assert await c.call(B, "who", None, str) == C, "others keep theirs"
    for stream in streams:
        await stream.aclose()
    await wait_all_tasks_blocked()
    assert b.dialled_by == {C}


# Dropping.


async def test_dropping_closes_what_was_dialled_here(net: PeerNet) -> None:
    a, b = await two(net)
    a.answer("ping", type(None), lambda peer, _: 1)
    await double(a)
    assert await b.call(A, "ping", None, int) == 1
    a.drop(B)
    a.drop(B)
    a.drop(C)
    await wait_all_tasks_blocked()
    assert await b.call(A, "ping", None, int) == 1
    assert net.dials == [(A, B), (B, A)], "its own link lives on"


async def test_expelling_closes_both_directions(net: PeerNet) -> None:
    a, b = await two(net)
    a.answer("ping", type(None), lambda peer, _: 1)
    await double(a)
    await b.call(A, "ping", None, int)
    a.expel(B)
    a.expel(C)
    await wait_all_tasks_blocked()
    assert a.connected == b.connected == 0


async def test_all_links_end_with_the_mesh() -> None:
    async with trio.open_nursery() as nursery:
        net = PeerNet(nursery)
        a, b = await two(net)
        await double(a)
        nursery.cancel_scope.cancel()
    assert a.connected == b.connected == 0
