"""Several generations as the choices of one answer, for OpenAI's `n`, `best_of` and many prompts.

They run at once, each on the node that is best for it. When one fails, all end.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import trio

from ollamad.api.asgi import Reply
from ollamad.api.asking import asker_of, routing_headers
from ollamad.api.calls import Call, reply
from ollamad.api.errors import as_service_error
from ollamad.api.generation import (
    Meter,
    Whole,
    begin_stream,
    failovers_of,
    lost,
    too_late,
    with_deadline,
    with_failover,
)
from ollamad.api.openai_layouts import EventLayout, usage_of
from ollamad.api.services import ServiceError
from ollamad.core.inference import Failed, Finished, GenerateRequest, InferenceError, Output

WAITING = 16  # events that wait for the client, of all choices

Told = tuple[int, Output | Finished | ServiceError]  # of which choice


@dataclasses.dataclass(slots=True)
class _Choice:
    outputs: list[Output] = dataclasses.field(default_factory=list)
    headers: dict[str, str] = dataclasses.field(default_factory=dict)  # how it came to its node
    end: Finished | None = None
    began_at: str = ""  # the id of a node

    @property
    def node_id(self) -> str:
        """Where it came to its end."""
        failovers = self.end.failovers if self.end is not None else ()
        return failovers[-1].to_node if failovers else self.began_at

    @property
    def mean_logprob(self) -> float:
        """How likely what was said is, token for token."""
        likely = Whole.of(self.outputs).logprobs
        return sum(each.logprob for each in likely) / len(likely) if likely else float("-inf")


async def answer_all(
    call: Call,
    requests: Sequence[GenerateRequest],
    layouts: Callable[[int], EventLayout],
    *,
    prompts: int,
    keep: int,
    tells_logprobs: bool,
    stream: bool,
) -> Reply | None:
    """Answer with all of these generations; None when the answer was streamed.

    Args:
      requests: as many for each prompt, the ones of the first prompt first.
      layouts: makes the layout of the choice with that index.
      prompts: how many different prompts there are.
      keep: how many choices are told of each prompt: the likeliest, if there are more.
      tells_logprobs: false if they were asked for only to find the likeliest.

    Raises:
      ServiceError: one failed before the first byte was sent.
    """
    requests = [with_failover(call, request) for request in requests]
    stats = call.api.inference_stats
    begun = stats.begin()
    failure: ServiceError | None = None
    choices = [_Choice() for _ in requests]
    shown = [layouts(index) for index in range(prompts * keep)]
    try:
        with with_deadline(call) as scope:
            failure = await _run(call, requests, choices, shown if stream else ())
        if scope.cancelled_caught:
            failure = too_late()
    finally:
        # No failure: the client went away.
        stats.end(call.services.monotonic() - begun, failed=failure is not None)
    if call.request.head_sent_at is not None:
        last = shown[0].failure(failure) if failure else shown[0].close(_usage(choices, prompts))
        await call.request.send_body(last, more=False)
        return None
    if failure is not None:
        raise failure
    per_prompt = len(requests) // prompts
    kept: list[_Choice] = []
    for first in range(0, len(choices), per_prompt):
        of_prompt = choices[first : first + per_prompt]
        kept += sorted(of_prompt, key=lambda choice: -choice.mean_logprob)[:keep]
    if keep == per_prompt:
        kept = choices  # in the order in which they were asked for
    bodies = []
    for layout, choice in zip(shown, kept, strict=True):
        said = Whole.of(choice.outputs)
        if not tells_logprobs:
            said = dataclasses.replace(said, logprobs=())
        assert choice.end is not None
        bodies.append(layout.choice(said, choice.end))
    body = shown[0].body(bodies, _usage(choices, prompts))
    body |= failovers_of(*(choice.end for choice in choices if choice.end is not None))
    return reply(body, headers=choices[0].headers | _headers(choices))


async def _run(
    call: Call,
    requests: Sequence[GenerateRequest],
    choices: Sequence[_Choice],
    layouts: Sequence[EventLayout],
) -> ServiceError | None:
    """Run them all, and send what they say to these layouts; returns what went wrong."""
    failure: ServiceError | None = None
    send, receive = trio.open_memory_channel[Told](WAITING)
    async with receive, trio.open_nursery() as nursery:
        async with send:
            for index, request in enumerate(requests):
                nursery.start_soon(_generate, call, index, request, choices[index], send.clone())
        async for index, event in receive:
            if isinstance(event, ServiceError):
                failure = event
                break
            choice = choices[index]
            if isinstance(event, Finished):
                choice.end = event
            else:
                choice.outputs.append(event)
            if layouts:
                layout = layouts[index]
                if call.request.head_sent_at is None:  # the others' nodes are not known yet
                    await begin_stream(call.request, layout, choice.headers)
                data = layout.end(event) if isinstance(event, Finished) else layout.part(event)
                await call.request.send_body(data, more=True)
        nursery.cancel_scope.cancel()
    return failure


async def _generate(
    call: Call,
    index: int,
    request: GenerateRequest,
    choice: _Choice,
    send: trio.MemorySendChannel[Told],
) -> None:
    async with send:
        meter: Meter | None = None
        try:
            async with call.services.inference.generate(request, asker_of(call)) as generation:
                choice.began_at = str(generation.node_id)
                choice.headers = routing_headers(generation)
                meter = Meter(request, generation.events)
                while True:
                    event = await meter.receive()
                    if isinstance(event, Failed):
                        raise InferenceError(event)
                    await send.send((index, event))
                    if isinstance(event, Finished):
                        return
        except trio.EndOfChannel:
            await send.send((index, as_service_error(lost(), call.request.id)))
        except Exception as error:
            await send.send((index, as_service_error(error, call.request.id)))
        finally:
            if meter is not None:
                call.spend_tokens(meter.tokens)


def _headers(choices: Sequence[_Choice]) -> dict[str, str]:
    """The nodes that wrote the choices, each once, and how often one of them was lost."""
    headers = {"X-Ollamad-Node": ", ".join(dict.fromkeys(choice.node_id for choice in choices))}
    lost_count = sum(len(choice.end.failovers) for choice in choices if choice.end is not None)
    if lost_count:
        headers["X-Ollamad-Failovers"] = str(lost_count)
    return headers


def _usage(choices: Sequence[_Choice], prompts: int) -> dict[str, Any]:
    """All tokens that were written, also of what is not shown; each prompt counts once."""
    ends = [choice.end for choice in choices if choice.end is not None]
    per_prompt = max(1, len(ends) // prompts)
    firsts = ends[::per_prompt]
    others = [end for place, end in enumerate(ends) if place % per_prompt]
    return usage_of(*firsts, *others, prompts=len(firsts))
