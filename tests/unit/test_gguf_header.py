"""The GGUF reader: what it finds in good files, and that bad ones get a clear error."""

import os
import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ollamad.store import gguf
from ollamad.store.gguf import GgufError, GgufHeader, Skipped, parse_header, read_header
from tests.fakes.gguf_files import LLAMA, gguf_bytes, key_value, string, write_gguf

U32, U64 = struct.Struct("<I"), struct.Struct("<Q")


def parse(data: bytes) -> GgufHeader:
    return parse_header(lambda length, offset: data[offset : offset + length], len(data))


def head(pairs: int = 0, tensors: int = 0) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", 3, tensors, pairs)


def test_a_good_file_is_read_from_disk(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    header = read_header(path)
    assert header.version == 3
    assert header.metadata["general.name"] == "Tiny"
    assert header.metadata["tokenizer.ggml.tokens"] == Skipped(600)
    assert [tensor.name for tensor in header.tensors] == [
        "token_embd.weight",
        "blk.0.attn_q.weight",
        "output_norm.weight",
    ]
    assert header.tensors[0].shape == (64, 600)
    assert header.tensors[0].elements == 38_400
    assert header.data_offset % 32 == 0
    assert header.file_size == path.stat().st_size


def test_version_1_has_shorter_lengths() -> None:
    old, new = parse(gguf_bytes(version=1)), parse(gguf_bytes())
    assert (old.version, old.metadata) == (1, new.metadata)
    assert [t.name for t in old.tensors] == [t.name for t in new.tensors]
    assert len(gguf_bytes(version=1)) < len(gguf_bytes())


def test_version_2_is_the_same_but_for_its_number() -> None:
    assert parse(gguf_bytes(version=2)).metadata == parse(gguf_bytes(version=3)).metadata


def test_every_scalar_type() -> None:
    values = {0: 255, 1: -1, 2: 65_535, 3: -2, 4: 7, 5: -7, 6: 0.5, 7: True, 10: 1 << 40}
    values |= {11: -(1 << 40), 12: 0.25}
    body = b"".join(
        string(f"k{kind}") + U32.pack(kind) + gguf._SCALARS[kind].pack(value)
        for kind, value in values.items()
    )
    assert parse(head(len(values)) + body).metadata == {f"k{k}": v for k, v in values.items()}


def test_short_arrays_are_kept_and_long_ones_skipped() -> None:
    pairs = {"short": [1, 2, 3], "long": list(range(1000)), "words": ["a", "b"], "none": []}
    metadata = parse(gguf_bytes(pairs, {})).metadata
    assert metadata == {
        "short": [1, 2, 3],
        "long": Skipped(1000),
        "words": ["a", "b"],
        "none": [],
    }


def test_what_follows_a_vocabulary_larger_than_a_block_is_found() -> None:
    words = [f"{'w' * 500}{number}" for number in range(5000)]  # 2.5 MB, read in 1 MiB blocks
    header = parse(gguf_bytes({"tokens": words, "after": 42}, {}))
    assert header.metadata == {"tokens": Skipped(5000), "after": 42}


def test_a_very_long_string_is_skipped() -> None:
    text = "x" * (gguf.MAX_KEPT_STRING_BYTES + 1)
    metadata = parse(gguf_bytes({"tokenizer.huggingface.json": text, "after": 1}, {})).metadata
    assert metadata == {"tokenizer.huggingface.json": Skipped(len(text)), "after": 1}


def test_a_type_of_tensor_that_is_newer_than_the_reader_is_let_through() -> None:
    data = gguf_bytes(LLAMA, {"new.weight": ((64, 64), 0)})
    at = data.index(b"new.weight") + len(b"new.weight") + 4 + 16
    changed = data[:at] + U32.pack(77) + data[at + 4 :]
    assert parse(changed).tensors[0].type == 77


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the magic number claims 4 bytes, but the file ends after 0"),
        (b"GGU", "the file ends after 3"),
        (b"PK\3\4" + bytes(100), "begins with"),
        (b"tjgg" + bytes(100), "begins with b'tjgg'"),
        (struct.pack(">4sI", b"GGUF", 3) + bytes(100), "big-endian"),
        (struct.pack("<4sI", b"GGUF", 99) + bytes(100), "GGUF version 99"),
        (head(pairs=1 << 60), "1,152,921,504,606,846,976 metadata entries; at most 1,024"),
        (head(tensors=1 << 63), "tensors; at most 65,536"),
        (head(1), "the length of a metadata key"),
        (head(1) + U64.pack(1 << 62), "a metadata key claims 4,611,686"),
        (head(1) + string(b"\xff\xfe"), "not UTF-8"),
        (head(2) + 2 * key_value("twice", 1), "'twice' stands there twice"),
        (head(1) + string("k") + U32.pack(99), "'k' has the unknown type 99"),
        (head(1) + string("k") + U32.pack(8) + U64.pack(1 << 61), "but the file ends after 0"),
        (head(1) + string("k") + struct.pack("<IIQ", 9, 8, 1 << 61), "the file ends after 0"),
        (head(1) + string("k") + struct.pack("<IIQ", 9, 0, 1 << 61), "the file ends after 0"),
        (head(1) + string("k") + struct.pack("<IIQ", 9, 9, 1), "array of the type 9"),
        (gguf_bytes({"general.alignment": 48}, {}), "general.alignment is 48"),
        (gguf_bytes({"general.alignment": 0}, {}), "general.alignment is 0"),
        (gguf_bytes({"general.alignment": "32"}, {}), "general.alignment is '32'"),
        (gguf_bytes({"split.count": 4}, {}), "one of 4 parts"),
        (gguf_bytes(tensor_count=60_000), "'' stands there twice"),
        (gguf_bytes()[:-1], "cut off: the tensor 'output_norm.weight'"),
        (gguf_bytes()[:-20_000], "cut off: the tensor 'token_embd.weight'"),
    ],
)
def test_a_bad_file_is_refused_with_the_reason(data: bytes, message: str) -> None:
    with pytest.raises(GgufError) as caught:
        parse(data)
    assert message in str(caught.value)


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    lengths = b"".join(U64.pack(length) for length in shape)
    return string(name) + U32.pack(len(shape)) + lengths + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize(
    ("infos", "count", "message"),
    [
        (tensor("t", (1,)) * 2, 2, "'t' stands there twice"),
        (tensor("t", (1,) * 5), 1, "claims 5 dimensions"),
        (string("t") + U32.pack(0xFFFFFFFF), 1, "claims 4,294,967,295 dimensions"),
        (tensor("t", (1 << 40, 1 << 40)), 1, "claims the shape"),
        (tensor("t", (1 << 45,)), 1, "cut off"),
        (tensor("t", (1,), offset=1), 1, "multiple of 32"),
        (tensor("t", (1,), offset=1 << 62), 1, "cut off"),
        (tensor("t", (31,), kind=3), 1, "rows of the tensor"),
        (tensor("t" * 300, (1,)), 1, "a tensor's name claims 300 bytes"),
    ],
)
def test_a_bad_tensor_is_refused_with_the_reason(infos: bytes, count: int, message: str) -> None:
    with pytest.raises(GgufError) as caught:
        parse(head(tensors=count) + infos + bytes(64))
    assert message in str(caught.value)


def test_the_error_says_where_in_the_file() -> None:
    data = head(1) + string("k") + U32.pack(99)
    with pytest.raises(GgufError) as caught:
        parse(data)
    assert caught.value.offset == len(data) - 4
    assert f"(at byte {len(data) - 4} of the file)" in str(caught.value)


def test_every_cut_of_a_header_is_refused() -> None:
    data = gguf_bytes({**LLAMA, "tokenizer.ggml.tokens": ["a", "b"]})
    for length in range(len(data)):
        with pytest.raises(GgufError):
            parse(data[:length])


def test_a_file_that_shrinks_while_it_is_read_is_refused() -> None:
    data = gguf_bytes()
    for kept in (0, 10, 30, 500, 5000):
        with pytest.raises(GgufError):
            parse_header(lambda length, at, kept=kept: data[:kept][at : at + length], len(data))


def test_a_pipe_a_directory_and_nothing_are_no_models(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(GgufError, match="not a regular file"):
            read_header(path)
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "nothing")


def test_a_claimed_number_costs_neither_memory_nor_time() -> None:
    """A file of 64 MiB and more that consists of claims: the worst that a header can do."""
    size = 1 << 40
    strings = head(1) + string("k") + struct.pack("<IIQ", 9, 8, 1 << 36)

    def pread(length: int, offset: int) -> bytes:  # a terabyte of empty strings
        return strings[offset : offset + length].ljust(length, b"\0")

    tracemalloc.start()
    try:
        with pytest.raises(GgufError, match="within which a header has to end"):
            parse_header(pread, size)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def check_total(data: bytes) -> None:
    """Whatever the bytes, there is a header or a GgufError, and no large allocation."""
    tracemalloc.start()
    try:
        header = parse(data)
    except GgufError:
        pass
    else:
        assert header.data_offset >= 24
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < (4 << 20) + 64 * len(data)


SEED = gguf_bytes(
    {**LLAMA, "tokenizer.ggml.tokens": [f"t{n}" for n in range(520)], "scores": [0.5] * 20},
    {"a.weight": ((32, 4), 3), "b.weight": ((8,), 0)},
)
FUZZ = settings(max_examples=400, deadline=5000, suppress_health_check=list(HealthCheck))
INTERESTING = [0, 1, 0x7F, 0x80, 0xFF]


@FUZZ
@given(st.binary(max_size=300), st.booleans())
def test_random_bytes_never_crash_the_reader(data: bytes, with_magic: bool) -> None:
    check_total(struct.pack("<4sI", b"GGUF", 3) + data if with_magic else data)


@FUZZ
@given(
    st.lists(
        st.tuples(
            st.integers(0, len(SEED) - 1),
            st.one_of(st.sampled_from(INTERESTING), st.integers(0, 255)),
        ),
        min_size=1,
        max_size=12,
    ),
    st.integers(0, len(SEED)),
)
def test_mutated_files_never_crash_the_reader(changes: list[tuple[int, int]], length: int) -> None:
    data = bytearray(SEED)
    for at, value in changes:
        data[at] = value
    check_total(bytes(data))
    check_total(bytes(data[:length]))


@FUZZ
@given(st.integers(8, len(SEED) - 8), st.integers(0, (1 << 64) - 1))
def test_a_huge_number_anywhere_never_crashes_the_reader(at: int, number: int) -> None:
    check_total(SEED[:at] + U64.pack(number) + SEED[at + 8 :])
