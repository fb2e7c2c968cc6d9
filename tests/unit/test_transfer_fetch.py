"""Fetching over an in-memory network: lies, losses, resumption, several holders, ends."""

import os
import random
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager

import msgspec
import pytest
import trio
import trio.testing

from ollamad.core.ids import NodeId
from ollamad.core.piece_picker import BAN_S, FIRST_BACK_OFF_S, IDLE_S, STALL_S
from ollamad.core.pieces import MIB, PieceMap
from ollamad.core.spread import CLAIM_S
from ollamad.core.state import Layer
from ollamad.peers.bulk import ARRIVAL_TIMEOUT_S, SEND_TIMEOUT_S
from ollamad.store.pieces import Region
from ollamad.transfer import fetch
from ollamad.transfer.fetch import Fetcher, FetchFailed, FetchProgress
from ollamad.transfer.server import PieceServer
from ollamad.wire import lane, pieces
from ollamad.wire.codec import encode
from ollamad.wire.lane import RequestEnded
from ollamad.wire.pieces import HolderSide
from tests.fakes.memory_lanes import MemoryReceivingLane, MemorySendingLane
from tests.fakes.memory_streams import Hook, MemoryStream
from tests.fakes.piece_nodes import (
    Corrupt,
    Full,
    MemoryPartial,
    MemoryStore,
    Missing,
    Network,
    Rotten,
    Unmapped,
    layer_of,
)

HERE, A, B, C = NodeId("here"), NodeId("A"), NodeId("B"), NodeId("C")
PIECES = 6
CONTENT = random.Random(7).randbytes((PIECES - 1) * MIB + 1000)


@pytest.fixture
async def network() -> AsyncIterator[Network]:
    async with trio.open_nursery() as nursery:
        yield Network(nursery)
        nursery.cancel_scope.cancel()


class Node:
    """A node of the test: a store that is served, and a fetcher."""

    def __init__(self, network: Network, name: NodeId) -> None:
        self.network = network
        self.name = name
        self.store = MemoryStore()
        lanes = network.lanes_of(name)
        randrange = random.Random(2).randrange
        self.server = PieceServer(
            self.store, lanes, missing=Missing, unmapped=Unmapped, randrange=randrange
        )
        self.reports: list[FetchProgress] = []
        network.handle(name, pieces.METHOD, self.server.handle)
        self.restart()

    def restart(self) -> None:
        """A new process over the same disk."""
        self.fetcher = Fetcher(
            self.network.peers_of(self.name),
            self.network.lanes_of(self.name),
            self.store,
            corrupt=Corrupt,
            rotten=Rotten,
            randrange=random.Random(1).randrange,
        )

    async def fetch(
        self,
        layer: Layer,
        holders: Sequence[NodeId] | Callable[[], Sequence[NodeId]],
        *,
        give_up_after_s: float = 60,
    ) -> None:
        await self.fetcher.fetch_blob(
            layer,
            holders if callable(holders) else lambda: holders,
            self.reports.append,
            give_up_after_s=give_up_after_s,
        )

    def lie(self, layer: Layer, index: int) -> None:
        """Change a bit of a piece, as a broken disk does."""
        source = self.store.blobs[layer.digest]
        source.data[index * source.map.piece_size] ^= 1


def content_of(node: Node, layer: Layer) -> bytes:
    return bytes(node.store.blobs[layer.digest].data)


async def test_who_has_nothing_at_first_is_asked_again_as_soon_as_it_may_be(
    network: Network, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """Nodes that begin together have nothing for each other in the first moment."""
    layer = Node(network, A).store.add(CONTENT)
    late, node = Node(network, B), Node(network, HERE)

    async def begin() -> None:
        await trio.sleep(FIRST_BACK_OFF_S / 2)
        late.store.add(CONTENT)

    nursery.start_soon(begin)
    since = trio.current_time()
    await node.fetch(layer, [B])
    assert FIRST_BACK_OFF_S <= trio.current_time() - since < 1.5 * FIRST_BACK_OFF_S


async def test_a_blob_travels_and_progress_is_true(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    sender, node = Node(network, A), Node(network, HERE)
    layer = sender.store.add(CONTENT)
    await node.fetch(layer, [A])
    assert content_of(node, layer) == CONTENT
    assert node.store.writes == dict.fromkeys(range(PIECES), 1)
    assert node.reports[0] == FetchProgress(0, 0, layer.size, None)
    assert node.reports[-1] == FetchProgress(layer.size, layer.size, layer.size, A)
    verified = [report.verified for report in node.reports]
    assert verified == sorted(verified)
    assert sender.server.bytes_sent == layer.size
    await trio.testing.wait_all_tasks_blocked()
    assert all(source.closed for source in sender.store.sources)
    assert trio.current_time() < 1


@pytest.mark.parametrize("size", [0, 1, 5, MIB, MIB + 1])
async def test_small_blobs(
    network: Network, autojump_clock: trio.testing.MockClock, size: int
) -> None:
    sender, node = Node(network, A), Node(network, HERE)
    layer = sender.store.add(CONTENT[:size])
    await node.fetch(layer, [A])
    assert content_of(node, layer) == CONTENT[:size]


async def test_an_empty_blob_needs_no_holder(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    node = Node(network, HERE)
    await node.fetch(layer_of(b"")[0], [])
    assert node.store.blobs


async def test_a_blob_that_is_here_is_not_fetched(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    Node(network, A)
    node = Node(network, HERE)
    await node.fetch(node.store.add(CONTENT), [A])
    assert not network.opened


async def test_a_corrupt_piece_never_reaches_the_blob_and_its_sender_is_banned(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    liar, honest, node = Node(network, A), Node(network, B), Node(network, HERE)
    layer = liar.store.add(CONTENT)
    honest.store.add(CONTENT)
    for index in range(PIECES):
        liar.lie(layer, index)
    await node.fetch(layer, [A, B])
    assert content_of(node, layer) == CONTENT
    assert node.store.refused >= 1
    assert network.opened[A] == 1
    # The ban holds for other blobs too, and ends.
    other = liar.store.add(CONTENT[: 2 * MIB])
    with pytest.raises(FetchFailed, match="wrong hash"):
        await node.fetch(other, [A], give_up_after_s=30)
    assert network.opened[A] == 1
    await trio.sleep(BAN_S)
    await node.fetch(other, [A], give_up_after_s=30)
    assert network.opened[A] == 2


async def test_with_only_a_liar_it_fails_with_the_reason_and_keeps_the_good_pieces(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    liar, node = Node(network, A), Node(network, HERE)
    layer = liar.store.add(CONTENT)
    liar.lie(layer, 3)
    with pytest.raises(FetchFailed, match="piece 3 has the wrong hash"):
        await node.fetch(layer, [A], give_up_after_s=30)
    assert layer.digest not in node.store.blobs
    assert not node.store.partials[layer.digest].have[3]
    assert node.store.partials[layer.digest].closed


@pytest.mark.parametrize(
    ("wrong_map", "reason"),
    [
        (PieceMap(len(CONTENT), MIB, bytes(32 * PIECES)), "something else"),  # other hashes
        (PieceMap(len(CONTENT) + 1, MIB, bytes(32 * PIECES)), "something else"),  # another size
        (PieceMap(len(CONTENT), 2 * MIB, bytes(32 * 3)), "something else"),  # other pieces
        (PieceMap(len(CONTENT), MIB, bytes(32)), "bad piece map: 32 bytes of hashes"),
    ],
)
async def test_a_wrong_map_is_its_holders_fault(
    network: Network, autojump_clock: trio.testing.MockClock, wrong_map: PieceMap, reason: str
) -> None:
    liar, honest, node = Node(network, A), Node(network, B), Node(network, HERE)
    layer = liar.store.add(CONTENT)
    liar.store.blobs[layer.digest].map = wrong_map
    liar.store.blobs[layer.digest].have = bytearray(b"\1" * len(wrong_map))
    with pytest.raises(FetchFailed, match=reason):
        await node.fetch(layer, [A], give_up_after_s=5)
    assert not node.store.partials
    honest.store.add(CONTENT)
    await node.fetch(layer, [A, B])
    assert content_of(node, layer) == CONTENT
    assert network.opened[A] == 1


async def test_a_holder_dies_in_mid_piece_and_returns(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    sender, node = Node(network, A), Node(network, HERE)
    layer = sender.store.add(CONTENT)
    blocks = 0

    async def die_once(message: bytes) -> bytes:
        nonlocal blocks
        blocks += message[0] == lane.BLOCK_TAG
        if blocks == 11:  # in the middle of the third piece
            blocks += 1
            network.kill(A)
            await trio.lowlevel.checkpoint()
        return message

    network.hooks[A] = die_once
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.fetch, layer, [A])
        await trio.sleep(20)
        assert A in network.down
        assert sum(node.store.writes.values()) == 2
        network.revive(A)
    assert content_of(node, layer) == CONTENT
    assert node.store.writes == dict.fromkeys(range(PIECES), 1)


async def test_a_fetch_without_holders_ends_at_its_deadline_with_reasons(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    node = Node(network, HERE)
    Node(network, B)
    layer, _ = layer_of(CONTENT)
    with pytest.raises(FetchFailed) as failure:
        await node.fetch(layer, [A, B], give_up_after_s=45)
    assert trio.current_time() == pytest.approx(45, abs=2)
    assert "A: A is not there" in str(failure.value)
    assert "B: it does not have the blob" in str(failure.value)
    with pytest.raises(FetchFailed, match="no node is known"):
        await node.fetch(layer, [], give_up_after_s=1)


async def test_a_holder_that_appears_later_is_used(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    sender, node = Node(network, A), Node(network, HERE)
    layer = sender.store.add(CONTENT)
    await node.fetch(layer, lambda: [A] if trio.current_time() > 30 else [])
    assert content_of(node, layer) == CONTENT


async def test_a_cancelled_fetch_goes_on_without_a_verified_piece_fetched_twice(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    sender, node = Node(network, A), Node(network, HERE)
    layer = sender.store.add(CONTENT)
    for _ in range(PIECES):
        before = sum(node.store.writes.values())
        with trio.CancelScope() as scope:

            def stop_after_the_next_piece(
                report: FetchProgress, scope: trio.CancelScope = scope, before: int = before
            ) -> None:
                if sum(node.store.writes.values()) > before:
                    scope.cancel()

            node.restart()
            await node.fetcher.fetch_blob(layer, lambda: [A], stop_after_the_next_piece)
        assert node.store.partials[layer.digest].closed or layer.digest in node.store.blobs
    node.restart()
    await node.fetch(layer, [A])
    assert content_of(node, layer) == CONTENT
    assert node.store.writes == dict.fromkeys(range(PIECES), 1)


async def test_resumption_reports_what_was_there(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    sender, node = Node(network, A), Node(network, HERE)
    layer = sender.store.add(CONTENT)
    partial = await node.store.open_partial(layer.digest, layer_of(CONTENT)[1])
    for index in (0, PIECES - 1):
        partial.write_piece(index, CONTENT[index * MIB : (index + 1) * MIB])
    await node.fetch(layer, [A])
    assert node.reports[0].verified == MIB + 1000
    assert node.reports[-1] == FetchProgress(layer.size, layer.size - MIB - 1000, layer.size, A)


async def test_a_full_disk_ends_the_fetch_with_the_stores_error(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    sender, node = Node(network, A), Node(network, HERE)
    layer = sender.store.add(CONTENT)
    node.store.room = 2000
    with pytest.raises(Full, match="no room"):
        await node.fetch(layer, [A])
    assert node.store.partials[layer.digest].closed
    node.store.room = None
    await node.fetch(layer, [A])
    assert content_of(node, layer) == CONTENT


async def test_a_store_that_cannot_begin_ends_the_fetch(
    network: Network, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender, node = Node(network, A), Node(network, HERE)
    layer = sender.store.add(CONTENT)

    async def no_room(digest: str, piece_map: PieceMap) -> None:
        raise Full("no room at all")

    monkeypatch.setattr(node.store, "open_partial", no_room)
    with pytest.raises(Full, match="at all"):
        await node.fetch(layer, [A])


async def test_two_holders_with_different_pieces_make_one_blob(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    left, right, node = Node(network, A), Node(network, B), Node(network, HERE)
    layer, piece_map = layer_of(CONTENT)
    for holder, wanted in ((left, (0, 2, 4)), (right, (1, 3, 5))):
        partial = await holder.store.open_partial(layer.digest, piece_map)
        for index in wanted:
            partial.write_piece(index, CONTENT[index * MIB : (index + 1) * MIB])
    await node.fetch(layer, [A, B])
    assert content_of(node, layer) == CONTENT
    assert left.server.bytes_sent == 3 * MIB
    assert right.server.bytes_sent == 2 * MIB + 1000


async def test_pieces_travel_on_while_they_still_arrive(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    """A gives slowly to B, and HERE fetches from B only, at the same time."""
    origin, middle, node = Node(network, A), Node(network, B), Node(network, HERE)
    layer = origin.store.add(CONTENT)

    async def slowly(message: bytes) -> bytes:
        await trio.sleep(1 if message[0] == lane.BLOCK_TAG else 0)
        return message

    network.hooks[A] = slowly
    async with trio.open_nursery() as nursery:
        nursery.start_soon(middle.fetch, layer, [A])
        await trio.sleep(5)
        await node.fetch(layer, [B])
    assert content_of(middle, layer) == content_of(node, layer) == CONTENT
    # 21 blocks of a second each: the second hop must not add another 21.
    assert trio.current_time() < 24
    assert node.store.writes == dict.fromkeys(range(PIECES), 1)


async def test_a_slow_holder_does_not_hold_up_the_end(
    network: Network, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    received: list[bytes] = []
    receive = pieces.HolderSide.receive

    def remember(side: pieces.HolderSide, data: bytes) -> pieces.HolderEvent:
        received.append(data)
        return receive(side, data)

    monkeypatch.setattr(pieces.HolderSide, "receive", remember)
    slow, quick, node = Node(network, A), Node(network, B), Node(network, HERE)
    layer = slow.store.add(CONTENT)
    quick.store.add(CONTENT)

    async def crawl(message: bytes) -> bytes:
        await trio.sleep(10 if message[0] == lane.BLOCK_TAG else 0)
        return message

    network.hooks[A] = crawl
    await node.fetch(layer, [A, B])
    assert content_of(node, layer) == CONTENT
    assert trio.current_time() < 10
    assert slow.server.bytes_sent < 2 * MIB
    # What the quick one brought is not asked of the slow one any longer.
    assert any(pieces.Cancel.__struct_config__.tag.encode() in data for data in received)


async def test_a_holder_that_is_far_slower_than_others_makes_room(
    network: Network, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """It is never silent for long, but what it owes would come sooner from the other one."""
    slow, quick, node = Node(network, A), Node(network, B), Node(network, HERE)
    content = os.urandom(16 * MIB)
    layer = slow.store.add(content)
    quick.store.add(content)

    def pace(seconds: float) -> Hook:
        async def hook(message: bytes) -> bytes:
            await trio.sleep(seconds if message[0] == lane.BLOCK_TAG else 0)
            return message

        return hook

    network.hooks |= {A: pace(STALL_S - 1), B: pace(0.5)}  # a block
    nursery.start_soon(node.fetch, layer, [A, B])
    await trio.sleep(5)
    assert slow.server._exchanges.total() == 1
    await trio.sleep(8)
    assert slow.server._exchanges.total() == 0
    assert quick.server._exchanges.total() == 1


async def test_a_holder_that_falls_silent_is_left_and_its_pieces_asked_elsewhere(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    mute, node = Node(network, A), Node(network, HERE)
    other = Node(network, B)
    layer = mute.store.add(CONTENT)
    other.store.add(CONTENT)

    async def fall_silent(message: bytes) -> bytes:
        if message[0] == lane.BLOCK_TAG:
            await trio.sleep_forever()
        return message

    network.hooks[A] = fall_silent
    holders = [A]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.fetch, layer, lambda: holders)
        await trio.sleep(STALL_S + 2)
        assert network.opened[A] >= 1
        holders.append(B)
    assert content_of(node, layer) == CONTENT
    assert trio.current_time() < STALL_S + 5


async def test_a_holder_that_fell_silent_once_is_asked_again(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    sender, node = Node(network, A), Node(network, HERE)
    layer = sender.store.add(CONTENT)
    silences = 1

    async def fall_silent_once(message: bytes) -> bytes:
        nonlocal silences
        if message[0] == lane.BLOCK_TAG and silences:
            silences -= 1
            await trio.sleep_forever()
        return message

    network.hooks[A] = fall_silent_once
    await node.fetch(layer, [A])
    assert content_of(node, layer) == CONTENT
    assert network.opened[A] == 2
    assert trio.current_time() < STALL_S + 5


async def test_a_holder_that_stopped_receiving_and_then_got_everything_is_used(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    sender, node = Node(network, A), Node(network, HERE)
    layer, piece_map = layer_of(CONTENT)
    await sender.store.open_partial(layer.digest, piece_map)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.fetch, layer, [A])
        await trio.sleep(1)
        sender.store.add(CONTENT)  # the exchange that is open knows nothing of it
    assert content_of(node, layer) == CONTENT
    assert trio.current_time() < IDLE_S + 5


async def test_a_holder_that_never_answers_is_left(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    node = Node(network, HERE)

    async def say_nothing(peer: NodeId, request: bytes, stream: MemoryStream) -> None:
        await trio.sleep_forever()

    network.handle(A, pieces.METHOD, say_nothing)
    with pytest.raises(FetchFailed, match="did not answer"):
        await node.fetch(layer_of(CONTENT)[0], [A], give_up_after_s=STALL_S * 2)


async def test_a_holder_that_breaks_the_protocol_is_banned(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    node = Node(network, HERE)

    async def babble(peer: NodeId, request: bytes, stream: MemoryStream) -> None:
        await stream.send(b"\xc1 not msgpack")
        await stream.receive()

    network.handle(A, pieces.METHOD, babble)
    with pytest.raises(FetchFailed, match="not a valid"):
        await node.fetch(layer_of(CONTENT)[0], [A], give_up_after_s=20)
    assert network.opened[A] == 1


async def test_a_holder_that_speaks_of_other_pieces_is_banned(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    liar, node = Node(network, A), Node(network, HERE)
    layer = liar.store.add(CONTENT)

    async def more(message: bytes) -> bytes:
        if b"bits" not in message[:8]:
            return message
        bits = pieces.decode_holder_message(message)
        assert isinstance(bits, pieces.Bitfield)
        changed = msgspec.structs.replace(bits, count=bits.count + 8, bits=bits.bits + b"\1")
        return encode(changed)

    network.hooks[A] = more
    with pytest.raises(FetchFailed, match=f"speaks of {PIECES + 8} pieces instead of {PIECES}"):
        await node.fetch(layer, [A], give_up_after_s=20)
    assert network.opened[A] == 1


async def test_hashes_count_only_of_the_node_that_gets_the_blob_from_its_origin(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    """Else any other one could have that node banned, by a hash that it will contradict."""
    source, node = Node(network, B), Node(network, HERE)
    layer, piece_map = layer_of(CONTENT)
    blank = PieceMap(piece_map.size, piece_map.piece_size, bytes(len(piece_map.hashes)))
    growing = await source.store.open_partial(layer.digest, blank)

    async def lie(peer: NodeId, request: bytes, stream: MemoryStream) -> None:
        side = HolderSide(PIECES)
        with network.lanes_of(A).expect(peer, plain=False) as ticket:
            await stream.send(side.bitfield(0, ticket.token, plain=False, spreads=False))
            await trio.sleep(1)
            await stream.send(encode(pieces.Hashes((0,), b"x" * 32)))
            await trio.sleep_forever()

    network.handle(A, pieces.METHOD, lie)

    async def fetch() -> None:
        unknown = msgspec.structs.replace(layer, pieces_root="")
        await node.fetcher.fetch_blob(
            unknown, lambda: [A, B], node.reports.append, authority=B, give_up_after_s=60
        )

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetch)
        await trio.sleep(3)
        for index in range(PIECES):  # the origin sends on
            growing.learn({index: piece_map.hash_of(index)})
            growing.write_piece(index, CONTENT[index * MIB : (index + 1) * MIB])
    assert content_of(node, layer) == CONTENT
    assert node.fetcher.bans.reasons().keys() == {A}


async def test_hashes_before_the_map_end_the_exchange_and_nothing_else(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    node = Node(network, HERE)
    layer, _ = layer_of(CONTENT)

    async def hasty(peer: NodeId, request: bytes, stream: MemoryStream) -> None:
        side = HolderSide(PIECES)
        await stream.send(side.bitfield(0, bytes(32), plain=False, spreads=True))
        await stream.send(encode(pieces.Hashes((0,), b"x" * 32)))
        await trio.sleep_forever()

    network.handle(A, pieces.METHOD, hasty)
    unknown = msgspec.structs.replace(layer, pieces_root="")
    with pytest.raises(FetchFailed, match="hashes before the map"):
        await node.fetcher.fetch_blob(
            unknown, lambda: [A], node.reports.append, authority=A, give_up_after_s=20
        )


async def test_a_piece_that_a_holder_cannot_read_comes_from_another(
    network: Network, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, node = Node(network, A), Node(network, HERE)
    layer = broken.store.add(CONTENT)
    open_source = broken.store.open_piece_source

    async def on_a_broken_disk(digest: str) -> object:
        source = await open_source(digest)
        open_piece = source.open_piece

        @contextmanager
        def open_it(index: int) -> Iterator[Region]:
            with open_piece(index) as region:
                yield Region(-1, 0, region.length) if index == 2 else region

        monkeypatch.setattr(source, "open_piece", open_it)
        return source

    monkeypatch.setattr(broken.store, "open_piece_source", on_a_broken_disk)
    holders = [A]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.fetch, layer, lambda: holders)
        await trio.sleep(10)
        assert sum(node.store.writes.values()) == PIECES - 1
        Node(network, B).store.add(CONTENT)
        holders.append(B)
    assert content_of(node, layer) == CONTENT
    assert network.opened[A] == 1  # an unreadable piece is no reason to leave


@pytest.mark.parametrize("reason", ["refused", "breaks off"])
async def test_holders_that_never_send_a_whole_piece_keep_no_fetch_going(
    network: Network,
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    reason: str,
) -> None:
    """They are there, they answer, and nothing comes of it."""
    broken, node = Node(network, A), Node(network, HERE)
    layer = broken.store.add(CONTENT)

    async def send_piece(
        self: MemorySendingLane,
        index: int,
        region: Region,
        wanted: Callable[[], bool],
        sent: Callable[[int], None],
    ) -> lane.EndCode | None:
        if reason == "breaks off":
            await self._send(lane.encode_block_head(index, 0, 500) + CONTENT[:500])
        return lane.EndCode.UNREADABLE

    monkeypatch.setattr(MemorySendingLane, "send_piece", send_piece)
    monkeypatch.setattr(fetch, "MAX_BROKEN_OFF", 0.01)
    with trio.fail_after(1000), pytest.raises(FetchFailed, match="no node sent anything"):
        await node.fetch(layer, [A], give_up_after_s=120)


async def test_nodes_that_lack_the_same_pieces_keep_no_fetch_going(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    """Whoever had the others is gone."""
    layer, piece_map = layer_of(CONTENT)
    nodes = [Node(network, A), Node(network, HERE)]
    for node in nodes:
        partial = await node.store.open_partial(layer.digest, piece_map)
        partial.write_piece(0, CONTENT[:MIB])
        partial.close()

    async def fails(node: Node, other: NodeId) -> None:
        with pytest.raises(FetchFailed):
            await node.fetch(layer, [other], give_up_after_s=120)

    with trio.fail_after(1000):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fails, nodes[0], HERE)
            nursery.start_soon(fails, nodes[1], A)


async def test_a_piece_that_settled_as_its_lane_was_lost_is_not_fetched_again(
    network: Network, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender, node = Node(network, A), Node(network, HERE)
    layer = sender.store.add(CONTENT)
    real, lost = MemoryReceivingLane.receive, 0
    came: list[int | RequestEnded] = []

    async def receive(self: MemoryReceivingLane) -> int | RequestEnded:
        nonlocal lost
        came.append(ended := await real(self))
        if lost < 2:
            lost += 1
            raise OSError("the line was lost")
        return ended

    monkeypatch.setattr(MemoryReceivingLane, "receive", receive)
    await node.fetch(layer, [A])
    assert content_of(node, layer) == CONTENT
    assert node.reports[-1].verified == len(CONTENT)
    assert sorted(came) == list(range(PIECES))  # type: ignore[type-var]


@pytest.mark.parametrize("times", [1, 2, 3])
async def test_what_the_disk_lost_during_a_fetch_is_fetched_again(
    network: Network,
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    times: int,
) -> None:
    """And nothing else; not for ever."""
    sender, node = Node(network, A), Node(network, HERE)
    layer = sender.store.add(CONTENT)
    real, left = MemoryPartial.finish, times

    async def finish(self: MemoryPartial) -> None:
        nonlocal left
        if left:
            left -= 1
            self.have[2] = 0
            self._settled.discard(2)
            raise Rotten("the disk lost a piece")
        await real(self)

    monkeypatch.setattr(MemoryPartial, "finish", finish)
    if times == 3:
        with pytest.raises(Rotten):
            await node.fetch(layer, [A])
    else:
        await node.fetch(layer, [A])
        assert content_of(node, layer) == CONTENT
    again = min(times, 2)
    assert node.store.writes == {index: 1 + again * (index == 2) for index in range(PIECES)}


async def test_a_second_fetch_of_the_same_blob_waits_for_the_first(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    sender, node = Node(network, A), Node(network, HERE)
    layer = sender.store.add(CONTENT)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.fetch, layer, [A])
        nursery.start_soon(node.fetch, layer, [A])
    assert node.store.writes == dict.fromkeys(range(PIECES), 1)
    assert sender.server.bytes_sent == layer.size


async def test_memory_is_bounded_when_the_disk_is_slow(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    sender, node = Node(network, A), Node(network, HERE)
    content = CONTENT * 3
    layer = sender.store.add(content)
    node.store.write_gate = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.fetch, layer, [A])
        await trio.sleep(STALL_S * 2)
        assert node.reports[-1].received <= lane.BLOCK_SIZE  # in memory; the rest is in the link
        assert network.opened[A] == 1  # a slow disk here is not the holder's fault
        node.store.write_gate.set()
    assert content_of(node, layer) == content
    assert set(node.store.writes.values()) == {1}


# The server alone.


async def test_a_peer_that_stops_reading_holds_nobody_up_for_long_and_is_dropped(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    sender, node = Node(network, A), Node(network, HERE)
    layer = sender.store.add(CONTENT)
    side = pieces.FetcherSide(layer.digest)
    async with network.exchange(B, A, pieces.METHOD, side.opening()) as stream:
        known = await stream.receive()
        assert known is not None
        ticket = side.receive(known).ticket  # type: ignore[union-attr]
        await network.lanes_of(B).dial(A, ticket, {}, plain=False)
        for index in range(PIECES):
            await stream.send(pieces.encode(pieces.Request(index)))
        await trio.testing.wait_all_tasks_blocked()
        assert sender.server.bytes_sent <= 2 * MIB
        await node.fetch(layer, [A])  # others are served meanwhile, with what it claimed, too
        assert trio.current_time() < CLAIM_S + 1
        assert not sender.store.sources[0].closed
        await trio.sleep(SEND_TIMEOUT_S + 1)
        assert sender.store.sources[0].closed


async def test_a_fetcher_that_does_not_open_its_lane_is_dropped(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    sender = Node(network, A)
    layer = sender.store.add(CONTENT)
    opening = pieces.FetcherSide(layer.digest).opening()
    async with network.exchange(B, A, pieces.METHOD, opening) as stream:
        assert await stream.receive() is not None
        assert await stream.receive() is None
    assert trio.current_time() == pytest.approx(ARRIVAL_TIMEOUT_S)


async def test_a_fetcher_that_breaks_the_protocol_is_told_and_dropped(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    sender = Node(network, A)
    layer = sender.store.add(CONTENT)
    side = pieces.FetcherSide(layer.digest)
    async with network.exchange(B, A, pieces.METHOD, side.opening()) as stream:
        await stream.send(b"rubbish")
        first = await stream.receive()
        assert first is not None
        side.receive(first)
        second = await stream.receive()
        assert second is not None
        event = side.receive(second)
        assert isinstance(event, pieces.Dismissed)
        assert event.code == "protocol"
        assert await stream.receive() is None
    async with network.exchange(B, A, pieces.METHOD, b"no opening") as stream:
        assert await stream.receive() is not None
        assert await stream.receive() is None


async def test_too_many_exchanges_are_refused_and_places_come_back(
    network: Network, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ollamad.transfer.server.MAX_EXCHANGES", 2)
    sender, node = Node(network, A), Node(network, HERE)
    layer = sender.store.add(CONTENT)
    opening = pieces.FetcherSide(layer.digest).opening()
    async with (
        network.exchange(B, A, pieces.METHOD, opening),
        network.exchange(C, A, pieces.METHOD, opening),
    ):
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(FetchFailed, match="serves many others"):
            await node.fetch(layer, [A], give_up_after_s=5)
    await node.fetch(layer, [A])
    assert content_of(node, layer) == CONTENT


async def test_one_peer_cannot_take_all_places(
    network: Network, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ollamad.transfer.server.MAX_EXCHANGES_PER_PEER", 2)
    sender, node = Node(network, A), Node(network, HERE)
    layer = sender.store.add(CONTENT)
    opening = pieces.FetcherSide(layer.digest).opening()
    async with (
        network.exchange(B, A, pieces.METHOD, opening),
        network.exchange(B, A, pieces.METHOD, opening),
        network.exchange(B, A, pieces.METHOD, opening) as third,
    ):
        answer = await third.receive()
        assert answer is not None
        assert isinstance(pieces.decode_holder_message(answer), pieces.Bye)
        await node.fetch(layer, [A])
    assert content_of(node, layer) == CONTENT


async def test_a_cancelled_piece_stops_after_the_block_under_way(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    sender, other = Node(network, A), MemoryStore()
    layer = sender.store.add(CONTENT)
    partial = await other.open_partial(layer.digest, layer_of(CONTENT)[1])
    side = pieces.FetcherSide(layer.digest)

    async def slowly(message: bytes) -> bytes:
        await trio.sleep(1 if message[0] == lane.BLOCK_TAG else 0)
        return message

    network.hooks[A] = slowly
    async with network.exchange(B, A, pieces.METHOD, side.opening()) as stream:
        first = await stream.receive()
        assert first is not None
        known = side.receive(first)
        assert isinstance(known, pieces.PiecesKnown)
        sinks = {0: partial.begin_piece(0)}
        receiving = await network.lanes_of(B).dial(A, known.ticket, sinks, plain=False)
        await stream.send(side.request(0))
        await trio.sleep(1.5)
        await stream.send(side.cancel(0))
        ended = await receiving.receive()
        assert ended == lane.RequestEnded(0, lane.EndCode.CANCELLED, 0.0)
        assert receiving.received == 2 * lane.BLOCK_SIZE


@pytest.mark.parametrize("seed", range(10))
async def test_a_cluster_gets_a_blob_whatever_happens(
    network: Network, autojump_clock: trio.testing.MockClock, seed: int
) -> None:
    """One source and a liar; three nodes fetch from all, while any of them is killed at times."""
    rng = random.Random(seed)
    names = [NodeId(name) for name in ("source", "liar", "x", "y", "z")]
    nodes = {name: Node(network, name) for name in names}
    layer = nodes[names[0]].store.add(CONTENT)
    nodes[names[1]].store.add(CONTENT)
    for index in range(0, PIECES, 2):
        nodes[names[1]].lie(layer, index)

    async def at_some_pace(message: bytes) -> bytes:
        await trio.sleep(rng.random())
        return message

    scopes: dict[NodeId, trio.CancelScope] = {}

    async def live(name: NodeId) -> None:
        """Fetch until it is done, as a new process after each kill."""
        node = nodes[name]
        while layer.digest not in node.store.blobs:
            node.restart()
            scopes[name] = trio.CancelScope()
            with scopes[name]:
                await node.fetch(layer, [other for other in names if other != name])

    async def kill_now_and_then() -> None:
        for _ in range(12):
            await trio.sleep(rng.random() * 2)
            victim = rng.choice(names)
            network.kill(victim)
            if victim in scopes:
                scopes[victim].cancel()
            await trio.sleep(rng.random() * 2)
            network.revive(victim)

    for name in names:
        network.hooks[name] = at_some_pace
    async with trio.open_nursery() as nursery:
        nursery.start_soon(kill_now_and_then)
        for name in names[2:]:
            nursery.start_soon(live, name)
    for name in names[2:]:
        assert content_of(nodes[name], layer) == CONTENT
        assert set(nodes[name].store.writes.values()) == {1}
