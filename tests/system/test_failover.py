"""A node is lost in the middle of an answer, and the client does not notice: the real model.

Greedy answers, so that each mode's rule can be checked to the character: a replay gives the
undisturbed text, a continuation what the other node says to the prompt and the tokens before.
"""

import json
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.fakes.chat_templates import TOOLS
from tests.system.conftest import ENDLESS, MODEL, open_cluster, open_two_holders
from tests.system.harness import WAIT_S, Cluster, Node, ok, wait_until
from tests.system.namespaces import NamespaceHost, Network, NotPermitted
from tests.system.streams import ask_runner, continuation

LENGTH = 70  # tokens of an answer
CUT = 20  # of them before the fault
LONGER = 200  # for what takes half a second until an answer moves, also on a quick machine
ASK = {
    "model": MODEL,
    "prompt": "Tell me a long story about a lighthouse.",
    "options": {
        "num_thread": 1,
        "temperature": 0,
        "seed": 1,
        "num_predict": LENGTH,
        "stop": ["no such text"],
    },
}
LONG_PROMPT = "Tell me more of the lighthouse, the wind and the old clock. " * 60


LIGHT = {
    "colour": {"enum": ["red", "green", "white"]},
    "lit": {"type": "boolean"},
    "sea": {"enum": ["calm", "rough"]},
    "steps": {"enum": [50, 200]},
}
SCHEMA = {"type": "object", "properties": LIGHT, "required": [*LIGHT]}
SCHEMA |= {"additionalProperties": False}
ADD = {
    "name": "add",
    "description": "Adds two numbers.",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
    },
}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Iterator[Cluster]:
    """A node that drains keeps no answer longer than for the next look."""
    yield from open_two_holders(tmp_path_factory, smollm2_path, OLLAMAD_DRAIN__TIMEOUT="0s")


@pytest.fixture
def whole(three: Cluster) -> None:
    """Each test begins with all nodes, and the model in the memory of both holders."""
    for node in three.nodes:
        if not node.running:
            node.start()
    three.wait_whole()
    first, second, entry = three.nodes
    for other in (second, first):
        entry.post(f"/nodes/{other.id}/drain")
        wait_until("the drain is known", lambda o=other: entry.node(o)["draining"])
        ok(entry.answer("/generate", **ASK | {"options": ASK["options"] | {"num_predict": 1}}))
        entry.post(f"/nodes/{other.id}/undrain")
        wait_until("it is over", lambda o=other: not entry.node(o)["draining"])
    wait_until("both are known to have it", lambda: len(loaded_on(entry)) == 2)


def loaded_on(node: Node) -> list[str]:
    return list(node.get(f"/models/{MODEL}")["model"]["loaded_on"])


def runner_of(node: Node) -> psutil.Process:
    """Found at once, by its parent: the rest of an answer takes a third of a second."""
    [runner] = psutil.Process(node.pid).children()
    return runner


def kill_node(node: Node) -> None:
    node.kill()


def pause_node(node: Node) -> None:
    node.pause()


def stop_node(node: Node) -> None:
    node.signal(signal.SIGTERM)


def kill_runner(node: Node) -> None:
    runner_of(node).kill()


def hang_runner(node: Node) -> None:
    runner_of(node).suspend()


FAULTS = [kill_node, pause_node, stop_node, kill_runner, hang_runner]


class Watched:
    """A streamed answer with the fault in its middle."""

    def __init__(
        self,
        cluster: Cluster,
        fault: Callable[[Node], None] | None,
        after: int,
        *,
        route: str = "/generate",
        **changes: Any,
    ) -> None:
        entry = cluster.nodes[2]
        self.lines: list[Any] = []
        body = changes if route == "/chat" else ASK | changes
        with entry.stream(route, **body) as stream:
            self.first = next(n for n in cluster.nodes if n.id == stream.served_by)
            for line in stream:
                self.lines.append(line)
                if len(self.lines) == after and fault is not None:
                    fault(self.first)

    @property
    def text(self) -> str:
        return "".join(line.get("response", "") for line in self.lines)

    @property
    def said(self) -> str:
        """The same of a chat."""
        return "".join(line["message"]["content"] for line in self.lines)

    @property
    def end(self) -> Any:
        assert self.lines[-1].get("done"), self.lines[-1]
        return self.lines[-1]


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_replay_gives_the_undisturbed_text(three: Cluster, fault: Callable[[Node], None]) -> None:
    replayed = ASK | {"failover": "replay"}  # read whole, as the other node will
    undisturbed = ok(three.nodes[2].answer("/generate", **replayed))
    watched = Watched(three, fault, CUT, failover="replay")
    resume(watched.first, fault)
    assert watched.text == undisturbed["response"]
    [move] = watched.end["failovers"]
    assert (move["from_node"], move["mode"]) == (watched.first.id, "replay")
    assert watched.end["eval_count"] == undisturbed["eval_count"]
    assert watched.end["context"] == undisturbed["context"]


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("fault", [kill_node, kill_runner])
def test_before_the_first_token_another_node_answers(
    three: Cluster, fault: Callable[[Node], None]
) -> None:
    """While the prompt is read: an answer like any other, that tells of no seam."""
    entry = three.nodes[2]
    asked = {"prompt": LONG_PROMPT, "failover": "replay"}  # read whole each time
    undisturbed = ok(entry.answer("/generate", **ASK | asked))
    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(Watched, three, None, 0, **asked)
        reads = wait_until("it is being read", lambda: next(filter(busy_on, three.nodes[:2]), None))
        fault(reads)
        watched = watching.result()
    assert watched.first is not reads, "else a token came before the fault"
    assert watched.text == undisturbed["response"]
    assert watched.end["prompt_eval_count"] == undisturbed["prompt_eval_count"]
    assert "failovers" not in watched.end


@pytest.mark.usefixtures("whole")
def test_a_replay_gives_the_undisturbed_text_of_a_later_turn(three: Cluster) -> None:
    """The first node has the earlier answer in its cache, written token by token; rounded
    differently from what the second one reads."""
    question = {"role": "user", "content": "Describe an old clock."}
    messages: list[Any] = [question]
    asked: dict[str, Any] = {key: value for key, value in ASK.items() if key != "prompt"}
    first = ok(three.nodes[2].answer("/chat", **asked, messages=[question]))
    moved = 0
    for _ in range(3):
        messages += [first["message"], {"role": "user", "content": "Tell me more, please."}]
        body = asked | {"messages": messages, "failover": "replay"}
        undisturbed = ok(three.nodes[2].answer("/chat", **body))
        if undisturbed["eval_count"] < LENGTH:
            break  # this machine's rounding has it end early, perhaps before it could be cut
        watched = Watched(three, kill_runner, CUT, route="/chat", **body)
        assert watched.said == undisturbed["message"]["content"]
        assert watched.end["failovers"][0]["mode"] == "replay"
        moved += 1
        first = undisturbed
    assert moved, "no later turn was long enough to be cut"


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_continuation_is_what_the_other_node_says_to_the_tokens_before(
    three: Cluster, fault: Callable[[Node], None]
) -> None:
    watched = Watched(three, fault, CUT, failover="continue")
    resume(watched.first, fault)
    check_continued(three, watched, LENGTH)


@pytest.mark.usefixtures("whole")
def test_a_drain_moves_an_answer(three: Cluster) -> None:
    entry = three.nodes[2]
    options = ASK["options"] | {"num_predict": LONGER}
    watched = Watched(
        three,
        lambda node: entry.post(f"/nodes/{node.id}/drain"),
        CUT,
        failover="continue",
        options=options,
    )
    entry.post(f"/nodes/{watched.first.id}/undrain")
    move = check_continued(three, watched, LONGER)
    assert move["reason"] == "DRAINING"


def check_continued(cluster: Cluster, watched: Watched, length: int) -> Any:
    """A continuation by its rule; returns how it moved."""
    [move] = watched.end["failovers"]
    assert (move["from_node"], move["mode"]) == (watched.first.id, "continue")
    assert watched.end["eval_count"] == length
    ids, prompt = watched.end["context"], watched.end["prompt_eval_count"]
    assert len(ids) == prompt + length, "no token is lost, none is there twice"
    before = ids[: prompt + move["after_tokens"]]
    second = next(node for node in cluster.nodes if node.id == move["to_node"])
    after = ids[len(before) :]
    assert spelled(second, after) == continuation(second, before, len(after))
    assert watched.text.endswith(spelled(second, after))
    return move


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("asked_for", [{}, {"failover": "replay"}], ids=["by default", "replay"])
def test_an_answer_by_a_schema_is_replayed(three: Cluster, asked_for: dict[str, str]) -> None:
    """Whatever is asked for: its grammar's state does not follow from the tokens."""
    asked = {"format": SCHEMA} | asked_for
    undisturbed = ok(three.nodes[2].answer("/generate", **ASK | asked))
    assert json.loads(undisturbed["response"]).keys() == LIGHT.keys()
    watched = Watched(three, kill_node, 5, **asked)  # it is short
    assert watched.text == undisturbed["response"]
    [move] = watched.end["failovers"]
    assert (move["from_node"], move["mode"]) == (watched.first.id, "replay")


@pytest.fixture
def calling(three: Cluster) -> Iterator[dict[str, Any]]:
    """What asks a model that calls functions, on the same nodes."""
    first, second, _ = three.nodes
    model = {"model": "calling", "from": MODEL, "template": TOOLS, "stream": False}
    ok(first.request("POST", f"{first.url}/api/create", json=model))
    first.post("/models/calling/download", {"nodes": [second.id]})
    three.wait_replicas("calling", [first, second])
    tools = [{"type": "function", "function": ADD}]
    yield {"model": "calling", "options": ASK["options"], "tools": tools}
    three.asked.delete("/models/calling")


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("cut", ["between two calls", "in a text"])
def test_what_is_said_beside_tools_is_replayed(
    three: Cluster, calling: dict[str, Any], cut: str
) -> None:
    """By the default mode, `continue`, which cannot keep the state of what reads calls."""
    story = [{"role": "user", "content": ASK["prompt"]}]
    messages, after = (story, CUT) if cut == "in a text" else (sums(), 1)
    undisturbed = ok(three.nodes[2].answer("/chat", **calling, messages=messages))["message"]
    assert len(calls_in([undisturbed])) == (0 if cut == "in a text" else 2)
    watched = Watched(three, kill_node, after, route="/chat", **calling, messages=messages)
    assert watched.said == undisturbed["content"]
    assert calls_in([line["message"] for line in watched.lines]) == calls_in([undisturbed])
    [move] = watched.end["failovers"]
    assert (move["from_node"], move["mode"]) == (watched.first.id, "replay")


def sums() -> list[Any]:
    """A conversation whose next message, of two calls, is clear even to a small model."""
    messages: list[Any] = []
    for a, b, c, d in ((1, 2, 3, 4), (5, 5, 2, 1), (4, 3, 1, 1)):
        messages += [
            {"role": "user", "content": f"What is {a} plus {b}, and {c} plus {d}?"},
            {"role": "assistant", "content": "", "tool_calls": [call(a, b), call(c, d)]},
            {"role": "tool", "tool_name": "add", "content": str(a + b)},
            {"role": "tool", "tool_name": "add", "content": str(c + d)},
            {"role": "assistant", "content": f"It is {a + b}, and {c + d}."},
        ]
    return [*messages, {"role": "user", "content": "What is 6 plus 7, and 2 plus 8?"}]


def call(a: int, b: int) -> dict[str, Any]:
    return {"function": {"name": "add", "arguments": {"a": a, "b": b}}}


def calls_in(messages: list[Any]) -> list[Any]:
    """What is called with what, without the ids, which are drawn anew each time."""
    calls = [call["function"] for message in messages for call in message.get("tool_calls", [])]
    return [(function["name"], function["arguments"]) for function in calls]


def resume(node: Node, fault: Callable[[Node], None]) -> None:
    if fault is pause_node:
        node.resume()
    if fault is stop_node:
        assert node.wait_end() == 0


def spelled(node: Node, ids: list[int]) -> str:
    return str(ask_runner(node, "/detokenize", {"tokens": ids})["content"])


@pytest.fixture(scope="module")
def far_three(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Iterator[Cluster]:
    """Three nodes on hosts of their own; the model is on the first two."""
    settings = {
        "OLLAMAD_MODELS__REPLICAS": "1",
        "OLLAMA_NUM_PARALLEL": "3",
        "OLLAMA_CONTEXT_LENGTH": "4096",
    }
    try:
        with Network() as network:
            for cluster in open_cluster(tmp_path_factory, **settings):
                cluster.network = network
                first = cluster.found()
                cluster.grow(2)
                first.import_model(smollm2_path, MODEL)
                first.post(f"/models/{MODEL}/download", {"nodes": [cluster.nodes[1].id]})
                cluster.wait_replicas(MODEL, cluster.nodes[:2])
                yield cluster
    except NotPermitted as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("way", ["the link", "the cable"])
def test_a_cut_moves_the_answers_and_ends_the_abandoned_halves(
    far_three: Cluster, way: str
) -> None:
    """Nothing is reset: only silence tells, and asking through others.

    Three answers of one node: one in each mode, and one that is many times as long.
    """
    network = far_three.network
    assert isinstance(network, Network)
    serving, other, entry = far_three.nodes
    options = ASK["options"] | {"num_predict": LONGER}
    undisturbed = ok(entry.answer("/generate", **ASK | {"options": options, "failover": "replay"}))

    is_cut = threading.Event()

    def cut() -> None:
        entry.post(f"/nodes/{other.id}/undrain")
        wait_until("there is another node", lambda: not entry.node(other)["draining"])
        assert evaluating(serving) == 3
        assert isinstance(serving.host, NamespaceHost)
        if way == "the cable":
            network.unplug(serving.host)
        else:
            assert isinstance(entry.host, NamespaceHost)
            network.cut(serving.host, entry.host)
        is_cut.set()

    both_speak = threading.Barrier(2, cut, WAIT_S)

    def watch(mode: str) -> Watched:
        return Watched(
            far_three, lambda _: bool(both_speak.wait()), CUT, options=options, failover=mode
        )

    entry.post(f"/nodes/{other.id}/drain")
    wait_until("there is one node", lambda: entry.node(other)["draining"])
    try:
        with (
            entry.stream("/generate", model=MODEL, **ENDLESS) as long,
            ThreadPoolExecutor(2) as pool,
        ):
            long.next()
            watching = pool.map(watch, ("continue", "replay"))
            assert is_cut.wait(WAIT_S)
            # The cut lasts, and so would the half of the long one.
            wait_until("the abandoned halves have ended", lambda: not evaluating(serving), 15)
            continued, replayed = watching
            assert continued.first is replayed.first is serving
            check_continued(far_three, continued, LONGER)
            assert replayed.text == undisturbed["response"]
            assert [move["mode"] for move in replayed.end["failovers"]] == ["replay"]
            print(f"{way}: {continued.end['failovers'][0]['silence_ms']} ms without a token")
    finally:
        network.heal()
    far_three.wait_whole(60)


def evaluating(node: Node) -> int:
    """Slots of a node's runner that are at work, as the runner itself says."""
    return sum(slot["is_processing"] for slot in ask_runner(node, "/slots"))


def busy_on(node: Node) -> int:
    return sum(model["busy"] for model in node.loaded())
