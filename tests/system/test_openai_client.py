"""Programs written for OpenAI: its own Python package, with only the base URL changed.

The client asks the second node; the model is on the first one.
"""

import asyncio
import json
import math
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pydantic
import pytest

from tests.fakes.chat_templates import THINKING, TOOLS
from tests.system.conftest import MODEL, derived
from tests.system.harness import ANSWER_TIMEOUT_S, Cluster, Node, wait_until

QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "seed": 1}
CHAT: dict[str, Any] = GREEDY | {"messages": QUESTION, "max_tokens": 12}


class Town(pydantic.BaseModel):
    capital: Literal["Paris", "Rome"]


def options_of(node: Node) -> dict[str, Any]:
    return {
        "base_url": f"{node.url}/v1",
        "api_key": node.admin_token(),
        "timeout": ANSWER_TIMEOUT_S,
        "max_retries": 0,
    }


@pytest.fixture
def client(model_on_one: Cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(**options_of(model_on_one.nodes[1])) as client:
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


def test_asynchronously(model_on_one: Cluster) -> None:
    async def both() -> tuple[str | None, str]:
        async with openai.AsyncOpenAI(**options_of(model_on_one.nodes[1])) as client:
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


def test_what_the_package_adds_to_a_chat(model_on_one: Cluster, client: openai.OpenAI) -> None:
    form = client.chat.completions.parse(**CHAT | {"max_tokens": 60}, response_format=Town)
    town = form.choices[0].message.parsed
    assert town is not None
    assert town.capital in ("Paris", "Rome")
    raw = client.chat.completions.with_raw_response.create(**CHAT)
    assert raw.headers["X-Ollamad-Node"] == model_on_one.nodes[0].id
    whole = raw.parse().choices[0].message.content
    assert whole
    word = whole.split()[2]  # a stream's helper takes no answer that was cut off
    with client.chat.completions.stream(**CHAT, stop=word) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion().choices[0]
    assert text == final.message.content == whole[: whole.index(word)]


def test_how_likely_the_tokens_were(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=3)
    [choice] = answer.choices
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert "".join(each.token for each in choice.logprobs.content) == choice.message.content
    for each in choice.logprobs.content:
        assert each.top_logprobs[0].token == each.token  # greedy
        assert len(each.top_logprobs) == 3
    legacy = client.completions.create(**GREEDY, prompt="One two", max_tokens=3, logprobs=2)
    told = legacy.choices[0].logprobs
    assert told is not None
    assert told.tokens is not None
    assert "".join(told.tokens) == legacy.choices[0].text
    assert told.text_offset is not None
    assert told.text_offset[0] == 0


def test_several_choices(client: openai.OpenAI) -> None:
    asked = CHAT | {"temperature": 1.0, "seed": 7, "n": 3}
    answer = client.chat.completions.create(**asked)
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) > 1
    assert client.chat.completions.create(**asked).choices[0].message.content == texts[0]
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert all(streamed)
    best = client.completions.create(
        model=MODEL, prompt=["One two", "Ada and"], max_tokens=4, best_of=2, seed=1
    )
    assert [choice.index for choice in best.choices] == [0, 1]
    banned = client.chat.completions.create(**CHAT, logit_bias={"504": -100})
    assert not (banned.choices[0].message.content or "").startswith("The")


def addition(name: str) -> dict[str, Any]:
    number = {"type": "integer"}
    parameters = {
        "type": "object",
        "properties": {"a": number, "b": number},
        "required": ["a", "b"],
    }
    function = {"name": name, "parameters": parameters, "strict": True}
    return {"type": "function", "function": function}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def sums() -> list[dict[str, Any]]:
    """A conversation whose next message is clear even to a small model."""
    messages: list[dict[str, Any]] = []
    for a, b in ((1, 2), (3, 4), (5, 5)):
        arguments = json.dumps({"a": a, "b": b})
        function = {"name": "add", "arguments": arguments}
        call = {"id": f"call_{a}", "type": "function", "function": function}
        messages += [
            {"role": "user", "content": f"What is {a} plus {b}?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": f"call_{a}", "content": str(a + b)},
            {"role": "assistant", "content": f"It is {a + b}."},
        ]
    return [*messages, {"role": "user", "content": "What is 6 plus 7?"}]


def as_items(message: dict[str, Any]) -> list[dict[str, Any]]:
    """A message of a chat as items of a response."""
    if message["role"] == "tool":
        about = {"call_id": message["tool_call_id"], "output": message["content"]}
        return [{"type": "function_call_output"} | about]
    if calls := message.get("tool_calls"):
        return [
            {"type": "function_call", "call_id": call["id"], **call["function"]} for call in calls
        ]
    return [message]


def test_a_tool_that_must_be_called(model_on_one: Cluster, client: openai.OpenAI) -> None:
    with derived(model_on_one, "calling", TOOLS):
        tools = [addition("add"), addition("sum")]
        asked = CHAT | {"model": "calling", "max_tokens": 80, "messages": sums(), "tools": tools}
        asked["parallel_tool_calls"] = False
        # By itself the model calls what it called before.
        for choice, name in (("auto", "add"), (named("sum"), "sum")):
            [answer] = client.chat.completions.create(**asked, tool_choice=choice).choices
            [call] = answer.message.tool_calls or []
            assert call.type == "function"
            assert call.function.name == name
            assert json.loads(call.function.arguments) == {"a": 6, "b": 7}
            assert answer.finish_reason == "tool_calls"
        likely = client.chat.completions.create(
            **asked, tool_choice="auto", logprobs=True, top_logprobs=2
        ).choices[0]
        assert likely.message.tool_calls
        assert likely.logprobs is not None
        assert all(len(each.top_logprobs) == 2 for each in likely.logprobs.content or ())
        written = "".join(each.token for each in likely.logprobs.content or ())
        assert '"add"' in written
        parts = list(
            client.chat.completions.create(**asked, tool_choice="auto", logprobs=True, stream=True)
        )
        assert any(part.choices[0].delta.tool_calls for part in parts)
        assert any(part.choices[0].logprobs for part in parts)
        items: list[Any] = []
        for message in sums():
            items += as_items(message)
        response = client.responses.create(
            model="calling",
            input=items,
            tools=[{"type": "function", **addition("sum")["function"]}],
            tool_choice={"type": "function", "name": "sum"},
            parallel_tool_calls=False,
            temperature=0,
            max_output_tokens=80,
        )
        [item] = [item for item in response.output if item.type == "function_call"]
        assert (item.name, json.loads(item.arguments)) == ("sum", {"a": 6, "b": 7})

        async def called() -> list[tuple[str, Any]]:
            async with openai.AsyncOpenAI(**options_of(model_on_one.nodes[1])) as other:
                whole = await other.chat.completions.create(**asked)
                async with other.chat.completions.stream(**asked) as stream:
                    streamed = await stream.get_final_completion()
            answers = (whole.choices[0].message, streamed.choices[0].message)
            calls: list[Any] = [call for each in answers for call in each.tool_calls or []]
            return [(call.function.name, json.loads(call.function.arguments)) for call in calls]

        assert asyncio.run(called()) == [("add", {"a": 6, "b": 7})] * 2


def test_thoughts_stand_beside_the_answer(model_on_one: Cluster, client: openai.OpenAI) -> None:
    with derived(model_on_one, "thinking", THINKING):
        asked = CHAT | {"model": "thinking"}
        thought: Any = client.chat.completions.create(**asked).choices[0].message
        assert thought.reasoning
        assert not thought.content
        deltas: list[Any] = [
            chunk.choices[0].delta for chunk in client.chat.completions.create(**asked, stream=True)
        ]
        assert "".join(getattr(each, "reasoning", "") for each in deltas) == thought.reasoning
        plain = client.chat.completions.create(**asked, reasoning_effort="none").choices[0].message
        assert plain.content
        assert not hasattr(plain, "reasoning")


# Responses.


def test_a_response(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_output_tokens": 12}
    whole = client.responses.create(**asked, input=QUESTION, instructions="Be brief.")
    assert whole.output_text
    assert whole.usage is not None
    assert whole.usage.output_tokens <= 12
    with client.responses.stream(**asked, input=QUESTION, instructions="Be brief.") as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_text == whole.output_text
    assert kinds[0] == "response.created"
    assert kinds[-1] in ("response.completed", "response.incomplete")
    again = client.responses.create(
        **asked, input=[*QUESTION, *whole.output, {"role": "user", "content": "And of Italy?"}]
    )
    assert again.output_text
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**asked, input="x", previous_response_id=whole.id)
    assert caught.value.param == "previous_response_id"


def test_a_response_of_a_form(client: openai.OpenAI) -> None:
    response = client.responses.parse(
        model=MODEL, input=QUESTION, text_format=Town, temperature=0, max_output_tokens=60
    )
    assert response.output_parsed is not None
    assert response.output_parsed.capital in ("Paris", "Rome")


def test_responses_asynchronously(model_on_one: Cluster) -> None:
    async def text() -> str:
        async with openai.AsyncOpenAI(**options_of(model_on_one.nodes[1])) as client:
            said = ""
            async for event in await client.responses.create(
                model=MODEL, input="Say hello.", max_output_tokens=8, stream=True
            ):
                if event.type == "response.output_text.delta":
                    said += event.delta
            return said

    assert asyncio.run(text())


# Completions, embeddings, models.


def test_a_completion_goes_on_with_the_prompt(client: openai.OpenAI) -> None:
    asked = GREEDY | {"prompt": "The capital of France is", "max_tokens": 6}
    answer = client.completions.create(**asked)
    assert "Paris" in answer.choices[0].text
    text = "".join(
        chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True)
    )
    assert text == answer.choices[0].text


def test_a_prompt_of_token_ids_is_read_as_the_text_that_they_stand_for(
    model_on_one: Cluster, client: openai.OpenAI
) -> None:
    options = {"num_predict": 8, "temperature": 0}
    first = model_on_one.nodes[0]
    told = first.answer("/generate", model=MODEL, prompt="Hello!", options=options).json()
    ids = told["context"][: -told["eval_count"]]
    by_ids = client.completions.create(**GREEDY, prompt=ids, max_tokens=8)
    assert by_ids.choices[0].text == told["response"]
    assert by_ids.usage is not None
    assert by_ids.usage.prompt_tokens == len(ids) == told["prompt_eval_count"]
    both = client.completions.create(**GREEDY, prompt=[ids, ids[:2]], max_tokens=4)
    assert len(both.choices) == 2
    with pytest.raises(openai.BadRequestError, match="token"):
        client.completions.create(**GREEDY, prompt=[2_000_000_000], max_tokens=4)


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


def test_asynchronously_all_that_is_no_chat(model_on_one: Cluster) -> None:
    async def all_of_it() -> None:
        async with openai.AsyncOpenAI(**options_of(model_on_one.nodes[1])) as client:
            assert MODEL in [model.id async for model in client.models.list()]
            assert (await client.models.retrieve(MODEL)).id == MODEL
            asked = GREEDY | {"prompt": "The capital of France is", "max_tokens": 6}
            whole = (await client.completions.create(**asked)).choices[0].text
            parts = [
                chunk.choices[0].text
                async for chunk in await client.completions.create(**asked, stream=True)
            ]
            assert ("Paris" in whole, "".join(parts)) == (True, whole)
            row = (await client.embeddings.create(model=MODEL, input="a cat")).data[0]
            assert len(row.embedding) == 576
            city = {"type": "string", "enum": ["Paris", "Rome"]}
            schema = {"type": "object", "properties": {"city": city}, "required": ["city"]}
            form: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
            asked_for = CHAT | {"max_tokens": 60, "response_format": form}
            said = (await client.chat.completions.create(**asked_for)).choices[0].message.content
            assert json.loads(said or "")["city"] in ("Paris", "Rome")
            with pytest.raises(openai.NotFoundError, match="nope"):
                await client.chat.completions.create(model="nope", messages=QUESTION)
            with pytest.raises(openai.BadRequestError, match="token ids"):
                await client.embeddings.create(model=MODEL, input=[1, 2, 3])

    asyncio.run(all_of_it())


def test_any_word_is_a_key_on_the_nodes_own_host(model_on_one: Cluster) -> None:
    options = options_of(model_on_one.nodes[1])
    with openai.OpenAI(**options | {"api_key": "ollama"}) as client:
        assert client.chat.completions.create(**CHAT).choices[0].message.content


# What goes wrong.


def test_errors_are_the_packages_own(model_on_one: Cluster, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="nope"):
        client.chat.completions.create(model="nope", messages=QUESTION)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**CHAT | {"temperature": 9})
    assert caught.value.param == "temperature"
    stranger = openai.OpenAI(**options_of(model_on_one.nodes[1]) | {"api_key": "odk_00_wrong"})
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_a_client_that_leaves_ends_the_generation(
    model_on_one: Cluster, client: openai.OpenAI
) -> None:
    asked = CHAT | {"max_tokens": 1500, "stop": "no such text"}
    stream = client.chat.completions.create(**asked, stream=True)
    next(iter(stream))
    wait_until("it runs", lambda: busy(model_on_one) == 1)
    stream.close()
    wait_until("it has ended", lambda: busy(model_on_one) == 0)


@pytest.mark.parametrize("stream", [True, False])
def test_a_task_that_is_cancelled_ends_the_generation(model_on_one: Cluster, stream: bool) -> None:
    asked = CHAT | {"max_tokens": 1500, "stop": "no such text", "stream": stream}

    async def cancel() -> None:
        async with openai.AsyncOpenAI(**options_of(model_on_one.nodes[1])) as client:

            async def ask() -> None:
                answer: Any = await client.chat.completions.create(**asked)
                if stream:
                    async for _ in answer:
                        pass

            task = asyncio.create_task(ask())
            await asyncio.to_thread(wait_until, "it runs", lambda: busy(model_on_one) == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.to_thread(wait_until, "it has ended", lambda: busy(model_on_one) == 0)

    asyncio.run(cancel())
