"""Links between nodes: framing, reconnecting, bounds; and three nodes over real sockets."""

import random
import struct
from pathlib import Path

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from ollamad.core.ids import NodeId
from ollamad.raft import Links, RaftNode, SqliteStore, Timing
from ollamad.raft import links as links_module
from ollamad.raft.links import FrameSplitter
from ollamad.wire.raftwire import MAX_FRAME_SIZE, MalformedMessage
from tests.fakes.raft_cluster import Ledger

A, B = NodeId("a"), NodeId("b")


def framed(*frames: bytes) -> bytes:
    return b"".join(struct.pack(">I", len(frame)) + frame for frame in frames)


class Recorder:
    """A `Consensus` that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, NodeId]] = []
        self.frames: list[tuple[NodeId, bytes]] = []

    def receive(self, sender: NodeId, frame: bytes) -> None:
        if frame == b"bad":
            raise MalformedMessage("bad")
        self.frames.append((sender, frame))

    def peer_connected(self, node_id: NodeId) -> None:
        self.events.append(("up", node_id))

    def peer_disconnected(self, node_id: NodeId) -> None:
        self.events.append(("down", node_id))


class Peer:
    """What a node dials: hands the other ends of the streams to the test."""

    def __init__(self) -> None:
        self.ends: list[trio.StapledStream] = []
        self.dialled: list[float] = []
        self.refuse = False

    async def dial(self, node_id: NodeId) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        self.dialled.append(trio.current_time())
        if self.refuse:
            raise ConnectionRefusedError
        ours, theirs = trio.testing.memory_stream_pair()
        self.ends.append(theirs)
        return ours


# Framing.


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_frames_come_out_however_they_arrive(size: int) -> None:
    frames = [b"", b"x", b"yy" * 50, b"z" * 5]
    data = framed(*frames)
    splitter = FrameSplitter()
    found = []
    for start in range(0, len(data), size):
        found += splitter.feed(data[start : start + size])
    assert found == frames


def test_a_frame_over_the_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(MalformedMessage):
        FrameSplitter().feed(struct.pack(">I", MAX_FRAME_SIZE + 1))


# Outgoing.


async def test_frames_leave_in_order_once_the_link_is_up(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    peer, recorder = Peer(), Recorder()
    links = Links(peer.dial)
    links.set_peers(frozenset({B}))
    links.send(B, b"nobody hears this")
    await nursery.start(links.run, recorder)
    await trio.testing.wait_all_tasks_blocked()
    assert recorder.events == [("up", B)]
    assert links.connected == {B}
    for number in range(5):
        links.send(B, b"%d" % number)
    links.send(NodeId("stranger"), b"x")
    await trio.testing.wait_all_tasks_blocked()
    assert await peer.ends[0].receive_some() == framed(b"0", b"1", b"2", b"3", b"4")


async def test_a_broken_link_is_noticed_and_dialled_again(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    peer, recorder = Peer(), Recorder()
    links = Links(peer.dial, rng=random.Random(1))
    links.set_peers(frozenset({B}))
    await nursery.start(links.run, recorder)
    await trio.testing.wait_all_tasks_blocked()
    await peer.ends[0].aclose()  # nothing was being sent
    await trio.sleep(0.2)
    assert recorder.events == [("up", B), ("down", B), ("up", B)]
    links.send(B, b"again")
    await trio.testing.wait_all_tasks_blocked()
    assert await peer.ends[1].receive_some() == framed(b"again")


async def test_dialling_backs_off_and_never_gives_up(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    peer, recorder = Peer(), Recorder()
    peer.refuse = True
    links = Links(peer.dial, rng=random.Random(1))
    links.set_peers(frozenset({B}))
    await nursery.start(links.run, recorder)
    await trio.sleep(60)
    assert 60 < len(peer.dialled) < 130  # about one a second in the end, not thousands
    peer.refuse = False
    await trio.sleep(1.1)
    assert recorder.events == [("up", B)]


async def test_a_peer_that_does_not_read_fills_a_bounded_queue_and_is_dropped(
    nursery: trio.Nursery, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links_module, "MAX_QUEUED_BYTES", 10_000)
    recorder = Recorder()
    dialled = 0

    async def dial(node_id: NodeId) -> trio.abc.Stream:
        nonlocal dialled
        dialled += 1
        ours, theirs = trio.testing.lockstep_stream_pair()  # a write waits for the reader
        keep.append(theirs)
        return ours

    keep: list[trio.abc.Stream] = []
    links = Links(dial)
    links.set_peers(frozenset({B}))
    await nursery.start(links.run, recorder)
    await trio.testing.wait_all_tasks_blocked()
    for _ in range(1000):
        links.send(B, bytes(1000))
    assert links._outgoing[B].size <= 10_000
    await trio.sleep(links_module.WRITE_TIMEOUT_S + 0.2)
    assert recorder.events == [("up", B), ("down", B), ("up", B)]
    assert links._outgoing[B].size == 0  # a new link does not begin with old frames


async def test_a_peer_that_is_not_wanted_any_more_is_let_go(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    peer, recorder = Peer(), Recorder()
    links = Links(peer.dial)
    links.set_peers(frozenset({A, B}))
    await nursery.start(links.run, recorder)
    await trio.testing.wait_all_tasks_blocked()
    links.set_peers(frozenset({A}))
    await trio.sleep(5)
    assert recorder.events[2:] == [("down", B)]
    assert links.connected == {A}


# Incoming.


async def test_frames_of_a_peer_arrive_under_its_name(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    recorder = Recorder()
    links = Links(Peer().dial)
    await nursery.start(links.run, recorder)
    ours, theirs = trio.testing.memory_stream_pair()
    nursery.start_soon(links.serve, ours, B)
    await theirs.send_all(framed(b"one", b"two"))
    await trio.testing.wait_all_tasks_blocked()
    assert recorder.frames == [(B, b"one"), (B, b"two")]


@pytest.mark.parametrize(
    "garbage", [framed(b"bad"), b"\xff" * 8, b"GET / HTTP/1.1\r\n\r\n", b"\x80\x04\x95" * 5]
)
async def test_garbage_ends_the_link_and_nothing_else(
    nursery: trio.Nursery,
    autojump_clock: MockClock,
    garbage: bytes,
    caplog: pytest.LogCaptureFixture,
) -> None:
    recorder = Recorder()
    links = Links(Peer().dial)
    await nursery.start(links.run, recorder)
    ours, theirs = trio.testing.memory_stream_pair()
    await theirs.send_all(garbage)
    await links.serve(ours, B)
    assert recorder.frames == []
    assert caplog.text.count("closing the consensus link of b") == 1


async def test_a_newer_stream_of_a_peer_replaces_the_older(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    recorder = Recorder()
    links = Links(Peer().dial)
    await nursery.start(links.run, recorder)
    pairs = [trio.testing.memory_stream_pair() for _ in range(3)]
    for ours, _ in pairs:
        nursery.start_soon(links.serve, ours, B)
        await trio.testing.wait_all_tasks_blocked()
    with trio.fail_after(5):
        assert [await theirs.receive_some() for _, theirs in pairs[:2]] == [b"", b""]
    await pairs[2][1].send_all(framed(b"x"))
    await trio.testing.wait_all_tasks_blocked()
    assert recorder.frames == [(B, b"x")]
    assert len(links._incoming) == 1


async def test_who_is_no_member_any_more_is_not_heard(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    recorder = Recorder()
    links = Links(Peer().dial)
    await nursery.start(links.run, recorder)
    c = NodeId("c")
    streams = {}
    for name in (B, c):
        ours, streams[name] = trio.testing.memory_stream_pair()
        nursery.start_soon(links.serve, ours, name)
    await trio.testing.wait_all_tasks_blocked()
    # Both may speak before this node knows them: one of them may be the leader.
    assert links.dialled_by == {B, c}
    links.set_peers(frozenset({B}))
    links.set_peers(frozenset())
    with trio.fail_after(5):
        assert await streams[B].receive_some() == b""
    assert links.dialled_by == {c}
    await streams[c].send_all(framed(b"x"))
    await trio.testing.wait_all_tasks_blocked()
    assert recorder.frames == [(c, b"x")]


# Everything together.


async def test_three_nodes_over_real_sockets_and_real_disks(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    ports: dict[NodeId, int] = {}
    nodes: dict[NodeId, RaftNode] = {}
    scopes: dict[NodeId, trio.CancelScope] = {}
    ledgers: dict[NodeId, Ledger] = {}
    names = [NodeId(name) for name in "abc"]
    # Slow on purpose: other tests share the processors.
    timing = Timing(heartbeat_s=0.1, election_min_s=1.0, election_max_s=2.0)

    async def start(name: NodeId, *, task_status: trio.TaskStatus[None]) -> None:
        async def dial(to: NodeId) -> trio.abc.Stream:
            if to not in ports:
                raise ConnectionRefusedError
            stream = await trio.open_tcp_stream("127.0.0.1", ports[to])
            await stream.send_all(name.encode())
            return stream

        async def serve(stream: trio.SocketStream) -> None:
            peer = (await stream.receive_some(1)).decode()
            if peer:
                await links.serve(stream, NodeId(peer))

        links = Links(dial)
        ledger = ledgers[name] = Ledger()
        node = RaftNode(name, SqliteStore(tmp_path / name), ledger, links.send, timing=timing)
        if not await node.open():
            if name == names[0]:
                node.bootstrap()
            else:
                node.start_as_learner(frozenset(names[:1]))
        with trio.CancelScope() as scope:
            nodes[name], scopes[name] = node, scope
            async with trio.open_nursery() as own:
                listeners = await trio.open_tcp_listeners(ports.get(name, 0), host="127.0.0.1")
                ports[name] = listeners[0].socket.getsockname()[1]
                own.start_soon(trio.serve_listeners, serve, listeners)
                await own.start(node.run)
                await own.start(links.run, node)
                links.set_peers(frozenset(names) - {name})
                task_status.started()

    with trio.fail_after(60):
        for name in names:
            await nursery.start(start, name)
        for name in names[1:]:
            await nodes[names[0]].add_voter(name, 20)
        for number in range(30):
            name = names[number % 3]
            assert await nodes[name].propose(b"%d" % number, 20) == b"done %d" % number
        leader = nodes[names[0]].leader
        assert leader is not None
        scopes[leader].cancel()
        other = next(name for name in names if name != leader)
        assert await nodes[other].propose(b"after", 20) == b"done after"
        await nursery.start(start, leader)
        assert await nodes[leader].propose(b"back", 20) == b"done back"
        assert len(ledgers[leader].commands) == 32
        nursery.cancel_scope.cancel()
