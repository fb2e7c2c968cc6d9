"""Turns the runner's events of a chat into what was said, thought and called. Sans-I/O.

llama.cpp knows how each model writes its thoughts and calls, and tells them apart. A call comes in
pieces; it is told when it is whole, as Ollama tells it.
"""

import secrets

import msgspec

from ollamad.core.inference import Chunk, Output, Thought, ToolCall
from ollamad.engine.assembly import likelihoods
from ollamad.engine.llama_client import CallDelta, ChatEvent, Timings, Usage

CALL_ID_BYTES = 4  # `call_` and 8 characters, as in Ollama


class ChatAssembler:
    """Eats the events of one chat; `reason`, `usage` and `timings` are known at the end.

    `candidates` is how many tokens are told that could have stood where one was written.
    """

    def __init__(self, candidates: int = 0) -> None:
        self._candidates = candidates
        self.reason = ""
        self.usage = Usage()
        self.timings = Timings()
        self._call: CallDelta | None = None  # the one whose pieces come now
        self._calls = 0  # that were told

    def feed(self, event: ChatEvent) -> list[Output]:
        """What can be told now, in order."""
        self.usage = event.usage or self.usage
        self.timings = event.timings or self.timings
        outputs: list[Output] = []
        for choice in event.choices:
            delta = choice.delta
            if delta.reasoning_content:
                outputs.append(Thought(delta.reasoning_content))
            told = choice.logprobs.content if choice.logprobs else None
            # A call that comes with how likely its tokens were is the whole answer.
            if delta.content or (told and delta.tool_calls):
                likely = likelihoods(told or (), self._candidates)
                outputs.append(Chunk(delta.content or "", logprobs=tuple(likely)))
            for piece in delta.tool_calls:
                if self._call is None or piece.index != self._call.index:
                    outputs += self._end_call()
                    self._call = piece
                else:
                    self._call.function.name += piece.function.name
                    self._call.function.arguments += piece.function.arguments
            if choice.finish_reason:
                self.reason = choice.finish_reason
                outputs += self._end_call()
        return outputs

    def _end_call(self) -> list[Output]:
        """The call that has come; none if it was cut off in the middle."""
        if self._call is None:
            return []
        function, self._call = self._call.function, None
        arguments = function.arguments or "{}"
        try:
            whole = isinstance(msgspec.json.decode(arguments), dict)
        except msgspec.DecodeError:
            whole = False
        if not whole or not function.name:
            return []
        self._calls += 1
        id_ = f"call_{secrets.token_hex(CALL_ID_BYTES)}"
        return [ToolCall(function.name, arguments, id_, self._calls - 1)]
