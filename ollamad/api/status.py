"""Handlers: health, version, the cluster and its members' coming and going, metrics."""

import logging
import math
import platform
from typing import Literal

import ollamad
from ollamad.api.asgi import Reply
from ollamad.api.bodies import JoinBody, JoinTokenBody, LeaveBody, invalid
from ollamad.api.calls import Api, Call, is_host_port, reply, rfc3339
from ollamad.api.schemas import (
    ClusterStatus,
    ConsensusInfo,
    Health,
    JoinTokenAnswer,
    Leader,
    Metrics,
    Moved,
    SchedulerStats,
    Version,
)
from ollamad.api.services import Cluster, NoQuorum, ServiceError
from ollamad.core.ids import NodeId, is_node_id, short

audit = logging.getLogger("ollamad.api.audit")

API_VERSION = "v1"


async def health(call: Call) -> Reply:
    services = call.services
    reason = trouble(call.api)
    now, uptime = rfc3339(services.wall()), services.monotonic() - call.api.started
    if reason is None:
        return reply(Health("healthy", now, format_uptime(uptime)))
    body = Health("unhealthy", now, format_uptime(uptime), reason=reason, code="NO_QUORUM")
    return reply(body, 503, {"Retry-After": "2"})


async def version(call: Call) -> Reply:
    return reply(
        Version(
            version=ollamad.__version__,
            build_time=call.services.build_time,
            git_commit=call.services.git_commit,
            go_version="",
            platform=call.services.platform,
            api_version=API_VERSION,
            python_version=platform.python_version(),
            engine_versions=dict(call.services.engine_versions),
            p2p_port=call.services.p2p_port,
        )
    )


async def cluster_status(call: Call) -> Reply:
    return reply(describe_cluster(call.api))


def describe_cluster(api: Api) -> ClusterStatus:
    """What `/cluster/status` says, also to WebSockets."""
    cluster = api.services.cluster
    state = cluster.state
    online = sum(cluster.presence(node_id).online for node_id in state.members)
    status: Literal["healthy", "degraded", "unhealthy"]
    if trouble(api):
        status = "unhealthy"
    elif online < len(state.members):
        status = "degraded"
    else:
        status = "healthy"
    leader = cluster.leader()
    return ClusterStatus(
        node_id=cluster.node_id,
        is_leader=cluster.is_leader,
        leader=leader or "",
        peers=connected_peers(cluster),
        status=status,
        cluster_id=state.cluster_id,
        cluster_size=len(state.members),
        nodes_online=online,
        has_quorum=cluster.has_quorum,
        term=cluster.term,
        voters=list(cluster.voters()),
        leader_name=state.members[leader].name if leader in state.members else "",
    )


async def cluster_leader(call: Call) -> Reply:
    leader = call.services.cluster.leader()
    if leader is None:
        raise NoQuorum("the cluster has no leader now")
    return reply(Leader(leader))


async def consensus(call: Call) -> Reply:
    """Where this node is in the log, with a hash of its state: equal where the index is equal."""
    cluster = call.services.cluster
    view = cluster.consensus()
    return reply(
        ConsensusInfo(
            node_id=cluster.node_id,
            leader=cluster.leader() or "",
            is_leader=cluster.is_leader,
            term=cluster.term,
            voters=list(cluster.voters()),
            has_quorum=cluster.has_quorum,
            commit_index=view.commit_index,
            applied_index=view.applied_index,
            state_hash=f"sha256:{cluster.state.fingerprint()}",
            state_age_ms=state_age_ms(cluster),
            disk_full=view.disk_full,
            disk_hangs=view.disk_hangs,
        )
    )


def state_age_ms(cluster: Cluster) -> int | None:
    """How old the local state may be; None before the first contact with a leader."""
    silence_s = cluster.consensus().silence_s
    return None if math.isinf(silence_s) else round(1000 * silence_s)


async def cluster_join(call: Call) -> Reply:
    body = await call.body(JoinBody)
    if not is_node_id(body.node_id):
        raise invalid("node_id", "node_id is not a node id (Qm… , 46 characters)", expected="id")
    if not is_host_port(body.address):
        raise invalid("address", "address must be host:port", expected="host:port")
    node_id = NodeId(body.node_id)
    if node_id in call.services.cluster.state.members:
        raise ServiceError(
            409, "ALREADY_MEMBER", "this node is a member already", {"node_id": node_id}
        )
    await call.services.cluster.admit(node_id, body.address)
    return reply(Moved("Node joined cluster", node_id))


async def cluster_leave(call: Call) -> Reply:
    body = await call.body(LeaveBody)
    member = await call.find_member(body.node_id)
    await call.services.cluster.remove(member.id, force=body.force, timeout_s=body.timeout_seconds)
    return reply(Moved("Node left cluster", member.id))


async def cluster_token(call: Call) -> Reply:
    body = await call.body(JoinTokenBody, optional=True)
    issued = await call.services.cluster.make_join_token(body.ttl_seconds)
    return reply(
        JoinTokenAnswer(
            token=issued.token,
            expires_at=rfc3339(issued.expires_at),
            command=issued.command,
        ),
        201,
    )


async def cluster_snapshot(call: Call) -> Reply:
    """The whole replicated state, secrets included, for whoever could read it on the disk."""
    if call.caller is None or not call.caller.owns_node:
        raise ServiceError(
            403,
            "FORBIDDEN",
            "the state holds the cluster's keys; only the cli-token of this node's data directory "
            "may have it: `ollamad backup` on this host",
        )
    audit.info(
        "%s at %s took the state with its keys, request %s",
        call.caller.username,
        call.address,
        call.request.id,
    )
    index, state = call.services.cluster.snapshot()
    headers = {"X-Applied-Index": str(index), "Cache-Control": "no-store"}
    return Reply(state, content_type=b"application/octet-stream", headers=headers)


async def metrics(call: Call) -> Reply:
    services = call.services
    cluster = services.cluster
    members = cluster.state.members
    http = call.api.http_stats.snapshot()
    inference = call.api.inference_stats.snapshot()
    return reply(
        Metrics(
            node_id=cluster.node_id,
            connected_peers=connected_peers(cluster),
            is_leader=cluster.is_leader,
            requests_processed=http.completed + http.failed,
            models_loaded=sum(len(cluster.presence(node_id).beat.loaded) for node_id in members),
            cluster_size=len(members),
            scheduler_stats=SchedulerStats(
                total_requests=inference.total,
                completed_requests=inference.completed,
                failed_requests=inference.failed,
                queued_requests=services.inference.queued(),
                average_latency=round(inference.average_latency_ms, 3),
            ),
            uptime="running",
            status="unhealthy" if trouble(call.api) else "healthy",
            cpu_usage=round(services.host.cpu_percent(), 2),
            memory_usage=round(services.host.memory_percent(), 2),
            network_usage=round(services.host.network_percent(), 2),
            requests_per_second=round(http.per_second, 3),
            average_latency=round(http.average_latency_ms),
            active_connections=http.active,
            error_rate=round(http.error_percent, 3),
            uptime_seconds=round(services.monotonic() - call.api.started, 3),
        )
    )


def connected_peers(cluster: Cluster) -> int:
    """Other members that are online."""
    return sum(
        cluster.presence(node_id).online
        for node_id in cluster.state.members
        if node_id != cluster.node_id
    )


def format_uptime(seconds: float) -> str:
    """`24h 15m 30s`, hours not limited to a day."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes}m {rest}s"


def trouble(api: Api) -> str | None:
    """Why this node cannot serve, or None."""
    cluster = api.services.cluster
    if not cluster.state.cluster_id:
        return "this node is not part of a cluster yet"
    lost_s = cluster.quorum_lost_for_s
    if cluster.has_quorum or lost_s <= api.settings.election_timeout_s:
        return None
    voters, missing = cluster.voters(), missing_voters(cluster)
    who = f"of {len(voters)} voters these are missing: {', '.join(missing)}; start them, or, if "
    who += "they are lost for good, see `ollamad recover`"
    return f"no quorum for {lost_s:.0f} s: {who if missing else 'the voters cannot agree'}"


def missing_voters(cluster: Cluster) -> list[str]:
    """The names of the voters that are not there."""
    members = cluster.state.members
    return sorted(
        members[voter].name if voter in members else short(voter)
        for voter in cluster.voters()
        if not cluster.presence(voter).online
    )
