"""Three nodes are upgraded from the previous release one by one, under load: nobody notices."""

import itertools
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.system.conftest import MODEL, open_cluster
from tests.system.harness import Cluster, Node, ok, wait_until
from tests.system.releases import previous_release, switch
from tests.system.streams import Answer, Client, at_once, sign_in

STREAMS = 4
LENGTH = 40  # tokens of an answer
PROMPTS = [f"Tell me a story about {what}" for what in ("a lighthouse.", "the wind.", "bread.")]
OPTIONS = {
    "temperature": 0,
    "seed": 1,
    "num_predict": LENGTH,
    "num_thread": 1,
    "stop": ["no such text"],
}
WRITE_PAUSE_S = 0.2


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Iterator[Cluster]:
    """Three nodes of the previous release that all hold the model."""
    settings = {
        "OLLAMAD_MODELS__REPLICAS": "3",
        "OLLAMA_NUM_PARALLEL": "3",
        "OLLAMA_CONTEXT_LENGTH": "512",
    }
    old = previous_release(tmp_path_factory.mktemp("old"))
    for cluster in open_cluster(tmp_path_factory, **settings, **old):
        first = cluster.found()
        cluster.grow(2)
        first.import_model(smollm2_path, MODEL)
        first.post(f"/models/{MODEL}/download", {"nodes": [n.id for n in cluster.nodes[1:]]})
        cluster.wait_replicas(MODEL, cluster.nodes)
        yield cluster


def code_of(node: Node) -> str:
    """Where the code that a node runs is."""
    environment = Path(f"/proc/{node.pid}/environ").read_bytes().split(b"\0")
    path = next((e for e in environment if e.startswith(b"PYTHONPATH=")), b"")
    return "previous" if b"old" in path else "present"


def test_nothing_is_lost_while_three_nodes_are_upgraded_one_by_one(cluster: Cluster) -> None:
    nodes = list(cluster.nodes)
    assert [code_of(node) for node in nodes] == ["previous"] * 3
    token = sign_in(nodes[0])
    calm = Client(nodes, token, {"model": MODEL, "options": OPTIONS})
    undisturbed = {prompt: calm.ask(prompt, place) for place, prompt in enumerate(PROMPTS)}
    assert not [answer.failure for answer in undisturbed.values() if answer.failure]

    answers: list[tuple[str, Answer]] = []
    written: list[str] = []
    over = threading.Event()

    def ask(number: int) -> None:
        rng = random.Random(number)
        mode = ("continue", "replay")[number % 2]
        client = Client(nodes, token, {"model": MODEL, "options": OPTIONS, "failover": mode})
        while not over.is_set():
            answer = client.ask(rng.choice(PROMPTS), rng.randrange(len(nodes)))
            answers.append((mode, answer))
            if answer.failure:
                return

    def write() -> None:
        """Change the state through each node in turn; keep what was acknowledged."""
        for number in itertools.count():
            if over.is_set():
                return
            node, name = nodes[number % 3], f"user-{number}"
            body = {"username": name, "password": "correct horse battery", "role": "viewer"}
            try:
                answer = node.request("POST", "/users", json=body, token=token, timeout_s=10)
            except httpx.TransportError:  # it is being upgraded
                continue
            if answer.status_code == 201:
                written.append(name)
            else:
                assert answer.status_code in (409, 503), answer.text
            time.sleep(WRITE_PAUSE_S)

    threads = at_once([write, *(lambda n=n: ask(n) for n in range(STREAMS))])  # type: ignore[misc]
    # The leader is the last one, as docs/operations.md says.
    leader = cluster.leader()
    order = [*(node for node in nodes if node is not leader), leader]
    for done, node in enumerate(order, 1):
        before = len(answers)
        wait_until("answers come", lambda b=before: len(answers) >= b + STREAMS, 60)
        assert node.stop() == 0
        switch(node.environment, {})
        node.start()
        cluster.wait_whole(60)
        assert [code_of(each) for each in order] == ["present"] * done + ["previous"] * (3 - done)
        # The versions are mixed now, and each takes changes and answers.
        for each in order:
            ok(each.request("POST", "/generate", json=short(done), token=token))
        known = len(written)
        wait_until("changes are taken", lambda k=known: len(written) > k + 3, 30)
    over.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a stream hangs"

    cluster.settled()
    assert not [answer.failure for _, answer in answers if answer.failure]
    seams = 0
    for mode, answer in answers:
        moved = len(answer.seams) + answer.resumed
        seams += moved
        assert answer.tokens == LENGTH, answer
        if mode == "replay" or not moved:
            assert answer.text == undisturbed[answer.prompt].text, (mode, answer)
    silences = [answer.longest_silence_s for _, answer in answers]
    print(f"{len(answers)} answers, {seams} seams, longest silence {max(silences):.2f} s")
    for node in nodes:
        known = {user["username"] for user in node.get("/users")["users"]}
        assert known >= set(written), "an acknowledged change is lost"
    assert len(written) >= 10


def short(number: int) -> dict[str, object]:
    return {"model": MODEL, "prompt": f"Say {number}", "options": OPTIONS | {"num_predict": 3}}
