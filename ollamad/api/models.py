"""Handlers: models, the blobs that they are made of, and transfers."""

import re
from collections.abc import Sequence
from typing import Literal

import msgspec

from ollamad.api.asgi import Reply
from ollamad.api.bodies import (
    CopyBody,
    CreateBody,
    DownloadBody,
    PushBody,
    ReplicasBody,
    invalid,
)
from ollamad.api.calls import Call, read_name, reply, rfc3339
from ollamad.api.descriptions import model_info, shown_texts
from ollamad.api.schemas import (
    Blob,
    Cancelled,
    Deleted,
    Download,
    EngineInfo,
    LayerInfo,
    ModelDetailsInfo,
    ModelInfo,
    ModelList,
    ModelSummary,
    OneModel,
    OneTransfer,
    PlacementInfo,
    ReplicasAnswer,
    TransferInfo,
    TransferList,
    Upload,
)
from ollamad.api.services import ServiceError
from ollamad.core.ids import NodeId
from ollamad.core.modelfile import ModelfileError, digest_of, is_path, parse_modelfile
from ollamad.core.names import is_reference
from ollamad.core.state import Model
from ollamad.core.transfers import Transfer

_DIGEST = re.compile(r"sha256[:-][0-9a-f]{64}")


async def list_models(call: Call) -> Reply:
    models = call.services.cluster.state.models.values()
    newest_first = sorted(models, key=lambda model: (-model.modified_at, model.name))
    wanted = call.services.library.wanted_replicas()
    return reply(ModelList([_summary(model, wanted.get(model.name, 1)) for model in newest_first]))


async def show_model(call: Call, name: str) -> Reply:
    """The model, and what it says of itself if a node that holds it is there to be asked."""
    model = await call.find_model(name)
    full = _full(call, model)
    try:
        description = await call.services.library.describe(model.name)
    except ServiceError as error:  # nobody who holds it can be asked
        return reply(
            OneModel(msgspec.structs.replace(full, engine=None, description_error=error.message))
        )
    full = msgspec.structs.replace(
        full,
        engine=EngineInfo(description.engine or None, description.engine_reason),
        model_info=model_info(description, verbose=False),
        **shown_texts(model, description),
    )
    return reply(OneModel(full))


async def create_model(call: Call) -> Reply:
    """A model of uploaded files, or as a Modelfile says."""
    body = await call.body(CreateBody)
    name = str(read_name(body.name, "name"))
    if body.quantize:
        raise quantize_refused()
    files = {file: read_digest(digest, f"files.{file}") for file, digest in body.files.items()}
    library = call.services.library
    if not body.modelfile:
        if not files:
            raise invalid("files", "files must name at least one uploaded blob", expected="object")
        model = await library.create(name, files, replace=body.replace)
        return reply(OneModel(_full(call, model)), 201)
    try:
        parsed = parse_modelfile(body.modelfile)
    except ModelfileError as error:
        raise ServiceError(400, "INVALID_MODELFILE", str(error), {"field": "modelfile"}) from None
    wanted = [each for each in (*parsed.bases, *parsed.adapters) if digest_of(each) is None]
    missing = [each for each in wanted if is_path(each) and each not in files]
    if missing:
        raise ServiceError(
            400,
            "FILES_NEEDED",
            "the Modelfile names files: upload them to /blobs/DIGEST, and say in files which "
            f"is which: {', '.join(missing)}",
            {"files": missing},
        )
    adapters = tuple(digest_of(each) or files.get(each, "") for each in parsed.adapters)
    if not all(adapters):
        raise ServiceError(
            400, "INVALID_MODELFILE", "ADAPTER must name a GGUF file with a LoRA adapter"
        )
    changes = msgspec.structs.replace(parsed.changes, adapters=adapters)
    blobs = {each: digest_of(each) or files.get(each, "") for each in parsed.bases}
    if all(blobs.values()):
        model = await library.create(name, blobs, changes, replace=body.replace)
    elif len(blobs) > 1:
        raise ServiceError(
            400, "INVALID_MODELFILE", "several FROM must all be files: one model, and projectors"
        )
    else:
        base = await _base(call, parsed.bases[0])
        known = call.services.cluster.state.find_model(name)
        if known is not None and not body.replace:
            raise ServiceError(
                409,
                "MODEL_EXISTS",
                f"there is a model {known.name} already; choose another name, or replace it",
                {"name": known.name},
            )
        model = await library.derive(name, base.name, changes)
    return reply(OneModel(_full(call, model)), 201)


async def _base(call: Call, name: str) -> Model:
    """The model that FROM names; the error says which is missing, so that it can be pulled."""
    try:
        return await call.find_model(name)
    except ServiceError as error:
        raise ServiceError(
            error.status,
            error.code,
            f"{error.message}: FROM needs it, pull it first",
            error.details | {"base": name},
        ) from None


async def copy_model(call: Call, name: str) -> Reply:
    model = await call.find_model(name)
    body = await call.body(CopyBody)
    destination = read_name(body.destination, "destination")
    known = call.services.cluster.state.find_model(str(destination))
    if known is not None and known.digest != model.digest:
        raise ServiceError(
            409,
            "MODEL_EXISTS",
            f"there is another model {known.name} already; delete it first",
            {"name": known.name},
        )
    copied = known or await call.services.library.derive(str(destination), model.name)
    return reply(OneModel(_full(call, copied)), 201)


async def push_model(call: Call, name: str) -> Reply:
    model = await call.find_model(name)
    body = await call.body(PushBody, optional=True)
    destination = str(read_name(body.destination or model.name, "destination"))
    transfer_id = await call.services.library.push(model.name, destination)
    return reply(Upload("uploading", model.name, "Model upload started", transfer_id, destination))


def quantize_refused() -> ServiceError:
    """What cannot be done here, and who can."""
    return ServiceError(
        400,
        "NOT_SUPPORTED",
        "quantize is not supported: the engines here load models, and llama.cpp's quantizer is a "
        "program of its own. Run llama-quantize on the file, or pull a quantized one, and create "
        "the model of that",
        {"field": "quantize"},
    )


async def delete_model(call: Call, name: str) -> Reply:
    services = call.services
    model = await call.find_model(name)
    await services.library.delete(model.name)
    return reply(
        Deleted(
            message=f"Successfully deleted model {model.name}",
            request_id=f"delete_{model.name}_{int(services.wall())}",
            node_id=services.cluster.node_id,
        )
    )


async def ask_replicas(call: Call, name: str) -> Reply:
    body = await call.body(ReplicasBody)
    known = await call.find_model(name)
    model = await call.services.library.ask_replicas(known.name, body.replicas or 0)
    full = _full(call, model)
    copies = "1 copy" if full.replicas_wanted == 1 else f"{full.replicas_wanted} copies"
    message = f"{model.name} should have {copies}; {len(model.confirmed)} there now"
    return reply(ReplicasAnswer(message, full))


async def download_model(call: Call, name: str) -> Reply:
    body = await call.body(DownloadBody, optional=True)
    # A reference such as pypi:NAME==1.0 is no model name; the library finds its name.
    is_whole = body.source is None and is_reference(name)
    model = name if is_whole else str(read_name(name))
    nodes: Sequence[NodeId] = [(await call.find_member(reference)).id for reference in body.nodes]
    transfer_id = await call.services.library.download(
        model, source=body.source, nodes=nodes, replicas=body.replicas
    )
    return reply(
        Download(
            status="downloading",
            model=model,
            message="Model download started",
            transfer_id=transfer_id,
        )
    )


async def has_blob(call: Call, digest: str) -> Reply:
    digest = read_digest(digest, "digest")
    if not await call.services.library.has_blob(digest):
        raise ServiceError(404, "BLOB_NOT_FOUND", f"blob {digest} is not here", {"digest": digest})
    return reply(Blob(digest))


async def upload_blob(call: Call, digest: str) -> Reply:
    """The raw body is the blob; it is streamed to the disk, and its size is not limited here."""
    digest = read_digest(digest, "digest")
    library = call.services.library
    if await library.has_blob(digest):
        return reply(Blob(digest))
    body = call.request.body
    await library.receive_blob(digest, body, body.expected_length)
    return reply(Blob(digest), 201)


async def list_transfers(call: Call) -> Reply:
    transfers = await call.services.library.transfers()
    return reply(TransferList([_transfer(transfer) for transfer in transfers]))


async def show_transfer(call: Call, transfer_id: str) -> Reply:
    return reply(OneTransfer(_transfer(await _find_transfer(call, transfer_id))))


async def cancel_transfer(call: Call, transfer_id: str) -> Reply:
    transfer = await _find_transfer(call, transfer_id)
    if transfer.status not in ("pending", "active"):
        raise ServiceError(
            409,
            "TRANSFER_ENDED",
            f"the transfer is {transfer.status} already",
            {"status": transfer.status},
        )
    await call.services.library.cancel(transfer.id)
    return reply(Cancelled(f"Transfer {transfer.id} is being cancelled", transfer.id))


async def _find_transfer(call: Call, transfer_id: str) -> Transfer:
    for transfer in await call.services.library.transfers():
        if transfer.id == transfer_id:
            return transfer
    raise ServiceError(
        404, "TRANSFER_NOT_FOUND", f"there is no transfer {transfer_id!r}", {"id": transfer_id}
    )


def read_digest(text: str, field: str) -> str:
    """A digest as `sha256:…`.

    Raises:
      ServiceError: 400.
    """
    if not _DIGEST.fullmatch(text):
        raise invalid(field, f"{field} must be sha256: and 64 hex digits", expected="digest")
    return text.replace("-", ":")


def _details(model: Model) -> ModelDetailsInfo:
    details = model.details
    return ModelDetailsInfo(
        parent_model=details.parent_model,
        format=details.format,
        family=details.family,
        families=details.families,
        parameter_size=details.parameter_size,
        quantization_level=details.quantization_level,
        context_length=details.context_length,
        embedding_length=details.embedding_length,
        capabilities=details.capabilities,
    )


def _summary(model: Model, wanted: int) -> ModelSummary:
    return ModelSummary(
        name=model.name,
        size=model.size,
        digest=model.digest,
        modified_at=rfc3339(model.modified_at),
        details=_details(model),
        replicas=model.confirmed,
        replicas_wanted=wanted,
        pinned=model.pinned,
    )


def _full(call: Call, model: Model) -> ModelInfo:
    cluster = call.services.cluster
    status: Literal["available", "unavailable", "downloading", "missing"]
    if not model.confirmed:
        status = "downloading" if model.desired else "missing"
    elif any(cluster.presence(node_id).online for node_id in model.confirmed):
        status = "available"
    else:
        status = "unavailable"
    placement = call.services.library.placement(model)
    return ModelInfo(
        name=model.name,
        size=model.size,
        digest=model.digest,
        modified_at=rfc3339(model.modified_at),
        details=_details(model),
        replicas=model.confirmed,
        replicas_wanted=placement.want,
        replicas_asked=model.replicas or None,
        pinned=model.pinned,
        placement=PlacementInfo(placement.reason, placement.nodes),
        status=status,
        inference_ready=call.services.library.inference_ready(model),
        desired=model.desired,
        loaded_on=[
            node_id
            for node_id in cluster.state.members
            if any(one.digest == model.digest for one in cluster.presence(node_id).beat.loaded)
        ],
        layers=[LayerInfo(layer.media_type, layer.digest, layer.size) for layer in model.layers],
    )


def _transfer(transfer: Transfer) -> TransferInfo:
    ended = transfer.finished_at
    return TransferInfo(
        id=transfer.id,
        model_name=transfer.model_name,
        type=transfer.type,
        status=transfer.status,
        progress=transfer.progress,
        speed=round(transfer.speed),
        eta=None if transfer.eta is None else round(transfer.eta),
        peer_id=transfer.peer_id,
        node_id=transfer.node_id,
        bytes_done=transfer.bytes_done,
        bytes_total=transfer.bytes_total,
        error=transfer.error,
        warning=transfer.warning,
        started_at=rfc3339(transfer.started_at),
        finished_at=None if ended is None else rfc3339(ended),
        digest=transfer.digest,
    )
