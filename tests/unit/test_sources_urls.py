"""Files by URL and from Hugging Face, against nginx: ranges, going on, faults, redirects, TLS."""

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import httpx
import pytest
import trio
from cryptography.hazmat.primitives.asymmetric import ec

from ollamad.bringing import Bringer, Step
from ollamad.core.pieces import MIB
from ollamad.core.state import Model
from ollamad.sources import client, ranges
from ollamad.sources.base import (
    AccessRefused,
    NotFound,
    OriginRefused,
    OriginUnreachable,
    SourceError,
)
from ollamad.sources.huggingface import BearerToken
from ollamad.sources.origins import Origins, OriginSettings
from ollamad.sources.policy import Policy, parse_hosts
from ollamad.sources.references import resolve_source
from ollamad.store.gguf import GgufError
from ollamad.store.models import ModelStore
from tests.fakes.gguf_files import gguf_bytes
from tests.fakes.origin_servers import ConnectProxy, Nginx, free_port, nginx, serving, write_pair

LOOPBACK = Policy(parse_hosts("127.0.0.1,localhost"), parse_hosts("127.0.0.1,localhost"))
SETTINGS = OriginSettings(policy=LOOPBACK, connections=4)
GGUF = gguf_bytes(tensors={"w": ((2048, 2048), 0)}, fill=random.Random(3).randbytes(1 << 24))
DIGEST = f"sha256:{hashlib.sha256(GGUF).hexdigest()}"
HEX = DIGEST.removeprefix("sha256:")
BREAKS_AFTER = 700_000  # bytes; less than a piece
LOCATIONS = """
location /whole/ { alias ROOT/; max_ranges 0; }
location /slow/ { alias ROOT/; limit_rate 2m; limit_rate_after 1m; }
location /dated/ { alias ROOT/; etag off; }
location /weak/ { alias ROOT/; etag off; add_header ETag 'W/"1"'; }
location /bare/ { alias ROOT/; etag off; add_header Last-Modified ""; }
location /mirrors/ { alias ROOT/; etag off; add_header ETag '"$request_id"'; }
location /busy/ { return 503; }
location /denied/ { return 403; }
location /moved/ { rewrite ^/moved/(.*)$ http://localhost:PORT/$1 redirect; }
location /here/ { rewrite ^/here/(.*)$ /$1 redirect; }
location /round/ { rewrite ^ /round/x redirect; }
location /inside/ { return 302 http://169.254.169.254/latest/meta-data; }
location /nowhere/ { return 302 "http://[broken/x"; }
location /secret/ { return 302 http://192.168.0.1/x.gguf; }
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    directory = tmp_path_factory.mktemp("nginx")
    port = free_port()
    locations = LOCATIONS.replace("ROOT", str(directory / "www")).replace("PORT", str(port))
    with nginx(directory, locations, port=port) as server:
        (server.root / "a.gguf").write_bytes(GGUF)
        (server.root / "no.gguf").write_bytes(b"<html>" * 1000)
        yield server


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "BACKOFF_S", 0.001)


@pytest.fixture
async def store(tmp_path: Path) -> ModelStore:
    store = ModelStore(tmp_path / "models", keep_free_bytes=0)
    await store.prepare()
    return store


async def pull(
    store: ModelStore,
    reference: str,
    settings: OriginSettings = SETTINGS,
    steps: list[Step] | None = None,
) -> Model:
    bringer = Bringer(store, Origins(settings))
    seen = [] if steps is None else steps
    async with store.pins.hold() as hold:
        return await bringer.bring(
            resolve_source(reference), "mine", hold, seen.append, lambda files: None
        )


async def has_model(store: ModelStore) -> bool:
    path = store.blob_path(DIGEST)
    return await store.has_blob(DIGEST) and path.read_bytes() == GGUF


def forget(server: Nginx) -> None:
    server.log.write_text("")


async def logged(server: Nginx, path: str, count: int = 1) -> list[str]:
    """The requests for a path, once nginx has written that many down."""
    with trio.fail_after(5):
        while len(found := server.requests(path)) < count:  # noqa: ASYNC110 - another process
            await trio.sleep(0.02)
    return found


async def test_a_file_comes_in_several_ranges_and_each_byte_once(
    server: Nginx, store: ModelStore
) -> None:
    forget(server)
    steps: list[Step] = []
    await pull(store, f"{server.url}/a.gguf#sha256={HEX}", steps=steps)
    assert await has_model(store)
    asked = await logged(server, "/a.gguf", 6)
    assert len(asked) == 6  # its size, a quarter for each connection, and the rest
    assert server.bytes_sent("/a.gguf") == len(GGUF) + 1
    assert steps[-1].done == steps[-1].total == steps[-1].received == len(GGUF)
    assert store.space.promised == 0


async def test_a_file_that_is_here_already_is_not_freed_during_a_pull(
    server: Nginx, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.put_bytes(GGUF)
    real = ModelStore.build_model

    async def late(self: ModelStore, *arguments: object, **more: object) -> Model:
        await self.free(lambda: (), grace_s=0)
        return await real(self, *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(ModelStore, "build_model", late)
    await pull(store, f"{server.url}/a.gguf#sha256={HEX}")
    assert await has_model(store)


@pytest.mark.parametrize("fragment", ["", f"#sha256={HEX}", f"#sha256:{HEX.upper()}"])
async def test_a_server_without_ranges_is_read_through(
    server: Nginx, store: ModelStore, fragment: str
) -> None:
    await pull(store, f"{server.url}/whole/a.gguf{fragment}")
    assert await has_model(store)


async def test_where_a_digest_decides_another_etag_does_not_matter(
    server: Nginx, store: ModelStore
) -> None:
    """As behind a name with several mirrors, each with etags of its own."""
    forget(server)
    await pull(store, f"{server.url}/mirrors/a.gguf#sha256={HEX}")
    assert await has_model(store)
    assert len(await logged(server, "/mirrors/a.gguf", 6)) == 6
    assert server.bytes_sent("/mirrors/a.gguf") == len(GGUF) + 1


@pytest.mark.parametrize("fragment", ["", f"#sha256={HEX}"])
async def test_a_line_that_never_lasts_for_a_whole_piece_is_no_matter(
    store: ModelStore, fragment: str
) -> None:
    """Of a piece that breaks off the rest is asked for."""
    sent: list[int] = []

    class Breaking(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            self.send_response(206)
            self.send_header("Content-Length", str(last + 1 - first))
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(GGUF)}")
            self.send_header("ETag", '"1"')
            self.end_headers()
            sent.append(self.wfile.write(GGUF[first : min(last + 1, first + BREAKS_AFTER)]))

        def log_message(self, format: str, *args: object) -> None:
            pass

    with serving(Breaking) as port:
        settings = OriginSettings(policy=LOOPBACK, connections=1)
        await pull(store, f"http://127.0.0.1:{port}/a.gguf{fragment}", settings)
    assert await has_model(store)
    # Of what came in an answer that broke off, httpx keeps less than a chunk back.
    assert sum(sent) < len(GGUF) + len(sent) * ranges.CHUNK_BYTES


async def test_another_digest_than_promised(server: Nginx, store: ModelStore) -> None:
    with pytest.raises(SourceError, match=r"sha256:0+ was promised, and sha256:.* came"):
        await pull(store, f"{server.url}/a.gguf#sha256={'0' * 64}")
    assert list(store.blobs.iterdir()) == []


async def test_what_is_no_model(server: Nginx, store: ModelStore) -> None:
    with pytest.raises(GgufError):
        await pull(store, f"{server.url}/no.gguf")


@pytest.mark.parametrize(
    ("place", "kind", "message"),
    [
        ("busy/a.gguf", OriginUnreachable, r"HTTP 503.*what has come is kept"),
        ("denied/a.gguf", AccessRefused, "refuses access"),
        ("absent.gguf", NotFound, "there is no"),
        ("round/a.gguf", SourceError, "redirects again and again"),
        ("nowhere/a.gguf", OriginRefused, "leads to something that is no URL"),
    ],
)
async def test_errors_say_what_to_do(
    server: Nginx, store: ModelStore, place: str, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        await pull(store, f"{server.url}/{place}")
    assert list(store.blobs.iterdir()) == []


async def test_a_stall_ends_and_is_told(
    server: Nginx, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "STALL_S", 0.2)
    listener = trio.socket.socket()
    await listener.bind(("127.0.0.1", 0))
    listener.listen()  # the system takes the connection, and nobody ever answers
    with pytest.raises(OriginUnreachable, match="does not answer"):
        await pull(store, f"http://127.0.0.1:{listener.getsockname()[1]}/a.gguf")
    listener.close()


# Going on.

PULLER = """
import sys, trio
from pathlib import Path
from ollamad.bringing import Bringer
from ollamad.sources.origins import Origins, OriginSettings
from ollamad.sources.policy import Policy, parse_hosts
from ollamad.sources.references import resolve_source
from ollamad.store.models import ModelStore

async def main():
    store = ModelStore(Path(sys.argv[1]), keep_free_bytes=0)
    await store.prepare()
    hosts = parse_hosts("127.0.0.1")
    source = Origins(OriginSettings(policy=Policy(hosts, hosts), connections=3))
    def report(step): print(step.done, flush=True)
    async with store.pins.hold() as hold:
        await Bringer(store, source).bring(
            resolve_source(sys.argv[2]), "mine", hold, report, lambda files: None)
    print("all", flush=True)

trio.run(main)
"""


def run_until(root: Path, url: str, size: int) -> bool:
    """Pull in a process that is killed once that many bytes are on the disk; whether it ended."""
    with subprocess.Popen(
        [sys.executable, "-c", PULLER, str(root), url], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == "all":
                return True
            if int(line) >= size:
                process.send_signal(signal.SIGKILL)
                return False
    raise AssertionError("it failed")


@pytest.mark.parametrize("fragment", ["", f"#sha256={HEX}"])
async def test_after_kill_9_no_verified_byte_comes_twice(
    server: Nginx, tmp_path: Path, fragment: str
) -> None:
    """Killed again and again; what the server is asked for never is what the journal proves."""
    url = f"{server.url}/slow/a.gguf{fragment}"
    root = tmp_path / "models"
    forget(server)
    ended, kills = False, 0
    proved: set[int] = set()
    for part in range(1, 5):
        before = len(server.requests("/slow/a.gguf"))
        ended = run_until(root, url, part * len(GGUF) // 5)
        await trio.sleep(0.3)  # nginx writes a request down when it sees that the client is gone
        for line in server.requests("/slow/a.gguf")[before:]:
            match = re.search(r"bytes=(\d+)-(\d+)", line)
            assert match is not None
            first, last = int(match[1]), int(match[2])
            if (first, last) != (0, 0):  # the question for the size
                assert not proved & set(range(first // MIB, last // MIB + 1))
        if ended:
            break
        kills += 1
        store = ModelStore(root, keep_free_bytes=0)
        await store.prepare()
        [key] = await store.partials()
        blob = await store.open_growing(key, len(GGUF), named=bool(fragment))
        now = {index for index, held in enumerate(blob.have) if held}
        blob.close()
        assert proved <= now
        proved = now
    assert kills >= 3
    assert proved
    if not ended:
        assert run_until(root, url, 1 << 40)
    store = ModelStore(root, keep_free_bytes=0)
    await store.prepare()
    assert await has_model(store)
    # Lost were only pieces that were under way: three at each kill.
    assert server.bytes_sent("/slow/a.gguf") <= len(GGUF) + kills * 3 * (MIB + 256 * 1024) + 10


@pytest.mark.parametrize("place", ["", "dated/", "weak/", "bare/"])
async def test_a_file_that_changed_meanwhile_is_begun_anew(
    server: Nginx, store: ModelStore, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Without a digest the etag or the time of the change says so, if there is one; nothing of
    the old file gets into the new one."""
    path = server.root / "changing.gguf"
    path.write_bytes(bytes(byte ^ 1 for byte in GGUF))
    os.utime(path, (1, 1))  # nginx makes the etag of the second and the size
    real = ranges._Download._write
    half = trio.Event()

    async def stop_half_way(self: "ranges._Download", index: int, data: bytearray) -> None:
        await real(self, index, data)
        if sum(self._target.have) >= 8:
            half.set()
            await trio.sleep_forever()

    with monkeypatch.context() as patch:
        patch.setattr(ranges._Download, "_write", stop_half_way)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pull, store, f"{server.url}/{place}changing.gguf")
            await half.wait()
            nursery.cancel_scope.cancel()
    path.write_bytes(GGUF)
    os.utime(path, (2, 2))
    await pull(store, f"{server.url}/{place}changing.gguf")
    assert await has_model(store)
    assert store.space.promised == 0


@pytest.mark.parametrize("place", ["", "dated/", "weak/"])
async def test_a_file_that_changes_under_a_pull_is_noticed(
    server: Nginx, store: ModelStore, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    path = server.root / "moving.gguf"
    path.write_bytes(GGUF)
    os.utime(path, (1, 1))
    real = ranges._Download._bring

    async def change_before(self: "ranges._Download", span: ranges.Span) -> None:
        path.write_bytes(GGUF[:-1] + b"?")
        await real(self, span)

    monkeypatch.setattr(ranges._Download, "_bring", change_before)
    with pytest.raises(SourceError, match="has changed while it was fetched"):
        await pull(store, f"{server.url}/{place}moving.gguf")


async def test_a_file_whose_versions_nothing_tells_apart_comes_in_one_answer(
    server: Nginx, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{server.url}/bare/a.gguf"
    real = ranges._Download._write

    async def break_off(self: "ranges._Download", index: int, data: bytearray) -> None:
        await real(self, index, data)
        if index == 2:
            raise httpx.ReadError("the line broke")

    with monkeypatch.context() as patch:
        patch.setattr(ranges._Download, "_write", break_off)
        with pytest.raises(OriginUnreachable, match="neither an ETag nor when it changed"):
            await pull(store, url)
    await trio.sleep(0.3)  # nginx writes a request down when it sees that the client is gone
    forget(server)
    steps: list[Step] = []
    await pull(store, url, steps=steps)
    assert await has_model(store)
    asked = await logged(server, "/bare/a.gguf", 3)
    assert [line for line in asked if "bytes=0-0" not in line] == [asked[-1]]
    assert server.bytes_sent("/bare/a.gguf") == len(GGUF) + 2  # twice a byte for its size
    assert steps[0].done == 0


def test_a_time_of_change_that_is_the_answers_own_tells_nothing() -> None:
    now = "Fri, 27 Nov 2026 00:00:00 GMT"
    made = httpx.Response(200, headers={"Last-Modified": now, "Date": now})
    assert ranges._modified(made) == ""


# What may be asked.


async def test_redirects_to_other_hosts_need_a_digest_or_the_setting(
    server: Nginx, store: ModelStore
) -> None:
    url = f"{server.url}/moved/a.gguf"
    with pytest.raises(OriginRefused, match=r"redirects to another host.*sources\.redirects: any"):
        await pull(store, url)
    await pull(store, f"{server.url}/here/a.gguf")  # the same host
    assert await store.remove_blob(DIGEST)
    await pull(store, f"{url}#sha256={HEX}")
    assert await store.remove_blob(DIGEST)
    policy = Policy(LOOPBACK.allow_http, LOOPBACK.allow_private, any_redirects=True)
    await pull(store, url, OriginSettings(policy=policy))
    assert await has_model(store)


@pytest.mark.parametrize("place", ["inside/x.gguf", "secret/x.gguf"])
async def test_redirects_into_private_networks_are_refused_whatever_the_digest(
    server: Nginx, store: ModelStore, place: str
) -> None:
    policy = Policy(parse_hosts("*"), parse_hosts("127.0.0.1"), any_redirects=True)
    with pytest.raises(OriginRefused, match=r"not a public address.*sources\.allow_private"):
        await pull(store, f"{server.url}/{place}#sha256={HEX}", OriginSettings(policy=policy))


async def test_plain_http_and_private_addresses_need_the_setting(
    server: Nginx, store: ModelStore
) -> None:
    url = f"{server.url}/a.gguf"
    with pytest.raises(OriginRefused, match=r"not encrypted.*sources\.allow_http: 127\.0\.0\.1"):
        await pull(store, url, OriginSettings())
    only_http = OriginSettings(policy=Policy(allow_http=parse_hosts("*")))
    with pytest.raises(OriginRefused, match=r"sources\.allow_private: 127\.0\.0\.1"):
        await pull(store, url, only_http)
    # By a name, it is the address behind it that counts.
    with pytest.raises(
        OriginRefused, match=r"localhost:\d+ is at (127\.0\.0\.1|::1), which is not"
    ):
        await pull(store, url.replace("127.0.0.1", "localhost"), only_http)


async def test_passwords_stay_with_their_host(server: Nginx) -> None:
    """A redirect that is followed does not take them along."""
    seen: list[str] = []

    class Recorder(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers.get("Authorization", ""))
            self.send_response(302 if self.path == "/first" else 200)
            if self.path == "/first":
                self.send_header("Location", f"http://localhost:{port}/second")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with serving(Recorder) as port:
        policy = Policy(LOOPBACK.allow_http, LOOPBACK.allow_private, any_redirects=True)
        async with client.OriginClient(policy) as origin:
            await origin.document(f"http://me:pw@127.0.0.1:{port}/first")
            await origin.document(f"http://127.0.0.1:{port}/first", {"Authorization": "Bearer x"})
            token = BearerToken("t")
            await origin.document(f"http://127.0.0.1:{port}/first", credentials=token)
    assert [value[:6] for value in seen] == ["Basic ", "", "Bearer", "", "Bearer", ""]


# TLS and proxies.


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Nginx, Path]]:
    """nginx with TLS for models.example, and its CA."""
    directory = tmp_path_factory.mktemp("tls")
    write_pair(
        ec.generate_private_key(ec.SECP256R1()),
        "models.example",
        directory / "key.pem",
        directory / "cert.pem",
    )
    tls = f"ssl_certificate {directory}/cert.pem; ssl_certificate_key {directory}/key.pem;"
    with nginx(directory, tls, listen_more="ssl") as server:
        (server.root / "a.gguf").write_bytes(GGUF)
        yield server, directory / "cert.pem"


async def test_an_own_ca_and_a_proxy(
    secure: tuple[Nginx, Path], store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, ca = secure
    url = f"https://models.example/a.gguf#sha256={HEX}"
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with ConnectProxy({"models.example": server.port}) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        monkeypatch.setenv("NO_PROXY", "other.example")
        with pytest.raises(OriginUnreachable, match=r"not trusted .*sources\.ca_file"):
            await pull(store, url, OriginSettings())
        await pull(store, url, OriginSettings(ca_file=str(ca)))
        assert set(proxy.asked) == {"models.example:443"}
        assert await store.remove_blob(DIGEST)
        monkeypatch.setenv("SSL_CERT_FILE", str(ca))
        await pull(store, url, OriginSettings())
        assert await store.remove_blob(DIGEST)
        monkeypatch.setenv("NO_PROXY", "models.example")
        proxy.asked.clear()
        with pytest.raises(SourceError):  # nobody resolves that name
            await pull(store, url, OriginSettings())
        assert proxy.asked == []
    with pytest.raises(SourceError, match="cannot be used"):
        await pull(store, url, OriginSettings(ca_file="/nowhere.pem"))


# Hugging Face.


def lfs(path: str, data: bytes) -> dict[str, object]:
    entry = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 135}
    return {"type": "file", "path": path, "size": len(data), "oid": "0" * 40, "lfs": entry}


@pytest.fixture(scope="module")
def hub(server: Nginx) -> OriginSettings:
    """A mirror of Hugging Face with one repository."""
    small = gguf_bytes()
    names = ["Tiny-Q8_0.gguf", "Tiny-Q4_K_M.gguf", "Tiny-F16.gguf", "mmproj-Tiny-F16.gguf"]
    contents = {name: GGUF if "Q4_K_M" in name else small for name in names}
    contents[names[-1]] = gguf_bytes(metadata={"general.architecture": "clip"})
    entries = [{"type": "directory", "path": "docs", "oid": "1"}, lfs("README.md", b"x")]
    entries += [lfs(name, data) for name, data in contents.items()]
    entries += [lfs(f"Big-Q2_K-0000{n}-of-00002.gguf", small) for n in (1, 2)]
    for name, data in contents.items():
        path = server.root / "me" / "Tiny-GGUF" / "resolve" / "main" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    listing = server.root / "api" / "models" / "me" / "Tiny-GGUF" / "tree" / "main"
    listing.parent.mkdir(parents=True)
    listing.write_text(json.dumps(entries))
    return OriginSettings(hf_endpoint=server.url, hf_token="hf_secret")


async def test_hugging_face(hub: OriginSettings, store: ModelStore) -> None:
    model = await pull(store, "hf.co/me/Tiny-GGUF", hub)
    kinds = [layer.media_type.rpartition(".")[2] for layer in model.layers[1:]]
    assert kinds == ["model", "projector"]
    assert model.layers[1].digest == DIGEST  # Q4_K_M, which nobody named
    other = await pull(store, "hf.co/me/Tiny-GGUF:q8_0", hub)
    assert other.layers[1].digest != DIGEST


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("Tiny-GGUF:Q5_K_M", SourceError, "no file for Q5_K_M; choose one of: F16, Q2_K, Q4_K_M"),
        ("Tiny-GGUF:Q2_K", SourceError, "in several parts"),
        ("absent", AccessRefused, "no repository me/absent, or it is private: then set HF_TOKEN"),
    ],
)
async def test_hugging_face_says_what_there_is(
    hub: OriginSettings, store: ModelStore, name: str, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        await pull(store, f"hf.co/me/{name}", hub)


# Files of this machine.


async def test_local_files_need_the_setting(store: ModelStore, tmp_path: Path) -> None:
    path = tmp_path / "allowed" / "a.gguf"
    path.parent.mkdir()
    path.write_bytes(GGUF)
    (tmp_path / "other.gguf").write_bytes(GGUF)
    settings = OriginSettings(local_files=(str(path.parent),))
    with pytest.raises(OriginRefused, match="ollama-dist models import"):
        await pull(store, str(path), OriginSettings())
    with pytest.raises(OriginRefused):
        await pull(store, f"{path.parent}/../other.gguf", settings)
    (path.parent / "link.gguf").symlink_to(tmp_path / "other.gguf")
    with pytest.raises(OriginRefused):
        await pull(store, f"{path.parent}/link.gguf", settings)
    with pytest.raises(NotFound):
        await pull(store, f"{path.parent}/absent.gguf", settings)
    await pull(store, f"file:{path}", settings)
    assert await has_model(store)
