"""`ollamad recover`: one survivor goes on alone after the majority of the voters is lost for good.

It looks before it leaps: it asks every other member, over TLS with this node's certificate, and
refuses while a majority could still be had. Then it makes this node the only voter, in a new
incarnation of the cluster; see "Loss of the majority" in docs/consensus.md.
"""

import datetime
import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio

import ollamad
from ollamad.cluster import CONSENSUS_VIEW, ConsensusView
from ollamad.core.commands import Proposal, RecoverCluster
from ollamad.core.ids import NodeId, short
from ollamad.core.state import ClusterState, Member
from ollamad.datadir import DataDir, DataDirError, check_owner
from ollamad.errors import StartError
from ollamad.machine import Machine
from ollamad.peers.identity import (
    CERTIFICATE_FILE,
    KEY_FILE,
    Identity,
    IdentityError,
    sync_directory,
    write_private,
)
from ollamad.peers.link import RemoteFailure
from ollamad.peers.mesh import Mesh
from ollamad.peers.tls import Gate, PeerUnreachable
from ollamad.raft.errors import RaftError
from ollamad.raft.recovery import LogView, make_only_voter, read_log
from ollamad.raft.sqlite_store import SqliteStore
from ollamad.wire.codec import MalformedMessage, encode
from ollamad.wire.mux import Departed

ANSWER_TIMEOUT_S = 5.0  # a dial takes up to 3 s, the answer comes at once


@dataclass(slots=True)
class Survey:
    """What the other members say, or why they say nothing."""

    views: dict[NodeId, ConsensusView] = field(default_factory=dict)
    silent: dict[NodeId, str] = field(default_factory=dict)  # why
    mute: dict[NodeId, str] = field(default_factory=dict)  # there, but cannot say: why
    newer: dict[NodeId, int] = field(default_factory=dict)  # of which incarnation
    # Those that say that this node was removed.
    farewells: dict[NodeId, Departed] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a recovery starts from."""

    self_id: NodeId
    state: ClusterState
    log: LogView
    survey: Survey


def recover(
    data_dir: Path,
    confirm: Callable[[str], bool],
    uninterrupted: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> str:
    """Make the node of that directory the only voter of its cluster.

    Args:
      confirm: is shown what will happen; whether to go on.
      uninterrupted: holds off Ctrl-C for the moment that the change takes.

    Returns:
      What to do next, for the user.

    Raises:
      StartError: there is nothing to recover, it would be wrong here, or it was not confirmed.
        Nothing was changed.
    """
    os.umask(0o077)  # the journal holds the cluster's keys
    try:
        _check_directory(data_dir)
        with DataDir(data_dir) as directory:
            identity = Identity.load_or_create(directory.identity)
            if not identity.is_member:
                raise StartError(f"the node of {data_dir} is in no cluster; nothing to recover")
            # With a wrong clock every other member would seem to be gone.
            identity.check_validity(datetime.datetime.now(datetime.UTC))
            plan = trio.run(_examine, directory, identity)
            if not confirm(describe(plan)):
                raise StartError("nothing was changed")
            # Whoever was asked may have thought about it for long.
            plan = trio.run(_examine, directory, identity)
            with uninterrupted():
                kept = trio.run(_carry_out, directory, identity, plan)
            return _next_steps(plan, kept)
    except (DataDirError, IdentityError, RaftError, MalformedMessage, OSError) as error:
        raise StartError(str(error)) from None


def _check_directory(data_dir: Path) -> None:
    """Whether this looks like what is to be recovered; makes nothing, unlike a start."""
    check_owner(data_dir)
    if not (data_dir / "raft.db").is_file() or not (data_dir / "identity" / KEY_FILE).is_file():
        raise StartError(
            f"{data_dir} is not the data directory of a node that was in a cluster; name it with "
            "--data-dir"
        )


async def _examine(directory: DataDir, identity: Identity) -> Plan:
    """Read the journal and ask the others; raise StartError if this is no case for recovery."""
    machine = Machine()
    store = SqliteStore(directory.raft)
    try:
        stored = await store.load()
    finally:
        await store.aclose()
    if not stored.entries:
        raise StartError(
            f"the journal in {directory.path} is empty: this node joined, but learnt nothing of "
            "its cluster; recover another node"
        )
    log = read_log(stored, machine)
    me, state = identity.node_id, machine.state
    if me not in state.members:
        raise StartError(
            "this node is no member of the cluster in its journal (it was removed, or had not "
            "caught up when it stopped); recover another node"
        )
    if log.voters == {me}:
        raise StartError("this node is the only voter already; start it, nothing is lost")
    plan = Plan(me, state, log, await _ask_all(identity, state))
    check(plan)
    return plan


async def _ask_all(identity: Identity, state: ClusterState) -> Survey:
    survey = Survey()
    others = [member for member in state.members.values() if member.id != identity.node_id]
    gate = Gate(identity, lambda _: False, on_newer=survey.newer.__setitem__)
    addresses = {member.id: member.p2p_address for member in others}
    mesh = Mesh(gate, version=ollamad.__version__, address_of=addresses.get)
    mesh.on_turned_away = survey.farewells.__setitem__
    async with trio.open_nursery() as nursery:
        await nursery.start(mesh.run)
        async with trio.open_nursery() as questions:
            for member in others:
                questions.start_soon(_ask, mesh, member, survey)
        nursery.cancel_scope.cancel()
    return survey


async def _ask(mesh: Mesh, member: Member, survey: Survey) -> None:
    try:
        with trio.fail_after(ANSWER_TIMEOUT_S):
            view = await mesh.call(member.id, CONSENSUS_VIEW, None, ConsensusView)
    except PeerUnreachable as error:
        survey.silent[member.id] = str(error)
    except trio.TooSlowError:
        # Something accepts connections there: perhaps a daemon that hangs, or is stopped.
        survey.silent[member.id] = f"{member.p2p_address}: no answer within {ANSWER_TIMEOUT_S:g} s"
    except RemoteFailure as error:
        survey.mute[member.id] = error.message
    else:
        survey.views[member.id] = view


def check(plan: Plan) -> None:
    """Whether recovery is right here.

    Raises:
      StartError: it is not; says who answered and what to do instead.
    """
    me, survey, log = plan.self_id, plan.survey, plan.log
    for node_id in survey.newer:
        raise StartError(
            f"the cluster was recovered already, by or with {_name(plan, node_id)}; start this "
            "node, and when it has stopped, start it with --join"
        )
    for node_id in survey.farewells:
        raise StartError(
            f"{_name(plan, node_id)} says that this node was removed from the cluster; start "
            "it, and when it has stopped, start it with --join"
        )
    for node_id, why in survey.mute.items():
        raise StartError(
            f"{_name(plan, node_id)} runs but cannot say whether it sees a quorum ({why}); stop it "
            "or install this version there"
        )
    for node_id, view in survey.views.items():
        if view.has_quorum:
            leader = NodeId(view.leader)
            raise StartError(
                f"{_name(plan, node_id)} is in touch with a quorum (leader "
                f"{_name(plan, leader) if leader else 'unknown'}, term {view.term}); nothing is "
                "lost: start this node, and it catches up"
            )
    alive = {me, *survey.views}
    for voters in (log.voters, *(frozenset(view.voters) for view in survey.views.values())):
        there = alive & voters
        if 2 * len(there) > len(voters):
            names = ", ".join(_name(plan, n) for n in sorted(there - {me}))
            raise StartError(
                f"{names} answered: with this node that makes {len(there)} of {len(voters)} "
                "voters, a majority; start this node instead"
            )
    if survey.views:
        best = max(survey.views, key=lambda n: survey.views[n].end)
        end = survey.views[best].end
        if log.end < end:
            raise StartError(
                f"{_name(plan, best)} has more of the log (entry {end.index} of term {end.term}) "
                f"than this node (entry {log.end.index} of term {log.end.term}); stop the daemon "
                "there and recover that node instead"
            )


def describe(plan: Plan) -> str:
    """What will happen and what may be lost, for the user to think about."""
    state, log, survey = plan.state, plan.log, plan.survey
    lines = [
        f"This is {_name(plan, plan.self_id)} of cluster {state.cluster_id}. Its log ends with "
        f"entry {log.end.index} of term {log.end.term}: {len(state.members)} members, "
        f"{len(state.models)} models, {len(state.users)} users.",
        "",
    ]
    for member in sorted(state.members.values(), key=lambda m: m.name):
        kind = "voter" if member.id in log.voters else "member"
        if member.id == plan.self_id:
            word = "this node"
        elif member.id in survey.views:
            word = "answers, and sees no quorum either"
        else:
            word = f"gone: {survey.silent[member.id]}"
        lines.append(f"  {member.name:<20} {kind:<7} {word}")
    lines += [
        "",
        "Recovery makes this node the only voter, with all that is in its log. Lost is what the "
        "majority had acknowledged and this node had not received.",
        "The other members keep their models but must join again; until then they are refused, and "
        "stop when they meet this node. If some of them still run where this node cannot see them, "
        "what they agree on meanwhile will be lost.",
        "Recover one node only.",
    ]
    return "\n".join(lines)


async def _carry_out(directory: DataDir, identity: Identity, plan: Plan) -> Path:
    """Keep copies, then change the journal in one transaction; where its copy is."""
    now = time.time()
    kept = await trio.to_thread.run_sync(partial(_keep_copies, directory, now))
    incarnation = max(time.time_ns(), plan.state.incarnation + 1)
    proposal = Proposal(os.urandom(16).hex(), now, RecoverCluster(incarnation, identity.node_id))
    term = max((view.term for view in plan.survey.views.values()), default=0)
    store = SqliteStore(directory.raft)
    try:
        await store.load()
        await store.commit(make_only_voter(plan.log, identity.node_id, term, encode(proposal)))
    finally:
        await store.aclose()
    assert plan.state.ca is not None, "a founded cluster has a CA"
    # The next start would do this too.
    identity.renew_if_due(plan.state.ca, incarnation, datetime.datetime.now(datetime.UTC))
    return kept


def _keep_copies(directory: DataDir, now: float) -> Path:
    """Copy what changes, the journal and the certificate, to names with a date beside them."""
    journal, certificate = directory.raft, directory.identity / CERTIFICATE_FILE
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
    write_private(
        certificate.with_name(f"{CERTIFICATE_FILE}.before-recovery-{stamp}"),
        certificate.read_bytes(),
    )
    kept = journal.with_name(f"{journal.name}.before-recovery-{stamp}")
    partial_copy = kept.with_name(f".{kept.name}.tmp")
    partial_copy.unlink(missing_ok=True)
    try:
        source, target = sqlite3.connect(journal), sqlite3.connect(partial_copy)
        try:
            source.backup(target)
        finally:
            source.close()
            target.close()
    except sqlite3.Error as error:
        partial_copy.unlink(missing_ok=True)
        raise StartError(f"cannot keep a copy of {journal}: {error}; nothing was changed") from None
    partial_copy.replace(kept)
    sync_directory(kept.parent)  # the copy must be there before what it is a copy of changes
    return kept


def _next_steps(plan: Plan, kept: Path) -> str:
    return (
        f"{_name(plan, plan.self_id)} is the only voter now. The journal as it was is in {kept}; "
        '"The majority is lost" in docs/operations.md says how to put it back.\n'
        "Start this node. Then for each node that is left: start it once, so that it hears of "
        "this and puts its old state aside, and again with `ollamad start --join TOKEN@HOST:PORT` "
        "(TOKEN from `ollama-dist cluster token` here). For each that is gone for good: "
        "`ollama-dist cluster leave NODE`."
    )


def _name(plan: Plan, node_id: NodeId) -> str:
    member = plan.state.members.get(node_id)
    return f"{member.name} ({short(node_id)}…)" if member else f"{short(node_id)}…"
