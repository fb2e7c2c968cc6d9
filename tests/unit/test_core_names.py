"""Model names by Ollama's rules, and every trick that would leave the directory of names."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollamad.core.names import (
    MAX_PART_LENGTH,
    InvalidName,
    ModelName,
    check_node_name,
    nearest,
    node_name_of,
    parse_name,
)


@pytest.mark.parametrize(
    ("text", "host", "namespace", "model", "tag", "shown"),
    [
        ("llama2", "registry.ollama.ai", "library", "llama2", "latest", "llama2:latest"),
        ("llama2:7b", "registry.ollama.ai", "library", "llama2", "7b", "llama2:7b"),
        ("me/llama2", "registry.ollama.ai", "me", "llama2", "latest", "me/llama2:latest"),
        ("hf.co/me/x:Q4_K_M", "hf.co", "me", "x", "Q4_K_M", "hf.co/me/x:Q4_K_M"),
        ("localhost:5000/a/b:c", "localhost:5000", "a", "b", "c", "localhost:5000/a/b:c"),
        ("registry.ollama.ai/library/x:y", "registry.ollama.ai", "library", "x", "y", "x:y"),
        ("hf.co/library/x", "hf.co", "library", "x", "latest", "hf.co/library/x:latest"),
        (" llama2 \n", "registry.ollama.ai", "library", "llama2", "latest", "llama2:latest"),
        ("_a-b.c:1.5", "registry.ollama.ai", "library", "_a-b.c", "1.5", "_a-b.c:1.5"),
    ],
)
def test_names_that_are_valid(
    text: str, host: str, namespace: str, model: str, tag: str, shown: str
) -> None:
    name = parse_name(text)
    assert name == ModelName(host, namespace, model, tag)
    assert str(name) == shown
    assert parse_name(shown) == name


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        ":7b",
        "llama2:",
        "a/b/c/d",
        "/llama2",
        "a//b",
        "a/",
        "..",
        ".",
        "../llama2",
        "../../etc/passwd",
        "a/../b",
        "a/..",
        "a/b/..:x",
        "x:..",
        "x:.hidden",
        ".x",
        "-x",
        "a..b",
        "x:a..b",
        "a\0b",
        "x:\0",
        "a b",
        "a\nb",
        "a\\b",
        "a:b:c",
        "x:7b/../../y",
        "llämä",
        "\uff4c\uff4cama",
        "llama\u200b2",
        "llama\u2215x",
        "x" * (MAX_PART_LENGTH + 1),
        "x:" + "y" * (MAX_PART_LENGTH + 1),
        "n" * (MAX_PART_LENGTH + 1) + "/x",
        "host:port/a/b",
        "host:123456/a/b",
        "h" * 400 + "/a/b",
        "http://host/x",
        "%2e%2e/x",
        "٣",
    ],
)
def test_names_that_are_refused(text: str) -> None:
    with pytest.raises(InvalidName):
        parse_name(text)


def test_the_longest_parts_are_valid() -> None:
    part = "x" * MAX_PART_LENGTH
    assert parse_name(f"{part}/{part}:{part}").tag == part


def test_two_spellings_have_the_same_key() -> None:
    assert parse_name("LLaMA2").key == parse_name("registry.ollama.ai/library/llama2:LATEST").key
    assert parse_name("a/x").key != parse_name("b/x").key
    assert parse_name("hf.co/library/x").key != parse_name("x").key


@given(st.text(max_size=40) | st.text(alphabet=string.ascii_letters + "./:-_\0", max_size=20))
def test_any_text_is_a_name_or_refused_and_never_leaves_its_directory(text: str) -> None:
    try:
        name = parse_name(text)
    except InvalidName:
        return
    for part in (name.host, name.namespace, name.model, name.tag):
        assert part
        assert part not in (".", "..")
        assert not part.startswith(".")
        assert not set(part) & set("/\\\0\n ")
        assert part.isascii()
    assert parse_name(str(name)) == name


@pytest.mark.parametrize(
    ("typed", "known", "expected"),
    [
        ("lama2", ["llama2:latest", "mistral:7b"], ["llama2:latest"]),
        ("llama2:13b", ["llama2:7b", "llama2:70b", "qwen:7b"], ["llama2:7b", "llama2:70b"]),
        ("LLAMA2", ["Llama2:latest"], ["Llama2:latest"]),
        ("zzz", ["llama2:latest"], []),
        ("anything", [], []),
    ],
)
def test_the_nearest_names_come_first(typed: str, known: list[str], expected: list[str]) -> None:
    assert nearest(typed, known) == expected


def test_no_more_names_than_asked_for() -> None:
    assert len(nearest("x", [f"x:{i}" for i in range(9)])) == 3


@pytest.mark.parametrize("name", ["a", "node-1", "n.example.org", "x" * 63, "9_9"])
def test_names_of_nodes(name: str) -> None:
    check_node_name(name)
    assert node_name_of(name) == name


@pytest.mark.parametrize(
    "name", ["", "x" * 64, "a b", "a/b", "a\n", "\x1b[2J", "-a", ".a", "Qmabcdef", "näme", "a\0"]
)
def test_names_that_no_node_may_have(name: str) -> None:
    with pytest.raises(ValueError, match="a node's name"):
        check_node_name(name)


@given(st.text())
def test_every_host_name_gives_a_node_name(host: str) -> None:
    check_node_name(node_name_of(host))
