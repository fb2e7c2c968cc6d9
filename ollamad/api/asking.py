"""Who asks for an inference and on what terms, read from the headers that all surfaces share.

X-Ollamad-Priority: low | normal | high     high needs the role operator
X-Ollamad-Deadline: seconds                 within which the answer must begin
X-Ollamad-Explain: true                     tell why the node was chosen
"""

import json
from collections.abc import Awaitable, Callable

import msgspec

from ollamad.api.auth import Identity
from ollamad.api.bodies import invalid
from ollamad.api.calls import Call
from ollamad.api.services import Generation, ServiceError
from ollamad.core.admission import PRIORITIES, Asker, Place
from ollamad.core.explanation import Explanation

PRIORITY_HEADER = "X-Ollamad-Priority"
DEADLINE_HEADER = "X-Ollamad-Deadline"
EXPLAIN_HEADER = "X-Ollamad-Explain"
MAX_DEADLINE_S = 86400.0
# Nodes that are told of in a header, the best first; clients take 8 KiB of headers at the least.
MAX_HEADER_SCORES = 16


def asker_of(call: Call, on_wait: Callable[[Place], Awaitable[None]] | None = None) -> Asker:
    """Who asks.

    Raises:
      ServiceError: 400 for a header that says nothing sensible, 403 for a priority that is not
        for everybody.
    """
    headers = call.request.headers
    name = headers.get(PRIORITY_HEADER, "normal")
    if name not in PRIORITIES:
        allowed = ", ".join(PRIORITIES)
        raise invalid(PRIORITY_HEADER, f"{PRIORITY_HEADER} must be one of {allowed}")
    caller = call.caller
    if PRIORITIES[name] > 0 and (caller is None or not caller.may("operator")):
        raise ServiceError(
            403,
            "FORBIDDEN",
            f"{PRIORITY_HEADER}: {name} needs the role operator",
            {"required": "operator", "role": caller.role if caller is not None else ""},
        )
    return Asker(
        identity=_name_of(caller),
        priority=PRIORITIES[name],
        deadline_s=_deadline_s(headers.get(DEADLINE_HEADER)),
        wants_scores=headers.get(EXPLAIN_HEADER, "false").lower() in ("true", "1", "yes"),
        on_wait=on_wait,
    )


def _name_of(caller: Identity | None) -> str:
    """Whose share of the queue it is, and whose the names of requests are."""
    if caller is None:
        return ""
    # Keys may have the same name, and belong to different people all the same.
    return caller.username if caller.key is None else f"key:{caller.key.id}"


def routing_headers(generation: Generation) -> dict[str, str]:
    """What the answer's headers tell of how the request came to its node."""
    headers = {"X-Ollamad-Node": str(generation.node_id)}
    if generation.first_place is not None:
        headers["X-Ollamad-Queue-Position"] = str(generation.first_place.position)
        headers["X-Ollamad-Queue-Estimate"] = f"{generation.first_place.estimate_s:.1f}"
        headers["X-Ollamad-Queued"] = f"{generation.waited_s:.3f}"
    if generation.explanation is not None:
        headers["X-Ollamad-Scores"] = _in_header(generation.explanation)
    return headers


def _in_header(explanation: Explanation) -> str:
    best = msgspec.structs.replace(explanation, scores=explanation.scores[:MAX_HEADER_SCORES])
    # Headers are ASCII; msgspec writes other characters as they are.
    return json.dumps(msgspec.to_builtins(best), separators=(",", ":"))


def _deadline_s(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= MAX_DEADLINE_S:
        raise invalid(
            DEADLINE_HEADER,
            f"{DEADLINE_HEADER} must be a number of seconds, at most {MAX_DEADLINE_S:.0f}",
            expected="seconds",
        )
    return seconds
