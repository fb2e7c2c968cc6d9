"""Programs written for OpenAI: its own Python package, with only the base URL changed.

The client asks the second node; the model is on the first one.
"""

import asyncio
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.system.conftest import open_cluster
from tests.system.harness import ANSWER_TIMEOUT_S, Cluster, Node, wait_until

MODEL = "smollm2:135m"
QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "seed": 1}
CHAT: dict[str, Any] = GREEDY | {"messages": QUESTION, "max_tokens": 12}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Iterator[Cluster]:
    for cluster in open_cluster(tmp_path_factory, OLLAMAD_MODELS__REPLICAS="1"):
        first = cluster.found()
        cluster.grow(1)
        first.import_model(smollm2_path, MODEL)
        cluster.wait_replicas(MODEL, [first])
        yield cluster


def options_of(node: Node) -> dict[str, Any]:
    return {
        "base_url": f"{node.url}/v1",
        "api_key": node.admin_token(),
        "timeout": ANSWER_TIMEOUT_S,
        "max_retries": 0,
    }


@pytest.fixture
def client(two: Cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(**options_of(two.nodes[1])) as client:
        yield client


def busy(cluster: Cluster) -> int:
    return sum(loaded["busy"] for node in cluster.nodes for loaded in node.loaded())


# Chat.


def test_a_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**CHAT)
    [choice] = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.completion_tokens <= 12
    assert answer.id.startswith("chatcmpl-")


def test_a_streamed_chat_is_the_whole_one_in_parts(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**CHAT)
    stream = client.chat.completions.create(
        **CHAT, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert len(chunks) > 3
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_asynchronously(two: Cluster) -> None:
    async def both() -> tuple[str | None, str]:
        async with openai.AsyncOpenAI(**options_of(two.nodes[1])) as client:
            whole = await client.chat.completions.create(**CHAT)
            text = ""
            async for chunk in await client.chat.completions.create(**CHAT, stream=True):
                text += chunk.choices[0].delta.content or ""
            return whole.choices[0].message.content, text

    whole, text = asyncio.run(both())  # the package knows no other loop
    assert text == whole


def test_stop_and_length(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**CHAT).choices[0].message.content
    assert whole
    word = whole.split()[2]
    stopped = client.chat.completions.create(**CHAT, stop=word).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.message.content is not None
    assert word not in stopped.message.content
    short = client.chat.completions.create(**CHAT | {"max_tokens": 2}).choices[0]
    assert short.finish_reason == "length"


def test_structured_output(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"capital": {"enum": ["Paris", "Rome"]}},
        "required": ["capital"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        **CHAT | {"max_tokens": 60},
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "town", "schema": schema, "strict": True},
        },
    )
    content = answer.choices[0].message.content
    assert content is not None
    assert json.loads(content)["capital"] in ("Paris", "Rome")


# Completions, embeddings, models.


def test_a_completion_goes_on_with_the_prompt(client: openai.OpenAI) -> None:
    asked = GREEDY | {"prompt": "The capital of France is", "max_tokens": 6}
    answer = client.completions.create(**asked)
    assert "Paris" in answer.choices[0].text
    text = "".join(
        chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True)
    )
    assert text == answer.choices[0].text


def test_embeddings(client: openai.OpenAI) -> None:
    # The client asks for base64 by itself, and decodes it.
    texts = ["a cat", "a dog", "the price of oil"]
    answer = client.embeddings.create(model=MODEL, input=texts)
    vectors = [row.embedding for row in answer.data]
    assert [len(vector) for vector in vectors] == [576] * 3
    plain = client.embeddings.create(model=MODEL, input=texts, encoding_format="float")
    for vector, row in zip(vectors, plain.data, strict=True):
        assert all(map(lambda a, b: math.isclose(a, b, abs_tol=1e-6), vector, row.embedding))
    short = client.embeddings.create(model=MODEL, input="a cat", dimensions=64).data[0].embedding
    assert len(short) == 64
    assert math.isclose(sum(number * number for number in short), 1, rel_tol=1e-3)


def test_models(client: openai.OpenAI) -> None:
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).owned_by == "library"


# What goes wrong.


def test_errors_are_the_packages_own(two: Cluster, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="nope"):
        client.chat.completions.create(model="nope", messages=QUESTION)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**CHAT | {"temperature": 9})
    assert caught.value.param == "temperature"
    stranger = openai.OpenAI(**options_of(two.nodes[1]) | {"api_key": "wrong"})
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_a_client_that_leaves_ends_the_generation(two: Cluster, client: openai.OpenAI) -> None:
    asked = CHAT | {"max_tokens": 1500, "stop": "no such text"}
    stream = client.chat.completions.create(**asked, stream=True)
    next(iter(stream))
    wait_until("it runs", lambda: busy(two) == 1)
    stream.close()
    wait_until("it has ended", lambda: busy(two) == 0)
