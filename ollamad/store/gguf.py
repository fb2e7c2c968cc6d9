"""Reads the header of a GGUF file: its metadata and what it says of its tensors.

Our own reader, because the `gguf` package needs numpy, maps the whole file and builds every
array of the vocabulary; and because a file from elsewhere is hostile until proved otherwise.
Every count, length and offset is checked against the file's real size and against a limit
before anything is read or allocated, so memory does not grow with a number that a file claims.

Read are the versions 1 (32-bit lengths, a few weeks of 2023) to 3, little endian, and through
`ggml` the formats from before GGUF. Refused by name: big-endian files, and the single parts of a
split model.
"""

import contextlib
import dataclasses
import os
import stat
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

MIB: Final = 1 << 20

# The largest vocabularies (262,144 tokens with as many merges) make headers of about 20 MiB.
MAX_HEADER_BYTES: Final = 64 * MIB
MAX_KEY_VALUES: Final = 1024  # models have 30 to 60
MAX_TENSORS: Final = 65_536  # the largest mixtures have a few thousand
MAX_KEY_BYTES: Final = 1024  # of a metadata key; the longest in use have about 60
MAX_TENSOR_NAME_BYTES: Final = 256  # llama.cpp's own limit is 64
MAX_KEPT_STRING_BYTES: Final = 1 * MIB  # longer ones are skipped; chat templates have 20 kB
MAX_KEPT_ITEMS: Final = 512  # longer arrays are skipped; those with one item a layer have 130
MAX_DIMENSIONS: Final = 4  # as in ggml
MAX_ELEMENTS: Final = 1 << 50  # of one tensor; a thousand times the largest model
MAX_ALIGNMENT: Final = 64 * 1024  # bytes; files use 32
DEFAULT_ALIGNMENT: Final = 32  # bytes, when the file does not say

_BLOCK: Final = 1 * MIB  # bytes read at a time

# The scalar types of metadata by number, and how each is stored.
_SCALARS: Final = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_STRING: Final = 8
_ARRAY: Final = 9
_U32: Final = _SCALARS[4]
_U64: Final = _SCALARS[10]

# ggml's tensor types: number -> (name, elements of a block, bytes of a block).
TENSOR_TYPES: Final = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
}


class GgufError(ValueError):
    """The file is not a model file that can be used; says what is wrong, and where.

    `offset` is the byte in the file at which the trouble begins, None if it has no place.
    """

    def __init__(self, problem: str, offset: int | None = None, *, kind: str = "GGUF") -> None:
        place = "" if offset is None else f" (at byte {offset:,} of the file)"
        super().__init__(f"not a usable {kind} file: {problem}{place}")
        self.offset = offset


@dataclasses.dataclass(frozen=True, slots=True)
class Skipped:
    """Stands for a value too large to keep, such as the vocabulary."""

    count: int  # items of an array, bytes of a string


Scalar = int | float | bool | str
Value = Scalar | list[Scalar] | Skipped


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
    """What the header says of one tensor. `type` is a key of TENSOR_TYPES, or unknown to it."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int  # bytes from the start of the tensor data

    @property
    def elements(self) -> int:
        count = 1
        for length in self.shape:
            count *= length
        return count


@dataclasses.dataclass(frozen=True, slots=True)
class GgufHeader:
    """A header, checked against the size of its file.

    A file from before GGUF is told in the same terms (see `ggml`), with the keys that GGUF has.
    """

    version: int
    metadata: Mapping[str, Value]
    tensors: tuple[Tensor, ...]
    data_offset: int  # byte of the file at which the tensor data begins
    file_size: int  # bytes
    format: str = "gguf"  # or ggml, ggmf, ggjt


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[Callable[[int, int], bytes], int]]:
    """How a reader sees a file: `pread(length, offset)`, and its size.

    Raises:
      GgufError: it is not a regular file.
      OSError: it cannot be read.
    """
    # O_NONBLOCK: opening a named pipe must not wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise GgufError("it is not a regular file")
        yield (lambda length, offset: os.pread(descriptor, length, offset)), status.st_size
    finally:
        os.close(descriptor)


def read_header(path: Path) -> GgufHeader:
    """Read the header of that file. Blocks on the disk: call it in a thread.

    Takes a few dozen milliseconds and a few MiB; at worst (a hostile file) a few seconds and
    some 100 MiB, whatever the file claims.

    Raises:
      GgufError: the file is malformed, truncated, or of a kind that is refused.
      OSError: the file cannot be read.
    """
    with opened(path) as (pread, size):
        return parse_header(pread, size)


def parse_header(pread: Callable[[int, int], bytes], file_size: int) -> GgufHeader:
    """Read a header through `pread(length, offset)`; see `read_header`."""
    cursor = Cursor(pread, file_size)
    version = _read_version(cursor)
    if version == 1:
        cursor.length_type = _U32
    tensor_count = cursor.bounded_length("tensors", MAX_TENSORS)
    pair_count = cursor.bounded_length("metadata entries", MAX_KEY_VALUES)
    metadata: dict[str, Value] = {}
    for _ in range(pair_count):
        start = cursor.offset
        key = cursor.text("a metadata key", MAX_KEY_BYTES)
        if key in metadata:
            raise GgufError(f"the metadata key {key!r} stands there twice", start)
        metadata[key] = _read_value(cursor, key)
    parts = metadata.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        raise GgufError(
            f"it is one of {parts} parts of a split model; "
            "merge them first with `llama-gguf-split --merge`"
        )
    alignment = _alignment(metadata)
    tensors = _read_tensors(cursor, tensor_count, alignment)
    data_offset = -(-cursor.offset // alignment) * alignment
    _check_extents(tensors, data_offset, file_size)
    return GgufHeader(version, metadata, tensors, data_offset, file_size)


class Cursor:
    """Walks through the header, never past its limits. `kind` is what errors call the file."""

    def __init__(
        self,
        pread: Callable[[int, int], bytes],
        file_size: int,
        limit: int = MAX_HEADER_BYTES,
        kind: str = "GGUF",
    ) -> None:
        self._pread = pread
        self._file_size = file_size
        self._limit = min(file_size, limit)
        self._kind = kind
        self.read_ahead = _BLOCK  # bytes
        self._block = b""
        self._block_start = 0
        self.offset = 0
        self.length_type = _U64  # of lengths, counts and shapes

    def error(self, problem: str, offset: int | None = None) -> GgufError:
        return GgufError(problem, offset, kind=self._kind)

    def take(self, length: int, what: str) -> bytes:
        """The next `length` bytes; the caller has bounded the length."""
        self._require(length, what)
        at = self.offset - self._block_start
        if at + length > len(self._block):
            self._load(max(length, self.read_ahead))
            at = 0
        data = self._block[at : at + length]
        if len(data) < length:
            raise self.error(f"the file became shorter within {what}", self.offset)
        self.offset += length
        return data

    def skip(self, length: int, what: str) -> None:
        self._require(length, what)
        self.offset += length

    def u32(self, what: str) -> int:
        number: int = _U32.unpack(self.take(4, what))[0]
        return number

    def u64(self, what: str) -> int:
        number: int = _U64.unpack(self.take(8, what))[0]
        return number

    def length(self, what: str) -> int:
        number: int = self.length_type.unpack(self.take(self.length_type.size, what))[0]
        return number

    def bounded_length(self, what: str, limit: int) -> int:
        start = self.offset
        count = self.length(f"the number of {what}")
        if count > limit:
            raise self.error(f"it claims {count:,} {what}; at most {limit:,} are read", start)
        return count

    def text(self, what: str, limit: int) -> str:
        """A string that must be there in full and be UTF-8."""
        start = self.offset
        length = self.length(f"the length of {what}")
        if length > limit:
            raise self.error(f"{what} claims {length:,} bytes; at most {limit:,} are read", start)
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError:
            raise self.error(f"{what} is not UTF-8 text", start) from None

    def skip_strings(self, count: int, what: str) -> None:
        """Skip that many strings. A tight loop: vocabularies have 100,000s of them."""
        step = self.length_type.size
        self._require(step * count, what)
        unpack = self.length_type.unpack_from
        block, at, start = self._block, self.offset - self._block_start, self._block_start
        for _ in range(count):
            if at + step > len(block):
                self.offset = start + at
                self._require(step, what)
                self._load(_BLOCK)
                block, at, start = self._block, 0, self._block_start
                if len(block) < step:
                    raise self.error(f"the file became shorter within {what}", start)
            at += step + unpack(block, at)[0]
        end = start + at
        self.offset = min(end, self._limit)
        self._require(end - self.offset, what)

    def _require(self, length: int, what: str) -> None:
        if length <= self._limit - self.offset:
            return
        if self.offset + length > self._file_size:
            raise self.error(
                f"{what} claims {length:,} bytes, but the file ends after "
                f"{max(0, self._file_size - self.offset):,}",
                self.offset,
            )
        raise self.error(
            f"{what} reaches beyond {MAX_HEADER_BYTES // MIB} MiB, "
            "within which a header has to end",
            self.offset,
        )

    def _load(self, length: int) -> None:
        self._block = self._pread(length, self.offset)
        self._block_start = self.offset


def _read_version(cursor: Cursor) -> int:
    magic = cursor.take(4, "the magic number")
    if magic != b"GGUF":
        raise GgufError(f"it begins with {magic!r}, not with 'GGUF'", 0)
    version = cursor.u32("the version")
    if version in (1, 2, 3):
        return version
    if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, 2, 3):
        raise GgufError("it is a big-endian file; only little-endian ones are read", 4)
    raise GgufError(f"it is GGUF version {version}; versions 1 to 3 are read", 4)


def _read_value(cursor: Cursor, key: str) -> Value:
    start = cursor.offset
    kind = cursor.u32(f"the type of {key!r}")
    if kind == _STRING:
        return _read_string(cursor, key)
    if (scalar := _SCALARS.get(kind)) is not None:
        number: Scalar = scalar.unpack(cursor.take(scalar.size, repr(key)))[0]
        return number
    if kind != _ARRAY:
        raise GgufError(f"{key!r} has the unknown type {kind}", start)
    kind = cursor.u32(f"the type of the items of {key!r}")
    count = cursor.length(f"the number of items of {key!r}")
    if kind == _STRING:
        if count > MAX_KEPT_ITEMS:
            cursor.skip_strings(count, repr(key))
            return Skipped(count)
        strings = [_read_string(cursor, key) for _ in range(count)]
        return ["" if isinstance(item, Skipped) else item for item in strings]
    scalar = _SCALARS.get(kind)
    if scalar is None:
        raise GgufError(f"{key!r} is an array of the type {kind}, which has no use", start)
    if count > MAX_KEPT_ITEMS:
        cursor.skip(count * scalar.size, repr(key))
        return Skipped(count)
    data = cursor.take(count * scalar.size, repr(key))
    return [item[0] for item in scalar.iter_unpack(data)]


def _read_string(cursor: Cursor, key: str) -> str | Skipped:
    length = cursor.length(f"the length of {key!r}")
    if length > MAX_KEPT_STRING_BYTES:
        cursor.skip(length, repr(key))
        return Skipped(length)
    # Not strict: a stray byte in a licence is no reason to refuse a model.
    return cursor.take(length, repr(key)).decode(errors="replace")


def _alignment(metadata: Mapping[str, Value]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if (
        not isinstance(alignment, int)
        or not 1 <= alignment <= MAX_ALIGNMENT
        or alignment & (alignment - 1)
    ):
        raise GgufError(f"general.alignment is {alignment!r}, not a power of two to 65,536")
    return alignment


def _read_tensors(cursor: Cursor, count: int, alignment: int) -> tuple[Tensor, ...]:
    tensors: dict[str, Tensor] = {}
    for _ in range(count):
        start = cursor.offset
        name = cursor.text("a tensor's name", MAX_TENSOR_NAME_BYTES)
        if name in tensors:
            raise GgufError(f"the tensor {name!r} stands there twice", start)
        dimensions = cursor.u32(f"the number of dimensions of {name!r}")
        if dimensions > MAX_DIMENSIONS:
            raise GgufError(f"the tensor {name!r} claims {dimensions:,} dimensions", start)
        shape = tuple(cursor.length(f"the shape of {name!r}") for _ in range(dimensions))
        tensor = Tensor(
            name,
            shape,
            cursor.u32(f"the type of {name!r}"),
            cursor.u64(f"the offset of {name!r}"),
        )
        if tensor.elements > MAX_ELEMENTS:
            raise GgufError(f"the tensor {name!r} claims the shape {shape}", start)
        if tensor.offset % alignment:
            raise GgufError(f"the tensor {name!r} does not begin at a multiple of {alignment}")
        tensors[name] = tensor
    return tuple(tensors.values())


def _check_extents(tensors: tuple[Tensor, ...], data_offset: int, file_size: int) -> None:
    """Every tensor must lie within the file: this is how a cut-off download shows."""
    for tensor in tensors:
        size = 0  # of a type that is newer than this reader, only the beginning is checked
        if (known := TENSOR_TYPES.get(tensor.type)) is not None:
            name, block_elements, block_bytes = known
            if tensor.shape and tensor.shape[0] % block_elements:
                raise GgufError(
                    f"the rows of the tensor {tensor.name!r} have {tensor.shape[0]:,} elements, "
                    f"which {name} cannot hold"
                )
            size = tensor.elements // block_elements * block_bytes
        end = data_offset + tensor.offset + size
        if end > file_size:
            raise GgufError(
                f"it is cut off: the tensor {tensor.name!r} ends at byte {end:,}, "
                f"the file after {file_size:,}"
            )
