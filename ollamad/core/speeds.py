"""How fast a node is with a model, as its own finished requests tell. Pure.

Hardware is unequal and changes (other programs, heat, other models beside), so nothing is taken
from data sheets: every answer carries the engine's counts and durations, and moving averages of
these are what routing predicts with. They travel in beats.
"""

from collections.abc import Iterable

import msgspec

from ollamad.core.inference import Finished

WEIGHT = 0.2  # of the newest measurement: a change of speed is known after some five requests
MIN_MEASURED_TOKENS = 16  # fewer say more about overheads than about speed
MAX_TOLD = 8  # models whose speeds a beat tells, the last used first
DIGEST_CHARS = 12  # of a model's digest, enough to tell the models of a cluster apart
S = 1e9  # nanoseconds

MAX_RATE = 1e7  # tokens a second
MAX_S = 3600.0
MAX_PENDING = 100_000_000  # tokens

# Until something was measured: a small model on an old CPU, so that nobody is driven away.
PREFILL_RATE = 200.0
BYTES_PER_TOKEN = 4.0
SERVICE_S = 5.0
LOAD_BYTES_PER_S = 500e6  # a disk
LOAD_OVERHEAD_S = 0.5


class Speed(msgspec.Struct, frozen=True, array_like=True):
    """One model on one node. 0: not measured."""

    model: str  # the first characters of its digest, see `short_digest`
    pending: int = 0  # tokens of prompts that wait or are being evaluated now
    prefill: float = 0.0  # tokens a second, of one prompt
    decode: float = 0.0  # tokens a second, of one answer
    service_s: float = 0.0  # that a request holds a slot
    load_s: float = 0.0  # to bring the model into memory
    bytes_per_token: float = 0.0  # of prompts


def short_digest(digest: str) -> str:
    """What stands for a model in beats."""
    return digest.removeprefix("sha256:")[:DIGEST_CHARS]


def believable(speed: Speed) -> Speed:
    """What another node told, without figures that no node can have: as if not measured."""
    return Speed(
        speed.model,
        min(MAX_PENDING, max(0, speed.pending)),
        _within(speed.prefill, 1.0, MAX_RATE),
        _within(speed.decode, 0.01, MAX_RATE),
        _within(speed.service_s, 0.001, MAX_S),
        _within(speed.load_s, 0.001, MAX_S),
        _within(speed.bytes_per_token, 0.1, 100.0),
    )


def _within(value: float, least: float, most: float) -> float:
    return value if least <= value <= most else 0.0


class Speedometer:
    """The speeds of this node."""

    def __init__(self) -> None:
        self._speeds: dict[str, Speed] = {}  # the last used at the end

    def measure(self, digest: str, end: Finished, prompt_bytes: int) -> None:
        """Learn from an answer that ended well."""
        model = short_digest(digest)
        old = self._speeds.pop(model, Speed(model))
        evaluated = end.prompt_eval_count - end.prompt_cached_count
        worked_s = (end.prompt_eval_duration + end.eval_duration) / S
        new = old
        if evaluated >= MIN_MEASURED_TOKENS and end.prompt_eval_duration > 0:
            rate = evaluated / (end.prompt_eval_duration / S)
            new = msgspec.structs.replace(new, prefill=_average(old.prefill, rate))
        if end.eval_count >= MIN_MEASURED_TOKENS and end.eval_duration > 0:
            rate = end.eval_count / (end.eval_duration / S)
            new = msgspec.structs.replace(new, decode=_average(old.decode, rate))
        if end.load_duration > LOAD_OVERHEAD_S * S / 5:  # else it was in memory already
            load_s = end.load_duration / S
            new = msgspec.structs.replace(new, load_s=_average(old.load_s, load_s))
        if worked_s > 0:
            new = msgspec.structs.replace(new, service_s=_average(old.service_s, worked_s))
        if end.prompt_eval_count >= MIN_MEASURED_TOKENS and prompt_bytes:
            ratio = prompt_bytes / end.prompt_eval_count
            average = _average(old.bytes_per_token, ratio)
            new = msgspec.structs.replace(new, bytes_per_token=average)
        self._speeds[model] = new

    def speed(self, digest: str) -> Speed:
        """Of one model."""
        model = short_digest(digest)
        return self._speeds.get(model, Speed(model))

    def told(self, pending: Iterable[tuple[str, float]]) -> tuple[Speed, ...]:
        """What a beat tells; `pending` are the tokens that wait, by digest."""
        waiting = {short_digest(digest): tokens for digest, tokens in pending}
        speeds = {model: self._speeds[model] for model in list(self._speeds)[-MAX_TOLD:]}
        for model in waiting:
            speeds.setdefault(model, self._speeds.get(model, Speed(model)))
        return tuple(
            msgspec.structs.replace(_rounded(speed), pending=round(waiting.get(speed.model, 0)))
            for speed in list(speeds.values())[-MAX_TOLD:]
        )


def _average(old: float, new: float) -> float:
    return old + WEIGHT * (new - old) if old else new


def _rounded(speed: Speed) -> Speed:
    """Four digits are more than was measured."""
    return Speed(
        speed.model,
        speed.pending,
        *(
            float(f"{value:.4g}")
            for value in (
                speed.prefill,
                speed.decode,
                speed.service_s,
                speed.load_s,
                speed.bytes_per_token,
            )
        ),
    )
