"""Reads the header of a model file from before GGUF (GGML, GGMF, GGJT), in GGUF's terms.

Such a file does not say what it is a model of: some numbers, the vocabulary, then one tensor after
the other, each with its name and its data. The layout of the numbers is found by trying: of all
that are known, the one under which vocabulary and first tensor come out whole. The tensors' names
then tell the architecture, as every converter took them from the original model.

As for GGUF, nothing that the file claims is believed before it is checked.
"""

import dataclasses
import struct
from collections.abc import Callable, Mapping
from typing import Final

from ollamad.store.gguf import (
    MAX_DIMENSIONS,
    MAX_TENSOR_NAME_BYTES,
    MAX_TENSORS,
    TENSOR_TYPES,
    Cursor,
    GgufError,
    GgufHeader,
    Skipped,
    Tensor,
    Value,
)

# The first four bytes: name of the format, and whether a version follows.
MAGICS: Final = {
    b"lmgg": ("ggml", False),
    b"fmgg": ("ggmf", True),
    b"tjgg": ("ggjt", True),
}
ADAPTER_MAGIC: Final = b"algg"
MAX_WORDS: Final = 1 << 19  # of a vocabulary; the largest of that time had 65,024
MAX_WORD_BYTES: Final = 1024
MAX_SIDE: Final = 1 << 24  # of a tensor
UNTOLD_CONTEXT: Final = 2048  # tokens; of the models whose files do not tell: LLaMA and Falcon
GGJT_ALIGNMENT: Final = 32  # bytes, of a tensor's data
TENSOR_READ_AHEAD: Final = 4096  # bytes; tensors lie far apart
QUANTISED_SINCE: Final = 2  # types that are not plain floats
# The quantised types were laid out anew twice in May 2023; only the last layout is still read.
LAST_GGJT: Final = 3
VERSION_FACTOR: Final = 1000  # in GGML files the number of the layout is a part of `ftype`
LAST_LAYOUT: Final = 2


@dataclasses.dataclass(frozen=True, slots=True)
class _Layout:
    """The numbers in front of a vocabulary; `f:` marks a float."""

    fields: tuple[str, ...]
    repeats_count: bool  # the number of words stands again in front of them


_LLAMA: Final = _Layout(
    ("n_vocab", "n_embd", "n_mult", "n_head", "n_layer", "n_rot", "ftype"), False
)
_FALCON: Final = _Layout(
    ("n_vocab", "n_embd", "n_head", "n_head_kv", "n_layer", "variant", "ftype"), False
)
_GPT2: Final = _Layout(("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer", "ftype"), True)
_GPTJ: Final = _Layout(("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer", "n_rot", "ftype"), True)
_NEOX: Final = _Layout(
    ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer", "n_rot", "parallel", "ftype"), False
)
_MPT: Final = _Layout(
    ("n_embd", "n_ctx", "n_head", "n_layer", "n_vocab", "f:alibi", "f:clip", "ftype"), False
)
_LAYOUTS: Final = (_GPT2, _GPTJ, _NEOX, _MPT, _LLAMA)

# What a tensor's name begins with, and then its architecture and layout.
_NAMES: Final = {
    "tok_embeddings.": ("llama", _LLAMA),
    "transformer.word_embeddings.": ("falcon", _FALCON),
    "model/": ("gpt2", _GPT2),
    "transformer.h.": ("gptj", _GPTJ),
    "gpt_neox.": ("gptneox", _NEOX),
    "transformer.blocks.": ("mpt", _MPT),
}
# Fine-tunes with token habits of their own, told by words of their vocabulary.
_WORDS: Final = {
    b"<fim_prefix>": ("gpt2", "starcoder"),
    b"<fim-prefix>": ("gpt2", "starcoder"),
    b"### Response:": ("gptneox", "dolly-v2"),
}


def parse_ggml(pread: Callable[[int, int], bytes], file_size: int) -> GgufHeader:
    """Read a header through `pread(length, offset)`.

    Raises:
      GgufError: the file is malformed, truncated, or of a kind that no engine reads.
    """
    cursor = Cursor(pread, file_size, limit=file_size, kind="GGML")
    magic = cursor.take(4, "the magic number")
    if magic == ADAPTER_MAGIC:
        raise cursor.error("it is a LoRA adapter, not a model; convert it to GGUF to use it", 0)
    name, has_version = MAGICS[magic]
    version = cursor.u32("the version") if has_version else 0
    if has_version and not 1 <= version <= LAST_GGJT:
        raise cursor.error(f"it is {name.upper()} version {version}; there are 1 to {LAST_GGJT}", 4)
    start = furthest = cursor.offset
    problem: GgufError | None = None  # of the layout that made sense for longest
    for layout in _LAYOUTS if name == "ggml" else (_LLAMA,):
        cursor.offset = start
        try:
            return _parse(cursor, layout, name, version, file_size)
        except _OtherLayout:
            continue
        except GgufError as error:
            if cursor.offset > furthest:
                furthest, problem = cursor.offset, error
    raise problem or cursor.error("its numbers fit no architecture that is known")


class _OtherLayout(Exception):
    """The bytes make no sense under this layout."""


def _parse(cursor: Cursor, layout: _Layout, name: str, version: int, file_size: int) -> GgufHeader:
    start = cursor.offset
    numbers = _read_numbers(cursor, layout)
    if layout.repeats_count and cursor.u32("the number of words") != numbers["n_vocab"]:
        raise _OtherLayout
    marks = _read_words(cursor, int(numbers["n_vocab"]), has_scores=name != "ggml")
    cursor.read_ahead = TENSOR_READ_AHEAD
    data_offset = cursor.offset
    tensors = _read_tensors(cursor, layout, file_size, aligned=name == "ggjt")
    names = [tensor.name for tensor in tensors]
    found = next(
        (known for prefix, known in _NAMES.items() if any(n.startswith(prefix) for n in names)),
        None,
    )
    if found is None:
        raise cursor.error(f"its tensors ({names[0]!r} first) are of no architecture that is known")
    architecture, true_layout = found
    if true_layout.fields != layout.fields:
        if len(true_layout.fields) != len(layout.fields):
            raise _OtherLayout
        cursor.offset = start
        numbers = _read_numbers(cursor, true_layout)
    for word, (base, special) in _WORDS.items():
        if architecture == base and word in marks:
            architecture = special
    _check_quantisation(cursor, tensors, name, version, int(numbers["ftype"]))
    return GgufHeader(
        version,
        _metadata(architecture, numbers),
        tensors,
        data_offset,
        file_size,
        format=name,
    )


def _read_numbers(cursor: Cursor, layout: _Layout) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for field in layout.fields:
        data = cursor.take(4, f"the number {field}")
        kind = "<f" if field.startswith("f:") else "<i"
        (numbers[field.removeprefix("f:")],) = struct.unpack(kind, data)
    sane = 0 < numbers["n_vocab"] <= MAX_WORDS and all(
        0 < numbers[field] <= MAX_SIDE for field in ("n_embd", "n_head", "n_layer")
    )
    if not sane or numbers["n_layer"] > 4096 or numbers["n_embd"] % numbers["n_head"]:
        raise _OtherLayout
    return numbers


def _read_words(cursor: Cursor, count: int, *, has_scores: bool) -> set[bytes]:
    """Skip the vocabulary; returns which of the words in `_WORDS` it has."""
    marks = set[bytes]()
    longest = max(map(len, _WORDS))
    for _ in range(count):
        size = cursor.u32("the length of a word")
        if size > MAX_WORD_BYTES:
            raise _OtherLayout
        word = cursor.take(size, "a word of the vocabulary")
        if size <= longest + 1 and (stripped := word.strip()) in _WORDS:
            marks.add(stripped)
        if has_scores:
            cursor.skip(4, "the score of a word")
    return marks


def _read_tensors(
    cursor: Cursor, layout: _Layout, file_size: int, *, aligned: bool
) -> tuple[Tensor, ...]:
    tensors: dict[str, Tensor] = {}
    while cursor.offset < file_size:
        try:
            tensor = _read_tensor(cursor, aligned=aligned)
        except _OtherLayout:
            if tensors:  # the first one was whole: it is this layout
                raise cursor.error("what follows is no tensor", cursor.offset) from None
            raise
        if tensor.name in tensors or len(tensors) >= MAX_TENSORS:
            raise cursor.error(f"there are too many tensors of the name {tensor.name!r}")
        tensors[tensor.name] = tensor
    if not tensors:
        raise cursor.error("it has no tensors")
    return tuple(tensors.values())


def _read_tensor(cursor: Cursor, *, aligned: bool) -> Tensor:
    dimensions, name_size, kind = (cursor.u32("the head of a tensor") for _ in range(3))
    known = TENSOR_TYPES.get(kind)
    if not (1 <= dimensions <= MAX_DIMENSIONS and 1 <= name_size <= MAX_TENSOR_NAME_BYTES):
        raise _OtherLayout
    if known is None:
        raise _OtherLayout
    shape = tuple(cursor.u32("the shape of a tensor") for _ in range(dimensions))
    data = cursor.take(name_size, "the name of a tensor")
    if not all(0 < side <= MAX_SIDE for side in shape) or not data.isascii():
        raise _OtherLayout
    name = data.decode()
    _, block_elements, block_bytes = known
    if shape[0] % block_elements:
        raise cursor.error(f"the rows of the tensor {name!r} have {shape[0]:,} elements")
    if aligned:
        cursor.skip(-cursor.offset % GGJT_ALIGNMENT, f"the padding of {name!r}")
    tensor = Tensor(name, shape, kind, cursor.offset)
    cursor.skip(tensor.elements // block_elements * block_bytes, f"the tensor {name!r}")
    return tensor


def _check_quantisation(
    cursor: Cursor, tensors: tuple[Tensor, ...], name: str, version: int, ftype: int
) -> None:
    quantised = any(tensor.type >= QUANTISED_SINCE for tensor in tensors)
    is_last = version == LAST_GGJT if name != "ggml" else ftype // VERSION_FACTOR == LAST_LAYOUT
    if quantised and not is_last:
        raise cursor.error(
            "it is quantised by a scheme from before May 2023, which no engine reads any more; "
            "get the model as GGUF"
        )


def _metadata(architecture: str, numbers: Mapping[str, float]) -> dict[str, Value]:
    """The numbers under the keys that GGUF has for them."""
    keys = {
        "context_length": "n_ctx",
        "embedding_length": "n_embd",
        "block_count": "n_layer",
        "attention.head_count": "n_head",
        "attention.head_count_kv": "n_head_kv",
    }
    metadata: dict[str, Value] = {
        "general.architecture": architecture,
        "general.file_type": int(numbers["ftype"]) % VERSION_FACTOR,
        "tokenizer.ggml.model": "llama" if architecture == "llama" else "gpt2",
        "tokenizer.ggml.tokens": Skipped(int(numbers["n_vocab"])),
    }
    if "n_ctx" not in numbers:
        metadata[f"{architecture}.context_length"] = UNTOLD_CONTEXT
    for key, field in keys.items():
        if field in numbers:
            metadata[f"{architecture}.{key}"] = int(numbers[field])
    return metadata
