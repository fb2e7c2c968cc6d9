"""Makes small GGUF files, right or wrong in a chosen way, for every test that needs one.

`gguf_bytes()` is a complete, tiny, valid llama (its tensors are zeros, so it cannot talk).
"""

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

Scalar = int | float | bool | str
Value = Scalar | Sequence[Scalar]


class Signed(list[int]):
    """An array of i32, where the other ints are u32."""


TYPE_NUMBERS = {bool: 7, str: 8, float: 6, int: 4}
SIGNED = 5
ARRAY = 9
BLOCKS = {0: (1, 4), 1: (1, 2), 3: (32, 20), 8: (32, 34)}  # F32, F16, Q4_1, Q8_0

LLAMA: dict[str, Value] = {
    "general.architecture": "llama",
    "general.name": "Tiny",
    "general.license": "apache-2.0",
    "general.file_type": 3,
    "llama.block_count": 2,
    "llama.context_length": 256,
    "llama.embedding_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": [f"token{number}" for number in range(600)],
    "tokenizer.chat_template": "{% for message in messages %}{{ message.content }}{% endfor %}",
}
TENSORS: dict[str, tuple[tuple[int, ...], int]] = {
    "token_embd.weight": ((64, 600), 3),
    "blk.0.attn_q.weight": ((64, 64), 3),
    "output_norm.weight": ((64,), 0),
}


def string(text: str | bytes, version: int = 3) -> bytes:
    """A string as it stands in the file."""
    data = text.encode() if isinstance(text, str) else text
    return length(len(data), version) + data


def length(number: int, version: int) -> bytes:
    """A count or a length: version 1 had 32 bits for it."""
    return struct.pack("<I" if version == 1 else "<Q", number)


def scalar(value: Scalar, version: int = 3) -> bytes:
    if isinstance(value, str):
        return string(value, version)
    return struct.pack({bool: "<?", float: "<f", int: "<I"}[type(value)], value)


def key_value(key: str, value: Value, version: int = 3) -> bytes:
    """A metadata entry: ints as u32, floats as f32."""
    if isinstance(value, str | int | float):
        kind = struct.pack("<I", TYPE_NUMBERS[type(value)])
        return string(key, version) + kind + scalar(value, version)
    kind = TYPE_NUMBERS[type(value[0])] if value else TYPE_NUMBERS[int]
    if isinstance(value, Signed):
        kind = SIGNED
    head = struct.pack("<II", ARRAY, kind) + length(len(value), version)
    return string(key, version) + head + b"".join(scalar(item, version) for item in value)


def tensor_size(shape: Sequence[int], kind: int) -> int:
    """Bytes of a tensor."""
    elements = 1
    for length in shape:
        elements *= length
    block_elements, block_bytes = BLOCKS[kind]
    return elements // block_elements * block_bytes


def gguf_bytes(
    metadata: Mapping[str, Value] | None = None,
    tensors: Mapping[str, tuple[tuple[int, ...], int]] | None = None,
    *,
    version: int = 3,
    alignment: int = 32,
    pair_count: int | None = None,
    tensor_count: int | None = None,
    fill: bytes = b"\0",
    data: Mapping[str, bytes] | None = None,
) -> bytes:
    """A whole file. The counts are the true ones unless given (to lie with).

    The tensors hold `data`, or copies of `fill` if there is none.
    """
    pairs = dict(LLAMA if metadata is None else metadata)
    shapes = dict(TENSORS if tensors is None else tensors)
    infos = b""
    offset = 0
    for name, (shape, kind) in shapes.items():
        infos += string(name, version) + struct.pack("<I", len(shape))
        infos += b"".join(length(size, version) for size in shape)
        infos += struct.pack("<IQ", kind, offset)
        offset += -(-tensor_size(shape, kind) // alignment) * alignment
    head = struct.pack("<4sI", b"GGUF", version)
    head += length(len(shapes) if tensor_count is None else tensor_count, version)
    head += length(len(pairs) if pair_count is None else pair_count, version)
    body = head + b"".join(key_value(key, value, version) for key, value in pairs.items()) + infos
    body += b"\0" * (-len(body) % alignment)
    if data is None:
        return body + (fill * (offset // len(fill) + 1))[:offset]
    return body + b"".join(
        data[name].ljust(-(-len(data[name]) // alignment) * alignment, b"\0") for name in shapes
    )


def write_gguf(
    path: Path,
    metadata: Mapping[str, Value] | None = None,
    tensors: Mapping[str, tuple[tuple[int, ...], int]] | None = None,
    *,
    fill: bytes = b"\0",
) -> Path:
    """Write a file and return its path."""
    path.write_bytes(gguf_bytes(metadata, tensors, fill=fill))
    return path
