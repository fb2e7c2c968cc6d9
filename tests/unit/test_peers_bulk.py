"""Lanes over real sockets: who may open one, both modes, and blocking calls that end in time."""

import os
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio

from ollamad.core.ids import NodeId
from ollamad.core.pieces import MIB
from ollamad.core.state import CertificateAuthority
from ollamad.peers import bulk
from ollamad.peers.bulk import BulkConnection, BulkPeers, Ticket
from ollamad.peers.doorman import Doorman
from ollamad.peers.identity import make_ca
from ollamad.peers.tls import PeerUnreachable
from ollamad.peers.tls_stream import TlsStream
from ollamad.wire.lane import Mode, encode_preamble
from tests.fakes.tls_nodes import TlsNode, utc_now

CONTENT = os.urandom(3 * MIB + 77)


class Member(TlsNode):
    """A node whose P2P port takes lanes."""

    def __init__(self, directory: Path, addresses: dict[NodeId, str]) -> None:
        super().__init__(directory)
        self.bulk = BulkPeers(self.gate, address_of=addresses.get)
        self.links: list[NodeId | None] = []
        self._addresses = addresses

    async def open_port(self, nursery: trio.Nursery) -> None:
        doorman = Doorman(self.gate, self._serve, lanes=self.bulk)
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, doorman.accept, [listener])
        self._addresses[self.id] = f"127.0.0.1:{listener.socket.getsockname()[1]}"

    async def _serve(self, stream: TlsStream, peer: NodeId | None, host: str) -> None:
        self.links.append(peer)


Pair = tuple[Member, Member]


@pytest.fixture(scope="module")
def ca() -> CertificateAuthority:
    return make_ca(utc_now())


@pytest.fixture
async def pair(tmp_path: Path, ca: CertificateAuthority) -> AsyncIterator[Pair]:
    """A holder and a fetcher."""
    addresses: dict[NodeId, str] = {}
    async with trio.open_nursery() as nursery:
        members = [Member(tmp_path / name, addresses) for name in ("holder", "fetcher")]
        for member in members:
            member.enter(ca)
            await member.open_port(nursery)
        yield members[0], members[1]
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def lane(pair: Pair, *, plain: bool) -> AsyncIterator[tuple[BulkConnection, BulkConnection]]:
    """The two ends of a lane: the holder's, the fetcher's."""
    holder, fetcher = pair
    arrived: list[BulkConnection] = []
    with holder.bulk.expect(fetcher.id, plain=plain) as ticket:

        async def wait() -> None:
            arrived.append(await ticket.arrived())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            ours = await fetcher.bulk.dial(holder.id, ticket.token, plain=plain)
    try:
        yield arrived[0], ours
    finally:
        for end in (arrived[0], ours):
            end.shut()
            end.close()


both_modes = pytest.mark.parametrize("plain", [True, False], ids=["plain", "encrypted"])


@both_modes
async def test_bytes_and_files_pass(pair: Pair, tmp_path: Path, plain: bool) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    received = bytearray(4 + len(CONTENT) - 1000)

    def send(theirs: BulkConnection) -> None:
        theirs.send(b"head")
        for offset in range(1000, len(CONTENT), 100_000):
            size = min(100_000, len(CONTENT) - offset)
            theirs.send_file(b"", descriptor, offset, size)

    def receive(ours: BulkConnection) -> None:
        view = memoryview(received)
        for begin in (0, 4, 13, 20_000):  # reads need not fit what was written
            end = {0: 4, 4: 13, 13: 20_000, 20_000: len(received)}[begin]
            ours.receive_into(view[begin:end])

    async with lane(pair, plain=plain) as (theirs, ours), trio.open_nursery() as nursery:
        nursery.start_soon(theirs.run, lambda: send(theirs))
        await ours.run(lambda: receive(ours))
        assert ours.received >= len(received)
    assert received == b"head" + CONTENT[1000:]
    os.close(descriptor)


@both_modes
async def test_a_file_goes_from_the_disk_to_the_socket_without_a_copy_unless_it_is_encrypted(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: bool
) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    received = bytearray(len(CONTENT))
    real, sent, read = os.sendfile, 0, 0

    def sendfile(out: int, source: int, offset: int, count: int) -> int:
        nonlocal sent
        done = real(out, source, offset, count)
        sent += done
        return done

    def preadv(source: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal read
        done = real_preadv(source, buffers, offset)
        read += done
        return done

    real_preadv = os.preadv
    monkeypatch.setattr(os, "sendfile", sendfile)
    monkeypatch.setattr(os, "preadv", preadv)
    async with lane(pair, plain=plain) as (theirs, ours), trio.open_nursery() as nursery:
        nursery.start_soon(theirs.run, lambda: theirs.send_file(b"", descriptor, 0, len(CONTENT)))
        await ours.run(lambda: ours.receive_into(memoryview(received)))
    assert received == CONTENT
    assert (sent, read) == ((len(CONTENT), 0) if plain else (0, len(CONTENT)))
    os.close(descriptor)


@both_modes
async def test_the_end_of_a_message_that_comes_in_two_parts_is_not_slept_through(
    pair: Pair, plain: bool
) -> None:
    """Each part is smaller than what a thread is woken for."""
    first, second = (bytes(bulk.READ_LOW_WATER - 2000) for _ in range(2))
    got = bytearray(len(first) + len(second))
    async with lane(pair, plain=plain) as (sender, receiver):
        await sender.run(lambda: sender.send(first))
        await trio.sleep(0.05)  # it is in the receiver's kernel
        with trio.fail_after(2):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(receiver.run, lambda: receiver.receive_into(memoryview(got)))
                await trio.sleep(0.05)  # it waits for the rest
                await sender.run(lambda: sender.send(second))


@both_modes
async def test_what_is_sent_is_readable_on_the_wire_only_without_encryption(
    pair: Pair, plain: bool
) -> None:
    """A wiretap between the two: the holder's address is that of a relay that listens."""
    holder, _ = pair
    real = holder._addresses[holder.id]
    heard = bytearray()

    async def relay(outer: trio.SocketStream) -> None:
        host, port = real.rsplit(":", 1)
        inner = await trio.open_tcp_stream(host, int(port))

        async def copy(source: trio.SocketStream, target: trio.SocketStream) -> None:
            async for data in source:
                heard.extend(data)
                await target.send_all(data)

        async with inner, outer, trio.open_nursery() as nursery:
            nursery.start_soon(copy, outer, inner)
            with suppress(trio.BrokenResourceError):
                await copy(inner, outer)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        [tap] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, relay, [tap])
        holder._addresses[holder.id] = f"127.0.0.1:{tap.socket.getsockname()[1]}"
        buffer = bytearray(8000)
        async with lane(pair, plain=plain) as (theirs, ours):
            await theirs.run(lambda: theirs.send(b"a secret" * 1000))
            await ours.run(lambda: ours.receive_into(memoryview(buffer)))
        assert buffer == b"a secret" * 1000
        assert (b"a secret" in heard) == plain
        nursery.cancel_scope.cancel()


async def test_a_ticket_opens_one_lane_in_its_mode_for_its_node_and_not_for_ever(
    pair: Pair, tmp_path: Path, ca: CertificateAuthority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "ARRIVAL_TIMEOUT_S", 0.3)
    holder, fetcher = pair
    other = Member(tmp_path / "other", holder._addresses).enter(ca)
    assert isinstance(other, Member)

    async def opens(member: Member, ticket: Ticket, *, plain: bool) -> bool:
        try:
            lane = await member.bulk.dial(holder.id, ticket.token, plain=plain)
        except PeerUnreachable:
            return False
        try:
            (await ticket.arrived()).close()
        except PeerUnreachable:
            return False
        finally:
            lane.close()
        return True

    with holder.bulk.expect(fetcher.id, plain=False) as ticket:
        assert not await opens(fetcher, ticket, plain=True)
        assert await opens(fetcher, ticket, plain=False)
        # Whoever comes with it again is turned away, and not only comes too late.
        with pytest.raises(PeerUnreachable):
            await fetcher.bulk.dial(holder.id, ticket.token, plain=False)
    with holder.bulk.expect(fetcher.id, plain=False) as ticket:
        assert not await opens(other, ticket, plain=False)  # it has the ticket, not the key
    with holder.bulk.expect(fetcher.id, plain=True) as ticket:
        pass
    assert not await opens(fetcher, ticket, plain=True)  # void
    with holder.bulk.expect(fetcher.id, plain=True) as ticket:
        assert await opens(fetcher, ticket, plain=True)


async def test_a_fetcher_does_not_take_another_node_for_the_holder(
    pair: Pair, tmp_path: Path, ca: CertificateAuthority
) -> None:
    holder, fetcher = pair
    with holder.bulk.expect(fetcher.id, plain=False) as ticket:
        holder._addresses[NodeId("another")] = holder._addresses[holder.id]
        with pytest.raises(PeerUnreachable, match="it is not node another"):
            await fetcher.bulk.dial(NodeId("another"), ticket.token, plain=False)


async def test_members_are_still_served_and_rubbish_is_not(pair: Pair) -> None:
    holder, fetcher = pair
    stream = await fetcher.gate.dial(holder.id, holder._addresses[holder.id])
    with trio.fail_after(5):
        assert not await stream.receive_some(1)  # `_serve` has ended
    await trio.aclose_forcefully(stream)
    assert holder.links == [fetcher.id]
    host, port = holder._addresses[holder.id].rsplit(":", 1)
    for rubbish in (
        encode_preamble(Mode.TLS, bytes(32)),
        encode_preamble(Mode.PLAIN, bytes(32)),
        b"OOPS" + bytes(40),
        b"ODLN\7" + bytes(32),
    ):
        raw = await trio.open_tcp_stream(host, int(port))
        await raw.send_all(rubbish)
        # Reset, perhaps, since it did not read all.
        with trio.fail_after(5), suppress(trio.BrokenResourceError):
            assert not await raw.receive_some(1)
        await raw.aclose()


async def test_one_that_says_nothing_is_closed(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ollamad.peers.doorman.HANDSHAKE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(bulk, "HANDSHAKE_TIMEOUT_S", 0.2)
    holder, _ = pair
    host, port = holder._addresses[holder.id].rsplit(":", 1)
    for begin in (b"", b"OD"):
        raw = await trio.open_tcp_stream(host, int(port))
        await raw.send_all(begin)
        with trio.fail_after(5), suppress(trio.BrokenResourceError):
            assert not await raw.receive_some(1)
        await raw.aclose()


@both_modes
async def test_a_call_that_blocks_ends_when_it_is_cancelled_or_the_lane_is_shut(
    pair: Pair, plain: bool
) -> None:
    ended = threading.Event()

    def receive(ours: BulkConnection) -> None:
        try:
            ours.receive_into(memoryview(bytearray(10)))
        finally:
            ended.set()

    async with lane(pair, plain=plain) as (_, ours):
        with trio.fail_after(5), trio.move_on_after(0.1) as scope:
            await ours.run(lambda: receive(ours))
        assert scope.cancelled_caught
        assert ended.is_set()  # it was waited for
        with pytest.raises((EOFError, OSError)):
            await ours.run(lambda: receive(ours))
    async with lane(pair, plain=plain) as (_, ours), trio.open_nursery() as nursery:

        async def shut_soon() -> None:
            await trio.sleep(0.1)
            ours.shut()

        nursery.start_soon(shut_soon)
        with trio.fail_after(5), pytest.raises((EOFError, OSError)):
            await ours.run(lambda: receive(ours))
        with trio.fail_after(5):
            await ours.run(lambda: ours.pause(100))  # paused no more


@both_modes
async def test_a_peer_that_takes_nothing_is_left(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, plain: bool
) -> None:
    monkeypatch.setattr(bulk, "SEND_TIMEOUT_S", 0.3)
    async with lane(pair, plain=plain) as (theirs, _):
        with pytest.raises(TimeoutError, match="took nothing"), trio.fail_after(20):
            await theirs.run(lambda: theirs.send(bytes(64 * MIB)))


async def test_a_file_that_is_shorter_ends_the_lane(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"abc")
    descriptor = os.open(tmp_path / "short", os.O_RDONLY)
    for plain in (True, False):
        async with lane(pair, plain=plain) as (theirs, _):
            with pytest.raises(EOFError, match="shorter"):
                await theirs.run(lambda t=theirs: t.send_file(b"head", descriptor, 0, 4))  # type: ignore[misc]
    os.close(descriptor)


async def test_a_lane_that_comes_when_its_exchange_has_ended_is_closed(pair: Pair) -> None:
    holder, _ = pair
    with holder.bulk.expect(NodeId("x"), plain=True) as ticket:
        pass
    ours, theirs = socket.socketpair()
    with theirs:
        ticket.deliver(BulkConnection(ours, trio.CapacityLimiter(1)))
        assert ours.fileno() == -1


@pytest.mark.parametrize("places", [0, 1])
async def test_work_that_is_cancelled_before_it_begins_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, places: int
) -> None:
    """A cancellation may come between two pieces, or while all threads are taken."""
    looks = 0
    real = trio.sleep

    async def sleep(seconds: float) -> None:
        nonlocal looks
        looks += 1
        assert looks < 100, "it waits for a thread that never began"
        await real(seconds)

    monkeypatch.setattr(trio, "sleep", sleep)
    ours, theirs = socket.socketpair()
    limiter = trio.CapacityLimiter(1)
    if not places:
        limiter.acquire_on_behalf_of_nowait("another")
    with ours, theirs, trio.CancelScope() as scope:
        if places:
            scope.cancel()
        else:
            scope.deadline = trio.current_time() + 0.05
        await BulkConnection(ours, limiter).run(lambda: pytest.fail("it began"))
    assert scope.cancelled_caught
