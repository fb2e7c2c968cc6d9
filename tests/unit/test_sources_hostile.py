"""Origins that lie: about sizes, places and versions, or that are as slow as they may be."""

import hashlib
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import trio

from ollamad import bringing
from ollamad.bringing import Bringer
from ollamad.core.names import parse_name
from ollamad.core.pieces import MIB
from ollamad.core.state import Model
from ollamad.sources import client, ranges
from ollamad.sources.base import OriginRefused, OriginUnreachable, SourceError
from ollamad.sources.huggingface import HuggingFace
from ollamad.sources.origins import Origins, OriginSettings
from ollamad.sources.policy import Policy, parse_hosts
from ollamad.sources.push import Pusher
from ollamad.sources.references import resolve_source
from ollamad.store.errors import PiecesRotten, StoreFull
from ollamad.store.models import ModelStore
from ollamad.store.partial import PartialBlob
from tests.fakes.gguf_files import gguf_bytes

HERE = Policy(parse_hosts("127.0.0.1"), parse_hosts("127.0.0.1"))
GGUF = gguf_bytes(tensors={"w": ((1024, 1024), 0)}, fill=random.Random(3).randbytes(1 << 22))
HEX = hashlib.sha256(GGUF).hexdigest()
DIGEST = f"sha256:{HEX}"

Answer = Callable[[BaseHTTPRequestHandler, int, int], None]


def honest(handler: BaseHTTPRequestHandler, first: int, last: int) -> None:
    """The range that was asked for."""
    last = min(last, len(GGUF) - 1)
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes {first}-{last}/{len(GGUF)}")
    handler.send_header("Content-Length", str(last + 1 - first))
    handler.end_headers()
    handler.wfile.write(GGUF[first : last + 1])


@contextmanager
def origin(answer: Answer) -> Iterator[str]:
    """A server that answers the question for the size honestly, and all others so."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            first, _, last = (
                self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            )
            is_first = (first, last) == ("0", "0")
            (honest if is_first else answer)(self, int(first), int(last or len(GGUF)))

        def log_message(self, format: str, *args: object) -> None:
            pass

    with serving(Handler) as server:
        yield f"http://127.0.0.1:{server.server_address[1]}/a.gguf"


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
async def store(tmp_path: Path) -> ModelStore:
    store = ModelStore(tmp_path / "models", keep_free_bytes=0)
    await store.prepare()
    return store


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "BACKOFF_S", 0.001)


async def pull(store: ModelStore, url: str) -> Model:
    bringer = Bringer(store, Origins(OriginSettings(policy=HERE, connections=2)))
    async with store.pins.hold() as hold:
        return await bringer.bring(
            resolve_source(url), "mine", hold, lambda step: None, lambda files: None
        )


def with_range(text: str) -> Answer:
    """206, with that for a Content-Range, and the bytes that were asked for."""

    def answer(handler: BaseHTTPRequestHandler, first: int, last: int) -> None:
        data = GGUF[first : last + 1]
        handler.send_response(206)
        handler.send_header("Content-Range", text.format(first=first, last=last))
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def too_much(handler: BaseHTTPRequestHandler, first: int, last: int) -> None:
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes {first}-{last}/{len(GGUF)}")
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.wfile.write(GGUF[first : last + 1] + b"and more")
    handler.close_connection = True


def other_bytes(handler: BaseHTTPRequestHandler, first: int, last: int) -> None:
    data = bytes(len(GGUF[first : last + 1]))
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes {first}-{last}/{len(GGUF)}")
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (with_range("bytes 7-9/{last}"), "sends another range than was asked for"),
        (with_range("lines {first}-{last}/9"), "sends another range than was asked for"),
        (with_range(""), "sends another range than was asked for"),
        (with_range("bytes {first}-{last}/17"), "has changed while it was fetched"),
        (too_much, "sends more than was asked for"),
        (other_bytes, f"{DIGEST} was promised, and sha256:"),
    ],
)
async def test_an_origin_that_lies_gets_nothing_in(
    store: ModelStore, answer: Answer, words: str
) -> None:
    with origin(answer) as url, pytest.raises(SourceError, match=words):
        await pull(store, f"{url}#sha256={HEX}")
    assert not await store.has_blob(DIGEST)
    assert store.space.promised == 0


@pytest.mark.parametrize("digits", ["9" * 5000, "٣٣", "-1", "0x10"])
async def test_numbers_that_no_size_has_are_no_sizes(store: ModelStore, digits: str) -> None:
    """Python refuses to read the first at all."""

    def answer(handler: BaseHTTPRequestHandler, first: int, last: int) -> None:
        handler.send_response(206)
        handler._headers_buffer.append(  # type: ignore[attr-defined]
            f"Content-Range: bytes {first}-{last}/{digits}\r\n".encode()
        )
        handler.send_header("Content-Length", str(len(GGUF[first : last + 1])))
        handler.end_headers()
        handler.wfile.write(GGUF[first : last + 1])

    with origin(answer) as url:
        await pull(store, f"{url}#sha256={HEX}")  # the size is not told, which is no crime
    assert await store.has_blob(DIGEST)
    assert client.number(digits) is None


async def test_an_answer_that_trickles_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes in time, and the whole never does."""
    monkeypatch.setattr(client, "DOCUMENT_S", 0.3)
    ended = threading.Event()

    def trickle(handler: BaseHTTPRequestHandler, first: int, last: int) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000000")
        handler.end_headers()
        while not ended.wait(0.02):
            handler.wfile.write(b"x")
            handler.wfile.flush()

    with origin(trickle) as url:
        async with client.OriginClient(HERE) as asked:
            with trio.fail_after(5), pytest.raises(OriginUnreachable, match="was not there after"):
                await asked.document(url)
        ended.set()


async def test_a_file_that_trickles_is_given_up(
    monkeypatch: pytest.MonkeyPatch, store: ModelStore
) -> None:
    monkeypatch.setattr(ranges, "CHUNK_S", 0.1)
    ended = threading.Event()

    def trickle(handler: BaseHTTPRequestHandler, first: int, last: int) -> None:
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes {first}-{last}/{len(GGUF)}")
        handler.send_header("Content-Length", str(last + 1 - first))
        handler.end_headers()
        with suppress(OSError):
            while not ended.wait(0.02):
                handler.wfile.write(b"x")
                handler.wfile.flush()
        handler.close_connection = True

    with origin(trickle) as url:
        try:
            with trio.fail_after(10), pytest.raises(OriginUnreachable, match="bytes came in"):
                await pull(store, f"{url}#sha256={HEX}")
        finally:
            ended.set()


async def test_a_size_that_no_disk_has_is_refused_before_a_byte_comes(store: ModelStore) -> None:
    asked = 0

    def huge(handler: BaseHTTPRequestHandler, first: int, last: int) -> None:
        nonlocal asked
        asked += 1
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes 0-0/{1 << 60}")
        handler.send_header("Content-Length", "1")
        handler.end_headers()
        handler.wfile.write(b"G")

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "honest", huge)
        with origin(huge) as url, pytest.raises(StoreFull):
            await pull(store, f"{url}#sha256={HEX}")
    assert asked == 1


async def test_a_list_that_goes_on_elsewhere_takes_no_token_along() -> None:
    asked: list[str] = []

    def listing(handler: BaseHTTPRequestHandler, first: int, last: int) -> None:
        asked.append(handler.path)
        body = b"[]"
        handler.send_response(200)
        handler.send_header("Link", f'<{elsewhere}>; rel="next"')
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    with origin(listing) as url, origin(listing) as elsewhere:
        async with client.OriginClient(HERE) as asking:
            endpoint = url.removesuffix("/a.gguf")
            hub = HuggingFace(asking, endpoint=endpoint, token="secret")
            with pytest.raises(OriginRefused, match="continues its list at"):
                await hub.resolve(parse_name("hf.co/me/x"))
    assert len(asked) == 1


async def test_no_connection_waits_for_the_end_of_another() -> None:
    """However many the settings allow: who waits counts as somebody who does not answer."""
    count = 16
    all_there = threading.Barrier(count)

    def wait(handler: BaseHTTPRequestHandler, first: int, last: int) -> None:
        with suppress(threading.BrokenBarrierError):
            all_there.wait(5)
        honest(handler, first, last)

    with origin(wait) as url:
        async with client.OriginClient(HERE) as asking, trio.open_nursery() as nursery:

            async def ask() -> None:
                async with asking.open(url, {"Range": "bytes=1-1"}) as response:
                    await response.aread()

            for _ in range(count):
                nursery.start_soon(ask)
        assert not all_there.broken


@pytest.mark.parametrize("times", [1, 3])
async def test_what_the_disk_lost_during_a_pull_comes_again(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """And nothing else; a disk that loses something each time ends the pull."""
    real, left = PartialBlob.finish, times
    asked: list[int] = []

    async def rot(self: PartialBlob, *arguments: object) -> str:
        nonlocal left
        if left:
            left -= 1
            path = store.blobs / f"{DIGEST.replace(':', '-')}.partial"
            data = bytearray(path.read_bytes())
            data[2 * MIB + 5] ^= 1
            path.write_bytes(data)
        return await real(self, *arguments)  # type: ignore[arg-type]

    def answer(handler: BaseHTTPRequestHandler, first: int, last: int) -> None:
        asked.extend(range(first // MIB, last // MIB + 1))
        honest(handler, first, last)

    monkeypatch.setattr(PartialBlob, "finish", rot)
    with origin(answer) as url:
        if times < bringing.MAX_ROTTEN:
            await pull(store, f"{url}#sha256={HEX}")
            assert await store.has_blob(DIGEST)
        else:
            with pytest.raises(PiecesRotten):
                await pull(store, f"{url}#sha256={HEX}")
    pieces = len(GGUF) // MIB + 1
    assert sorted(asked) == sorted([*range(pieces), *[2] * min(times, bringing.MAX_ROTTEN - 1)])


async def test_a_registry_cannot_have_a_model_sent_elsewhere() -> None:
    """Neither its bytes nor the password go to another host."""
    elsewhere: list[str] = []

    class Other(BaseHTTPRequestHandler):
        def do_PATCH(self) -> None:
            elsewhere.append(self.path)
            self.send_response(202)
            self.end_headers()

        do_PUT = do_PATCH

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Lying(Other):
        def do_HEAD(self) -> None:
            self.send_response(404)
            self.end_headers()

        def do_POST(self) -> None:
            self.send_response(202)
            self.send_header("Location", f"http://127.0.0.1:{other.server_address[1]}/upload")
            self.end_headers()

    async def read(digest: str, offset: int, length: int) -> bytes:
        return GGUF[offset : offset + length]

    with serving(Other) as other, serving(Lying) as registry:
        async with client.OriginClient(HERE) as asking:
            name = parse_name(f"127.0.0.1:{registry.server_address[1]}/me/x")
            pusher = Pusher(asking, name, plain_http=HERE.allow_http)
            with pytest.raises(OriginRefused, match="the registry's own host"):
                await pusher.push(b"{}", [(DIGEST, len(GGUF))], read, lambda sent: None)
    assert elsewhere == []


async def test_what_a_registry_keeps_elsewhere_is_not_sent_again() -> None:
    """Its blobs may be at a storage service, whose address is then the answer."""
    written: list[str] = []

    class Registry(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(307)
            self.send_header("Location", "https://storage.example/x?signature=y")
            self.end_headers()

        def do_PUT(self) -> None:
            written.append(self.path)
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(201)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    async def read(digest: str, offset: int, length: int) -> bytes:
        raise AssertionError("nothing is to be sent")

    with serving(Registry) as registry:
        async with client.OriginClient(HERE) as asking:
            name = parse_name(f"127.0.0.1:{registry.server_address[1]}/me/x")
            pusher = Pusher(asking, name, plain_http=HERE.allow_http)
            await pusher.push(b"{}", [(DIGEST, len(GGUF))], read, lambda sent: None)
    assert written == ["/v2/me/x/manifests/latest"]
