"""What was answered a moment ago, so that a client whose entry node died can go on. Pure.

A client that names its request (`request_id`) can ask any node for the rest of the answer. The
node that served keeps what it said for KEPT_S after its end, within bounds; the node that the
client asks now fetches that. Only who asked the same before gets it: the fingerprint is of the
request and of the identity, and names are each identity's own, so that nobody takes another's.
"""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from ollamad.core.inference import (
    Chunk,
    Event,
    Failed,
    Finished,
    GenerateRequest,
    InferenceError,
    Likelihood,
    Output,
    Thought,
    ToolCall,
)

KEPT_S = 60.0  # after its end: a client that is alive asks within seconds
MAX_TRANSCRIPTS = 512
MAX_BYTES = 32 << 20  # of all answers together, those that still run included
# What these take in memory beside their text, as measured with CPython.
EVENT_BYTES = 120
TOKEN_BYTES = 40
LIKELIHOOD_BYTES = 150
MAX_ID_CHARS = 128
MAX_SEED = 1 << 31
OWNER_CHARS = 16  # of a fingerprint: whose request it is


def seed_of(request_id: str) -> int:
    """The seed of a request with that id, on whatever node it runs: so it can be run again."""
    digest = hashlib.blake2b(request_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % MAX_SEED


def fingerprint_of(request: GenerateRequest, identity: str) -> str:
    """What must be the same for two requests to be one."""
    same = msgspec.structs.replace(
        request,
        failover="",
        resume=(),
        resumed_text="",
        fingerprint="",
        keep_alive_s=None,
        default_seed=-1,
    )
    owner = hashlib.blake2b(identity.encode(), digest_size=OWNER_CHARS // 2).hexdigest()
    data = msgspec.msgpack.encode((identity, same))
    return owner + hashlib.blake2b(data, digest_size=16).hexdigest()


def _key(request_id: str, fingerprint: str) -> tuple[str, str]:
    """Under which an answer is kept: the name, and whose it is."""
    return request_id, fingerprint[:OWNER_CHARS]


@dataclass(eq=False, slots=True)
class Transcript:
    """One answer as far as it is known."""

    fingerprint: str
    events: list[Event] = field(default_factory=list)
    size: int = 0  # bytes, about
    ended_at: float | None = None  # None while it runs
    is_taken: bool = False  # somebody goes on with it: the generation is to end
    is_dropped: bool = False  # there was no room for it, or it was made again: it is kept no more


class Transcripts:
    """The answers that this node gave last, by the ids of their requests."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], Transcript] = {}  # the oldest first
        self._size = 0

    def __len__(self) -> int:
        return len(self._kept)

    def begin(self, request: GenerateRequest, now: float) -> Transcript:
        """An answer that begins, or goes on behind `request.resume`."""
        self._sweep(now)
        key = _key(request.request_id, request.fingerprint)
        if (before := self._drop(key)) is not None:
            before.is_taken = True  # it goes on here now, whatever node it ran for
        transcript = Transcript(request.fingerprint)
        self._kept[key] = transcript
        if request.resume:
            self.add(transcript, Chunk(request.resumed_text, request.resume))
        return transcript

    def add(self, transcript: Transcript, event: Event) -> None:
        """The next event of an answer."""
        if isinstance(event, Failed):
            return  # the rest may come from elsewhere
        if transcript.is_dropped:
            return
        size = size_of(event)
        transcript.events.append(event)
        transcript.size += size
        self._size += size
        if self._size > MAX_BYTES:
            self._make_room()

    def end(self, transcript: Transcript, now: float) -> None:
        """It runs no more, whole or not."""
        transcript.ended_at = now
        self._sweep(now)

    def find(self, request_id: str, fingerprint: str, now: float) -> Transcript | None:
        """What is known of the answer to that request, or to another of its owner by that name."""
        self._sweep(now)
        return self._kept.get(_key(request_id, fingerprint))

    def _sweep(self, now: float) -> None:
        for key, transcript in list(self._kept.items()):
            if transcript.ended_at is not None and now - transcript.ended_at > KEPT_S:
                self._drop(key)
        self._make_room()

    def _make_room(self) -> None:
        """The oldest that ended give way; if that is not enough, the longest that runs."""
        if len(self._kept) <= MAX_TRANSCRIPTS and self._size <= MAX_BYTES:
            return
        for key, transcript in list(self._kept.items()):
            if len(self._kept) <= MAX_TRANSCRIPTS and self._size <= MAX_BYTES:
                return
            if transcript.ended_at is not None:
                self._drop(key)
        while self._size > MAX_BYTES:
            self._drop(max(self._kept, key=lambda key: self._kept[key].size))

    def _drop(self, key: tuple[str, str]) -> Transcript | None:
        transcript = self._kept.pop(key, None)
        if transcript is not None:
            self._size -= transcript.size
            transcript.is_dropped = True
            transcript.events.clear()  # who writes it may go on for long
        return transcript


def size_of(event: Event) -> int:
    """The bytes of memory that an event takes, about."""
    match event:
        case Chunk(text, tokens, logprobs):
            size = sys.getsizeof(text) + TOKEN_BYTES * len(tokens)
            size += sum(map(_size_of_likelihood, logprobs))
        case Thought(text):
            size = sys.getsizeof(text)
        case ToolCall(name, arguments, call_id):
            size = sum(map(sys.getsizeof, (name, arguments, call_id)))
        case Finished():
            size = TOKEN_BYTES * len(event.context) + EVENT_BYTES * len(event.failovers)
        case Failed():
            size = 0
    return EVENT_BYTES + size


def _size_of_likelihood(one: Likelihood) -> int:
    return LIKELIHOOD_BYTES + len(one.token) + sum(map(_size_of_likelihood, one.others))


class Resume(msgspec.Struct, frozen=True):
    """Where a client stands that asks for the rest of an answer."""

    from_token: int = 0  # tokens that it has
    received: str | None = None  # their text; without it, what was made again is not compared

    def is_ahead_of(self, events: Sequence[Event]) -> bool:
        """Whether it has more than these events, the beginning of an answer that was made again."""
        tokens = 0
        for event in events:
            if not isinstance(event, Chunk):
                return False  # it has ended, or counts no tokens
            tokens += len(event.tokens)
        return tokens < self.from_token

    def cut(self, events: Sequence[Event]) -> list[Event]:
        """These events, of which one ends where it stands if its text shows where that is.

        What an answer went on behind is kept as one part, and a client whose entry node died once
        more may have less than that.
        """
        tokens, text, received = 0, "", self.received or ""
        for place, event in enumerate(events):
            if not isinstance(event, Chunk) or tokens >= self.from_token:
                break
            missing = self.from_token - tokens
            if missing < len(event.tokens):
                said = received[len(text) :]
                if self.received is None or text + said != received or event.logprobs:
                    break
                if not event.text.startswith(said):
                    break
                first = Chunk(said, event.tokens[:missing])
                rest = Chunk(event.text[len(said) :], event.tokens[missing:])
                return [*events[:place], first, rest, *events[place + 1 :]]
            tokens += len(event.tokens)
            text += event.text
        return list(events)

    def known(self, events: Sequence[Event]) -> int:
        """How many of these events, which are the answer, it has.

        Raises:
          InferenceError: none ends where it stands.
        """
        tokens = 0
        for count, event in enumerate(events):
            if tokens == self.from_token:
                return count
            if isinstance(event, Chunk):
                tokens += len(event.tokens)
            elif isinstance(event, Output):
                raise _mismatch("an answer with thoughts or tool calls can be resumed from 0 only")
        if tokens == self.from_token:
            return len(events)
        raise _mismatch(f"no part of the answer ends after {self.from_token} tokens; resume from 0")


def _mismatch(message: str) -> InferenceError:
    return InferenceError(Failed("RESUME_MISMATCH", message, 409))
