"""Real templates of Ollama's models, and the prompts that Ollama makes with them."""

import msgspec
import pytest

from ollamad.core.gotemplate import TemplateError
from ollamad.core.inference import Message, ToolCall
from ollamad.core.ollama_template import ChatTemplate
from tests.fakes import ollama_templates as published

SYSTEM = Message("system", "Be brief.")
HI = Message("user", "Hi")
HELLO = Message("assistant", "Hello!")
MORE = Message("user", "More")
ADD = ToolCall("add", '{"a":1,"b":"<x>"}', "call_1")
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds",
        "parameters": {
            "type": "object",
            "required": ["a"],
            "properties": {
                "a": {"type": "integer", "description": "First"},
                "b": {"type": "array", "items": {"type": "string"}},
                "c": {"type": ["string", "null"]},
            },
        },
    },
}
TOOLS = msgspec.json.encode([TOOL]).decode()


@pytest.mark.parametrize(
    ("source", "messages", "prompt"),
    [
        (
            published.LLAMA3,
            [SYSTEM, HI, HELLO, MORE],
            "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nMore<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (published.LLAMA3, [HI], "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
         "<|start_header_id|>assistant<|end_header_id|>\n\n"),
        (published.CHATML, [SYSTEM, HI],
         "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
         "<|im_start|>assistant\n"),
        # What was begun for the model is cut off together with the response.
        (published.CHATML, [HI, HELLO], "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
        (published.GEMMA2, [SYSTEM, HI, HELLO, MORE],
         "<start_of_turn>user\nBe brief. Hi<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>"
         "\n<start_of_turn>user\nMore<end_of_turn>\n<start_of_turn>model\n"),
        (published.GEMMA3, [SYSTEM, HI, HELLO, MORE],
         "<start_of_turn>user\nBe brief.<end_of_turn>\n<start_of_turn>user\nHi<end_of_turn>\n"
         "<start_of_turn>model\nHello!<end_of_turn>\n<start_of_turn>user\nMore<end_of_turn>\n"
         "<start_of_turn>model\n"),
        (published.GEMMA3, [HI, HELLO],
         "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello!"),
        (published.PHI3, [SYSTEM, HI],
         "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n"),
        # The system prompt stands before the last message of the user.
        (published.MISTRAL, [SYSTEM, HI, HELLO, MORE],
         "[INST] Hi[/INST] Hello!</s>[INST] Be brief.\n\nMore[/INST]"),
        (published.QWEN25, [SYSTEM, HI],
         "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
         "<|im_start|>assistant\n"),
        # Neighbours of one role are one message; all system messages are `.System`.
        (published.QWEN25, [SYSTEM, SYSTEM, HI, MORE],
         "<|im_start|>system\nBe brief.\n\nBe brief.<|im_end|>\n<|im_start|>user\nHi\n\nMore"
         "<|im_end|>\n<|im_start|>assistant\n"),
        # Of the older kind, a later system message begins a turn of its own.
        (published.CHATML, [HI, HELLO, SYSTEM, MORE],
         "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
         "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nMore<|im_end|>\n"
         "<|im_start|>assistant\n"),
        # A template that says nothing of the response has it at its end.
        ("[{{ .Prompt }}]", [HI, HELLO, MORE], "[Hi]Hello![More]"),
        ("{{ .Prompt }}", [HI], "Hi"),
    ],
)  # fmt: skip
def test_the_prompts_of_real_templates(source: str, messages: list[Message], prompt: str) -> None:
    assert ChatTemplate(source).render(messages) == prompt


@pytest.mark.parametrize(
    ("source", "prompt"),
    [
        (
            published.QWEN25,
            "<|im_start|>system\n\n# Tools\n\n<tools>\n"
            '{"type": "function", "function": {"name":"add","description":"Adds","parameters":'
            '{"type":"object","required":["a"],"properties":{"a":{"type":"integer","description":'
            '"First"},"b":{"type":"array","items":{"type":"string"}},"c":{"type":["string","null"]}'
            "}}}}\n</tools><|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
            '<tool_call>\n{"name": "add", "arguments": {"a":1,"b":"\\u003cx\\u003e"}}\n</tool_call>'
            "<|im_end|>\n<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (
            published.MISTRAL,
            '[INST] Hi[/INST][TOOL_CALLS] [{"name": "add", "arguments": {"a":1,"b":'
            '"\\u003cx\\u003e"}}]</s>[TOOL_RESULTS] {"content": 3} [/TOOL_RESULTS]',
        ),
    ],
)
def test_tools_their_calls_and_results(source: str, prompt: str) -> None:
    messages = [
        HI,
        Message("assistant", "", tool_calls=(ADD,)),
        Message("tool", "3", tool_name="add", tool_call_id="call_1"),
    ]
    assert ChatTemplate(source).render(messages, TOOLS) == prompt


@pytest.mark.parametrize(("think", "level"), [("", "low"), ("on", "medium"), ("high", "high")])
def test_what_else_templates_use(think: str, level: str) -> None:
    template = ChatTemplate(published.GPT_OSS, today="2026-01-31")
    assert template.render([HI], TOOLS, think) == (
        "<|start|>system<|message|>Current date: 2026-01-31\n\n"
        f"Reasoning: {level}<|end|><|start|>developer<|message|>\n"
        "type add = (_: {\n// First\na: number,\nb: string[],\nc: string | null,\n}) => any;"
        "<|end|><|start|>user<|message|>Hi<|end|><|start|>assistant"
    )


def test_filling_in() -> None:
    template = ChatTemplate(published.INFILL)
    assert template.takes_suffix
    assert template.fill_in("a", "b") == "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>"
    assert template.render([HI]) == "Hi"
    assert not ChatTemplate(published.CHATML).takes_suffix


def test_an_error_says_what_it_is() -> None:
    with pytest.raises(TemplateError, match="not ended"):
        ChatTemplate("{{ if .Prompt }}")
    with pytest.raises(TemplateError, match="no field Missing"):
        ChatTemplate("{{ range .Messages }}{{ .Missing }}{{ end }}").render([HI])
