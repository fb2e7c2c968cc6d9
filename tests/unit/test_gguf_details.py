"""What is made of a header: the names, sizes and numbers that Ollama shows."""

import pytest

from ollamad.store.details import ModelFacts, details_of, facts_of, human_number
from ollamad.store.gguf import GgufError, parse_header
from tests.fakes.gguf_files import LLAMA, Value, gguf_bytes


def facts(changes: dict[str, Value] | None = None, *without: str) -> ModelFacts:
    metadata = {k: v for k, v in (LLAMA | (changes or {})).items() if k not in without}
    data = gguf_bytes(metadata)
    return facts_of(parse_header(lambda length, at: data[at : at + length], len(data)))


def test_the_facts_of_a_small_llama() -> None:
    found = facts()
    assert found.architecture == "llama"
    assert found.name == "Tiny"
    assert found.license == "apache-2.0"
    assert found.parameter_count == 64 * 600 + 64 * 64 + 64
    assert found.quantization == "Q4_1"
    assert (found.context_length, found.embedding_length, found.block_count) == (256, 64, 2)
    assert (found.head_count, found.head_count_kv) == (4, 2)
    assert (found.key_length, found.value_length) == (16, 16)
    assert found.kv_bytes_per_token == 2 * 2 * (16 + 16) * 2  # layers, heads, widths, f16
    assert (found.tokenizer_model, found.tokenizer_pre) == ("gpt2", "smollm")
    assert found.chat_template.startswith("{% for message")
    assert found.capabilities == ("completion",)


def test_the_details_are_what_the_state_keeps() -> None:
    details = details_of(facts())
    assert details.format == "gguf"
    assert (details.family, details.families) == ("llama", ("llama",))
    assert details.parameter_size == "43K"
    assert details.quantization_level == "Q4_1"
    assert (details.context_length, details.kv_bytes_per_token) == (256, 256)


@pytest.mark.parametrize(
    ("changes", "without", "expected"),
    [
        ({"llama.attention.head_count_kv": [2, 1]}, (), 3 * 32 * 2),  # a number for each layer
        ({"llama.attention.head_count_kv": [2, 0]}, (), 2 * 32 * 2),  # a layer without attention
        ({"llama.attention.key_length": 128}, (), 2 * 2 * (128 + 16) * 2),
        ({"llama.attention.key_length": 128, "llama.attention.value_length": 64}, (), 1536),
        ({}, ("llama.attention.head_count_kv",), 2 * 4 * 32 * 2),  # as many as there are heads
        ({}, ("llama.attention.head_count", "llama.attention.head_count_kv"), 0),  # recurrent
    ],
)
def test_memory_for_each_token(
    changes: dict[str, Value], without: tuple[str, ...], expected: int
) -> None:
    assert facts(changes, *without).kv_bytes_per_token == expected


@pytest.mark.parametrize(
    ("changes", "without", "expected"),
    [
        ({"general.file_type": 15}, (), "Q4_K_M"),
        ({"general.file_type": 1024}, (), "Q4_1"),  # unknown: most parameters decide
        ({}, ("general.file_type",), "Q4_1"),
        ({"general.file_type": "Q4"}, (), "Q4_1"),
    ],
)
def test_quantization(changes: dict[str, Value], without: tuple[str, ...], expected: str) -> None:
    assert facts(changes, *without).quantization == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"general.architecture": "bert"}, ("embedding",)),
        ({"llama.pooling_type": 3}, ("embedding",)),
        ({"llama.pooling_type": 0}, ("completion",)),
        ({"tokenizer.chat_template": "{% if tools %}…{% endif %}"}, ("completion", "tools")),
    ],
)
def test_capabilities(changes: dict[str, Value], expected: tuple[str, ...]) -> None:
    assert facts(changes).capabilities == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("general.architecture", ""),
        ("general.architecture", "llama\n\x1b[31m"),
        ("general.architecture", "x" * 100),
        ("llama.context_length", 0xFFFFFFFF),
        ("llama.context_length", "256"),
        ("llama.block_count", 1_000_000),
        ("llama.attention.head_count", True),
        ("llama.attention.head_count_kv", ["2"]),
        ("llama.attention.key_length", 100_000),
        ("llama.embedding_length", 0.5),
    ],
)
def test_a_number_out_of_range_is_refused_by_name(key: str, value: Value) -> None:
    with pytest.raises(GgufError, match=key.replace(".", r"\.")):
        facts({key: value})


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (15_400, "15K"),
        (134_515_008, "134.52M"),
        (270_000_000, "270M"),
        (7_000_000_000, "7B"),
        (7_241_732_096, "7.2B"),
        (405_853_388_800, "405.9B"),
    ],
)
def test_counts_are_written_as_ollama_does(count: int, text: str) -> None:
    assert human_number(count) == text
