"""Handlers: the nodes of the cluster, and draining them."""

from typing import Literal

from ollamad.api.asgi import Reply
from ollamad.api.calls import Call, reply, rfc3339
from ollamad.api.schemas import (
    Done,
    DrainInfo,
    Loaded,
    NodeCapacity,
    NodeInfo,
    NodeList,
    NodeUsage,
    OneNode,
)
from ollamad.core.inference import LoadedModel
from ollamad.core.state import Member

GB = 1_000_000_000  # the document's unit for capacity, in whole numbers


async def list_nodes(call: Call) -> Reply:
    members = call.services.cluster.state.members.values()
    ordered = sorted(members, key=lambda member: member.name)
    return reply(NodeList([describe(call, member) for member in ordered]))


async def show_node(call: Call, reference: str) -> Reply:
    return reply(OneNode(describe(call, await call.find_member(reference))))


async def drain(call: Call, reference: str) -> Reply:
    member = await call.find_member(reference)
    await call.services.cluster.set_draining(member.id, True)
    return reply(Done(f"Node {member.name} is being drained"))


async def undrain(call: Call, reference: str) -> Reply:
    member = await call.find_member(reference)
    await call.services.cluster.set_draining(member.id, False)
    return reply(Done(f"Node {member.name} is no longer draining"))


def _drain(call: Call, member: Member) -> DrainInfo | None:
    """What a node that drains still waits for; None if it does not drain."""
    if not member.draining:
        return None
    beat = call.services.cluster.presence(member.id).beat
    answers = sum(loaded.busy + loaded.queued for loaded in beat.loaded)
    sole = call.services.library.sole_models(member.id)
    return DrainInfo(not (answers or sole), answers, sole)


def describe(call: Call, member: Member) -> NodeInfo:
    """A node as both node routes show it: fractions in `*_usage`, percent in `cpu`, `memory`."""
    cluster = call.services.cluster
    presence = cluster.presence(member.id)
    usage, capacity = presence.beat.usage, member.capacity
    status: Literal["online", "draining", "offline"] = "draining" if member.draining else "online"
    if not presence.online:
        status = "offline"
    models = [model.name for model in cluster.state.models.values() if member.id in model.confirmed]
    return NodeInfo(
        id=member.id,
        name=member.name,
        address=member.api_address,
        status=status,
        # The cluster saw a member at the latest when it joined.
        last_seen=rfc3339(max(presence.last_seen, member.joined_at)),
        models=sorted(models),
        capacity=NodeCapacity(
            cpu_cores=capacity.cpu_cores,
            memory_gb=round(capacity.memory_bytes / GB),
            disk_gb=round(capacity.disk_bytes / GB),
            gpu_count=capacity.gpu_count,
            gpu_memory_gb=round(capacity.gpu_memory_bytes / GB),
            memory_bytes=capacity.memory_bytes,
            disk_bytes=capacity.disk_bytes,
            gpu_memory_bytes=capacity.gpu_memory_bytes,
        ),
        usage=NodeUsage(
            cpu_usage=round(usage.cpu, 4),
            memory_usage=round(usage.memory, 4),
            disk_usage=round(usage.disk, 4),
            gpu_usage=round(usage.gpu, 4),
            cpu=round(100 * usage.cpu, 2),
            memory=round(100 * usage.memory, 2),
            bandwidth=round(usage.bandwidth, 1),
        ),
        draining=member.draining,
        drain=_drain(call, member),
        is_leader=member.id == cluster.leader(),
        voter=member.id in cluster.voters(),
        version=member.version,
        joined_at=rfc3339(member.joined_at),
        p2p_address=member.p2p_address,
        loaded=[_loaded(loaded) for loaded in presence.beat.loaded],
        gpus=presence.beat.gpus,
    )


def _loaded(model: LoadedModel) -> Loaded:
    return Loaded(
        name=model.name,
        digest=model.digest,
        size=model.size,
        size_vram=model.size_vram,
        context_length=model.context_length,
        expires_at=rfc3339(model.expires_at) if model.expires_at else None,
        slots=model.slots,
        busy=model.busy,
        queued=model.queued,
        engine=model.engine,
        engine_reason=model.engine_reason,
        size_used=model.size_used,
    )
