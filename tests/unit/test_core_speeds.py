"""What a node learns of its own speed from its answers."""

import msgspec
import pytest

from ollamad.core.inference import Finished
from ollamad.core.speeds import MAX_TOLD, MIN_MEASURED_TOKENS, Speed, Speedometer, short_digest
from ollamad.wire.codec import encode

DIGEST = "sha256:" + "a" * 64
END = Finished(
    "stop",
    load_duration=2_000_000_000,
    prompt_eval_count=120,
    prompt_cached_count=20,
    prompt_eval_duration=500_000_000,
    eval_count=50,
    eval_duration=1_000_000_000,
)


def test_the_first_answer_tells_all() -> None:
    speeds = Speedometer()
    speeds.measure(DIGEST, END, 480)
    assert speeds.speed(DIGEST) == Speed(
        short_digest(DIGEST), 0, prefill=200.0, decode=50.0, service_s=1.5, load_s=2.0,
        bytes_per_token=4.0,
    )  # fmt: skip


def test_later_ones_move_it_slowly() -> None:
    speeds = Speedometer()
    speeds.measure(DIGEST, END, 480)
    slow = msgspec.structs.replace(END, prompt_eval_duration=1_000_000_000, load_duration=0)
    speeds.measure(DIGEST, slow, 480)
    assert speeds.speed(DIGEST).prefill == pytest.approx(180.0)
    assert speeds.speed(DIGEST).load_s == 2.0, "it was in memory, which says nothing of loading"
    for _ in range(40):
        speeds.measure(DIGEST, slow, 480)
    assert speeds.speed(DIGEST).prefill == pytest.approx(100.0, rel=0.01)


@pytest.mark.parametrize("cached", [120, 121 - MIN_MEASURED_TOKENS])
def test_few_tokens_say_nothing_of_the_rate(cached: int) -> None:
    speeds = Speedometer()
    speeds.measure(DIGEST, msgspec.structs.replace(END, prompt_cached_count=cached), 480)
    assert speeds.speed(DIGEST).prefill == 0.0


def test_a_beat_tells_the_models_used_last_and_those_that_wait() -> None:
    speeds = Speedometer()
    digests = [f"sha256:{number:064x}"[::-1] for number in range(20)]
    for digest in digests:
        speeds.measure(digest, END, 480)
    told = speeds.told([(DIGEST, 99.6)])
    assert len(told) == MAX_TOLD
    assert told[-1] == Speed(short_digest(DIGEST), 100)
    assert len(encode(told)) < 600
    assert speeds.told([])[-1].model == short_digest(digests[-1])
