"""Models from an OCI registry and back: Debian's docker-registry, with and without tokens."""

import base64
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from ollamad.bringing import Bringer, Step
from ollamad.core.names import parse_name
from ollamad.core.pieces import MIB
from ollamad.core.state import Model
from ollamad.sources import push as push_module
from ollamad.sources import ranges
from ollamad.sources.base import (
    AccessRefused,
    NotFound,
    OriginRefused,
    OriginUnreachable,
    SourceError,
)
from ollamad.sources.client import OriginClient, basic_header
from ollamad.sources.origins import Origins, OriginSettings
from ollamad.sources.policy import Policy, parse_hosts
from ollamad.sources.push import Pusher
from ollamad.sources.references import resolve_source
from ollamad.sources.registry import (
    RegistrySource,
    challenge_parameters,
    read_docker_account,
)
from ollamad.store.errors import StoreFull
from ollamad.store.manifests import describe
from ollamad.store.models import ModelStore
from tests.fakes.gguf_files import gguf_bytes
from tests.fakes.origin_servers import (
    BreakingProxy,
    RegistryServer,
    TokenServer,
    registry_server,
    serving,
    token_server,
)

LOOPBACK = Policy(parse_hosts("127.0.0.1,localhost"), parse_hosts("127.0.0.1,localhost"))
GGUF = gguf_bytes(tensors={"w": ((1024, 1024), 0)}, fill=random.Random(2).randbytes(1 << 22))


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "BACKOFF_S", 0.001)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TokenServer]:
    with token_server(tmp_path_factory.mktemp("tokens")) as server:
        yield server


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    with registry_server(tmp_path_factory.mktemp("plain")) as server:
        yield server


@pytest.fixture(scope="module")
def guarded(
    tmp_path_factory: pytest.TempPathFactory, tokens: TokenServer
) -> Iterator[RegistryServer]:
    with registry_server(tmp_path_factory.mktemp("guarded"), tokens) as server:
        yield server


@pytest.fixture
def docker_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Docker's configuration, without accounts."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.delenv("REGISTRY_AUTH_FILE", raising=False)
    return tmp_path / "config.json"


def sign_in(config: Path, host: str, account: str = "me:s3cret") -> None:
    auth = base64.b64encode(account.encode()).decode()
    config.write_text(json.dumps({"auths": {f"https://{host}/v1/": {"auth": auth}}}))


async def store_at(path: Path) -> ModelStore:
    store = ModelStore(path, keep_free_bytes=0)
    await store.prepare()
    return store


async def made(store: ModelStore) -> Model:
    """A model of Ollama's shape: weights, template, system prompt, parameters, licence."""
    digest, _ = await store.put_bytes(GGUF)
    return await store.build_model(
        "tiny", digest, template="{{ .Prompt }}", system="Be brief.", license="MIT"
    )


async def fill(server: RegistryServer, store: ModelStore, repository: str) -> Model:
    model = await made(store)
    blobs = [store.blob_path(layer.digest).read_bytes() for layer in model.layers]
    server.fill(repository, "latest", model.manifest, blobs)
    return model


async def pull(
    store: ModelStore,
    name: str,
    settings: OriginSettings | None = None,
    report: Callable[[Step], None] = lambda step: None,
) -> Model:
    bringer = Bringer(store, Origins(settings or OriginSettings(policy=LOOPBACK)))
    async with store.pins.hold() as hold:
        return await bringer.bring(resolve_source(name), "mine", hold, report, lambda files: None)


async def push(
    store: ModelStore, model: Model, name: str, settings: OriginSettings | None = None
) -> list[int]:
    """What was told of its progress."""
    seen: list[int] = []

    async def read(digest: str, offset: int, length: int) -> bytes:
        return store.blob_path(digest).read_bytes()[offset : offset + length]

    async with OriginClient(LOOPBACK) as client:
        pusher = Pusher(client, parse_name(name), plain_http=LOOPBACK.allow_http)
        blobs = [(blob.digest, blob.size) for blob in describe(model.manifest).blobs]
        await pusher.push(model.manifest, blobs, read, seen.append)
    return seen


async def test_a_model_comes_as_it_is(plain: RegistryServer, tmp_path: Path) -> None:
    model = await fill(plain, await store_at(tmp_path / "there"), "me/tiny")
    store = await store_at(tmp_path / "here")
    steps: list[Step] = []
    pulled = await pull(store, f"{plain.host}/me/tiny", report=steps.append)
    assert pulled.manifest == model.manifest
    # What is told names the files in the order in which they come: as Ollama has it.
    manifest = describe(model.manifest)
    order = [(blob.digest, blob.size) for blob in (*manifest.layers, manifest.config)]
    assert list(steps[0].layers) == order
    ends = [sum(size for _, size in order[: n + 1]) for n in range(len(order))]
    assert set(ends) <= {step.done for step in steps}
    assert pulled.digest == f"sha256:{hashlib.sha256(model.manifest).hexdigest()}"
    for layer in model.layers:
        path = store.blob_path(layer.digest)
        assert f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" == layer.digest
    assert (await store.describe_model(pulled)).system == "Be brief."
    assert store.space.promised == 0


async def test_what_is_here_already_is_not_freed_during_a_pull(
    plain: RegistryServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights came with a model that is deleted while the rest still comes."""
    model = await fill(plain, await store_at(tmp_path / "there"), "me/kept")
    store = await store_at(tmp_path / "here")
    await store.put_bytes(GGUF)
    real = ModelStore.model_of

    async def late(self: ModelStore, name: str, manifest: bytes) -> Model:
        await self.free(lambda: (), grace_s=0)
        return await real(self, name, manifest)

    monkeypatch.setattr(ModelStore, "model_of", late)
    assert (await pull(store, f"{plain.host}/me/kept")).digest == model.digest


async def test_a_mirror_stands_in_for_ollamas_registry(
    plain: RegistryServer, tmp_path: Path
) -> None:
    model = await fill(plain, await store_at(tmp_path / "there"), "library/known")
    settings = OriginSettings(mirror=plain.url)  # allowed without more: the operator named it
    pulled = await pull(await store_at(tmp_path / "here"), "known", settings)
    assert pulled.digest == model.digest
    with pytest.raises(NotFound, match=r"no model smollm2:7b; check .*did you mean smollm2:135m"):
        await pull(await store_at(tmp_path / "here"), "smollm2:7b", settings)


async def test_a_token_is_got_from_the_realm(
    guarded: RegistryServer, tokens: TokenServer, tmp_path: Path, docker_config: Path
) -> None:
    there = await store_at(tmp_path / "there")
    model = await made(there)
    name = f"{guarded.host}/me/tokened"
    with pytest.raises(SourceError, match="refuses access"):  # who has no account cannot push
        await push(there, model, name)
    sign_in(docker_config, guarded.host)
    total = sum(layer.size for layer in model.layers)
    seen = await push(there, model, name)
    assert seen[-1] == total
    assert seen == sorted(seen)
    sign_in(docker_config, "nobody")
    tokens.asked.clear()
    pulled = await pull(await store_at(tmp_path / "here"), name)
    assert pulled.digest == model.digest
    [asked] = tokens.asked  # one token for the manifest and all blobs
    assert asked["scope"] == "repository:me/tokened:pull"
    assert asked["service"] == "test-registry"
    assert {"ts", "nonce"} <= asked.keys()


async def test_a_private_model_needs_the_account(
    guarded: RegistryServer, tokens: TokenServer, tmp_path: Path, docker_config: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    there = await store_at(tmp_path / "there")
    sign_in(docker_config, guarded.host)
    model = await made(there)
    name = f"{guarded.host}/me/private"
    await push(there, model, name)
    monkeypatch.setattr(tokens, "anonymous_pull", False)
    here = await store_at(tmp_path / "here")
    sign_in(docker_config, "other.example")
    with pytest.raises(AccessRefused, match=r"refuses access .*sign in there first"):
        await pull(here, name)
    sign_in(docker_config, guarded.host, "me:wrong")
    with pytest.raises(SourceError, match="refuses access"):
        await pull(here, name)
    sign_in(docker_config, guarded.host)
    assert (await pull(here, name)).digest == model.digest


async def test_a_realm_elsewhere_gets_no_password(
    guarded: RegistryServer, tokens: TokenServer, tmp_path: Path, docker_config: Path
) -> None:
    """The registry is asked as localhost; its realm is 127.0.0.1, which is another host."""
    sign_in(docker_config, f"localhost:{guarded.port}")
    store = await store_at(tmp_path / "here")
    name = f"localhost:{guarded.port}/me/x"
    tokens.asked.clear()
    with pytest.raises(
        OriginRefused, match=r"not its own host.*sources\.token_hosts: 127\.0\.0\.1"
    ):
        await pull(store, name)
    assert tokens.asked == []
    allowed = OriginSettings(policy=LOOPBACK, token_hosts=parse_hosts("127.0.0.1"))
    with pytest.raises(NotFound):
        await pull(store, name, allowed)
    assert len(tokens.asked) == 1


@pytest.mark.parametrize("pushing", [False, True])
async def test_a_token_that_expires_meanwhile_is_replaced(
    guarded: RegistryServer, tokens: TokenServer, tmp_path: Path, docker_config: Path,
    monkeypatch: pytest.MonkeyPatch, pushing: bool,
) -> None:  # fmt: skip
    sign_in(docker_config, guarded.host)
    there = await store_at(tmp_path / "there")
    model = await made(there)
    repository = f"me/{'pushed' if pushing else 'pulled'}-late"
    name = f"{guarded.host}/{repository}"
    if not pushing:
        await push(there, model, name)
    monkeypatch.setattr(tokens, "ttl_s", -3600)
    scope = {"scope": f"repository:{repository}:push,pull"}
    expired = tokens.token(scope, basic_header("me", "s3cret"))
    monkeypatch.setattr(tokens, "ttl_s", 300)
    tokens.asked.clear()
    place, method = (Pusher, "_upload") if pushing else (RegistrySource, "open")
    real, times = getattr(place, method), 0

    def expire(self: Any, *arguments: Any, **more: Any) -> Any:
        nonlocal times
        times += 1
        if times == 2:
            self._login._header = f"Bearer {expired}"
        return real(self, *arguments, **more)

    monkeypatch.setattr(place, method, expire)
    if pushing:
        await push(there, model, name)
    pulled = await pull(await store_at(tmp_path / "here"), name)
    assert pulled.digest == model.digest
    assert times > 2
    # To ask what is there, to send it (twice), and to pull it; or to pull it (twice).
    assert len(tokens.asked) == (4 if pushing else 2)


async def test_who_signs_in_meanwhile_signs_in_for_all() -> None:
    """Also for a connection that is refused after that: a realm may give the same token again."""
    header, challenges = "Bearer old", 0

    class Login:
        def header(self) -> str:
            return header

        async def challenged(self, www_authenticate: str) -> bool:
            nonlocal challenges
            challenges += 1
            return False

    class Realm(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            nonlocal header
            header = "Bearer new"  # another connection got it
            self.send_response(200 if self.headers["Authorization"] == header else 401)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with serving(Realm) as port:
        async with OriginClient(LOOPBACK) as client:
            await client.document(f"http://127.0.0.1:{port}/x", credentials=Login())
    assert challenges == 0


@pytest.mark.parametrize("after", [0, 5 * MIB // 2])
async def test_a_push_survives_a_line_that_breaks(
    plain: RegistryServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """In the middle of the third chunk, or before the first, of which nothing has come then."""
    monkeypatch.setattr(push_module, "CHUNK_BYTES", MIB)
    monkeypatch.setattr(push_module, "BACKOFF_S", 0.001)
    store = await store_at(tmp_path / "there")
    model = await made(store)
    with BreakingProxy(plain.port, after=after, times=2) as proxy:
        seen = await push(store, model, f"{proxy.host}/me/broken{after}")
        assert proxy.left == 0
    assert seen[-1] == sum(layer.size for layer in model.layers)
    pulled = await pull(await store_at(tmp_path / "here"), f"{plain.host}/me/broken{after}")
    assert pulled.digest == model.digest


async def test_a_push_that_gets_no_farther_ends(
    plain: RegistryServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push_module, "CHUNK_BYTES", MIB)
    monkeypatch.setattr(push_module, "BACKOFF_S", 0.001)
    store = await store_at(tmp_path / "there")
    with BreakingProxy(plain.port, after=5 * MIB // 2, times=1000) as proxy:
        with pytest.raises(OriginUnreachable, match="cannot be reached or broke off"):
            await push(store, await made(store), f"{proxy.host}/me/hopeless")
        assert proxy.left == 1000 - push_module.MAX_FAILURES


async def test_what_is_pushed_again_is_not_sent_again(
    plain: RegistryServer, tmp_path: Path
) -> None:
    store = await store_at(tmp_path / "there")
    model = await made(store)
    await push(store, model, f"{plain.host}/me/again")
    for layer in model.layers:
        store.blob_path(layer.digest).unlink()  # nothing can be read any more
    seen = await push(store, model, f"{plain.host}/me/again")
    assert seen[-1] == sum(layer.size for layer in model.layers)


async def test_a_blob_that_is_not_what_its_digest_says_never_gets_in(
    plain: RegistryServer, tmp_path: Path
) -> None:
    model = await fill(plain, await store_at(tmp_path / "there"), "me/rotten")
    weights = next(layer for layer in model.layers if layer.size == len(GGUF))
    hexes = weights.digest.removeprefix("sha256:")
    path = plain.root / f"docker/registry/v2/blobs/sha256/{hexes[:2]}/{hexes}/data"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    store = await store_at(tmp_path / "here")
    try:
        with pytest.raises(SourceError, match=r"was promised, and .* thrown away"):
            await pull(store, f"{plain.host}/me/rotten")
        assert not await store.has_blob(weights.digest)
        path.write_bytes(good[:-1])
        with pytest.raises(SourceError, match="has changed while it was fetched"):
            await pull(store, f"{plain.host}/me/rotten")
    finally:
        path.write_bytes(good)
    assert await store.partials() == [weights.digest]
    assert (await pull(store, f"{plain.host}/me/rotten")).digest == model.digest


async def test_a_model_that_does_not_fit_is_refused_before_it_comes(
    plain: RegistryServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(plain, await store_at(tmp_path / "there"), "me/large")
    store = await store_at(tmp_path / "here")
    monkeypatch.setattr("ollamad.store.files.free_bytes_of", lambda _: (len(GGUF) + 10, 1 << 40))
    with pytest.raises(StoreFull, match=r"are needed, .* are free"):
        await pull(store, f"{plain.host}/me/large")
    assert list(store.blobs.iterdir()) == []


async def test_what_is_not_allowed_is_not_asked(plain: RegistryServer, tmp_path: Path) -> None:
    store = await store_at(tmp_path / "here")
    name = f"{plain.host}/me/tiny"
    with pytest.raises(OriginRefused, match=rf"sources\.allow_private: 127\.0\.0\.1:{plain.port}"):
        await pull(store, name, OriginSettings())
    # Allowed to go there, but not without TLS: so TLS is what is tried.
    only_private = OriginSettings(policy=Policy(allow_private=parse_hosts("127.0.0.0/8")))
    with pytest.raises(OriginUnreachable):
        await pull(store, name, only_private)


def test_challenges() -> None:
    text = 'realm="https://a/token",service=b, scope="repository:c/d:pull,push"'
    assert challenge_parameters(text) == {
        "realm": "https://a/token", "service": "b", "scope": "repository:c/d:pull,push",
    }  # fmt: skip
    assert challenge_parameters("") == {}


def test_accounts_are_dockers(tmp_path: Path) -> None:
    environment = {"HOME": str(tmp_path)}
    assert read_docker_account("a.example", environment) is None
    path = tmp_path / ".docker" / "config.json"
    path.parent.mkdir()
    sign_in(path, "a.example", "u:p:q")
    assert read_docker_account("A.example", environment) == ("u", "p:q")
    assert read_docker_account("b.example", environment) is None
    path.write_text("{")
    with pytest.raises(SourceError, match="cannot be understood"):
        read_docker_account("a.example", environment)
    path.write_text('{"auths": {"a.example": {"auth": "%%%"}}}')
    with pytest.raises(SourceError, match="cannot be understood"):
        read_docker_account("a.example", environment)
