"""Makes small model files from before GGUF, of every architecture that the reader knows.

Their weights are zeros but for embeddings and output, as in `tiny_llama.parrot`: each says a
fixed row of tokens. Vocabulary: the 256 bytes, then `MORE`.
"""

import itertools
import struct
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

WIDTH, HEADS, LAYERS, CONTEXT, FEED_FORWARD = 64, 4, 2, 64, 192
MORE = (*(b"<%d>" % number for number in range(43)), b"<|endoftext|>")
# As text (MPT reads its vocabulary as UTF-8), where only ASCII is what it looks like.
WORDS = [bytes([byte]) for byte in range(256)] + list(MORE)
END = len(WORDS) - 1
FORMATS = {"ggml": b"lmgg", "ggmf": b"fmgg", "ggjt": b"tjgg"}

# Per architecture: the numbers in front, whether the number of words stands again, and for the
# tensors: embedding, output, then names with shapes, `#` standing for the layer.
_V, _E, _F = len(WORDS), WIDTH, 4 * WIDTH
NUMBERS: dict[str, tuple[list[int | float], bool]] = {
    "gpt2": ([_V, CONTEXT, _E, HEADS, LAYERS, 0], True),
    "starcoder": ([_V, CONTEXT, _E, HEADS, LAYERS, 0], True),
    "gptj": ([_V, CONTEXT, _E, HEADS, LAYERS, 8, 0], True),
    "gptneox": ([_V, CONTEXT, _E, HEADS, LAYERS, 8, 1, 0], False),
    "dolly-v2": ([_V, CONTEXT, _E, HEADS, LAYERS, 8, 1, 0], False),
    "mpt": ([_E, CONTEXT, HEADS, LAYERS, _V, 8.0, 0.0, 0], False),
    "llama": ([_V, _E, 64, HEADS, LAYERS, _E // HEADS, 0], False),
    "falcon": ([_V, _E, HEADS, 1, LAYERS, 7, 0], False),
}
EMBEDDING = {
    "gpt2": "model/wte",
    "starcoder": "model/wte",
    "gptj": "transformer.wte.weight",
    "gptneox": "gpt_neox.embed_in.weight",
    "dolly-v2": "gpt_neox.embed_in.weight",
    "mpt": "transformer.wte.weight",
    "llama": "tok_embeddings.weight",
    "falcon": "transformer.word_embeddings.weight",
}
OUTPUT = {
    "gpt2": "model/lm_head",
    "starcoder": "model/lm_head",
    "gptj": "lm_head.weight",
    "gptneox": "embed_out.weight",
    "dolly-v2": "embed_out.weight",
    "llama": "output.weight",
    "falcon": "lm_head.weight",
}
_GPT2 = {
    "model/ln_f/b": (_E,),
    "model/wpe": (CONTEXT, _E),
    "model/h#/ln_1/b": (_E,),
    "model/h#/ln_2/b": (_E,),
    "model/h#/attn/c_attn/w": (3 * _E, _E),
    "model/h#/attn/c_attn/b": (3 * _E,),
    "model/h#/attn/c_proj/w": (_E, _E),
    "model/h#/attn/c_proj/b": (_E,),
    "model/h#/mlp/c_fc/w": (_F, _E),
    "model/h#/mlp/c_fc/b": (_F,),
    "model/h#/mlp/c_proj/w": (_E, _F),
    "model/h#/mlp/c_proj/b": (_E,),
}
_NEOX = {
    "gpt_neox.final_layer_norm.bias": (_E,),
    "gpt_neox.layers.#.input_layernorm.bias": (_E,),
    "gpt_neox.layers.#.post_attention_layernorm.bias": (_E,),
    "gpt_neox.layers.#.attention.query_key_value.weight": (3 * _E, _E),
    "gpt_neox.layers.#.attention.query_key_value.bias": (3 * _E,),
    "gpt_neox.layers.#.attention.dense.weight": (_E, _E),
    "gpt_neox.layers.#.attention.dense.bias": (_E,),
    "gpt_neox.layers.#.mlp.dense_h_to_4h.weight": (_F, _E),
    "gpt_neox.layers.#.mlp.dense_h_to_4h.bias": (_F,),
    "gpt_neox.layers.#.mlp.dense_4h_to_h.weight": (_E, _F),
    "gpt_neox.layers.#.mlp.dense_4h_to_h.bias": (_E,),
}
TENSORS: dict[str, tuple[Mapping[str, tuple[int, ...]], tuple[str, ...]]] = {
    "gpt2": (_GPT2, ("model/ln_f/g", "model/h#/ln_1/g", "model/h#/ln_2/g")),
    "gptneox": (
        _NEOX,
        (
            "gpt_neox.final_layer_norm.weight",
            "gpt_neox.layers.#.input_layernorm.weight",
            "gpt_neox.layers.#.post_attention_layernorm.weight",
        ),
    ),
    "gptj": (
        {
            "transformer.ln_f.bias": (_E,),
            "lm_head.bias": (_V,),
            "transformer.h.#.ln_1.bias": (_E,),
            **{f"transformer.h.#.attn.{part}_proj.weight": (_E, _E) for part in "qkv"},
            "transformer.h.#.attn.out_proj.weight": (_E, _E),
            "transformer.h.#.mlp.fc_in.weight": (_F, _E),
            "transformer.h.#.mlp.fc_in.bias": (_F,),
            "transformer.h.#.mlp.fc_out.weight": (_E, _F),
            "transformer.h.#.mlp.fc_out.bias": (_E,),
        },
        ("transformer.ln_f.weight", "transformer.h.#.ln_1.weight"),
    ),
    "mpt": (
        {
            "transformer.blocks.#.attn.Wqkv.weight": (3 * _E, _E),
            "transformer.blocks.#.attn.out_proj.weight": (_E, _E),
            "transformer.blocks.#.ffn.up_proj.weight": (_F, _E),
            "transformer.blocks.#.ffn.down_proj.weight": (_E, _F),
        },
        (
            "transformer.norm_f.weight",
            "transformer.blocks.#.norm_1.weight",
            "transformer.blocks.#.norm_2.weight",
        ),
    ),
    "llama": (
        {
            **{f"layers.#.attention.w{part}.weight": (_E, _E) for part in "qkvo"},
            "layers.#.feed_forward.w1.weight": (FEED_FORWARD, _E),
            "layers.#.feed_forward.w2.weight": (_E, FEED_FORWARD),
            "layers.#.feed_forward.w3.weight": (FEED_FORWARD, _E),
        },
        ("norm.weight", "layers.#.attention_norm.weight", "layers.#.ffn_norm.weight"),
    ),
    "falcon": (
        {
            "transformer.ln_f.bias": (_E,),
            "transformer.h.#.input_layernorm.bias": (_E,),
            "transformer.h.#.self_attention.query_key_value.weight": (_E + 2 * _E // HEADS, _E),
            "transformer.h.#.self_attention.dense.weight": (_E, _E),
            "transformer.h.#.mlp.dense_h_to_4h.weight": (_F, _E),
            "transformer.h.#.mlp.dense_4h_to_h.weight": (_E, _F),
        },
        ("transformer.ln_f.weight", "transformer.h.#.input_layernorm.weight"),
    ),
}
TENSORS["starcoder"] = TENSORS["gpt2"]
TENSORS["dolly-v2"] = TENSORS["gptneox"]
# Words that tell a fine-tune from what it was tuned from.
SPECIAL = {"starcoder": b"<fim_prefix>", "dolly-v2": b"### Response:"}


def ggml_bytes(
    architecture: str,
    said: Sequence[int] = (),
    *,
    format_: str | None = None,
    version: int | None = None,
    tensor_type: int = 0,
    ftype: int | None = None,
    ends: bool = True,
) -> bytes:
    """A whole file. Behind an `x` it says `said`, each of them once, and then the end, or all of it
    again and again."""
    format_ = format_ or ("ggjt" if architecture in ("llama", "falcon") else "ggml")
    if version is None and format_ != "ggml":
        version = 3
    numbers, repeats = NUMBERS[architecture]
    if ftype is not None:
        numbers = [*numbers[:-1], ftype]
    words = [word if word.isascii() or architecture != "mpt" else b"?" for word in WORDS]
    if architecture in SPECIAL:
        words[256] = SPECIAL[architecture]
    out = FORMATS[format_] + (b"" if version is None else struct.pack("<I", version))
    for number in numbers:
        out += struct.pack("<f" if isinstance(number, float) else "<i", number)
    if repeats:
        out += struct.pack("<i", len(words))
    for word in words:
        out += struct.pack("<I", len(word)) + word
        if format_ != "ggml":
            out += struct.pack("<f", 0.0)
    then = END if ends else said[0]
    for name, array in _tensors(architecture, [*said, then]).items():
        data = array.astype(np.float32).tobytes()
        kind = 0
        if tensor_type and array.ndim == 2:
            kind, data = tensor_type, bytes(array.size // 32 * 18)
        out += struct.pack("<iii", array.ndim, len(name), kind)
        out += b"".join(struct.pack("<i", side) for side in array.shape[::-1]) + name.encode()
        if format_ == "ggjt":
            out += bytes(-len(out) % 32)
        out += data
    return out


def _tensors(architecture: str, said: Sequence[int]) -> dict[str, Array]:
    generator = np.random.default_rng(3)
    embedding = generator.standard_normal((len(WORDS), WIDTH))
    embedding -= embedding.mean(axis=1, keepdims=True)  # what a layer norm takes away
    embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
    output = np.zeros_like(embedding)
    for token, follower in itertools.pairwise([ord("x"), *said]):
        output[follower] += embedding[token]
    tensors: dict[str, Array] = {EMBEDDING[architecture]: embedding}
    if architecture in OUTPUT:
        tensors[OUTPUT[architecture]] = output
    zeros, ones = TENSORS[architecture]
    for names, value in ((dict.fromkeys(ones, (_E,)), 1.0), (zeros, 0.0)):
        for name, shape in names.items():
            for layer in range(LAYERS) if "#" in name else (0,):
                tensors[name.replace("#", str(layer))] = np.full(shape, value, np.float32)
    return tensors
