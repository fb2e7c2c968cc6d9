"""Headers of files from before GGUF: what they are is found out; what is wrong is said."""

import struct
from pathlib import Path

import pytest

from ollamad.store.details import details_of, facts_of
from ollamad.store.gguf import GgufError, GgufHeader
from ollamad.store.weights import read_weights
from tests.fakes.ggml_files import CONTEXT, HEADS, LAYERS, NUMBERS, WIDTH, WORDS, ggml_bytes
from tests.fakes.gguf_files import gguf_bytes


@pytest.fixture
def read(tmp_path: Path):
    def read_bytes(data: bytes) -> GgufHeader:
        path = tmp_path / "model"
        path.write_bytes(data)
        return read_weights(path)

    return read_bytes


@pytest.mark.parametrize("architecture", NUMBERS)
def test_the_architecture_is_found_out(read, architecture: str):
    header = read(ggml_bytes(architecture))
    facts = facts_of(header)
    assert facts.architecture == architecture
    assert (facts.embedding_length, facts.block_count) == (WIDTH, LAYERS)
    assert facts.head_count == HEADS
    assert facts.weights.vocabulary == len(WORDS)
    old = architecture not in ("llama", "falcon")
    assert facts.context_length == (CONTEXT if old else 2048)
    assert (header.format, header.version) == (("ggml", 0) if old else ("ggjt", 3))
    details = details_of(facts)
    assert (details.format, details.family) == (header.format, architecture)
    assert details.kv_bytes_per_token > 0
    assert facts.parameter_count == sum(t.elements for t in header.tensors) > 100_000


@pytest.mark.parametrize(("format_", "version"), [("ggml", None), ("ggmf", 1), ("ggjt", 1)])
def test_llamas_of_all_formats(read, format_: str, version: int | None):
    header = read(ggml_bytes("llama", format_=format_, version=version))
    assert (facts_of(header).architecture, header.format) == ("llama", format_)
    assert len(header.tensors) == 3 + 9 * LAYERS


def test_newer_files_are_read_as_what_they_are(read):
    assert (read(gguf_bytes()).format, read(gguf_bytes()).version) == ("gguf", 3)


def test_quantised_files_need_the_last_layout(read):
    new = ggml_bytes("gpt2", tensor_type=2, ftype=2002)
    assert facts_of(read(new)).quantization == "Q4_0"
    assert facts_of(read(ggml_bytes("llama", tensor_type=2, ftype=2))).quantization == "Q4_0"
    for old in (
        ggml_bytes("gpt2", tensor_type=2, ftype=1002),
        ggml_bytes("llama", tensor_type=2, ftype=2, version=2),
        ggml_bytes("llama", tensor_type=2, ftype=2, format_="ggml"),
    ):
        with pytest.raises(GgufError, match="scheme from before May 2023"):
            read(old)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"algg" + bytes(100), "LoRA adapter"),
        (b"tjgg" + struct.pack("<I", 9) + bytes(100), "GGJT version 9; there are 1 to 3"),
        (b"lmgg", "fit no architecture"),
        (b"lmgg" + bytes(1000), "fit no architecture"),
        (b"lmgg" + b"\xff" * 1000, "fit no architecture"),
        (ggml_bytes("gpt2")[:-1], "but the file ends after"),
        (ggml_bytes("llama")[: len(ggml_bytes("llama")) // 2], "but the file ends after"),
        (ggml_bytes("gpt2") + b"\x01\0\0", "the head of a tensor"),
        (ggml_bytes("gpt2") + b"\xff" * 64, "what follows is no tensor"),
        (ggml_bytes("gptj").replace(b"transformer.h.", b"transformer.x."), "of no architecture"),
    ],
)
def test_a_bad_file_is_refused_with_the_reason(read, data: bytes, message: str):
    with pytest.raises(GgufError, match="not a usable GGML file") as caught:
        facts_of(read(data))
    assert message in str(caught.value)


@pytest.mark.parametrize("architecture", ["gpt2", "mpt", "llama"])
def test_whatever_is_cut_off_is_refused(read, architecture: str):
    data = ggml_bytes(architecture)
    for length in [*range(4, 100, 5), *range(200, len(data), 49_999)]:
        with pytest.raises(GgufError):
            read(data[:length])


def test_flipped_bytes_do_no_harm(read):
    data = bytearray(ggml_bytes("gpt2"))
    for at in range(0, 3000, 23):
        changed = bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        try:
            facts_of(read(changed))
        except GgufError:
            continue
