"""Handlers of `/api/v1`: generate, chat and embeddings, whole and streamed."""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from ollamad.api.asgi import Reply
from ollamad.api.bodies import ChatBody, EmbedBody, ExplainBody, GenerateBody
from ollamad.api.calls import Call, reply
from ollamad.api.generation import LineLayout, Whole, answer, embed, encode
from ollamad.api.ollama import read_think, require_capability, require_completion, shortened
from ollamad.api.schemas import EmbeddingsAnswer
from ollamad.api.services import Generation
from ollamad.core.admission import Place
from ollamad.core.inference import Chunk, Finished, GenerateRequest, Output


async def generate(call: Call) -> Reply | None:
    body = await call.body(GenerateBody)
    return await _answer(call, body, body.request())


async def chat(call: Call) -> Reply | None:
    body = await call.body(ChatBody)
    return await _answer(call, body, body.request())


async def embeddings(call: Call) -> Reply:
    body = await call.body(EmbedBody)
    request = body.request()
    request = msgspec.structs.replace(request, model=(await call.find_model(request.model)).name)
    embedded = await embed(call, request)
    result = embedded.embeddings
    vectors: Sequence[Sequence[float]] = result.vectors
    if body.dimensions:
        vectors = [shortened(vector, body.dimensions) for vector in vectors]
    shown = EmbeddingsAnswer(
        model=request.model,
        embedding=vectors[0],
        total_duration=result.total_duration,
        load_duration=result.load_duration,
        prompt_eval_count=result.prompt_eval_count,
        embeddings=msgspec.UNSET if body.input is None else vectors,
    )
    return reply(shown, headers={"X-Ollamad-Node": embedded.node_id})


async def explain(call: Call) -> Reply:
    """Where such a request would go now, and why; nothing is run."""
    body = await call.body(ExplainBody)
    request = body.request()
    request = msgspec.structs.replace(request, model=(await call.find_model(request.model)).name)
    return reply(call.services.inference.explain(request))


class NativeLayout(LineLayout):
    """The lines of `/api/v1`: with what its clients may ask for beside the answer.

    `token` counts the tokens up to the end of a line, for who names the request to resume it.
    """

    def __init__(
        self, model: str, *, chat: bool, wall: Callable[[], float], first_token: int | None
    ) -> None:
        super().__init__(model, chat=chat, wall=wall)
        self._token = first_token  # None: they are not counted, or not known
        self._routing: dict[str, Any] = {}
        self._waited = False

    def begin(self, generation: Generation) -> bytes:
        """The request waits no more. What is known only now is told at the end."""
        if generation.explanation is not None:
            self._routing["routing"] = generation.explanation
        if self._waited:  # its headers went out before that was known
            self._routing["node_id"] = generation.node_id
        return b""

    def waiting(self, place: Place) -> bytes:
        """Where it stands in the queue."""
        self._waited = True
        status = {
            "status": "queued",
            "position": place.position,
            "waiting": place.waiting,
            "estimate_seconds": place.estimate_s,
            "done": False,
        }
        return encode(self.opening(Whole()) | status) + b"\n"

    def part(self, output: Output) -> bytes:
        line = super().part(output)
        if self._token is None:
            return line
        if not isinstance(output, Chunk) or not output.tokens:
            self._token = None  # from here on a number would be wrong
            return line
        self._token += len(output.tokens)
        return line[:-2] + b',"token":%d}\n' % self._token

    def whole(self, said: Whole, end: Finished) -> dict[str, Any]:
        return super().whole(said, end) | self._routing


async def _answer(
    call: Call, body: GenerateBody | ChatBody, request: GenerateRequest
) -> Reply | None:
    model = await call.find_model(request.model)
    chat = request.messages is not None
    if not request.only_loads:  # which each model can
        require_completion(model, body.model, "chat" if chat else "generate")
    if request.tools:
        require_capability(model, "tools")
    if request.has_images:
        require_capability(model, "vision")
    think = read_think(model, body.model, body.think)
    request = msgspec.structs.replace(request, model=model.name, think=think)
    resume = body.resume()
    layout = NativeLayout(
        request.model,
        chat=chat,
        wall=call.services.wall,
        first_token=None if resume is None else resume.from_token,
    )
    return await answer(
        call,
        request,
        layout,
        stream=body.stream is True,
        resume=resume,
        waiting=layout.waiting,
        on_begin=layout.begin,
    )
