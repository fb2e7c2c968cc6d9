"""Modelfiles: what Ollama reads, and errors that name the line."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollamad.core.inference import Message
from ollamad.core.modelfile import ModelfileError, digest_of, is_path, parse_modelfile

WHOLE = '''
# A comment
from ./weights.gguf
FROM ./mmproj.gguf
Adapter ./lora.gguf
PARAMETER temperature 0.7
parameter num_ctx 4096
PARAMETER stop "<|im_end|>"
PARAMETER stop   User:
PARAMETER stop """a
b"""
PARAMETER num_gqa 8
TEMPLATE """{{ if .System }}# {{ .System }}
{{ end }}{{ .Prompt }}"""
SYSTEM "You are brief."
LICENSE MIT
LICENSE """Other
terms"""
MESSAGE user Hello
MESSAGE assistant """Hi
there"""
RENDERER qwen3
PARSER qwen3
REQUIRES 0.12.0
'''


def test_everything_that_there_is() -> None:
    file = parse_modelfile(WHOLE)
    assert file.bases == ("./weights.gguf", "./mmproj.gguf")
    assert file.adapters == ("./lora.gguf",)
    changes = file.changes
    assert changes.parameters == {
        "temperature": 0.7, "num_ctx": 4096, "stop": ["<|im_end|>", "User:", "a\nb"],
    }  # fmt: skip
    assert changes.template == "{{ if .System }}# {{ .System }}\n{{ end }}{{ .Prompt }}"
    assert changes.system == "You are brief."
    assert changes.licenses == ("MIT", "Other\nterms")
    assert changes.messages == (Message("user", "Hello"), Message("assistant", "Hi\nthere"))
    assert changes.config == {"renderer": "qwen3", "parser": "qwen3", "requires": "0.12.0"}


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_lines_of_windows(line_end: str) -> None:
    file = parse_modelfile(line_end.join(["FROM a", 'SYSTEM """one', 'two"""', ""]))
    assert (file.bases, file.changes.system) == (("a",), "one\ntwo")


def test_the_last_template_counts_and_a_hash_inside_is_no_comment() -> None:
    file = parse_modelfile('FROM a\nTEMPLATE x\nTEMPLATE """\n# kept\n"""\nSYSTEM a # b')
    assert file.changes.template == "\n# kept\n"
    assert file.changes.system == "a # b"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "needs a FROM"),
        ("SYSTEM x", "needs a FROM"),
        ("FROM a\nFORM b", r"line 2: 'FORM' is no instruction of a Modelfile; did you mean FROM"),
        ("FROM a\n\n!!", "line 3: '!!'"),
        ("FROM", "line 1: FROM says nothing"),
        ("FROM a\nSYSTEM", "line 2: SYSTEM says nothing"),
        ('FROM a\nSYSTEM """x\ny', r'line 2: the """ of SYSTEM are never closed'),
        ('FROM a\nSYSTEM """x""" y', "nothing may follow"),
        ('FROM a\nSYSTEM "x', "never closed"),
        ("FROM a\nMESSAGE tool x", "line 2: the role in MESSAGE must be one of system, user"),
        ("FROM a\nPARAMETER temprature 1", "did you mean temperature"),
        ("FROM a\nPARAMETER num_ctx many", "line 2: num_ctx cannot be 'many'"),
        ("FROM a\nPARAMETER num_ctx", "line 2: num_ctx"),
        ("x" * (1 << 20) + "\n", "at most"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(text: str, message: str) -> None:
    with pytest.raises(ModelfileError, match=message):
        parse_modelfile(text)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("./a", True), ("../a.gguf", True), ("/m/a", True), ("~/a", True), ("a.GGUF", True),
        ("llama3.2", False), ("me/model:tag", False), ("hf.co/u/r-GGUF", False),
    ],
)  # fmt: skip
def test_files_and_models(text: str, path: bool) -> None:
    assert is_path(text) is path


def test_blobs() -> None:
    digest = "sha256:" + "a" * 64
    assert digest_of(f"@{digest}") == digest_of(digest.replace(":", "-")) == digest
    assert digest_of("sha256:abc") is None


@given(st.text())
def test_no_text_makes_it_stumble(text: str) -> None:
    for candidate in (text, f"FROM a\n{text}", f"FROM a\nPARAMETER {text}", f"MESSAGE {text}"):
        with contextlib.suppress(ModelfileError):
            parse_modelfile(candidate)
