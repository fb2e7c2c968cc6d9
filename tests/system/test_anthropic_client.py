"""Programs written for Anthropic: its own Python package, with only the base URL changed.

The client asks the second node; the model is on the first one.
"""

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import httpx
import pydantic
import pytest

from tests.fakes.chat_templates import THINKING, TOOLS
from tests.system.conftest import MODEL, derived
from tests.system.harness import ANSWER_TIMEOUT_S, Cluster, Node, wait_until

QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
PLAIN: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "max_tokens": 12}
# The package itself knows of no temperature any more.
ASKED: dict[str, Any] = PLAIN | {"extra_body": {"temperature": 0}}
CALL = {"type", "id", "name", "input"}  # the fields of one, as they are sent back


class Town(pydantic.BaseModel):
    capital: Literal["Paris", "Rome"]


def options_of(node: Node) -> dict[str, Any]:
    # The package sends it as X-Api-Key.
    return {
        "base_url": node.url,
        "api_key": node.admin_token(),
        "timeout": ANSWER_TIMEOUT_S,
        "max_retries": 0,
    }


@pytest.fixture
def client(model_on_one: Cluster) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(**options_of(model_on_one.nodes[1])) as client:
        yield client


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_a_message_whole_and_streamed(client: anthropic.Anthropic) -> None:
    whole = client.messages.create(**ASKED, system="Be brief.")
    assert (whole.type, whole.role, whole.model) == ("message", "assistant", MODEL)
    assert whole.stop_reason in ("end_turn", "max_tokens")
    assert 0 < whole.usage.output_tokens <= 12
    with client.messages.stream(**ASKED, system="Be brief.") as stream:
        streamed = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert streamed == text_of(final) == text_of(whole)
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert final.usage.input_tokens + (final.usage.cache_read_input_tokens or 0) > 10
    kinds = [event.type for event in client.messages.create(**ASKED, stream=True)]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_asynchronously(model_on_one: Cluster, client: anthropic.Anthropic) -> None:
    async def text() -> str:
        async with (
            anthropic.AsyncAnthropic(**options_of(model_on_one.nodes[1])) as other,
            other.messages.stream(**ASKED) as stream,
        ):
            return "".join([part async for part in stream.text_stream])

    assert asyncio.run(text()) == text_of(client.messages.create(**ASKED))


def test_a_conversation_and_how_it_stops(client: anthropic.Anthropic) -> None:
    turns = [*QUESTION, {"role": "assistant", "content": "Paris."}]
    turns.append({"role": "user", "content": [{"type": "text", "text": "Count: 1, 2, 3"}]})
    whole = text_of(client.messages.create(**ASKED | {"messages": turns}))
    stop = whole[3:5]
    stopped = client.messages.create(**ASKED | {"messages": turns}, stop_sequences=[stop])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop)
    assert text_of(stopped) == whole[: whole.index(stop)]
    cut = client.messages.create(**ASKED | {"max_tokens": 2})
    assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 2)


def test_an_answer_of_a_form(client: anthropic.Anthropic) -> None:
    asked = ASKED | {"max_tokens": 60}
    schema = {
        "type": "object",
        "properties": {"capital": {"enum": ["Paris", "Rome"]}},
        "required": ["capital"],
        "additionalProperties": False,
    }
    form: Any = {"format": {"type": "json_schema", "schema": schema}}
    answer = client.messages.create(**asked, output_config=form)
    assert json.loads(text_of(answer))["capital"] in ("Paris", "Rome")
    parsed = client.messages.parse(**asked, output_format=Town).parsed_output
    assert parsed is not None
    assert parsed.capital in ("Paris", "Rome")


def tool(name: str) -> dict[str, Any]:
    number = {"type": "integer"}
    schema = {"type": "object", "properties": {"a": number, "b": number}, "required": ["a", "b"]}
    return {"name": name, "input_schema": schema}


def sums() -> list[Any]:
    """A conversation whose next message is clear even to a small model."""
    messages: list[Any] = []
    for a, b in ((1, 2), (3, 4), (5, 5)):
        call = {"type": "tool_use", "id": f"call_{a}", "name": "add", "input": {"a": a, "b": b}}
        messages += [
            {"role": "user", "content": f"What is {a} plus {b}?"},
            {"role": "assistant", "content": [call]},
            result_of(f"call_{a}", str(a + b)),
            {"role": "assistant", "content": f"It is {a + b}."},
        ]
    return [*messages, {"role": "user", "content": "What is 6 plus 7?"}]


def result_of(call_id: str, text: str) -> dict[str, Any]:
    block = {"type": "tool_result", "tool_use_id": call_id, "content": text}
    return {"role": "user", "content": [block]}


def calls_in(message: Any) -> list[tuple[str, Any]]:
    return [(block.name, block.input) for block in message.content if block.type == "tool_use"]


def test_tools(model_on_one: Cluster, client: anthropic.Anthropic) -> None:
    with derived(model_on_one, "calling", TOOLS):
        asked = ASKED | {"model": "calling", "max_tokens": 80, "messages": sums()}
        asked["tools"] = [tool("add"), tool("sum")]
        alone = {"disable_parallel_tool_use": True}
        named = {"type": "tool", "name": "sum"} | alone
        # By itself the model calls what it called before.
        for choice, name in (({"type": "auto"} | alone, "add"), (named, "sum")):
            whole = client.messages.create(**asked, tool_choice=choice)
            assert calls_in(whole) == [(name, {"a": 6, "b": 7})]
            assert whole.stop_reason == "tool_use"
        with client.messages.stream(**asked, tool_choice=named) as stream:
            written = "".join(event.partial_json for event in stream if event.type == "input_json")
            final = stream.get_final_message()
        assert json.loads(written) == {"a": 6, "b": 7}
        assert (calls_in(final), final.stop_reason) == (calls_in(whole), "tool_use")
        none = client.messages.create(**asked | {"max_tokens": 40}, tool_choice={"type": "none"})
        assert not calls_in(none)
        [call] = [block for block in final.content if block.type == "tool_use"]
        turn: Any = {"role": "assistant", "content": [call.model_dump(include=CALL)]}
        asked["messages"] = [*sums(), turn, result_of(call.id, "13")]
        assert "13" in text_of(client.messages.create(**asked))


def test_thoughts_come_when_they_are_asked_for(
    model_on_one: Cluster, client: anthropic.Anthropic
) -> None:
    with derived(model_on_one, "thinking", THINKING):
        asked = ASKED | {"model": "thinking"}
        plain = client.messages.create(**asked)
        assert [block.type for block in plain.content] == ["text"]
        asked["thinking"] = {"type": "enabled", "budget_tokens": 1024}
        first = client.messages.create(**asked).content[0]
        assert first.type == "thinking"
        assert first.thinking
        with client.messages.stream(**asked) as stream:
            thoughts = "".join(event.thinking for event in stream if event.type == "thinking")
            [block, *_] = stream.get_final_message().content
        assert block.type == "thinking"
        assert block.thinking == thoughts == first.thinking


def test_counting(client: anthropic.Anthropic) -> None:
    counted = client.messages.count_tokens(model=MODEL, messages=QUESTION, system="Be brief.")
    message = client.messages.create(**ASKED, system="Be brief.")
    usage = message.usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_models(client: anthropic.Anthropic) -> None:
    listed = client.models.list().data
    assert MODEL in [model.id for model in listed]
    assert client.models.retrieve(MODEL).display_name == MODEL


def test_errors_are_the_packages_own(model_on_one: Cluster, client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="nope"):
        client.messages.create(**ASKED | {"model": "nope"})
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        client.messages.create(**ASKED | {"extra_body": {"temperature": 3}})
    tool = {"name": "add", "input_schema": {"type": "object"}}
    with pytest.raises(anthropic.BadRequestError, match="does not support tools"):
        client.messages.create(**ASKED, tools=[tool])
    bad = options_of(model_on_one.nodes[1]) | {"api_key": "wrong.wrong.wrong"}
    with anthropic.Anthropic(**bad) as stranger, pytest.raises(anthropic.AuthenticationError):
        stranger.messages.create(**ASKED)


def test_bare_http(model_on_one: Cluster) -> None:
    node = model_on_one.nodes[1]
    headers = {"X-Api-Key": node.admin_token(), "anthropic-version": "2023-06-01"}
    url = f"{node.url}/v1/messages"
    answer = httpx.post(url, json=PLAIN, headers=headers, timeout=ANSWER_TIMEOUT_S, trust_env=False)
    assert answer.status_code == 200
    assert answer.json()["content"][0]["type"] == "text"
    wrong = httpx.post(url, content=b"{", headers=headers, trust_env=False)
    assert wrong.status_code == 400
    assert wrong.json()["type"] == "error"
    assert wrong.json()["error"]["type"] == "invalid_request_error"
    lines = []
    with httpx.stream(
        "POST", url, json=PLAIN | {"stream": True}, headers=headers, timeout=60, trust_env=False
    ) as stream:
        lines = [line for line in stream.iter_lines() if line]
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    types = [json.loads(line[6:])["type"] for line in lines if line.startswith("data: ")]
    assert names == types


def test_a_client_that_leaves_ends_the_generation(
    model_on_one: Cluster, client: anthropic.Anthropic
) -> None:
    def busy() -> int:
        return sum(loaded["busy"] for node in model_on_one.nodes for loaded in node.loaded())

    asked = ASKED | {"max_tokens": 1500, "stop_sequences": ["no such text"]}
    stream = client.messages.create(**asked, stream=True)
    next(iter(stream))
    wait_until("it runs", lambda: busy() == 1)
    stream.close()
    wait_until("it has ended", lambda: busy() == 0)
