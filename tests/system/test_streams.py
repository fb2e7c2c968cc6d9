"""A hundred streams in flight while each node in turn is killed -9: nobody notices.

The real model, greedy. Every client goes on at another node when its own dies, and hears of no
other error. What is checked of every text, by its mode's rule: under `replay`, and where no seam
is, it is the undisturbed text, to the character. Under `continue` it mostly is that as well, and
then it is right; if not, it parted behind a seam, and says there what a replica says to the prompt
and the tokens before. Often none parts, and no replica is asked: the report tells how many did.
`test_failover` compares all its continuations with a replica.
"""

import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.conftest import MODEL, open_cluster
from tests.system.harness import LONG_FAULTS, Cluster, Node, ok, run_cli, wait_until
from tests.system.streams import Answer, Client, at_once, continuation, sign_in

STREAMS = 100
LENGTH = 20  # tokens of an answer
PROMPTS = [
    f"{start} {what}"
    for start in ("Tell me a story about", "Explain to a child", "Write a letter about")
    for what in ("a lighthouse.", "the wind.", "an old clock.", "bread.")
]
OPTIONS = {
    "temperature": 0,
    "seed": 1,
    "num_predict": LENGTH,
    "num_thread": 1,
    "stop": ["no such text"],
}
BODY = {"model": MODEL, "options": OPTIONS}
MODES = ("continue", "replay")


@pytest.fixture(scope="module", params=[3, 5] if LONG_FAULTS in os.environ else [3])
def cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path
) -> Iterator[Cluster]:
    """Nodes that all hold the model (five as well with `make faults`)."""
    settings = {
        "OLLAMAD_MODELS__REPLICAS": str(request.param),
        "OLLAMA_NUM_PARALLEL": "4",
        "OLLAMA_CONTEXT_LENGTH": "512",
        "OLLAMAD_SCHEDULER__FAILOVER": "replay",  # where nothing is asked for
    }
    for cluster in open_cluster(tmp_path_factory, **settings):
        first = cluster.found()
        cluster.grow(request.param - 1)
        first.import_model(smollm2_path, MODEL)
        others = [node.id for node in cluster.nodes[1:]]
        first.post(f"/models/{MODEL}/download", {"nodes": others})
        cluster.wait_replicas(MODEL, cluster.nodes)
        yield cluster


def test_every_stream_completes_while_each_node_in_turn_is_killed(cluster: Cluster) -> None:
    nodes = list(cluster.nodes)
    token = sign_in(nodes[0])
    calm = Client(nodes, token, BODY | {"failover": "continue"})
    undisturbed = {prompt: calm.ask(prompt, place) for place, prompt in enumerate(PROMPTS)}
    assert not [answer.failure for answer in undisturbed.values() if answer.failure]

    answers: list[tuple[str, Answer]] = []
    over = threading.Event()
    lock = threading.Lock()

    def stream(number: int) -> None:
        """One after the other, so that there are a hundred until the last node was killed."""
        rng = random.Random(number)
        mode = MODES[number % 2]
        client = Client(nodes, token, BODY | {"failover": mode})
        while True:
            answer = client.ask(rng.choice(PROMPTS), rng.randrange(len(nodes)))
            with lock:
                answers.append((mode, answer))
            if over.is_set() or answer.failure:
                return

    threads = at_once([lambda number=number: stream(number) for number in range(STREAMS)])
    for node in nodes:
        before = len(answers)
        wait_until("answers come", lambda b=before: len(answers) >= b + 5, 60)
        node.kill()
        time.sleep(1)
        node.start()
        cluster.wait_whole(60)
    over.set()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a stream hangs"

    report(answers)
    assert not [answer.failure for _, answer in answers if answer.failure]
    assert not [error for _, answer in answers for error in answer.errors]
    moved = 0
    parted: list[Answer] = []
    for mode, answer in answers:
        assert answer.end is not None
        assert answer.tokens == LENGTH
        seams = len(answer.seams) + answer.resumed
        moved += seams > 0
        if mode == "replay" or not seams:
            assert answer.text == undisturbed[answer.prompt].text, (mode, answer)
            continue
        assert answer.end["eval_count"] == LENGTH, answer
        if len(answer.end["context"]) != answer.end["prompt_eval_count"] + LENGTH:
            # Nobody was left who knew its tokens: the text was read anew, by others perhaps.
            assert answer.resumed, answer
            continue
        if answer.text != undisturbed[answer.prompt].text:
            parted.append(answer)
    assert len(answers) >= STREAMS
    assert moved >= 5, "the kills hit some answers in their middle"
    print(
        f"{moved} answers moved; {len(parted)} continuations parted from the undisturbed text, "
        "and are compared with what a replica says"
    )
    replica = next(node for node in nodes if node.runners())
    for answer in parted:
        check_behind_the_seam(replica, answer, undisturbed[answer.prompt])


def check_behind_the_seam(replica: Node, answer: Answer, undisturbed: Answer) -> None:
    """A text that parted from the undisturbed one did so behind a seam, and as a replica does.

    Tokens that are read are rounded differently from those that were written one by one, so both
    texts are right.
    """
    assert answer.end is not None
    places = [move["after_tokens"] for move in answer.seams]
    if not places:  # what its first entry node knew of seams is gone with it
        places = answer.resumed_at
    before = answer.lengths[place := max(places)]
    if len(places) == 1 and not answer.resumed:
        assert answer.text[:before] == undisturbed.text[:before], answer
    ids = answer.end["context"][: place - LENGTH]
    rest = continuation(replica, ids, LENGTH - place, read_anew=True)
    assert answer.text[before:] == rest, answer


def report(answers: list[tuple[str, Answer]]) -> None:
    """Shown with `pytest -rP`."""
    for mode in MODES:
        of_mode = [answer for each, answer in answers if each == mode]
        moved = [answer for answer in of_mode if answer.seams]
        resumed = [answer for answer in of_mode if answer.resumed]
        silences = sorted(answer.longest_silence_s for answer in moved + resumed)
        middle = silences[len(silences) // 2] if silences else 0.0
        print(
            f"{mode}: {len(of_mode)} answers, {len(moved)} moved by their entry node, "
            f"{len(resumed)} resumed by their client; longest silence of these: "
            f"p50 {middle:.2f} s, worst {max(silences, default=0):.2f} s; "
            f"{sum(bool(answer.failure) for answer in of_mode)} failed"
        )


@pytest.fixture
def pair(cluster: Cluster) -> tuple[Node, Node]:
    """An entry node and another one; the model is in the memory of both."""
    entry, other = cluster.nodes[:2]
    for node in (entry, other):
        assert node.running
    cluster.wait_whole()
    return entry, other


def test_the_command_line_goes_on_when_its_node_dies(
    cluster: Cluster, pair: tuple[Node, Node]
) -> None:
    entry, other = pair
    arguments = ["--option", "temperature=0", "--option", "seed=1", "--option", "num_predict=300"]
    arguments += ["--option", "num_thread=1", "--option", "stop=no such text"]
    token = sign_in(entry)
    question = ["--token", token, "generate", MODEL, PROMPTS[0], *arguments]
    whole = run_cli(other, *question)
    assert whole.returncode == 0, whole.stderr
    begun = threading.Event()
    wait_until("nothing else is being answered", lambda: not busy(cluster))

    def kill() -> None:
        wait_until("it is being answered", lambda: busy(cluster))
        time.sleep(0.3)
        entry.kill()
        begun.set()

    [killer] = at_once([kill])
    result = run_cli(entry, *question)
    killer.join()
    entry.start()
    cluster.wait_whole()
    assert result.returncode == 0, result.stderr
    assert "going on at" in result.stderr
    assert result.stdout == whole.stdout


def busy(cluster: Cluster) -> bool:
    """Whether a node says so of itself: what others know of it is a beat old."""
    return any(one["busy"] for node in cluster.running for one in node.loaded())


def test_a_request_id_gives_the_same_answer_on_any_node(cluster: Cluster) -> None:
    token = sign_in(cluster.nodes[0])
    body: dict[str, Any] = BODY | {"prompt": PROMPTS[1], "request_id": "the-same"}
    first, *others = [
        ok(node.request("POST", "/generate", json=body, token=token)) for node in cluster.nodes
    ]
    for other in others:
        assert other["response"] == first["response"]
        assert other["context"] == first["context"]
        assert other["total_duration"] == first["total_duration"], "it was not made again"
