"""Answers of a real model, asked at any node: local, forwarded, streamed, cut off."""

import base64
import concurrent.futures
import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.fakes.gguf_files import write_gguf
from tests.fakes.projector_files import PATCHES, png, write_projector
from tests.system.conftest import MODEL, open_two_holders
from tests.system.harness import ANSWER_TIMEOUT_S, Cluster, Node, ok, refused, wait_until

# One thread: two that wait for each other get nowhere on a machine with other work to do. All
# requests say so, since a runner that was loaded with other settings is loaded again.
ONE = {"num_thread": 1}
GREEDY = ONE | {"temperature": 0, "seed": 1}
LONG = GREEDY | {"num_predict": 1500, "stop": ["no such text"]}
SHORT = ONE | {"num_predict": 1}
DRAIN_S = 1.5
STORY = {"model": MODEL, "prompt": "Tell me a story", "options": LONG, "failover": "off"}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Iterator[Cluster]:
    yield from open_two_holders(tmp_path_factory, smollm2_path)


@pytest.fixture(autouse=True)
def idle(three: Cluster) -> None:
    """Each test starts with three nodes that run, do not drain, and work on nothing."""
    for node in three.nodes:
        if not node.running:
            node.start()
    three.wait_whole()
    for node in three.nodes:
        if node.node(node)["draining"]:
            node.post(f"/nodes/{node.id}/undrain")
        wait_until("nothing runs", lambda n=node: busy(n) == 0)


def busy(node: Node) -> int:
    """Requests that the runners of a node work on, as the node says."""
    return sum(each["busy"] for each in node.loaded())


def text_runners(node: Node) -> list[psutil.Process]:
    """The runners that generate (embeddings have one of their own)."""
    return [each for each in node.runners() if "--pooling" not in each.cmdline()]


def text_runner(node: Node) -> psutil.Process:
    [runner] = text_runners(node)
    return runner


def holder_of(cluster: Cluster, node_id: str) -> Node:
    return next(node for node in cluster.nodes if node.id == node_id)


def model_of(node: Node) -> Any:
    return node.get(f"/models/{MODEL}")["model"]


# One answer.


@pytest.mark.parametrize("index", [0, 1, 2])
def test_every_node_answers(three: Cluster, index: int) -> None:
    node = three.nodes[index]
    holders = {each.id for each in three.nodes[:2]}
    options = GREEDY | {"num_predict": 12}

    response = node.answer(
        "/generate", model=MODEL, prompt="The capital of France is", raw=True, options=options
    )
    answer = ok(response)
    assert answer["model"] == MODEL
    assert "Paris" in answer["response"]
    assert (answer["done"], answer["done_reason"]) == (True, "length")
    assert answer["eval_count"] == 12
    assert answer["prompt_eval_count"] >= 5
    assert answer["eval_duration"] > 0
    assert answer["total_duration"] >= answer["eval_duration"]
    assert response.headers["X-Ollamad-Node"] in holders

    messages = [{"role": "user", "content": "What is the capital of France?"}]
    answer = ok(node.answer("/chat", model=MODEL, messages=messages, options=options))
    assert answer["message"]["role"] == "assistant"
    assert answer["message"]["content"]

    answer = ok(node.answer("/embeddings", model=MODEL, prompt="Paris", options=ONE))
    vector = answer["embedding"]
    assert len(vector) == 576, "the model's own width"
    assert all(math.isfinite(number) for number in vector)


@pytest.mark.parametrize("index", [0, 2])
def test_a_stream_gives_the_same_answer_bit_by_bit(three: Cluster, index: int) -> None:
    node = three.nodes[index]
    asked = {"model": MODEL, "prompt": "Count: one, two,", "options": GREEDY | {"num_predict": 20}}
    whole = ok(node.answer("/generate", **asked))
    with node.stream("/generate", **asked) as stream:
        lines = list(stream)
        assert stream.served_by in {each.id for each in three.nodes[:2]}
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    assert len(lines) > 10, "it comes as it is made"
    assert "".join(line["response"] for line in lines) == whole["response"]
    assert lines[-1]["response"] == ""
    assert lines[-1]["eval_count"] == 20
    assert lines[-1]["context"] == whole["context"]
    assert all(line["model"] == MODEL and line["created_at"] for line in lines)


def test_a_streamed_chat_has_messages(three: Cluster) -> None:
    messages = [
        {"role": "system", "content": "Answer with one word."},
        {"role": "user", "content": "What is the capital of France?"},
    ]
    node = three.nodes[2]
    with node.stream("/chat", model=MODEL, messages=messages, options=GREEDY) as stream:
        lines = list(stream)
    assert all(line["message"]["role"] == "assistant" for line in lines)
    assert "Paris" in "".join(line["message"]["content"] for line in lines)
    assert lines[-1]["done_reason"] == "stop"


def test_embeddings_of_several_texts_differ_as_the_texts_do(three: Cluster) -> None:
    texts = ["The cat sits on the mat.", "A cat is on the mat.", "Stock markets fell on Monday."]
    answer = ok(three.nodes[2].answer("/embeddings", model=MODEL, input=texts, options=ONE))
    one, two, other = answer["embeddings"]
    assert answer["embedding"] == one

    def likeness(a: list[float], b: list[float]) -> float:
        product = sum(x * y for x, y in zip(a, b, strict=True))
        return product / (math.hypot(*a) * math.hypot(*b))

    assert likeness(one, two) > likeness(one, other)


def test_a_conversation_goes_on_from_its_context(three: Cluster) -> None:
    node = three.nodes[2]
    options = GREEDY | {"num_predict": 16}
    first = ok(node.answer("/generate", model=MODEL, prompt="My name is Zebulon.", options=options))
    asked = {"model": MODEL, "prompt": "What is my name?", "options": options}
    second = ok(node.answer("/generate", context=first["context"], **asked))
    assert second["context"][: len(first["context"])] == first["context"]
    assert "Zeb" in second["response"]
    assert "Zeb" not in ok(node.answer("/generate", **asked))["response"]


def test_pictures_are_seen_through_every_surface(
    three: Cluster, tmp_path: Path, smollm2_path: Path
) -> None:
    """By a projector of random numbers: all say the same, and it depends on the picture."""
    first, _, entry = three.nodes
    first.import_model(smollm2_path, "seeing", write_projector(tmp_path / "mmproj.gguf", 576))
    red, blue = (base64.b64encode(png(*rgb)).decode() for rgb in ((255, 0, 0), (0, 0, 255)))
    try:
        wait_until("it is known", lambda: entry.request("GET", "/models/seeing").is_success)
        told = []
        for pictures in ((), (red,), (blue,)):
            by_all = [by(entry, *pictures) for by in (by_ollama, by_openai, by_anthropic)]
            assert by_all == by_all[:1] * 3
            told.append(by_all[0])
        texts, tokens = zip(*told, strict=True)
        assert len(set(texts)) == 3
        assert tokens[1] == tokens[2] == tokens[0] + PATCHES
    finally:
        first.delete("/models/seeing")


WHAT = "What is it?"
SEEING = {"model": "seeing", "temperature": 0, "max_tokens": 24}


def by_ollama(node: Node, *pictures: str) -> tuple[str, int]:
    """What a model says of pictures (base64), and how many tokens the prompt had."""
    message = {"role": "user", "content": WHAT, "images": pictures}
    options = {"temperature": 0, "num_predict": 24}
    asked = {"model": "seeing", "messages": [message], "options": options, "stream": False}
    said = ok(node.answer(f"{node.url}/api/chat", **asked))
    return said["message"]["content"], said["prompt_eval_count"]


def by_openai(node: Node, *pictures: str) -> tuple[str, int]:
    urls = [{"url": f"data:image/png;base64,{each}"} for each in pictures]
    parts = [{"type": "image_url", "image_url": url} for url in urls]
    message = {"role": "user", "content": [{"type": "text", "text": WHAT}, *parts]}
    said = ok(node.answer(f"{node.url}/v1/chat/completions", messages=[message], **SEEING))
    return said["choices"][0]["message"]["content"], said["usage"]["prompt_tokens"]


def by_anthropic(node: Node, *pictures: str) -> tuple[str, int]:
    about = {"type": "base64", "media_type": "image/png"}
    blocks = [{"type": "image", "source": about | {"data": each}} for each in pictures]
    message = {"role": "user", "content": [*blocks, {"type": "text", "text": WHAT}]}
    said = ok(node.answer(f"{node.url}/v1/messages", messages=[message], **SEEING))
    usage = said["usage"]
    tokens = usage["input_tokens"] + usage["cache_read_input_tokens"]
    return said["content"][0]["text"], tokens


# Options.


def text_of(node: Node, **options: Any) -> Any:
    asked = ONE | {"num_predict": 24} | options
    return ok(node.answer("/generate", model=MODEL, prompt="Once upon a time", options=asked))


def test_seed_and_temperature_take_effect(three: Cluster) -> None:
    node = three.nodes[2]
    hot = {"temperature": 1.5, "top_k": 0, "top_p": 1.0}
    one = text_of(node, seed=1, **hot)["response"]
    assert text_of(node, seed=2, **hot)["response"] != one
    assert text_of(node, seed=1, **hot)["response"] == one
    cold = text_of(node, seed=1, temperature=0)["response"]
    assert text_of(node, seed=2, temperature=0)["response"] == cold
    # The one likeliest token is what greedy takes too.
    assert text_of(node, seed=3, temperature=1.5, top_k=1)["response"] == cold


def test_num_predict_and_stop_take_effect(three: Cluster) -> None:
    node = three.nodes[2]
    whole = text_of(node, temperature=0)
    assert whole["eval_count"] == 24
    assert text_of(node, temperature=0, num_predict=3)["eval_count"] == 3
    word = whole["response"].split()[4]
    stopped = text_of(node, temperature=0, stop=[word])
    assert stopped["done_reason"] == "stop"
    assert stopped["response"] == whole["response"].split(word)[0]


def test_repeat_penalty_takes_effect(three: Cluster) -> None:
    node = three.nodes[2]
    asked = {"model": MODEL, "prompt": "a a a a a a a a a a a a", "raw": True}
    plain = GREEDY | {"num_predict": 10, "repeat_penalty": 1.0}
    penalised = plain | {"repeat_penalty": 2.0}
    one = ok(node.answer("/generate", options=plain, **asked))["response"]
    other = ok(node.answer("/generate", options=penalised, **asked))["response"]
    assert one != other


def test_json_is_json(three: Cluster) -> None:

    schema = {
        "type": "object",
        "properties": {"big": {"type": "boolean"}, "rank": {"enum": ["low", "high"]}},
        "required": ["big", "rank"],
        "additionalProperties": False,
    }
    answer = ok(
        three.nodes[2].answer(
            "/generate",
            model=MODEL,
            prompt="Tell me of Paris in JSON.",
            format=schema,
            options=GREEDY | {"num_predict": 100},
        )
    )
    told = json.loads(answer["response"])
    assert isinstance(told["big"], bool)
    assert told["rank"] in ("low", "high")


def test_a_larger_context_is_loaded_when_it_is_asked_for(three: Cluster) -> None:
    node = three.nodes[0]
    ok(
        node.answer(
            "/generate", model=MODEL, prompt="Hi", options={"num_predict": 1, "num_ctx": 512}
        )
    )
    prompt = "word " * 700
    refusal = node.answer(
        "/generate", model=MODEL, prompt=prompt, options=ONE | {"num_ctx": 512}, truncate=False
    )
    if refusal.status_code == 400:
        error = refusal.json()
        assert "512" in error["error"], "both numbers are told"
        assert error["details"], error
    options = SHORT | {"num_ctx": 1024}
    answer = ok(node.answer("/generate", model=MODEL, prompt=prompt, options=options))
    assert answer["prompt_eval_count"] > 700


# Who is asked, and who leaves.


def load_on(cluster: Cluster, node: Node) -> None:
    """Have the model in a holder's memory."""
    if not text_runners(node):
        other = next(each for each in cluster.nodes[:2] if each is not node)
        other.post(f"/nodes/{other.id}/drain")
        wait_until("it drains", lambda: node.node(other)["draining"])
        ok(node.answer("/generate", model=MODEL, prompt="Hi", options=SHORT))
        other.post(f"/nodes/{other.id}/undrain")
    for each in cluster.nodes:
        wait_until("all know", lambda n=each: node.id in model_of(n)["loaded_on"])
        wait_until(
            "nobody drains",
            lambda n=each: not any(n.node(holder)["draining"] for holder in cluster.nodes[:2]),
        )


def test_a_node_that_has_the_model_in_memory_answers_itself(three: Cluster) -> None:
    for node in three.nodes[:2]:
        load_on(three, node)
    for node in three.nodes[:2]:
        wait_until("it does not drain", lambda n=node: n.node(n)["status"] == "online")
        answer = node.answer("/generate", model=MODEL, prompt="Hi", options=SHORT)
        assert ok(answer)
        assert answer.headers["X-Ollamad-Node"] == node.id


def test_requests_are_spread_over_the_holders(three: Cluster) -> None:
    for node in three.nodes[:2]:
        load_on(three, node)
    asked = {"model": MODEL, "prompt": "Tell me a story", "options": GREEDY | {"num_predict": 40}}
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: three.nodes[2].answer("/generate", **asked), range(6)))
    assert {answer.status_code for answer in answers} == {200}
    served = {answer.headers["X-Ollamad-Node"] for answer in answers}
    assert served == {node.id for node in three.nodes[:2]}


@pytest.mark.parametrize("index", [0, 2], ids=["local", "forwarded"])
def test_a_client_that_leaves_stops_its_generation(three: Cluster, index: int) -> None:
    node = three.nodes[index]
    with node.stream("/generate", model=MODEL, prompt="Tell me a story", options=LONG) as stream:
        serving = holder_of(three, stream.served_by)
        for _ in range(3):
            stream.next()
        assert busy(serving) == 1
    left = time.monotonic()
    wait_until("the generation is over", lambda: busy(serving) == 0, 10, 0.02)
    took_s = time.monotonic() - left
    print(f"stopped after {took_s:.2f} s")
    assert took_s < 1.0
    # The runner itself has stopped too: it burns no more time.
    runner = text_runner(serving)
    before = sum(runner.cpu_times()[:2])
    time.sleep(0.5)
    assert sum(runner.cpu_times()[:2]) - before < 0.1


def test_a_client_of_a_whole_answer_that_leaves_stops_it_too(three: Cluster) -> None:
    node = three.nodes[2]
    with pytest.raises(httpx.ReadTimeout):
        node.request(
            "POST",
            "/generate",
            json={"model": MODEL, "prompt": "Tell me a story", "options": LONG},
            timeout_s=1.5,
        )
    wait_until(
        "the generation is over", lambda: not any(busy(each) for each in three.nodes), 1.5, 0.05
    )


def test_a_draining_node_finishes_what_runs_and_takes_nothing_new(three: Cluster) -> None:
    first, second, third = three.nodes
    options = GREEDY | {"num_predict": 300, "stop": ["no such text"]}
    with first.stream(
        "/generate", model=MODEL, prompt="Tell me a story", options=options
    ) as stream:
        assert stream.served_by == first.id
        stream.next()
        third.post(f"/nodes/{first.id}/drain")
        for node in three.nodes:
            wait_until("it knows", lambda n=node: n.node(first)["status"] == "draining")
        for node in three.nodes:
            answer = node.answer("/generate", model=MODEL, prompt="Hi", options=SHORT)
            assert ok(answer)["done"]
            assert answer.headers["X-Ollamad-Node"] == second.id
        last = list(stream)[-1]
    assert last["done"]
    assert last["eval_count"] == 300, "the stream that ran has come to its own end"
    third.post(f"/nodes/{first.id}/undrain")
    wait_until("it is back", lambda: first.node(first)["status"] == "online")
    answer = first.answer("/generate", model=MODEL, prompt="Hi", options=SHORT)
    assert answer.headers["X-Ollamad-Node"] == first.id


def test_a_drain_that_lasts_longer_than_it_may_moves_the_answer(three: Cluster) -> None:
    first, second, _ = three.nodes
    first.stop()
    first.environment["OLLAMAD_DRAIN__TIMEOUT"] = f"{DRAIN_S:g}s"
    first.start()
    del first.environment["OLLAMAD_DRAIN__TIMEOUT"]
    three.wait_whole()
    load_on(three, first)
    # It has just started: by what it has measured so far the other one may look quicker.
    second.post(f"/nodes/{second.id}/drain")
    wait_until("it knows", lambda: first.node(second)["draining"])
    with first.stream("/generate", **STORY | {"failover": "continue"}) as stream:
        assert stream.served_by == first.id
        stream.next()
        second.post(f"/nodes/{second.id}/undrain")
        wait_until("it knows", lambda: not first.node(second)["draining"])
        begun = time.monotonic()
        first.post(f"/nodes/{first.id}/drain")
        wait_until("it has moved", lambda: (busy(first), busy(second)) == (0, 1), every_s=0.02)
        assert time.monotonic() - begun >= DRAIN_S, "it might have ended there"
        assert not stream.next()["done"]
    first.stop()  # the next one starts as the others do


def test_without_failover_a_killed_holder_is_told_in_band_and_the_next_answer_comes(
    three: Cluster,
) -> None:
    node = three.nodes[2]
    with node.stream("/generate", **STORY) as stream:
        serving = holder_of(three, stream.served_by)
        stream.next()
        serving.kill()
        last = list(stream)[-1]
    assert last["code"] == "NODE_LOST", last
    assert last["details"]["node_id"] == serving.id
    wait_until("its runner is gone", lambda: not serving.runners(), 5)
    answer = node.answer("/generate", model=MODEL, prompt="Hi", options=SHORT)
    assert ok(answer)["done"]
    assert answer.headers["X-Ollamad-Node"] != serving.id


def test_waiting_requests_are_counted(three: Cluster) -> None:
    first, second, _ = three.nodes
    first.post(f"/nodes/{second.id}/drain")  # everything goes to the first node, which has 2 slots
    wait_until("the drain is known", lambda: first.node(second)["draining"])

    def queued() -> int:
        return int(first.get("/metrics")["scheduler_stats"]["queued_requests"])

    asked = {"model": MODEL, "prompt": "Tell me a story", "options": LONG}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with first.stream("/generate", **asked) as one, first.stream("/generate", **asked) as two:
            one.next()
            two.next()
            assert queued() == 0
            third = pool.submit(first.answer, "/generate", model=MODEL, prompt="Hi", options=SHORT)
            wait_until("the third request waits", lambda: queued() == 1)
            assert not third.done()
        ok(third.result())
    assert queued() == 0


@pytest.mark.parametrize("index", [0, 2], ids=["local", "forwarded"])
def test_without_failover_a_killed_runner_is_told_in_band_and_the_next_answer_comes(
    three: Cluster, index: int
) -> None:
    node = three.nodes[index]
    with node.stream("/generate", **STORY) as stream:
        serving = holder_of(three, stream.served_by)
        stream.next()
        runner = text_runner(serving)
        runner.kill()
        last = list(stream)[-1]
    assert last["code"] == "RUNNER_DIED", last
    assert last["error"]
    assert "done" not in last
    assert ok(serving.answer("/generate", model=MODEL, prompt="Hi", options=SHORT))
    load_on(three, serving)
    assert text_runner(serving).pid != runner.pid


def test_a_runner_that_dies_idle_is_started_again(three: Cluster) -> None:
    node = three.nodes[0]
    load_on(three, node)
    runner = text_runner(node)
    runner.kill()
    assert ok(node.answer("/generate", model=MODEL, prompt="Hi", options=SHORT))
    wait_until("its end is noticed", lambda: runner.pid not in [r.pid for r in node.runners()])
    load_on(three, node)
    assert text_runner(node).pid != runner.pid


def test_a_runner_dies_with_a_killed_daemon(three: Cluster) -> None:
    node = three.nodes[0]
    load_on(three, node)
    assert node.runners()
    node.kill()
    wait_until("its runner is gone", lambda: not node.runners(), 5)


# Memory.


def test_keep_alive_unloads(three: Cluster) -> None:
    node, other, _ = three.nodes
    other.post(f"/nodes/{other.id}/drain")  # else it answers, if it has the model in memory
    wait_until("it drains", lambda: node.node(other)["draining"])
    options = SHORT
    ok(node.answer("/generate", model=MODEL, prompt="Hi", options=options, keep_alive=-1))
    [loaded] = node.loaded()
    assert loaded["name"] == MODEL
    assert loaded["size"] > 50_000_000
    assert loaded["expires_at"] is None
    assert node.get(f"/models/{MODEL}")["model"]["loaded_on"]

    ok(node.answer("/generate", model=MODEL, prompt="Hi", options=options, keep_alive="2s"))
    assert node.loaded()[0]["expires_at"]
    wait_until("it is unloaded", lambda: not node.loaded(), 15)
    wait_until("its process is gone", lambda: not node.runners(), 5)

    ok(node.answer("/generate", model=MODEL, prompt="Hi", options=options, keep_alive=0))
    wait_until("it is unloaded at once", lambda: not node.loaded(), 5)


def test_a_deleted_model_leaves_memory(three: Cluster, tmp_path: Path, smollm2_path: Path) -> None:
    node = three.nodes[0]
    node.import_model(smollm2_path, "twin")  # only here, so only this node can answer
    options = GREEDY | {"num_predict": 100, "stop": ["no such text"]}
    with node.stream(
        "/generate", model="twin", prompt="Tell me a story", options=options
    ) as stream:
        stream.next()
        assert "twin:latest" in [each["name"] for each in node.loaded()]
        node.delete("/models/twin")
        *_, last = stream
    assert (last["done"], last["eval_count"]) == (True, 100), "what ran has ended as it would have"
    wait_until(
        "it is unloaded", lambda: "twin:latest" not in [each["name"] for each in node.loaded()], 10
    )
    refused(node.answer("/generate", model="twin", prompt="Hi"), 404, "MODEL_NOT_FOUND")
    assert ok(node.answer("/generate", model=MODEL, prompt="Hi", options=SHORT))


# Requests that cannot be.


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_model_is_told_with_the_nearest_names(three: Cluster, stream: bool) -> None:
    for node in three.nodes:
        for route in ("/generate", "/chat", "/embeddings"):
            more = {"messages": []} if route == "/chat" else {"prompt": "Hi"}
            answer = node.answer(route, model="smolm:135m", stream=stream, **more)
            details = refused(answer, 404, "MODEL_NOT_FOUND")
            assert details["suggestions"] == [MODEL]
            assert MODEL in answer.json()["error"]


@pytest.mark.parametrize(
    ("route", "body", "field"),
    [
        ("/generate", {"prompt": "x"}, "model"),
        ("/generate", {"model": 7, "prompt": "x"}, "model"),
        ("/generate", {"model": MODEL, "prompt": 7}, "prompt"),
        ("/generate", {"model": MODEL, "prompt": "x", "stream": "yes"}, "stream"),
        ("/generate", {"model": MODEL, "prompt": "x", "options": {"seed": "a"}}, "options.seed"),
        ("/generate", {"model": MODEL, "prompt": "x", "options": {"stop": "a"}}, "options.stop"),
        ("/generate", {"model": MODEL, "prompt": "x", "keep_alive": "soon"}, "keep_alive"),
        ("/generate", {"model": MODEL, "prompt": "x", "context": [-1]}, "context[0]"),
        ("/generate", {"model": MODEL, "prompt": "x", "format": "xml"}, "format"),
        ("/chat", {"model": MODEL}, "messages"),
        ("/chat", {"model": MODEL, "messages": [{"content": "x"}]}, "messages[0].role"),
        ("/chat", {"model": MODEL, "messages": [{"role": "boss"}]}, "messages[0].role"),
        ("/embeddings", {"model": MODEL}, "prompt"),
        ("/embeddings", {"model": MODEL, "prompt": ""}, "prompt"),
        ("/embeddings", {"model": MODEL, "input": []}, "input"),
    ],
)
def test_a_bad_field_is_named(three: Cluster, route: str, body: Any, field: str) -> None:
    answer = three.nodes[2].request("POST", route, json=body)
    details = refused(answer, 400, "INVALID_REQUEST")
    assert details["field"] == field
    assert answer.json()["error"]


def test_what_is_no_json_is_told(three: Cluster) -> None:
    node = three.nodes[0]
    headers = {"Content-Type": "application/json"}
    answer = node.request("POST", "/generate", content=b"{", headers=headers)
    refused(answer, 400, "INVALID_JSON")
    refused(node.request("POST", "/generate", content=b"", headers=headers), 400, "INVALID_REQUEST")
    text = {"Content-Type": "text/plain"}
    answer = node.request("POST", "/generate", content=b"{}", headers=text)
    refused(answer, 415, "UNSUPPORTED_MEDIA_TYPE")
    refused(node.request("GET", "/generate"), 405, "METHOD_NOT_ALLOWED")
    refused(node.request("GET", "/nowhere"), 404, "NOT_FOUND")


@pytest.mark.parametrize("index", [0, 2], ids=["local", "forwarded"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_is_told_with_both_numbers(
    three: Cluster, index: int, stream: bool
) -> None:
    words = 9000
    answer = three.nodes[index].answer(
        "/generate",
        model=MODEL,
        prompt="word " * words,
        stream=stream,
        options=ONE | {"num_ctx": 512},
    )
    assert answer.status_code == 400, answer.text
    body = answer.json()
    assert "512" in body["error"]
    numbers = {value for value in body["details"].values() if isinstance(value, int)}
    assert 512 in numbers
    assert any(number > words for number in numbers)


def test_a_file_that_llama_cpp_cannot_run_is_told(three: Cluster, tmp_path: Path) -> None:
    """Its header is right, its tensors are not those of a llama."""
    node, second, entry = three.nodes
    node.import_model(write_gguf(tmp_path / "hollow.gguf"), "hollow")
    try:
        node.post("/models/hollow/download", {"nodes": [second.id]})
        three.wait_replicas("hollow", [node, second])
        for asked in (node, entry):
            answer = asked.answer("/generate", model="hollow", prompt="Hi")
            assert answer.status_code in (500, 503), answer.text
            assert answer.json()["code"] == "LOAD_FAILED"
            tried = answer.json()["details"]["nodes_tried"]
            assert sorted(tried) == sorted([node.id, second.id])
        # The others are none the worse for it.
        assert ok(node.answer("/generate", model=MODEL, prompt="Hi", options=SHORT))
    finally:
        node.delete("/models/hollow")


def test_a_model_that_nobody_online_holds_is_told(three: Cluster, tmp_path: Path) -> None:
    first, second, _ = three.nodes
    second.import_model(write_gguf(tmp_path / "tiny.gguf"), "tiny")
    second.kill()
    wait_until("it is offline", lambda: first.node(second)["status"] == "offline", 15)
    answer = first.answer("/generate", model="tiny", prompt="Hi")
    refused(answer, 503, "NO_REPLICA")
    assert not first.get("/models/tiny")["model"]["inference_ready"]
    first.delete("/models/tiny")


def test_requests_are_counted(three: Cluster) -> None:
    node = three.nodes[2]
    before = node.get("/metrics")
    ok(node.answer("/generate", model=MODEL, prompt="Hi", options=SHORT))
    refused(node.answer("/generate", model="nothing", prompt="Hi"), 404, "MODEL_NOT_FOUND")
    after = node.get("/metrics")
    assert after["requests_processed"] >= before["requests_processed"] + 2
    stats, stats_before = after["scheduler_stats"], before["scheduler_stats"]
    assert stats["completed_requests"] == stats_before["completed_requests"] + 1
    assert after["cluster_size"] == 3
    assert after["connected_peers"] == 2
    wait_until("a beat has told it", lambda: node.get("/metrics")["models_loaded"] >= 1)


def test_a_client_that_does_not_read_does_not_hold_up_others(three: Cluster) -> None:
    node = three.nodes[0]
    with contextlib.ExitStack() as stack:
        slow = stack.enter_context(
            node.stream("/generate", model=MODEL, prompt="Tell me a story", options=LONG)
        )
        slow.next()
        begun = time.monotonic()
        ok(node.answer("/generate", model=MODEL, prompt="Hi", options=SHORT))
        assert time.monotonic() - begun < ANSWER_TIMEOUT_S / 2
        assert node.get("/health")["status"] == "healthy"


def test_the_daemon_does_not_load_the_engine_itself(three: Cluster) -> None:
    """Native code crashes and leaks; it lives in the runners."""
    for node in three.nodes:
        mapped = Path(f"/proc/{node.pid}/maps").read_text()
        assert "xllamacpp" not in mapped
    assert psutil.Process(three.nodes[2].pid).memory_info().rss < 400 << 20
