"""Handlers of Ollama's API that are about models: lists, show, pull, create, copy, delete, blobs.

`/api/tags` and `/api/ps` tell of the whole cluster; a pull tells the progress of the cluster's own
transfer, wherever it runs.
"""

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import trio

import ollamad
from ollamad.api.asgi import Reply
from ollamad.api.bodies import checked_template, invalid, read_options
from ollamad.api.calls import Call, reply, rfc3339
from ollamad.api.conversation import read_messages
from ollamad.api.descriptions import model_info, shown_texts
from ollamad.api.dialects import ollama_error
from ollamad.api.errors import as_service_error
from ollamad.api.generation import LineLayout, encode
from ollamad.api.models import has_blob, quantize_refused, read_digest, upload_blob
from ollamad.api.ollama import find
from ollamad.api.ollama_bodies import (
    CopyBody,
    CreateBody,
    NamedBody,
)
from ollamad.api.services import ServiceError
from ollamad.core.description import Changes
from ollamad.core.inference import LoadedModel
from ollamad.core.names import InvalidName, ModelName, is_reference, parse_name
from ollamad.core.state import Model, ModelDetails
from ollamad.core.transfers import Transfer

# The first release of Ollama with all the surfaces that are here (`/v1/responses` came with 0.13.3,
# `/v1/messages` with 0.14.0). Clients refuse a server that is older than a feature that they need,
# as Codex does below 0.13.4, so a number of our own would lock them out.
OLLAMA_VERSION = "0.14.0"
# A model that stays in memory for ever is told to go in this year: a date that every client's
# arithmetic can hold. Ollama itself says "in 292 years".
FOR_EVER = "2300-01-01T00:00:00Z"
PROGRESS_INTERVAL_S = 0.2  # between two looks at a transfer
LOST_AFTER_S = 10.0  # a transfer whose node does not tell of it for so long has failed

_ACTS = {"pull": "pulls", "push": "pushes"}

Tell = Callable[[dict[str, Any]], Awaitable[None]]


async def version(call: Call) -> Reply:
    return reply({"version": OLLAMA_VERSION, "ollamad": ollamad.__version__})


async def tags(call: Call) -> Reply:
    models = call.services.cluster.state.models.values()
    newest_first = sorted(models, key=lambda model: (-model.modified_at, model.name))
    return reply(
        {
            "models": [
                {
                    "name": model.name,
                    "model": model.name,
                    "modified_at": rfc3339(model.modified_at),
                    "size": model.size,
                    "digest": _hex(model.digest),
                    "details": _details(model),
                    "capabilities": model.details.capabilities,
                }
                for model in newest_first
            ]
        }
    )


async def ps(call: Call) -> Reply:
    """What is in memory anywhere: a model that two nodes have loaded is told twice."""
    cluster = call.services.cluster
    rows = []
    for member in sorted(cluster.state.members.values(), key=lambda member: member.name):
        presence = cluster.presence(member.id)
        if presence.online:
            rows += [_loaded(call, one) | {"node": member.name} for one in presence.beat.loaded]
    return reply({"models": rows})


async def show(call: Call) -> Reply:
    body = await call.body(NamedBody, any_type=True)
    if not body.wanted:
        raise invalid("model", "model is required")
    model = await find(call, body.wanted, f"model '{body.wanted}' not found")
    description = await call.services.library.describe(model.name)
    return reply(
        shown_texts(model, description)
        | {
            "details": _details(model),
            "model_info": model_info(description, verbose=body.verbose is True),
            "capabilities": model.details.capabilities,
            "modified_at": rfc3339(model.modified_at),
        }
    )


async def delete(call: Call) -> Reply:
    body = await call.body(NamedBody, any_type=True)
    model = await find(call, body.wanted, f"model '{body.wanted}' not found")
    await call.services.library.delete(model.name)
    return Reply(b"")


async def copy(call: Call) -> Reply:
    body = await call.body(CopyBody, any_type=True)
    source = _name(body.source, f'source "{body.source or ""}" is invalid')
    destination = _name(body.destination, f'destination "{body.destination or ""}" is invalid')
    model = await find(call, str(source), f'model "{body.source}" not found')
    if destination.key != source.key:
        await call.services.library.derive(str(destination), model.name)
    return Reply(b"")


async def pull(call: Call) -> Reply | None:
    body = await call.body(NamedBody, any_type=True)
    wanted = body.wanted
    # A reference such as pypi:NAME==1.0 is no model name; the library finds its name.
    if not is_reference(wanted):
        wanted = str(_name(wanted, "invalid model name"))

    async def work(tell: Tell) -> None:
        library = call.services.library
        warning = ""
        model = call.services.cluster.state.find_model(wanted)
        if model is None or not library.inference_ready(model):
            transfer_id: str | None = await library.download(wanted)
        else:
            try:
                transfer_id = await library.update(model.name)
            except ServiceError as error:
                transfer_id = None
                warning = f"what is here stays, newer or not: {error.message}"
        await tell({"status": "pulling manifest"})
        if transfer_id is not None:
            warning = await _follow(call, transfer_id, tell)
        elif model is not None:
            for layer in model.layers:
                await tell(_moving("pull", layer.digest, layer.size, layer.size))
        for status in ("verifying sha256 digest", "writing manifest"):
            await tell({"status": status})
        if warning:
            await tell({"status": f"warning: {warning}"})
        await tell({"status": "success"})

    return await _with_progress(call, work, stream=body.stream is not False)


async def push(call: Call) -> Reply | None:
    body = await call.body(NamedBody, any_type=True)
    name = _name(body.wanted, "invalid model name")
    model = await find(call, str(name), f"model '{body.wanted}' not found")

    async def work(tell: Tell) -> None:
        transfer_id = await call.services.library.push(model.name, str(name))
        await tell({"status": "retrieving manifest"})
        await _follow(call, transfer_id, tell, verb="push")
        for status in ("pushing manifest", "success"):
            await tell({"status": status})

    return await _with_progress(call, work, stream=body.stream is not False)


async def create(call: Call) -> Reply | None:
    body = await call.body(CreateBody, any_type=True)
    name = str(_name(body.wanted, "invalid model name"))
    changes = _changes(body)
    if body.quantize or body.quantization:
        raise quantize_refused()
    files = {
        file: read_digest(digest, f"files.{file}") for file, digest in (body.files or {}).items()
    }
    if body.from_:
        _name(body.from_, "invalid model name")
    elif not files:
        raise invalid("from", "neither 'from' or 'files' was specified")

    async def work(tell: Tell) -> None:
        library = call.services.library
        if body.from_:
            base = await _found_or_pulled(call, body.from_, tell)
            before = {layer.digest for layer in base.layers}
            model = await library.derive(name, base.name, changes)
        else:
            before = set(files.values())
            model = await library.create(name, files, changes, replace=True)
        for layer in model.layers:
            what = "using existing" if layer.digest in before else "creating new"
            await tell({"status": f"{what} layer {layer.digest}"})
        await tell({"status": "writing manifest"})
        await tell({"status": "success"})

    return await _with_progress(call, work, stream=body.stream is not False)


async def _found_or_pulled(call: Call, name: str, tell: Tell) -> Model:
    """The model of that name; pulled, if the cluster does not have it.

    Raises:
      ServiceError: nobody has it.
    """
    try:
        return await call.find_model(name)
    except ServiceError as error:
        if error.status != 404:
            raise
    transfer_id = await call.services.library.download(str(_name(name, "invalid model name")))
    await tell({"status": "pulling manifest"})
    await _follow(call, transfer_id, tell)
    return await call.find_model(name)


async def head_blob(call: Call, digest: str) -> Reply:
    await has_blob(call, digest)
    return Reply(b"")


async def put_blob(call: Call, digest: str) -> Reply:
    return Reply(b"", (await upload_blob(call, digest)).status)


async def _with_progress(
    call: Call, work: Callable[[Tell], Awaitable[None]], *, stream: bool
) -> Reply | None:
    """Answer with the steps that `work` tells as they come, or with the last one at the end.

    An error before the first step has its status; a later one is the last line.
    """
    request = call.request
    last: dict[str, Any] = {}

    async def tell(step: dict[str, Any]) -> None:
        nonlocal last
        last = step
        if stream:
            if request.head_sent_at is None:
                await request.send_head(200, ((b"content-type", LineLayout.content_type),))
            await request.send_body(encode(step) + b"\n", more=True)

    try:
        await work(tell)
    except Exception as error:
        if request.head_sent_at is None:
            raise
        failure = ollama_error(as_service_error(error, request.id))
        await request.send_body(encode(failure) + b"\n", more=False)
        return None
    if not stream:
        return reply(last)
    await request.send_body(b"", more=False)
    return None


async def _follow(call: Call, transfer_id: str, tell: Tell, *, verb: str = "pull") -> str:
    """Tell the progress of a transfer until its end; returns its warning.

    Raises:
      ServiceError: it failed, was cancelled, or its node does not tell of it any more.
    """
    told: dict[str, dict[str, Any]] = {}
    heard_at = trio.current_time()
    while True:
        transfer = await call.services.library.transfer(transfer_id)
        if transfer is not None:
            heard_at = trio.current_time()
            for step in _steps(verb, transfer):
                if told.get(step["status"]) != step:
                    told[step["status"]] = step
                    await tell(step)
            match transfer.status:
                case "completed":
                    if verb == "pull":
                        await _until_listed(call, transfer)
                    return transfer.warning
                case "failed":
                    raise ServiceError(500, "TRANSFER_FAILED", transfer.error)
                case "cancelled":
                    raise ServiceError(500, "TRANSFER_CANCELLED", f"the {verb} was cancelled")
        elif trio.current_time() - heard_at > LOST_AFTER_S:
            raise ServiceError(
                503,
                "NODE_UNREACHABLE",
                f"the node that {_ACTS[verb]} the model does not answer",
            )
        await trio.sleep(PROGRESS_INTERVAL_S)


async def _until_listed(call: Call, transfer: Transfer) -> None:
    """What is pulled can be used with the next request, though another node has pulled it."""
    if call.services.cluster.state.find_model(transfer.model_name) is None:
        await call.find_model(transfer.model_name)


def _changes(body: CreateBody) -> Changes:
    if body.template and "{%" not in body.template:  # else it is Jinja, which the runner reads
        checked_template(body.template)
    licenses = (body.license,) if isinstance(body.license, str) else body.license or ()
    return Changes(
        template=body.template or "",
        system=body.system or "",
        parameters=_parameters(body.parameters),
        messages=read_messages(body.messages),
        licenses=tuple(text for text in licenses if text),
        adapters=tuple(
            read_digest(digest, f"adapters.{file}")
            for file, digest in (body.adapters or {}).items()
        ),
        config={
            key: value
            for key in ("renderer", "parser", "requires")
            if (value := getattr(body, key))
        },
    )


def _parameters(given: dict[str, Any] | None) -> dict[str, Any]:
    """A model's parameters as they are given, but whole numbers as they are read: a seed may have
    any number of digits."""
    read = msgspec.structs.asdict(read_options(given))
    parameters = {name: value for name, value in (given or {}).items() if value is not None}
    return parameters | {name: value for name, value in read.items() if isinstance(value, int)}


def _name(text: str | None, problem: str) -> ModelName:
    try:
        return parse_name(text or "")
    except InvalidName:
        raise ServiceError(400, "INVALID_MODEL_NAME", problem) from None


def _steps(verb: str, transfer: Transfer) -> list[dict[str, Any]]:
    """The files that have moved, and the one that moves now; one for all if they are not known."""
    steps: list[dict[str, Any]] = []
    left = transfer.bytes_done
    layers = transfer.layers or ((transfer.digest, transfer.bytes_total),)
    for digest, size in layers if transfer.bytes_total else ():
        completed = min(size, left)
        left -= completed
        steps.append(_moving(verb, digest, size, completed))
        if completed < size:
            break
    return steps


def _moving(verb: str, digest: str, total: int, completed: int) -> dict[str, Any]:
    step: dict[str, Any] = {"status": f"{verb}ing {_hex(digest)[:12]}".rstrip()}
    if digest:
        step["digest"] = digest
    return step | {"total": total} | ({"completed": completed} if completed else {})


def _details(model: Model | None) -> dict[str, Any]:
    """What the model is; of one that was deleted while it is in memory, nothing is known."""
    details = ModelDetails() if model is None else model.details
    return {
        "parent_model": details.parent_model,
        "format": details.format,
        "family": details.family,
        "families": details.families,
        "parameter_size": details.parameter_size,
        "quantization_level": details.quantization_level,
    }


def _loaded(call: Call, loaded: LoadedModel) -> dict[str, Any]:
    model = call.services.cluster.state.find_model(loaded.name)
    return {
        "name": loaded.name,
        "model": loaded.name,
        "size": loaded.size,
        "digest": _hex(loaded.digest),
        "details": _details(model),
        "expires_at": rfc3339(loaded.expires_at) if loaded.expires_at else FOR_EVER,
        "size_vram": loaded.size_vram,
        "context_length": loaded.context_length,
        "engine": loaded.engine,
    }


def _hex(digest: str) -> str:
    return digest.removeprefix("sha256:")
