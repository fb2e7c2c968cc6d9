"""Reads the header of a model's weights, whichever of the known formats the file has."""

from pathlib import Path

from ollamad.store import ggml, gguf
from ollamad.store.gguf import GgufHeader


def read_weights(path: Path) -> GgufHeader:
    """Read a header, by what the file begins with and not by its name. Blocks on the disk.

    Raises:
      GgufError: the file is malformed, truncated, or of a kind that no engine reads.
      OSError: the file cannot be read.
    """
    with gguf.opened(path) as (pread, size):
        magic = pread(4, 0)
        if magic in ggml.MAGICS or magic == ggml.ADAPTER_MAGIC:
            return ggml.parse_ggml(pread, size)
        return gguf.parse_header(pread, size)
