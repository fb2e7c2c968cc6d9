"""Makes a small projector (mmproj) of random numbers, so that a text model can be shown pictures.

llama.cpp runs it as it would run a trained one: a picture becomes tokens' embeddings, and other
pictures become other ones. What the model says of them makes no sense.
"""

import random
import struct
import zlib
from pathlib import Path

from tests.fakes.gguf_files import Value, write_gguf

IMAGE_SIZE = 28  # pixels on each side
PATCH_SIZE = 14
PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2  # tokens of a picture
WIDTH = 32
F32 = 0


def write_projector(path: Path, embedding_length: int) -> Path:
    """A projector of LLaVA's kind for a model whose embeddings have that length."""
    metadata: dict[str, Value] = {
        "general.architecture": "clip",
        "clip.has_vision_encoder": True,
        "clip.projector_type": "mlp",
        "clip.use_gelu": True,
        "clip.vision.image_size": IMAGE_SIZE,
        "clip.vision.patch_size": PATCH_SIZE,
        "clip.vision.embedding_length": WIDTH,
        "clip.vision.feed_forward_length": WIDTH,
        "clip.vision.projection_dim": embedding_length,
        "clip.vision.block_count": 1,
        "clip.vision.attention.head_count": 2,
        "clip.vision.attention.layer_norm_epsilon": 1e-5,
        "clip.vision.image_mean": [0.5, 0.5, 0.5],
        "clip.vision.image_std": [0.5, 0.5, 0.5],
    }
    square, vector = (WIDTH, WIDTH), (WIDTH,)
    shapes: dict[str, tuple[int, ...]] = {
        "v.patch_embd.weight": (PATCH_SIZE, PATCH_SIZE, 3, WIDTH),
        "v.position_embd.weight": (WIDTH, PATCHES),
        "mm.0.weight": (WIDTH, embedding_length),
        "mm.0.bias": (embedding_length,),
        "mm.2.weight": (embedding_length, embedding_length),
        "mm.2.bias": (embedding_length,),
    }
    for part in ("attn_q", "attn_k", "attn_v", "attn_out", "ffn_up", "ffn_down"):
        shapes[f"v.blk.0.{part}.weight"] = square
        shapes[f"v.blk.0.{part}.bias"] = vector
    for part in ("ln1", "ln2"):
        shapes[f"v.blk.0.{part}.weight"] = vector
        shapes[f"v.blk.0.{part}.bias"] = vector
    numbers = random.Random(1)
    values = [numbers.uniform(-0.2, 0.2) for _ in range(4099)]  # a prime: no row is like another
    fill = struct.pack(f"<{len(values)}f", *values)
    tensors = {name: (shape, F32) for name, shape in shapes.items()}
    return write_gguf(path, metadata, tensors, fill=fill)


def png(red: int, green: int, blue: int, size: int = 8) -> bytes:
    """A square picture of one colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    rows = (b"\0" + bytes((red, green, blue)) * size) * size
    header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
