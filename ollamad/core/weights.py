"""What the header of a model's weights says that decides how it is run, and by which engine. Pure.

The choice follows from the file's own header (format, version, architecture, tokenizer), never
from its name: llama.cpp reads GGUF from version 2 on, ctransformers what is older. The model can
say otherwise with the parameter `engine`.
"""

import dataclasses
from collections.abc import Collection
from typing import Final

import msgspec

XLLAMACPP: Final = "xllamacpp"  # llama.cpp's server, embedded
LLAMA_SERVER: Final = "llama-server"  # llama.cpp's server, a program built elsewhere
CTRANSFORMERS: Final = "ctransformers"
ENGINES: Final = (XLLAMACPP, LLAMA_SERVER, CTRANSFORMERS)

LEGACY_GGUF: Final = 1  # the last version of GGUF that llama.cpp does not read any more

# What ctransformers 0.2.27 runs: architectures under their names in GGUF and in our reader of the
# older formats, and what it calls them. In GGUF it knows llamas with SentencePiece only; a falcon
# of before GGUF it opens only beside a second file.
LEGACY_TYPES: Final = {
    "llama": "llama",
    "gpt2": "gpt2",
    "gptj": "gptj",
    "gptneox": "gpt_neox",
    "mpt": "mpt",
    "starcoder": "starcoder",
    "dolly-v2": "dolly-v2",
}
LEGACY_GGUF_ARCHITECTURES: Final = ("llama",)


class Weights(msgspec.Struct, frozen=True):
    """A header in short; zero or empty where it says nothing."""

    format: str = "gguf"  # or ggml, ggmf, ggjt
    version: int = 3
    architecture: str = ""
    tokenizer: str = ""
    layer_bytes: tuple[int, ...] = ()  # of the tensors of each layer
    vocabulary: int = 0  # tokens
    width: int = 0  # of the embeddings
    feed_forward: int = 0  # width, of the widest layer
    heads: int = 0  # of the widest layer

    @property
    def is_legacy(self) -> bool:
        """Whether llama.cpp reads it no more."""
        return self.format != "gguf" or self.version <= LEGACY_GGUF

    def describe(self) -> str:
        """The file's kind in words, such as `GGUF version 3, llama`."""
        version = f" version {self.version}" if self.version else ""
        return f"{self.format.upper()}{version}, {self.architecture or 'no architecture'}"


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """An engine, and why it."""

    engine: str
    reason: str


class NoEngine(ValueError):
    """No engine here runs this model; says why, and what can be done."""


def choose_engine(
    weights: Weights, *, wanted: str = "", preferred: str = XLLAMACPP, available: Collection[str]
) -> Choice:
    """The engine for a file.

    Args:
      wanted: what the model or the request asks for; empty: nothing.
      preferred: the node's engine for what llama.cpp reads.
      available: the engines that this node has.

    Raises:
      NoEngine: none fits.
    """
    if wanted:
        if wanted not in ENGINES:
            raise NoEngine(f"there is no engine {wanted!r}; there are {', '.join(ENGINES)}")
        if wanted not in available:
            raise NoEngine(f"the engine {wanted} is not on this node; {_remedy(wanted)}")
        if wanted == CTRANSFORMERS:
            _check_legacy(weights)
        elif weights.is_legacy:
            raise NoEngine(
                f"the file is {weights.describe()}, which {wanted} does not read; leave the "
                f"parameter engine out, and {CTRANSFORMERS} is taken"
            )
        return Choice(wanted, f"the parameter engine asks for {wanted}")
    if weights.is_legacy:
        if CTRANSFORMERS not in available:
            raise NoEngine(
                f"the file is {weights.describe()}, which only {CTRANSFORMERS} reads; "
                f"{_remedy(CTRANSFORMERS)}, or convert the file to GGUF version 3"
            )
        _check_legacy(weights)
        return Choice(
            CTRANSFORMERS, f"the file is {weights.describe()}: llama.cpp reads newer ones"
        )
    if preferred not in available:
        raise NoEngine(f"the engine {preferred} is not on this node; {_remedy(preferred)}")
    why = "" if preferred == XLLAMACPP else "; the setting engine.llama_server is set"
    return Choice(preferred, f"the file is {weights.describe()}: llama.cpp reads it{why}")


def _check_legacy(weights: Weights) -> None:
    known = LEGACY_GGUF_ARCHITECTURES if weights.format == "gguf" else tuple(LEGACY_TYPES)
    if weights.architecture not in known:
        raise NoEngine(
            f"the file is {weights.describe()}; of that format {CTRANSFORMERS} runs "
            f"{', '.join(known)} only; get or convert the model as GGUF version 3"
        )
    if weights.format == "gguf" and weights.tokenizer != "llama":
        raise NoEngine(
            f"the file has a {weights.tokenizer or 'nameless'} tokenizer; {CTRANSFORMERS} runs "
            "GGUF files with a SentencePiece vocabulary (llama) only"
        )


def _remedy(engine: str) -> str:
    if engine == LLAMA_SERVER:
        return "set engine.llama_server to its path"
    return f"install it with `pip install {engine}`"
