"""Finds what was said of an answer whose entry node died, on whatever node served it.

The holders of the model are asked, since one of them served; that is two or three questions.
Asking also ends the generation there, at its next token, so that nothing is made twice for long.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import msgspec
import trio

from ollamad.core.ids import NodeId
from ollamad.core.inference import Event, Failed, GenerateRequest, InferenceError
from ollamad.core.transcripts import Transcript, Transcripts
from ollamad.scheduler.exchange import (
    LOSSES,
    TRANSCRIPT,
    Peers,
    PeerStream,
    ask,
    receive_whole,
    send_whole,
)
from ollamad.wire.codec import MalformedMessage, decode, encode

# A node that does not answer that soon is most likely the one that died; the answer is then made
# again on another one.
ASK_TIMEOUT_S = 1.5


class _Asked(msgspec.Struct, frozen=True):
    request_id: str
    fingerprint: str


class _Told(msgspec.Struct, frozen=True):
    """What a node has said; `is_another`: under that id, but to another request."""

    events: list[Event] = []
    is_another: bool = False


class Keeper:
    """The transcripts of this node, and the questions about them."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._transcripts = Transcripts()
        self._now = now

    @contextmanager
    def keeping(self, request: GenerateRequest) -> Iterator[Transcript]:
        """The transcript of a generation that runs in this context."""
        transcript = self._transcripts.begin(request, self._now())
        try:
            yield transcript
        finally:
            self._transcripts.end(transcript, self._now())

    def note(self, transcript: Transcript, event: Event) -> None:
        """An event of an answer.

        Raises:
          InferenceError: somebody has asked for what was said before, and goes on with that.
        """
        if transcript.is_taken:
            raise InferenceError(
                Failed("RESUMED_ELSEWHERE", "the client goes on with this at another node", 409)
            )
        self._transcripts.add(transcript, event)

    async def find(
        self,
        request: GenerateRequest,
        holders: Sequence[NodeId],
        here: NodeId,
        is_online: Callable[[NodeId], bool],
        peers: Peers,
    ) -> tuple[NodeId, list[Event]] | None:
        """Who served that request before, and what it said, if anybody did.

        Raises:
          InferenceError: 409, another request of the same identity has that id.
        """
        question = _Asked(request.request_id, request.fingerprint)
        told: list[tuple[NodeId, _Told]] = []

        async def find_out(node_id: NodeId) -> None:
            with trio.move_on_after(ASK_TIMEOUT_S), suppress(*LOSSES):
                async with ask(peers, node_id, TRANSCRIPT, encode(question)) as stream:
                    told.append((node_id, decode(await receive_whole(stream), _Told)))

        async with trio.open_nursery() as nursery:
            for node_id in holders:
                if node_id == here:
                    told.append((here, self._tell(question)))
                elif is_online(node_id):
                    nursery.start_soon(find_out, node_id)
        if any(answer.is_another for _, answer in told):
            raise InferenceError(
                Failed(
                    "REQUEST_ID_TAKEN",
                    f"the request_id {request.request_id!r} belongs to another request of yours; "
                    "choose a new one for each",
                    409,
                )
            )
        told = [each for each in told if each[1].events]
        if not told:
            return None
        node_id, best = max(told, key=lambda each: len(each[1].events))
        return node_id, best.events

    async def serve(self, request: bytes, stream: PeerStream) -> None:
        """Answer the question of another node."""
        try:
            asked = decode(request or await receive_whole(stream), _Asked)
        except MalformedMessage:
            asked = _Asked("", "")
        await send_whole(stream, encode(self._tell(asked)))

    def _tell(self, asked: _Asked) -> _Told:
        transcript = self._transcripts.find(asked.request_id, asked.fingerprint, self._now())
        if transcript is None:
            return _Told()
        if transcript.fingerprint != asked.fingerprint:
            return _Told(is_another=True)
        transcript.is_taken = True
        return _Told(list(transcript.events))
