"""How an answer goes on elsewhere when the node that gives it is lost. Pure.

Two ways. `continue` has the next node read the prompt and exactly the tokens that the client has,
and write on from there: quick, and right given what was said. `replay` runs the request again
with the same seed and leaves out what was sent already: bit for bit the undisturbed text, at the
price of a longer silence. Only a replay can keep a grammar, whose state the tokens do not tell.
"""

from typing import Literal

import msgspec

from ollamad.core.inference import (
    Chunk,
    Event,
    Failed,
    Failover,
    Finished,
    GenerateRequest,
    Thought,
    ToolCall,
)

Mode = Literal["continue", "replay", "off"]
MODES: tuple[Mode, ...] = ("continue", "replay", "off")


def parse_mode(text: str) -> Mode:
    """The mode of that name.

    Raises:
      ValueError: there is none.
    """
    for mode in MODES:
        if mode == text:
            return mode
    raise ValueError(f"use one of {', '.join(MODES)}")


class _Said:
    """A text that was sent, and how much of it a replay has said again."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._owed = ""
        self._repeated = 0

    def rewind(self) -> None:
        """All of it is owed (again)."""
        self._owed, self._repeated = "".join(self._parts), 0

    def settle(self) -> None:
        """Nothing is owed: the next text is new."""
        self._owed, self._repeated = "", 0

    def have(self, text: str) -> None:
        """The client has this already; all of it is owed."""
        self._parts = [text]
        self.rewind()

    @property
    def text(self) -> str:
        """All that was sent."""
        return "".join(self._parts)

    @property
    def is_owed(self) -> bool:
        return self._repeated < len(self._owed)

    def new_of(self, text: str) -> str | None:
        """What of this text was not sent before; None if it is not what was sent."""
        again = text[: len(self._owed) - self._repeated]
        if not self._owed.startswith(again, self._repeated):
            return None
        self._repeated += len(again)
        new = text[len(again) :]
        if new:
            self._parts.append(new)
        return new


class Answer:
    """What the client has of an answer, and the request that gets the rest."""

    def __init__(self, request: GenerateRequest, mode: Mode) -> None:
        self._request = request
        has_state = bool(request.format) or request.is_parsed  # which tokens do not tell
        self._mode: Mode = "replay" if mode == "continue" and has_state else mode
        self._text = _Said()
        self._thought = _Said()
        self._calls: list[tuple[str, str]] = []  # that were sent: functions and their arguments
        self._calls_owed = 0  # of these, the last ones
        self._said, self._said_tokens = "", 0  # had from before, by tokens that nobody knows
        self._tokens: list[int] = []
        self._written = 0  # tokens of what was sent, about
        self._all_told = True  # the ids of all that was sent are known
        self._resumed = 0  # tokens that the running attempt was given
        self.begun = False  # the client has something of the answer
        self.failovers: tuple[Failover, ...] = ()

    @property
    def mode(self) -> Mode:
        """How this answer would go on now."""
        return "replay" if self._mode == "continue" and not self._all_told else self._mode

    @property
    def token_count(self) -> int:
        """Tokens that the client has, as far as they are known."""
        return self._said_tokens + len(self._tokens)

    @property
    def written_count(self) -> int:
        """Tokens that the client has, about: a part of which they are not known counts as one."""
        return self._said_tokens + self._written

    def have(self, text: str, tokens: int) -> None:
        """The client has this text from before; of which tokens it is made is not known.

        A continuation reads it behind the prompt, as the tokenizer spells it. To make the answer
        again instead would be no better: a prompt of which a part was in the cache, where the
        answer before was written, is rounded differently than one that is read anew.
        """
        self.begun = True
        if self._mode == "continue":
            self._said, self._said_tokens = text, tokens
        else:
            self._text.have(text)
            self._all_told = False

    def resume(self) -> GenerateRequest:
        """The request for the next node; the whole one if nothing was sent yet."""
        self._resumed = 0
        if not self.begun:
            return self._request
        if self.mode != "continue":
            self._text.rewind()
            self._thought.rewind()
            self._calls_owed = len(self._calls)
            return self._request
        self._text.settle()
        self._resumed = self.token_count
        return msgspec.structs.replace(
            self._request,
            resume=tuple(self._tokens),
            resumed_text=self._text.text if self._request.request_id else "",
            said=self._said,
            said_tokens=self._said_tokens,
        )

    def take(self, event: Event) -> Event | None:
        """What of that event the client gets; None if it has it already."""
        match event:
            case Chunk(text, tokens):
                is_repeated = self._text.is_owed
                new = self._text.new_of(text)
                if new is None:
                    return _diverged()
                if is_repeated and not new:
                    return None
                if new != text:
                    # Which of its tokens are new cannot be told, if only a part of it is.
                    tokens = ()
                self.begun = True
                self._tokens += tokens
                self._written += max(1, len(tokens))
                self._all_told = self._all_told and bool(tokens)
                return event if new == text else Chunk(new)
            case Thought(text):
                new = self._thought.new_of(text)
                if new is None:
                    return _diverged()
                self.begun, self._all_told = True, False
                if not new:
                    return None
                self._written += 1
                return Thought(new)
            case ToolCall(name, arguments):
                if self._calls_owed:
                    sent = self._calls[-self._calls_owed]
                    self._calls_owed -= 1
                    return None if (name, arguments) == sent else _diverged()
                self._calls.append((name, arguments))
                self._written += 1
                self.begun, self._all_told = True, False
                return event
            case Finished():
                return self._finish(event)
            case Failed():
                return event

    def _finish(self, event: Finished) -> Event:
        if self._text.is_owed or self._thought.is_owed or self._calls_owed:
            return _diverged()
        if not self.failovers and not self._resumed:
            return event
        count = event.eval_count + self._resumed
        return msgspec.structs.replace(event, eval_count=count, failovers=self.failovers)


def _diverged() -> Failed:
    return Failed(
        "REPLAY_DIVERGED",
        "the node was lost, and the one that ran the request again gives another answer; what "
        "was sent stands, the rest is missing: ask again",
    )
