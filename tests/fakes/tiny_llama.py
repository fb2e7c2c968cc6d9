"""Tiny llamas with a fixed seed, as files of any GGUF version, and what they answer by numpy.

Two of them, with one SentencePiece vocabulary (bytes, letters, a few words):

- `random_llama()`: weights from a seeded generator. Its greedy answer depends on every part of
  the maths (rotary positions, grouped attention, gated feed-forward), so an engine that gives
  the reference's tokens computes what a llama is.
- `parrot(pieces)`: attention and feed-forward are zero, and each token's successor is written into
  the output matrix. Behind an `x` it says the given tokens: for characters that are split over
  tokens, and stop strings likewise.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.fakes.gguf_files import Signed, Value, gguf_bytes

Array = NDArray[np.float32]

UNKNOWN, BOS, EOS = 0, 1, 2
FIRST_BYTE = 3
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?:-\n"
# Each with the pieces that it is merged from.
WORDS = ("\u2581t", "\u2581th", "\u2581the", "\u2581b", "\u2581be", "he", "in", "OP")
TOKENS = [
    "<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *LETTERS, *WORDS
]  # fmt: skip
NORMAL_TYPE, UNKNOWN_TYPE, CONTROL_TYPE, BYTE_TYPE = 1, 2, 3, 6

EPSILON = np.float32(1e-5)
ROPE_BASE = 10000.0


@dataclasses.dataclass(frozen=True)
class Shape:
    width: int = 64
    heads: int = 4
    kv_heads: int = 2
    layers: int = 2
    feed_forward: int = 96
    context: int = 256

    @property
    def head_width(self) -> int:
        return self.width // self.heads


@dataclasses.dataclass(frozen=True)
class TinyLlama:
    """The weights, each matrix with one row for each output."""

    shape: Shape
    weights: dict[str, Array]

    def gguf(self, version: int = 3, **metadata: Value) -> bytes:
        """The model as a file."""
        pairs = _metadata(self.shape) | metadata
        tensors = {name: (tuple(w.shape[::-1]), 0) for name, w in self.weights.items()}
        data = {name: weight.tobytes() for name, weight in self.weights.items()}
        return gguf_bytes(pairs, tensors, version=version, data=data)

    def write(self, path: Path, version: int = 3, **metadata: Value) -> Path:
        path.write_bytes(self.gguf(version, **metadata))
        return path

    def logits(self, ids: Sequence[int]) -> Array:
        """Scores of the token after `ids`."""
        last = _norm(self._states(ids)[-1]) * self.weights["output_norm.weight"]
        return np.asarray(self.weights["output.weight"] @ last, np.float32)

    def _states(self, ids: Sequence[int]) -> Array:
        """The state of each token behind the last layer: the textbook's llama, all at once."""
        shape, weights = self.shape, self.weights
        x = weights["token_embd.weight"][list(ids)]
        for layer in range(shape.layers):
            w = {
                name.removeprefix(f"blk.{layer}.").removesuffix(".weight"): weight
                for name, weight in weights.items()
                if name.startswith(f"blk.{layer}.")
            }
            x = x + self._attention(_norm(x) * w["attn_norm"], w) @ w["attn_output"].T
            h = _norm(x) * w["ffn_norm"]
            gate = h @ w["ffn_gate"].T
            x = x + (gate / (1 + np.exp(-gate)) * (h @ w["ffn_up"].T)) @ w["ffn_down"].T
        return x

    def embedding(self, ids: Sequence[int]) -> Array:
        """The mean of the tokens' last states, of length 1."""
        mean = (_norm(self._states(ids)) * self.weights["output_norm.weight"]).mean(axis=0)
        return np.asarray(mean / np.linalg.norm(mean), np.float32)

    def greedy(self, ids: Sequence[int], count: int) -> tuple[list[int], float]:
        """The likeliest tokens, and by how much the closest decision was won."""
        answer: list[int] = []
        margin = float("inf")
        while len(answer) < count:
            second, first = np.sort(scores := self.logits([*ids, *answer]))[-2:]
            margin = min(margin, float(first - second))
            answer.append(int(np.argmax(scores)))
            if answer[-1] == EOS:
                break
        return answer, margin

    def adapted(
        self, seed: int = 5, rank: int = 4, alpha: float = 8.0
    ) -> "tuple[TinyLlama, bytes]":
        """This model with a LoRA adapter of noise applied, and the adapter as a file."""
        generator = np.random.default_rng(seed)
        weights, data = dict(self.weights), dict[str, bytes]()
        tensors: dict[str, tuple[tuple[int, ...], int]] = {}
        for name in ("blk.0.attn_q.weight", "blk.1.ffn_down.weight"):
            rows, columns = weights[name].shape
            a = (generator.standard_normal((rank, columns)) * 0.3).astype(np.float32)
            b = (generator.standard_normal((rows, rank)) * 0.3).astype(np.float32)
            weights[name] = weights[name] + np.float32(alpha / rank) * (b @ a)
            for part, matrix in (("a", a), ("b", b)):
                key = f"{name}.lora_{part}"
                tensors[key], data[key] = (matrix.shape[::-1], 0), matrix.tobytes()
        pairs: dict[str, Value] = {
            "general.type": "adapter",
            "general.architecture": "llama",
            "adapter.type": "lora",
            "adapter.lora.alpha": alpha,
        }
        return TinyLlama(self.shape, weights), gguf_bytes(pairs, tensors, data=data)

    def _attention(self, h: Array, w: dict[str, Array]) -> Array:
        shape, length = self.shape, len(h)
        q = _rotated((h @ w["attn_q"].T).reshape(length, shape.heads, shape.head_width))
        k = _rotated((h @ w["attn_k"].T).reshape(length, shape.kv_heads, shape.head_width))
        v = (h @ w["attn_v"].T).reshape(length, shape.kv_heads, shape.head_width)
        # Engines keep keys and values in half precision.
        k, v = k.astype(np.float16).astype(np.float32), v.astype(np.float16).astype(np.float32)
        shared = shape.heads // shape.kv_heads
        out = np.empty((length, shape.heads, shape.head_width), np.float32)
        hidden = np.triu(np.full((length, length), -np.inf, np.float32), 1)
        for head in range(shape.heads):
            scores = q[:, head] @ k[:, head // shared].T / np.sqrt(np.float32(shape.head_width))
            scores += hidden
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            out[:, head] = weights @ v[:, head // shared]
        return out.reshape(length, shape.width)


def random_llama(seed: int = 108, shape: Shape | None = None) -> TinyLlama:
    """A llama of seeded noise, which says letters and words only.

    So every token of an answer is text, and no answer ends before it has the asked length.
    """
    shape = shape or Shape()
    generator = np.random.default_rng(seed)

    def noise(rows: int, columns: int, scale: float) -> Array:
        return (generator.standard_normal((rows, columns)) * scale).astype(np.float32)

    weights = _weights(shape, noise)
    weights["output.weight"][: FIRST_BYTE + 256] = 0
    return TinyLlama(shape, weights)


def parrot(pieces: Sequence[int], after: str = "x") -> TinyLlama:
    """A llama that says these tokens behind a prompt that ends with `after`, and then EOS.

    No token may come twice.
    """
    start = TOKENS.index(after)
    assert len({start, *pieces}) == len(pieces) + 1, "a token has one successor"
    shape = Shape(width=128)
    generator = np.random.default_rng(1)
    weights = _weights(shape, lambda rows, columns, _: np.zeros((rows, columns), np.float32))
    embedding = generator.standard_normal((len(TOKENS), shape.width))
    embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
    weights["token_embd.weight"] = embedding.astype(np.float32)
    output = np.zeros((len(TOKENS), shape.width), np.float32)
    for token, follower in itertools.pairwise([start, *pieces, EOS]):
        output[follower] = weights["token_embd.weight"][token]
    weights["output.weight"] = output
    return TinyLlama(shape, weights)


def ids_of(text: str) -> list[int]:
    """Each character as its letter, or as its bytes where the vocabulary has no letter."""
    ids: list[int] = []
    for character in text.replace(" ", "\u2581"):
        if character in TOKENS:
            ids.append(TOKENS.index(character))
        else:
            ids += [FIRST_BYTE + byte for byte in character.encode()]
    return ids


def text_of(ids: Sequence[int]) -> str:
    """The text that these tokens make; bytes that are no character are left out."""
    data = b""
    for id_ in ids:
        if FIRST_BYTE <= id_ < FIRST_BYTE + 256:
            data += bytes([id_ - FIRST_BYTE])
        elif id_ not in (UNKNOWN, BOS, EOS):
            data += TOKENS[id_].replace("\u2581", " ").encode()
    return data.decode(errors="ignore")


def _weights(shape: Shape, noise) -> dict[str, Array]:  # type: ignore[no-untyped-def]
    kv_width = shape.kv_heads * shape.head_width
    weights: dict[str, Array] = {"token_embd.weight": noise(len(TOKENS), shape.width, 1.0)}
    ones = np.ones(shape.width, np.float32)
    for layer in range(shape.layers):
        matrices = {
            "attn_q": (shape.width, shape.width, 0.3),
            "attn_k": (kv_width, shape.width, 0.3),
            "attn_v": (kv_width, shape.width, 0.2),
            "attn_output": (shape.width, shape.width, 0.2),
            "ffn_gate": (shape.feed_forward, shape.width, 0.2),
            "ffn_up": (shape.feed_forward, shape.width, 0.2),
            "ffn_down": (shape.width, shape.feed_forward, 0.2),
        }
        weights[f"blk.{layer}.attn_norm.weight"] = ones
        weights[f"blk.{layer}.ffn_norm.weight"] = ones
        for name, (rows, columns, scale) in matrices.items():
            weights[f"blk.{layer}.{name}.weight"] = noise(rows, columns, scale)
    weights["output_norm.weight"] = ones
    weights["output.weight"] = noise(len(TOKENS), shape.width, 0.5)
    return weights


def _norm(x: Array) -> Array:
    return np.asarray(x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPSILON), np.float32)


def _rotated(x: Array) -> Array:
    """Rotary positions on adjacent pairs, as llama files have their heads laid out."""
    length, _, width = x.shape
    angles = np.arange(length)[:, None] * ROPE_BASE ** (-np.arange(0, width, 2) / width)
    cosine, sine = np.cos(angles)[:, None], np.sin(angles)[:, None]
    out = np.empty_like(x)
    out[..., 0::2] = x[..., 0::2] * cosine - x[..., 1::2] * sine
    out[..., 1::2] = x[..., 0::2] * sine + x[..., 1::2] * cosine
    return out


def _metadata(shape: Shape) -> dict[str, Value]:
    types = [UNKNOWN_TYPE, CONTROL_TYPE, CONTROL_TYPE, *[BYTE_TYPE] * 256]
    types += [NORMAL_TYPE] * (len(TOKENS) - len(types))
    return {
        "general.architecture": "llama",
        "general.name": "Tiny",
        "general.file_type": 0,
        "llama.block_count": shape.layers,
        "llama.context_length": shape.context,
        "llama.embedding_length": shape.width,
        "llama.feed_forward_length": shape.feed_forward,
        "llama.attention.head_count": shape.heads,
        "llama.attention.head_count_kv": shape.kv_heads,
        "llama.attention.layer_norm_rms_epsilon": float(EPSILON),
        "llama.rope.dimension_count": shape.head_width,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": TOKENS,
        # Longer pieces win, as in a trained vocabulary.
        "tokenizer.ggml.scores": [float(len(token)) for token in TOKENS],
        "tokenizer.ggml.token_type": Signed(types),
        "tokenizer.ggml.bos_token_id": BOS,
        "tokenizer.ggml.eos_token_id": EOS,
        "tokenizer.ggml.unknown_token_id": UNKNOWN,
        "tokenizer.chat_template": "{% for message in messages %}{{ message.content }}{% endfor %}",
    }
