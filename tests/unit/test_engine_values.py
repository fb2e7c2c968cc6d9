"""Options become a runner's command line and a completion's body."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from ollamad.core.inference import GenerateRequest, InferenceError, Options
from ollamad.core.state import ModelDetails
from ollamad.engine.memory import estimate
from ollamad.engine.sampling import completion_body, json_schema, token_limit
from ollamad.engine.spec import (
    EngineSettings,
    ModelSpec,
    RunnerConfig,
    runner_config,
    usable_cores,
)

SETTINGS = EngineSettings(runtime_dir=Path("unused"), num_parallel=2, context_length=4096)
SPEC = ModelSpec(
    "m", "sha256:0", "/m.gguf", 1 << 30, ModelDetails(context_length=8192, kv_bytes_per_token=1000)
)


def body_of(options: Options, format_: str = "", **fields: Any) -> dict[str, Any]:
    request = GenerateRequest("m", **fields)
    limit = token_limit(options, 100)
    body = completion_body([1, 2], request, options, limit, json_schema(format_))
    decoded = msgspec.json.decode(body)
    assert isinstance(decoded, dict)
    return decoded


def test_what_a_request_itself_asks_of_the_sampling():
    assert body_of(Options(), logprobs=3)["n_probs"] == 3
    assert body_of(Options(), logprobs=0)["n_probs"] == 1
    assert "n_probs" not in body_of(Options())
    assert body_of(Options(), logit_bias=((5, -100.0),))["logit_bias"] == [[5, -100.0]]
    assert body_of(Options(), default_seed=7)["seed"] == 7
    assert body_of(Options(seed=8), default_seed=7)["seed"] == 8


def test_a_replay_reads_its_prompt_whole():
    """So that it is computed alike on a node that has some of it in its cache."""
    for mode, cached in (("", True), ("continue", True), ("off", True), ("replay", False)):
        body = completion_body([1], GenerateRequest("m", failover=mode), Options(), 9, None)
        assert msgspec.json.decode(body)["cache_prompt"] is cached


def test_ollamas_defaults():
    assert body_of(Options()) == {
        "prompt": [1, 2],
        "id_slot": -1,
        "stream": True,
        "return_tokens": True,
        "cache_prompt": True,
        "return_progress": True,
        "n_predict": 1000,
        "n_keep": 4,
        "seed": -1,
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.0,
        "typical_p": 1.0,
        "repeat_last_n": 64,
        "repeat_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "mirostat": 0,
        "mirostat_tau": 5.0,
        "mirostat_eta": 0.1,
        "stop": [],
    }


@pytest.mark.parametrize(
    ("option", "key", "value"),
    [
        ("num_predict", "n_predict", 7),
        ("num_keep", "n_keep", 9),
        ("seed", "seed", 42),
        ("seed", "seed", 0),
        ("temperature", "temperature", 0.0),
        ("top_k", "top_k", 3),
        ("top_p", "top_p", 0.5),
        ("min_p", "min_p", 0.1),
        ("typical_p", "typical_p", 0.7),
        ("repeat_last_n", "repeat_last_n", -1),
        ("repeat_penalty", "repeat_penalty", 1.2),
        ("presence_penalty", "presence_penalty", 0.3),
        ("frequency_penalty", "frequency_penalty", 0.4),
        ("mirostat", "mirostat", 2),
        ("mirostat_tau", "mirostat_tau", 4.0),
        ("mirostat_eta", "mirostat_eta", 0.2),
    ],
)
def test_each_option_arrives(option: str, key: str, value: float):
    assert body_of(Options(**{option: value}))[key] == value  # type: ignore[arg-type]


@pytest.mark.parametrize("num_predict", [-1, -2, 0, 5000])
def test_an_answer_is_bounded_by_ten_contexts(num_predict: int):
    assert body_of(Options(num_predict=num_predict))["n_predict"] == 1000


def test_negative_seeds_are_random():
    assert body_of(Options(seed=-5))["seed"] == -1


def test_empty_stop_strings_are_dropped():
    assert body_of(Options(stop=("a", "", "b")))["stop"] == ["a", "b"]


def test_formats():
    assert "json_schema" not in body_of(Options())
    assert body_of(Options(), "json")["json_schema"] == {"type": "object"}
    assert body_of(Options(), '{"type": "array"}')["json_schema"] == {"type": "array"}
    with pytest.raises(InferenceError, match="JSON schema"):
        body_of(Options(), "{")


def test_a_runners_default_configuration():
    assert runner_config(SPEC, Options(), SETTINGS) == RunnerConfig(
        model_path="/m.gguf",
        context_length=4096,
        parallel=2,
        threads=usable_cores(),
        batch=0,
        gpu_layers=-1,
        embedding=False,
        pooling="",
        chat_template="",
    )


def test_options_of_a_runner():
    options = Options(num_ctx=100, num_batch=64, num_gpu=3, num_thread=5)
    config = runner_config(SPEC, options, SETTINGS)
    assert (config.context_length, config.batch) == (100, 64)
    assert (config.gpu_layers, config.threads) == (3, 5)


@pytest.mark.parametrize(("num_ctx", "length"), [(1, 4), (8192, 8192), (9000, 8192)])
def test_the_context_stays_within_what_the_model_knows(num_ctx: int, length: int):
    assert runner_config(SPEC, Options(num_ctx=num_ctx), SETTINGS).context_length == length


@pytest.mark.parametrize(
    ("capability", "num_batch", "size", "pooling"),
    [
        ("embedding", None, 2048, ""),
        ("embedding", 16, 2048, ""),
        ("completion", None, 512, "mean"),
        ("completion", 1024, 1024, "mean"),
        ("completion", 9999, 2048, "mean"),
    ],
)
def test_what_is_embedded_fits_one_batch(
    capability: str, num_batch: int | None, size: int, pooling: str
):
    details = ModelDetails(context_length=2048, capabilities=(capability,))
    spec = msgspec.structs.replace(SPEC, details=details)
    config = runner_config(spec, Options(num_batch=num_batch), SETTINGS, embedding=True)
    assert (config.context_length, config.batch, config.pooling) == (size, size, pooling)
    assert "--embedding" in config.arguments()


@pytest.mark.parametrize(
    ("template", "used"),
    [("{% for m in messages %}x{% endfor %}", True), ("{{ .Prompt }}", False), (None, False)],
)
def test_only_jinja_templates_reach_the_runner(template: str | None, used: bool):
    spec = msgspec.structs.replace(SPEC, template=template)
    arguments = runner_config(spec, Options(), SETTINGS).arguments()
    assert ("--chat-template" in arguments) is used


def test_adapters_and_the_projector_reach_the_runner():
    spec = msgspec.structs.replace(SPEC, adapter_paths=("/a", "/b"), projector_path="/p")
    arguments = runner_config(spec, Options(), SETTINGS).arguments()
    assert arguments[-6:] == ["--adapter", "/a", "--adapter", "/b", "--projector", "/p"]
    # The projector's tokens are of no use for embeddings of text; what adapts the weights is.
    embedding = runner_config(spec, Options(), SETTINGS, embedding=True).arguments()
    assert embedding[-4:] == ["--adapter", "/a", "--adapter", "/b"]


def test_the_estimate_grows_with_slots_and_context():
    def size(**fields: int) -> int:
        return estimate(SPEC, runner_config(SPEC, Options(**fields), SETTINGS)).total

    assert size(num_ctx=2000) - size(num_ctx=1000) == 1000 * 2 * 1000
    assert size() > SPEC.size + 4096 * 2 * 1000


def test_the_estimate_of_a_model_that_does_not_tell_its_layers_is_not_small():
    bare = msgspec.structs.replace(SPEC, size=4 << 30, details=ModelDetails())
    config = runner_config(bare, Options(), SETTINGS)
    assert estimate(bare, config).total > (4 << 30) + 2 * 4096 * 500_000
