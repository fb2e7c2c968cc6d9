"""The commands that change the cluster's state, and `apply`, which carries them out.

`apply` is total: it answers with a rejection, it never raises, because a command that raises
would stop replication on every node at once. It is deterministic: the time comes with the
command. Every command carries an id, and a command that was applied before answers with its
first outcome and changes nothing, so that a caller may retry after an unknown outcome.
"""

import dataclasses

import msgspec

from ollamad.core.ids import NodeId, short
from ollamad.core.names import InvalidName, check_node_name, check_username, parse_name
from ollamad.core.quota import PERIODS, KeyCount, later
from ollamad.core.state import (
    ROLES,
    ApiKey,
    Capacity,
    CertificateAuthority,
    ClusterState,
    JoinToken,
    Member,
    Model,
    Settings,
    User,
)


class Command(msgspec.Struct, frozen=True, tag_field="type"):
    """Base of all commands; the class name is the tag on the wire and in the journal."""


class FoundCluster(Command, frozen=True):
    """The first command of a cluster: its identity, its secrets, its first member and user."""

    cluster_id: str
    ca: CertificateAuthority
    jwt_key: bytes
    founder: Member
    admin: User


class RecoverCluster(Command, frozen=True):
    """The majority is lost for good, and one node goes on alone, in a new incarnation.

    The other members are left behind: see `Member`.
    """

    incarnation: int  # Unix time in nanoseconds; above the one before
    survivor: NodeId = NodeId("")


class ChangeSettings(Command, frozen=True):
    settings: Settings


class AdmitMember(Command, frozen=True):
    """Let a node in, or let a known one change its certificate. Spends nothing of the token."""

    member: Member
    token_id: str


class UpdateMember(Command, frozen=True):
    """A member tells its own addresses, name, version and capacity when they have changed."""

    id: NodeId
    name: str
    api_address: str
    p2p_address: str
    raft_address: str
    capacity: Capacity
    version: str


class SetDraining(Command, frozen=True):
    id: NodeId
    draining: bool


class RemoveMember(Command, frozen=True):
    id: NodeId


class PutModel(Command, frozen=True):
    """Add a model or replace the one of that name. `model.confirmed` says who has it now."""

    model: Model


class DeleteModel(Command, frozen=True):
    name: str


class SetDesired(Command, frozen=True):
    """Which nodes should hold a model. Of level 1; `PlaceReplicas` is what newer logs have."""

    name: str
    desired: tuple[NodeId, ...]


class ConfirmReplica(Command, frozen=True):
    """A node holds every blob of this manifest, verified (or, with `present` false, no more)."""

    name: str
    digest: str
    node_id: NodeId
    present: bool = True


class AskReplicas(Command, frozen=True):
    """How many copies of a model somebody wants, and on which nodes in any case."""

    name: str
    replicas: int  # 0: the cluster's default
    pinned: tuple[NodeId, ...] = ()


class PlaceReplicas(Command, frozen=True):
    """Which nodes should hold a model, decided on the view that the leader had.

    Rejected as STALE if the model is another one or placed otherwise by now.
    """

    name: str
    digest: str
    was: tuple[NodeId, ...]  # what `desired` was when this was decided, sorted
    desired: tuple[NodeId, ...]


class ReleaseReplica(Command, frozen=True):
    """A node gives up a copy that it need not have. Rejected if that is not so any more.

    The node frees the blobs only after this was applied.
    """

    name: str
    digest: str
    node_id: NodeId


class PutUser(Command, frozen=True):
    user: User


class AddUser(Command, frozen=True):
    """Like PutUser, but a name that is taken is refused."""

    user: User


class SetPassword(Command, frozen=True):
    """Change a password. The new generation ends every session of the user."""

    username: str
    password_hash: str
    generation: str


class SetRole(Command, frozen=True):
    """What a user may do from now on. The last admin stays one."""

    username: str
    role: str


class DeleteUser(Command, frozen=True):
    """Refused for the last admin, after whom nobody could make another one."""

    username: str


class AddKey(Command, frozen=True):
    key: ApiKey


class DeleteKey(Command, frozen=True):
    id: str


class RecordUsage(Command, frozen=True):
    """What a node has counted for API keys, so that it outlives the node. Never goes back."""

    node_id: NodeId
    counts: tuple[KeyCount, ...]


class AddJoinToken(Command, frozen=True):
    token: JoinToken


class Revoke(Command, frozen=True):
    """End a JWT or a whole session by id. Rejected if it was revoked before (a replay)."""

    id: str
    expires_at: float


AnyCommand = (
    FoundCluster
    | RecoverCluster
    | ChangeSettings
    | AdmitMember
    | UpdateMember
    | SetDraining
    | RemoveMember
    | PutModel
    | DeleteModel
    | SetDesired
    | ConfirmReplica
    | AskReplicas
    | PlaceReplicas
    | ReleaseReplica
    | PutUser
    | DeleteUser
    | AddJoinToken
    | Revoke
    | AddUser
    | SetPassword
    | AddKey
    | DeleteKey
    | RecordUsage
    | SetRole
)


class Proposal(msgspec.Struct, frozen=True):
    """A command as it stands in the log: with the id and the wall clock of who proposed it."""

    id: str
    at: float  # Unix seconds
    command: AnyCommand
    level: int = 1  # the least LEVEL that carries this command out as it is meant


# What this version's `apply` can do. Raise it with each command, or field of one, that an older
# version would refuse or overlook: a node below a proposal's level must stop, not differ.
LEVEL = 3

_LEVELS: dict[type[Command], int] = {
    AskReplicas: 2,
    PlaceReplicas: 2,
    ReleaseReplica: 2,
    AddUser: 2,
    SetPassword: 2,
    DeleteUser: 2,
    AddKey: 2,
    DeleteKey: 2,
    RecordUsage: 2,
    SetRole: 3,
}


def level_of(command: AnyCommand) -> int:
    """The least LEVEL that carries this command out as it is meant."""
    if isinstance(command, PutModel) and (command.model.replicas or command.model.pinned):
        return 2
    return _LEVELS.get(type(command), 1)


@dataclasses.dataclass(frozen=True, slots=True)
class Applied:
    """The command took effect, now or the first time it was seen."""


@dataclasses.dataclass(frozen=True, slots=True)
class Rejected:
    """The command was refused and changed nothing. `code` is for programs (upper case)."""

    code: str
    message: str


Outcome = Applied | Rejected
# A state of these is some 10 MB; whoever needs more needs a directory service.
MAX_USERS = 10_000
MAX_KEYS = 10_000
DEPARTED_NODE = "DEPARTED_NODE"  # code of the rejection of a node that has left

APPLIED = Applied()


def apply(state: ClusterState, proposal: Proposal) -> Outcome:
    """Carry out one proposal on the state, in place."""
    if (seen := state.recent.get(proposal.id)) is not None:
        return Rejected(seen.code, seen.message) if seen.code else APPLIED
    outcome = _apply_command(state, proposal.command, proposal.at)
    rejection = outcome if isinstance(outcome, Rejected) else Rejected("", "")
    state.remember(proposal.id, rejection.code, rejection.message, proposal.at)
    return outcome


def _apply_command(state: ClusterState, command: AnyCommand, now: float) -> Outcome:
    if not state.cluster_id and not isinstance(command, FoundCluster):
        return Rejected("NO_CLUSTER", "the cluster has not been founded yet")
    match command:
        case FoundCluster():
            return _found(state, command)
        case RecoverCluster():
            return _recover(state, command)
        case ChangeSettings(settings):
            state.settings = settings
            return APPLIED
        case AdmitMember(member, token_id):
            return _admit(state, member, token_id, now)
        case UpdateMember():
            return _update_member(state, command)
        case SetDraining(node_id, draining):
            if node_id not in state.members:
                return _unknown_node(node_id)
            state.members[node_id] = msgspec.structs.replace(
                state.members[node_id], draining=draining
            )
            return APPLIED
        case RemoveMember(node_id):
            return _remove_member(state, node_id, now)
        case PutModel(model):
            return _put_model(state, model)
        case DeleteModel(name):
            doomed = state.find_model(name)
            if doomed is None:
                return _unknown_model(name)
            del state.models[parse_name(doomed.name).key]
            return APPLIED
        case SetDesired(name, desired):
            return _set_desired(state, name, desired)
        case ConfirmReplica():
            return _confirm(state, command)
        case AskReplicas():
            return _ask_replicas(state, command)
        case PlaceReplicas():
            return _place(state, command)
        case ReleaseReplica():
            return _release(state, command)
        case PutUser(user):
            if user.role not in ROLES:
                return Rejected("INVALID_ROLE", f"{user.role!r} is not one of {', '.join(ROLES)}")
            state.users[user.username] = user
            return APPLIED
        case AddUser(user):
            return _add_user(state, user)
        case SetPassword():
            known = state.users.get(command.username)
            if known is None:
                return _unknown_user(command.username)
            state.users[known.username] = msgspec.structs.replace(
                known, password_hash=command.password_hash, generation=command.generation
            )
            return APPLIED
        case SetRole(username, role):
            return _set_role(state, username, role)
        case DeleteUser(username):
            return _delete_user(state, username)
        case AddKey(key):
            return _add_key(state, key)
        case DeleteKey(key_id):
            if state.api_keys.pop(key_id, None) is None:
                return Rejected("KEY_NOT_FOUND", f"there is no API key {key_id!r}")
            state.key_usage.pop(key_id, None)
            return APPLIED
        case RecordUsage(node_id, counts):
            for count in counts:
                if count.key_id in state.api_keys:
                    by_node = state.key_usage.setdefault(count.key_id, {})
                    by_node[node_id] = later(by_node.get(node_id), count.used)
            return APPLIED
        case AddJoinToken(token):
            for expired in [t.id for t in state.join_tokens.values() if t.expires_at < now]:
                del state.join_tokens[expired]
            state.join_tokens[token.id] = token
            return APPLIED
        case Revoke(token_id, expires_at):
            for expired in [key for key, end in state.revoked.items() if end < now]:
                del state.revoked[expired]
            if token_id in state.revoked:
                return Rejected("ALREADY_REVOKED", "this token was used or revoked before")
            state.revoked[token_id] = expires_at
            return APPLIED


def _found(state: ClusterState, command: FoundCluster) -> Outcome:
    if state.cluster_id:
        return Rejected("ALREADY_FOUNDED", f"this is cluster {state.cluster_id} already")
    state.cluster_id = command.cluster_id
    state.ca = command.ca
    state.jwt_key = command.jwt_key
    state.members = {command.founder.id: command.founder}
    state.users = {command.admin.username: command.admin}
    return APPLIED


def _recover(state: ClusterState, command: RecoverCluster) -> Outcome:
    if command.incarnation <= state.incarnation:
        return Rejected("OLD_INCARNATION", "the cluster was recovered later than that")
    state.incarnation = command.incarnation
    if command.survivor in state.members:
        for member in state.members.values():
            left_behind = member.id != command.survivor
            state.members[member.id] = msgspec.structs.replace(member, left_behind=left_behind)
    return APPLIED


def _admit(state: ClusterState, member: Member, token_id: str, now: float) -> Outcome:
    token = state.join_tokens.get(token_id)
    if token is None or token.expires_at < now:
        return Rejected("TOKEN_EXPIRED", "the join token is unknown or expired; make a new one")
    if (problem := _name_problem(member.name)) is not None:
        return problem
    if member.id in state.departed:
        # It would be a new node, which to logs that are older than its departure has a vote.
        return Rejected(
            DEPARTED_NODE,
            f"node {short(member.id)}… has left this cluster, and an id does not come back; start "
            "it again with --join, and it makes a new key",
        )
    twin = next((m for m in state.members.values() if m.name == member.name), None)
    known = state.members.get(member.id, twin)
    if twin is not None and twin.left_behind and member.id not in state.members:
        # It joins with a new key, for what it was: a node of that name with those models.
        _take_place(state, twin.id, member.id, now)
    elif twin is not None and twin.id != member.id:
        return Rejected(
            "NAME_TAKEN",
            f"a node named {member.name!r} is a member already ({short(twin.id)}…); "
            "give this one another name with NODE_ID, or, if that one is gone for good, take it "
            "out first with `ollama-dist cluster leave`",
        )
    if known is not None:
        member = msgspec.structs.replace(member, draining=known.draining, joined_at=known.joined_at)
    state.members[member.id] = member
    return APPLIED


def _take_place(state: ClusterState, old: NodeId, new: NodeId, now: float) -> None:
    """Let `new` hold what `old` held, which departs."""
    del state.members[old]
    state.departed[old] = now
    for key, model in state.models.items():
        desired, confirmed, pinned = (
            tuple(sorted(new if node_id == old else node_id for node_id in nodes))
            for nodes in (model.desired, model.confirmed, model.pinned)
        )
        state.models[key] = msgspec.structs.replace(
            model, desired=desired, confirmed=confirmed, pinned=pinned
        )


def _update_member(state: ClusterState, command: UpdateMember) -> Outcome:
    member = state.members.get(command.id)
    if member is None:
        return _unknown_node(command.id)
    name = command.name
    if (problem := _name_problem(name)) is not None:
        return problem
    if any(m.name == name and m.id != command.id for m in state.members.values()):
        name = member.name  # somebody else took the new name; keep the old one
    state.members[command.id] = msgspec.structs.replace(
        member,
        name=name,
        api_address=command.api_address,
        p2p_address=command.p2p_address,
        raft_address=command.raft_address,
        capacity=command.capacity,
        version=command.version,
    )
    return APPLIED


def _remove_member(state: ClusterState, node_id: NodeId, now: float) -> Outcome:
    if node_id not in state.members:
        return _unknown_node(node_id)
    if len(state.members) == 1:
        return Rejected("LAST_MEMBER", "the last node of a cluster cannot leave it")
    del state.members[node_id]
    state.departed[node_id] = now
    for key, model in state.models.items():
        if node_id in {*model.desired, *model.confirmed, *model.pinned}:
            state.models[key] = msgspec.structs.replace(
                model,
                desired=tuple(n for n in model.desired if n != node_id),
                confirmed=tuple(n for n in model.confirmed if n != node_id),
                pinned=tuple(n for n in model.pinned if n != node_id),
            )
    return APPLIED


def _put_model(state: ClusterState, model: Model) -> Outcome:
    try:
        key = parse_name(model.name).key
    except InvalidName as error:
        return Rejected("INVALID_MODEL_NAME", str(error))
    known = set(state.members)
    state.models[key] = msgspec.structs.replace(
        model,
        desired=tuple(sorted(set(model.desired) & known)),
        confirmed=tuple(sorted(set(model.confirmed) & known)),
        replicas=max(0, model.replicas),
        pinned=tuple(sorted(set(model.pinned) & known)),
    )
    return APPLIED


def _set_desired(state: ClusterState, name: str, desired: tuple[NodeId, ...]) -> Outcome:
    model = state.find_model(name)
    if model is None:
        return _unknown_model(name)
    for node_id in desired:
        if node_id not in state.members:
            return _unknown_node(node_id)
    _replace_model(state, msgspec.structs.replace(model, desired=tuple(sorted(set(desired)))))
    return APPLIED


def _confirm(state: ClusterState, command: ConfirmReplica) -> Outcome:
    model = state.find_model(command.name)
    if model is None:
        return _unknown_model(command.name)
    if model.digest != command.digest:
        return Rejected("SUPERSEDED", f"{command.name} has another manifest by now")
    if command.node_id not in state.members:
        return _unknown_node(command.node_id)
    confirmed = set(model.confirmed) - {command.node_id}
    if command.present:
        confirmed.add(command.node_id)
    _replace_model(state, msgspec.structs.replace(model, confirmed=tuple(sorted(confirmed))))
    return APPLIED


def _ask_replicas(state: ClusterState, command: AskReplicas) -> Outcome:
    model = state.find_model(command.name)
    if model is None:
        return _unknown_model(command.name)
    if command.replicas < 0:
        return Rejected("INVALID_REPLICAS", "a model has 1 copy or more; 0 means the default")
    for node_id in command.pinned:
        if node_id not in state.members:
            return _unknown_node(node_id)
    pinned = tuple(sorted(set(command.pinned)))
    _replace_model(state, msgspec.structs.replace(model, replicas=command.replicas, pinned=pinned))
    return APPLIED


def _place(state: ClusterState, command: PlaceReplicas) -> Outcome:
    model = state.find_model(command.name)
    if model is None:
        return _unknown_model(command.name)
    if (model.digest, model.desired) != (command.digest, command.was):
        return Rejected("STALE", f"{command.name} was placed anew meanwhile")
    return _set_desired(state, command.name, command.desired)


def _release(state: ClusterState, command: ReleaseReplica) -> Outcome:
    model = state.find_model(command.name)
    if model is None:
        return _unknown_model(command.name)
    if model.digest != command.digest:
        return Rejected("SUPERSEDED", f"{command.name} has another manifest by now")
    rest = set(model.confirmed) - {command.node_id}
    is_spare = command.node_id not in model.desired and set(model.desired) <= rest
    if not rest or not is_spare:
        return Rejected("NEEDED", f"the copy of {command.name} is needed")
    _replace_model(state, msgspec.structs.replace(model, confirmed=tuple(sorted(rest))))
    return APPLIED


def _replace_model(state: ClusterState, model: Model) -> None:
    state.models[parse_name(model.name).key] = model


def _name_problem(name: str) -> Rejected | None:
    try:
        check_node_name(name)
    except ValueError as error:
        return Rejected("INVALID_NAME", str(error))
    return None


def _add_user(state: ClusterState, user: User) -> Outcome:
    try:
        check_username(user.username)
    except ValueError as error:
        return Rejected("INVALID_USERNAME", str(error))
    if user.role not in ROLES:
        return Rejected("INVALID_ROLE", f"{user.role!r} is not one of {', '.join(ROLES)}")
    if user.username in state.users:
        return Rejected("USER_EXISTS", f"there is a user {user.username!r} already")
    if len(state.users) >= MAX_USERS:
        return Rejected("TOO_MANY_USERS", f"there are {MAX_USERS} users already; delete some")
    state.users[user.username] = user
    return APPLIED


def _set_role(state: ClusterState, username: str, role: str) -> Outcome:
    user = state.users.get(username)
    if user is None:
        return _unknown_user(username)
    if role not in ROLES:
        return Rejected("INVALID_ROLE", f"{role!r} is not one of {', '.join(ROLES)}")
    if role != "admin" and _is_last_admin(state, user):
        return Rejected("LAST_ADMIN", f"{username!r} is the only admin; make another one first")
    state.users[username] = msgspec.structs.replace(user, role=role)
    return APPLIED


def _delete_user(state: ClusterState, username: str) -> Outcome:
    user = state.users.get(username)
    if user is None:
        return _unknown_user(username)
    if _is_last_admin(state, user):
        return Rejected("LAST_ADMIN", f"{username!r} is the only admin; make another one first")
    del state.users[username]
    return APPLIED


def _is_last_admin(state: ClusterState, user: User) -> bool:
    return user.role == "admin" and sum(u.role == "admin" for u in state.users.values()) == 1


def _add_key(state: ClusterState, key: ApiKey) -> Outcome:
    if key.role not in ROLES:
        return Rejected("INVALID_ROLE", f"{key.role!r} is not one of {', '.join(ROLES)}")
    if key.period not in PERIODS:
        return Rejected("INVALID_PERIOD", f"{key.period!r} is not one of {', '.join(PERIODS)}")
    if key.id in state.api_keys:
        return Rejected("KEY_EXISTS", f"there is an API key {key.id!r} already")
    if len(state.api_keys) >= MAX_KEYS:
        return Rejected("TOO_MANY_KEYS", f"there are {MAX_KEYS} API keys already; delete some")
    state.api_keys[key.id] = key
    return APPLIED


def _unknown_user(username: str) -> Rejected:
    return Rejected("USER_NOT_FOUND", f"there is no user {username!r}")


def _unknown_node(node_id: NodeId) -> Rejected:
    return Rejected("NODE_NOT_FOUND", f"there is no node {short(node_id)}… in this cluster")


def _unknown_model(name: str) -> Rejected:
    return Rejected("MODEL_NOT_FOUND", f"model {name!r} not found")
