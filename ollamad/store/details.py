"""What a GGUF header means: family, size, quantisation, context, memory for each token.

Knows the names that llama.cpp gives to metadata and file types, and how Ollama shows them.
"""

import dataclasses
import re
from typing import Final

from ollamad.core.state import ModelDetails
from ollamad.core.weights import Weights
from ollamad.store.gguf import TENSOR_TYPES, GgufError, GgufHeader, Skipped, Value

MAX_LENGTH: Final = 1 << 31  # tokens of context, width of embeddings; ggml's own are 32 bits
MAX_LAYERS: Final = 4096  # the deepest models have about 130
MAX_HEADS: Final = 65_536  # heads of a layer, and the width of one; both stay below 1,000
F16_BYTES: Final = 2  # of one number in the key and value cache

# Becomes part of the cluster's state and of log lines: a short plain word.
_ARCHITECTURE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._\-]{0,63}")

_LAYER: Final = re.compile(r"blk\.(\d{1,4})\.")  # llama.cpp's names of a layer's tensors

# llama.cpp's `general.file_type`.
FILE_TYPES: Final = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    19: "IQ2_XXS",
    20: "IQ2_XS",
    21: "Q2_K_S",
    22: "IQ3_XS",
    23: "IQ3_XXS",
    24: "IQ1_S",
    25: "IQ4_NL",
    26: "IQ3_S",
    27: "IQ3_M",
    28: "IQ2_S",
    29: "IQ2_M",
    30: "IQ4_XS",
    31: "IQ1_M",
    32: "BF16",
    36: "TQ1_0",
    37: "TQ2_0",
    38: "MXFP4",
    39: "NVFP4",
}

# Encoders: they make embeddings and cannot generate. Others do so too when they name a pooling.
EMBEDDING_ARCHITECTURES: Final = frozenset(
    {
        "bert",
        "eurobert",
        "gemma-embedding",
        "jina-bert-v2",
        "jina-bert-v3",
        "llama-embed",
        "modern-bert",
        "neo-bert",
        "nomic-bert",
        "nomic-bert-moe",
        "t5encoder",
    }
)

# What only templates of models that think speak of.
THINKING_MARKS: Final = (
    "<think>", "</think>", "enable_thinking", "reasoning_content", "reasoning_effort",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class ModelFacts:
    """A model as its header describes it; zero or empty where the header says nothing."""

    architecture: str
    name: str
    license: str
    parameter_count: int
    quantization: str
    context_length: int  # tokens that it was trained for
    embedding_length: int
    block_count: int  # layers
    head_count: int  # of the widest layer
    head_count_kv: int  # of the widest layer
    key_length: int  # of one head
    value_length: int  # of one head
    # An upper bound: sliding windows and compressed caches take less.
    kv_bytes_per_token: int
    tokenizer_model: str
    tokenizer_pre: str
    chat_template: str
    pooling_type: int | None
    capabilities: tuple[str, ...]
    weights: Weights


def facts_of(header: GgufHeader) -> ModelFacts:
    """Interpret a header.

    Raises:
      GgufError: its architecture is no plain word, or a number in it is out of range.
    """
    reader = _Reader(header)
    architecture = reader.text("general.architecture")
    if not _ARCHITECTURE.fullmatch(architecture):
        raise GgufError(f"its general.architecture is {architecture[:64]!r}")
    layers = reader.number("block_count", MAX_LAYERS)
    heads = reader.numbers("attention.head_count", MAX_HEADS, layers)
    heads_kv = reader.numbers("attention.head_count_kv", MAX_HEADS, layers) or heads
    width = reader.number("embedding_length", MAX_LENGTH)
    widest = max(heads, default=0)
    head_width = min(width // widest, MAX_HEADS) if widest else 0
    key_length = reader.number("attention.key_length", MAX_HEADS) or head_width
    value_length = reader.number("attention.value_length", MAX_HEADS) or head_width
    template = reader.text("tokenizer.chat_template")
    pooling = reader.optional_number("pooling_type", MAX_LENGTH)
    return ModelFacts(
        architecture=architecture,
        name=reader.text("general.name"),
        license=reader.text("general.license"),
        parameter_count=sum(tensor.elements for tensor in header.tensors),
        quantization=_quantization(header),
        context_length=reader.number("context_length", MAX_LENGTH),
        embedding_length=width,
        block_count=layers,
        head_count=widest,
        head_count_kv=max(heads_kv, default=0),
        key_length=key_length,
        value_length=value_length,
        kv_bytes_per_token=sum(heads_kv) * (key_length + value_length) * F16_BYTES,
        tokenizer_model=reader.text("tokenizer.ggml.model"),
        tokenizer_pre=reader.text("tokenizer.ggml.pre"),
        chat_template=template,
        pooling_type=pooling,
        capabilities=capabilities_of(architecture, pooling, template),
        weights=Weights(
            format=header.format,
            version=header.version,
            architecture=architecture,
            tokenizer=reader.text("tokenizer.ggml.model"),
            layer_bytes=_layer_bytes(header, layers),
            vocabulary=_length(header.metadata.get("tokenizer.ggml.tokens")),
            width=width,
            feed_forward=max(reader.numbers("feed_forward_length", MAX_LENGTH, layers), default=0),
            heads=widest,
        ),
    )


def capabilities_of(architecture: str, pooling_type: int | None, template: str) -> tuple[str, ...]:
    """What can be asked of a model, in Ollama's words. `template` is the one that it will use."""
    if architecture in EMBEDDING_ARCHITECTURES or pooling_type:
        return ("embedding",)
    can = ["completion"]
    if "tools" in template.lower():
        can.append("tools")
    if any(mark in template for mark in THINKING_MARKS):
        can.append("thinking")
    if ".Suffix" in template:  # of Ollama's templates; others do not know it
        can.append("insert")
    return tuple(can)


def details_of(facts: ModelFacts) -> ModelDetails:
    """The part of the facts that the cluster's state keeps."""
    return ModelDetails(
        format=facts.weights.format,
        family=facts.architecture,
        families=(facts.architecture,),
        parameter_size=human_number(facts.parameter_count),
        quantization_level=facts.quantization,
        context_length=facts.context_length,
        embedding_length=facts.embedding_length,
        kv_bytes_per_token=facts.kv_bytes_per_token,
        capabilities=facts.capabilities,
    )


def human_number(count: int) -> str:
    """A count as Ollama writes it: `7B`, `1.5B`, `134.52M`, `270M`, `15K`, `12`."""
    for unit, letter, decimals in ((10**9, "B", 1), (10**6, "M", 2)):
        if count >= unit:
            return f"{count / unit:.{0 if count % unit == 0 else decimals}f}{letter}"
    return f"{count / 1000:.0f}K" if count >= 1000 else str(count)


def _layer_bytes(header: GgufHeader, layers: int) -> tuple[int, ...]:
    """What each layer's tensors take."""
    sizes = [0] * layers
    for tensor in header.tensors:
        layer = _LAYER.match(tensor.name)
        if layer is not None and int(layer[1]) < layers and tensor.type in TENSOR_TYPES:
            _, block_elements, block_bytes = TENSOR_TYPES[tensor.type]
            sizes[int(layer[1])] += tensor.elements // block_elements * block_bytes
    return tuple(sizes)


def _length(value: Value | None) -> int:
    if isinstance(value, Skipped):
        return value.count
    return len(value) if isinstance(value, list) else 0


class _Reader:
    """Takes typed values out of the metadata; `x` stands for `<architecture>.x` in numbers."""

    def __init__(self, header: GgufHeader) -> None:
        self._metadata = header.metadata
        self._prefix = f"{self.text('general.architecture')}."

    def text(self, key: str) -> str:
        value = self._metadata.get(key)
        return value if isinstance(value, str) else ""

    def optional_number(self, key: str, limit: int) -> int | None:
        value = self._metadata.get(self._prefix + key)
        return None if value is None else self._bounded(key, value, limit)

    def number(self, key: str, limit: int) -> int:
        return self.optional_number(key, limit) or 0

    def numbers(self, key: str, limit: int, layers: int) -> list[int]:
        """One number for each layer, where the file has one for all or a list."""
        value = self._metadata.get(self._prefix + key)
        if value is None:
            return []
        if isinstance(value, list):
            return [self._bounded(key, item, limit) for item in value[:layers]]
        return [self._bounded(key, value, limit)] * layers

    def _bounded(self, key: str, value: Value, limit: int) -> int:
        # Exactly int: a bool is none, and -1 stands for "unset" in some files.
        if type(value) is not int or not -1 <= value <= limit:
            shown = value if isinstance(value, int | float | bool) else type(value).__name__
            raise GgufError(f"{self._prefix}{key} is {shown}, not a number up to {limit:,}")
        return max(0, value)


def _quantization(header: GgufHeader) -> str:
    """The file's own word for it, else the tensor type that most parameters have."""
    named = header.metadata.get("general.file_type")
    if type(named) is int and named in FILE_TYPES:
        return FILE_TYPES[named]
    elements: dict[int, int] = {}
    for tensor in header.tensors:
        elements[tensor.type] = elements.get(tensor.type, 0) + tensor.elements
    if not elements:
        return "unknown"
    commonest = max(elements, key=lambda kind: elements[kind])
    return TENSOR_TYPES[commonest][0] if commonest in TENSOR_TYPES else "unknown"
