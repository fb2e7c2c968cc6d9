"""Models from real servers into a real cluster: a registry, a slow link, Modelfiles, an Ollama."""

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path

import httpx
import ollama
import pytest

from tests.fakes.gguf_files import LLAMA, gguf_bytes
from tests.fakes.origin_servers import Nginx, RegistryServer, nginx, registry_server
from tests.system.conftest import open_cluster
from tests.system.harness import Cluster, Node, ok, run_cli, wait_until
from tests.system.test_pull import end_of, pull

MIB = 1 << 20
LARGE = gguf_bytes(tensors={"w": ((4096, 2048), 0)}, fill=random.Random(5).randbytes(32 * MIB))
HEX = hashlib.sha256(LARGE).hexdigest()
SLOW = "location /slow/ { alias ROOT/; limit_rate 1m; limit_rate_after 1m; }"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    with registry_server(tmp_path_factory.mktemp("registry")) as server:
        yield server


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    directory = tmp_path_factory.mktemp("web")
    with nginx(directory, SLOW.replace("ROOT", str(directory / "www"))) as server:
        (server.root / "large.gguf").write_bytes(LARGE)
        yield server


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes that may ask this machine, without TLS."""
    settings = {
        "OLLAMAD_SOURCES__ALLOW_HTTP": "127.0.0.1",
        "OLLAMAD_SOURCES__ALLOW_PRIVATE": "127.0.0.0/8",
        "OLLAMAD_SOURCES__CONNECTIONS": "2",
    }
    for cluster in open_cluster(tmp_path_factory, **settings):
        cluster.found()
        cluster.grow()
        yield cluster


def blobs(node: Node) -> dict[str, int]:
    """The files of a node's store by their names, and their sizes."""
    return {p.name: p.stat().st_size for p in (node.data_dir / "models" / "blobs").iterdir()}


def pull_as_ollama_does(node: Node, name: str) -> list[dict[str, str]]:
    """What `/api/pull` tells, line by line."""
    headers = {"Authorization": f"Bearer {node.admin_token()}"}
    url = f"http://{node.address}/api/pull"
    answer = httpx.post(url, json={"model": name}, headers=headers, trust_env=False, timeout=60)
    return [json.loads(line) for line in answer.text.splitlines()]


def asked_pieces(web: Nginx, since: int = 0) -> list[int]:
    """The pieces that were asked for, by the server's log."""
    pieces: list[int] = []
    for line in web.requests("/slow/large.gguf")[since:]:
        first, _, last = line.split('"')[1].removeprefix("bytes=").partition("-")
        if last != "0":
            pieces += range(int(first) // MIB, int(last) // MIB + 1)
    return pieces


def test_a_model_is_made_pushed_deleted_and_pulled_again(
    two: Cluster, registry: RegistryServer, tmp_path: Path
) -> None:
    first, second = two.nodes
    (tmp_path / "weights.gguf").write_bytes(gguf_bytes(LLAMA | {"general.name": "mine"}))
    (tmp_path / "Modelfile").write_text(
        'FROM ./weights.gguf\nSYSTEM """Be brief."""\nPARAMETER stop END\nLICENSE MIT\n'
    )
    made = run_cli(first, "models", "create", "mine", "-f", str(tmp_path / "Modelfile"))
    assert made.returncode == 0, made.stderr
    name = f"{registry.host}/me/mine:1"
    pushed = run_cli(second, "models", "push", "mine", name)
    assert pushed.returncode == 0, pushed.stderr
    digest = first.get("/models/mine")["model"]["digest"]
    first.delete("/models/mine")
    for node in two.nodes:
        wait_until("its blobs are gone", lambda n=node: not blobs(n))
    pulled = run_cli(second, "models", "pull", name)
    assert pulled.returncode == 0, pulled.stderr
    two.wait_replicas(name, two.nodes)
    shown = first.get(f"/models/{name.replace('/', '%2F')}")["model"]
    assert shown["digest"] == digest
    assert (shown["system"], shown["license"]) == ("Be brief.", "MIT")
    printed = run_cli(first, "models", "show", name, "--modelfile")
    assert 'PARAMETER stop "END"' in printed.stdout
    # The tag means another model after a while, which a pull as Ollama's clients do it brings.
    assert pull_as_ollama_does(first, name)[-1] == {"status": "success"}
    assert first.get(f"/models/{name.replace('/', '%2F')}")["model"]["digest"] == digest
    (tmp_path / "Modelfile").write_text('FROM ./weights.gguf\nSYSTEM """Be long."""\n')
    made = run_cli(first, "models", "create", "other", "-f", str(tmp_path / "Modelfile"))
    assert made.returncode == 0, made.stderr
    pushed = run_cli(second, "models", "push", "other", name)
    assert pushed.returncode == 0, pushed.stderr
    assert pull_as_ollama_does(first, name)[-1] == {"status": "success"}
    assert first.get(f"/models/{name.replace('/', '%2F')}")["model"]["system"] == "Be long."
    first.delete("/models/other")
    first.delete(f"/models/{name.replace('/', '%2F')}")


def test_ollamas_client_pushes_and_is_told_how_far(
    two: Cluster, registry: RegistryServer, tmp_path: Path
) -> None:
    """From a node that does not hold the model; what the registry has is not sent again."""
    first, second = two.nodes
    first.post("/distribution/auto-configure", {"enabled": False})
    (tmp_path / "large.gguf").write_bytes(LARGE)
    name = f"{registry.host}/me/large:1"
    first.import_model(tmp_path / "large.gguf", name)
    headers = {"Authorization": f"Bearer {second.admin_token()}"}
    with ollama.Client(host=second.url, headers=headers, trust_env=False) as client:
        steps = list(client.push(name, stream=True))
        statuses = list(dict.fromkeys(step.status for step in steps))
        assert statuses[0] == "retrieving manifest"
        assert f"pushing {HEX[:12]}" in statuses
        assert statuses[-2:] == ["pushing manifest", "success"]
        moved = [step for step in steps if step.digest == f"sha256:{HEX}"]
        assert {step.total for step in moved} == {len(LARGE)}
        done = [step.completed or 0 for step in moved]
        assert done == sorted(done)
        assert done[-1] == len(LARGE)
        assert client.push(name).status == "success"
        client.delete(name)
        assert client.pull(name).status == "success"
        client.delete(name)
    first.post("/distribution/auto-configure", {"enabled": True})


def test_a_killed_pull_goes_on_by_itself_and_each_piece_comes_once(
    two: Cluster, web: Nginx
) -> None:
    """The second node follows meanwhile, and gets the model from the first."""
    first, second = two.nodes
    source = f"{web.url}/slow/large.gguf#sha256={HEX}"
    transfer_id = pull(first, "large", source=source)
    puller = first if transfer_id.startswith(first.id[:6]) else second
    other = second if puller is first else first

    def done(node: Node) -> int:
        moving = [t for t in node.get("/transfers")["transfers"] if t["node_id"] == node.id]
        return max((t["bytes_done"] for t in moving if "large" in t["model_name"]), default=0)

    wait_until("both have some of it", lambda: done(puller) > 8 * MIB and done(other) > 4 * MIB)
    puller.kill()
    proved = done(other) // MIB  # what the follower has was proved at the puller
    assert proved >= 4
    seen = len(web.requests("/slow/large.gguf"))
    before = set(asked_pieces(web))
    puller.start()
    asked = other.request
    wait_until("it is whole", lambda: asked("GET", "/models/large").status_code == 200, 120)
    two.wait_replicas("large", two.nodes, 90)
    again = [piece for piece in asked_pieces(web, seen) if piece in before]
    # Twice came only what was under way when it was killed, or had just been asked for.
    fully = web.bytes_sent("/slow/large.gguf")
    assert fully < len(LARGE) + 6 * MIB, (fully, again)
    for node in two.nodes:
        assert blobs(node)[f"sha256-{HEX}"] == len(LARGE)
        path = node.data_dir / "models" / "blobs" / f"sha256-{HEX}"
        assert hashlib.sha256(path.read_bytes()).hexdigest() == HEX
    first.delete("/models/large")


def times_of(directory: Path) -> dict[Path, int]:
    """Everything below a directory, and when it was changed."""
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*")}


def test_what_is_not_allowed_is_told_with_its_setting(two: Cluster) -> None:
    node = two.nodes[0]
    for source, words in (
        ("http://10.0.0.1/x.gguf", "sources.allow_http: 10.0.0.1"),
        ("https://169.254.169.254/latest", "sources.allow_private: 169.254.169.254"),
        ("/etc/passwd", "sources.local_files"),
    ):
        ended = end_of(node, pull(node, "refused", source=source))
        assert ended["status"] == "failed"
        assert words in ended["error"]


@pytest.mark.parametrize("read_only", [True, False])
def test_an_ollamas_directory_is_adopted(
    tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path, read_only: bool
) -> None:
    """And only read, or used for what is new as well."""
    ollama = tmp_path_factory.mktemp("ollama")
    for cluster in open_cluster(tmp_path_factory):
        donor = cluster.found()  # what an Ollama would have written
        donor.import_model(smollm2_path, "adopted")
        manifests = donor.data_dir / "models"
        donor.stop()
        manifests.rename(ollama / "models")
    before = times_of(ollama / "models")
    settings = {
        "OLLAMA_MODELS": str(ollama / "models"),
        "OLLAMAD_MODELS__READ_ONLY": str(read_only).lower(),
    }
    for cluster in open_cluster(tmp_path_factory, **settings):
        node = cluster.found()
        # The first look may come before the cluster is founded, and the next is a minute later.
        wait_until("it is adopted", lambda: node.get("/models")["models"], 90)  # noqa: B023
        cluster.wait_replicas("adopted", [node])
        asked = {"model": "adopted", "prompt": "The capital of France is", "raw": True}
        options = {"temperature": 0, "num_predict": 4, "num_thread": 1}
        assert "Paris" in ok(node.answer("/generate", options=options, **asked))["response"]
        node.post("/models/adopted/copy", {"destination": "mine"})
        node.delete("/models/adopted")
        node.restart()
        assert [m["name"] for m in node.get("/models")["models"]] == ["mine:latest"]
        asked["model"] = "mine"
        assert "Paris" in ok(node.answer("/generate", options=options, **asked))["response"]
    after = times_of(ollama / "models")
    if read_only:
        assert after == before
    else:
        # The copy needs the blobs; of the model that was deleted only the manifest goes.
        gone, come = before.keys() - after.keys(), after.keys() - before.keys()
        assert {path.parent.name for path in gone if "manifests" in path.parts} >= {"adopted"}
        assert not [path for path in gone if "blobs" in path.parts]
        assert [path.parent.name for path in come if path.name == "latest"] == ["mine"]
        assert not [path for path in come if "blobs" in path.parts]
