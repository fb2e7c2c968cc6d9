"""Which engine runs a file: by its header, unless somebody says otherwise."""

import pytest

from ollamad.core.weights import (
    CTRANSFORMERS,
    ENGINES,
    LLAMA_SERVER,
    XLLAMACPP,
    NoEngine,
    Weights,
    choose_engine,
)

V1 = Weights(version=1, architecture="llama", tokenizer="llama")
V2 = Weights(version=2, architecture="llama", tokenizer="llama")
V3 = Weights(version=3, architecture="qwen3", tokenizer="gpt2")
GPT2 = Weights(format="ggml", version=0, architecture="gpt2", tokenizer="gpt2")


@pytest.mark.parametrize(
    ("weights", "wanted", "preferred", "engine", "reason"),
    [
        (V3, "", XLLAMACPP, XLLAMACPP, "the file is GGUF version 3, qwen3: llama.cpp reads it"),
        (V2, "", XLLAMACPP, XLLAMACPP, "the file is GGUF version 2, llama: llama.cpp reads it"),
        (V3, "", LLAMA_SERVER, LLAMA_SERVER, "the setting engine.llama_server is set"),
        (V1, "", LLAMA_SERVER, CTRANSFORMERS, "GGUF version 1, llama: llama.cpp reads newer"),
        (GPT2, "", XLLAMACPP, CTRANSFORMERS, "GGML, gpt2"),
        (V3, LLAMA_SERVER, XLLAMACPP, LLAMA_SERVER, "the parameter engine asks for llama-server"),
        (V3, XLLAMACPP, LLAMA_SERVER, XLLAMACPP, "the parameter engine"),
        (V2, CTRANSFORMERS, XLLAMACPP, CTRANSFORMERS, "the parameter engine"),
    ],
)
def test_the_choice(weights: Weights, wanted: str, preferred: str, engine: str, reason: str):
    choice = choose_engine(weights, wanted=wanted, preferred=preferred, available=ENGINES)
    assert choice.engine == engine
    assert reason in choice.reason


@pytest.mark.parametrize(
    ("weights", "wanted", "available", "why"),
    [
        (V3, "vllm", ENGINES, "there is no engine 'vllm'; there are xllamacpp, llama-server"),
        (V3, LLAMA_SERVER, (XLLAMACPP,), "set engine.llama_server to its path"),
        (V3, "", (CTRANSFORMERS,), "install it with `pip install xllamacpp`"),
        (V1, "", (XLLAMACPP,), "only ctransformers reads; install it"),
        (V1, XLLAMACPP, ENGINES, "leave the parameter engine out"),
        (V3, CTRANSFORMERS, ENGINES, "runs llama only"),
        (
            Weights(version=2, architecture="llama", tokenizer="gpt2"),
            CTRANSFORMERS,
            ENGINES,
            "has a gpt2 tokenizer",
        ),
        (
            Weights(format="ggjt", architecture="falcon"),
            "",
            ENGINES,
            "GGJT version 3, falcon; of that format ctransformers runs llama, gpt2",
        ),
        (Weights(version=1, architecture="falcon"), "", ENGINES, "runs llama only"),
    ],
)
def test_no_engine_fits(weights: Weights, wanted: str, available: tuple[str, ...], why: str):
    with pytest.raises(NoEngine) as caught:
        choose_engine(weights, wanted=wanted, available=available)
    assert why in str(caught.value)
