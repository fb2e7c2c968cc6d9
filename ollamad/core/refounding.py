"""A new cluster out of the state of an old one, as a restored backup is.

Nothing by which nodes know each other is taken over: the new cluster has an id, a CA and a signing
key of its own, so that nodes of the old one, should they turn up, cannot disturb it, nor it them
(a backup may well be tried out beside the cluster that it is of). etcd's snapshots are restored in
the same way. What people have made stays: models, users, keys, settings.
"""

import msgspec

from ollamad.core.ids import NodeId
from ollamad.core.state import CertificateAuthority, ClusterState


def refound(
    old: ClusterState,
    *,
    cluster_id: str,
    ca: CertificateAuthority,
    jwt_key: bytes,
    founder: NodeId,
    predecessor: NodeId,
) -> ClusterState:
    """The state in which the new cluster begins.

    `founder` is its only node, for what `predecessor` was in the old one. The other members stay
    as those that were left behind: each may join again, with a new key, and then takes the place
    of the member of its name, with its models.
    """
    members = {
        member.id: msgspec.structs.replace(
            member,
            left_behind=True,
            # Nobody may be dialled there: those are nodes of another cluster.
            api_address="",
            p2p_address="",
            raft_address="",
        )
        for member in old.members.values()
        if member.id != predecessor
    }
    members[founder] = msgspec.structs.replace(
        old.members[predecessor], id=founder, left_behind=False, draining=False
    )
    return ClusterState(
        cluster_id=cluster_id,
        ca=ca,
        jwt_key=jwt_key,
        settings=old.settings,
        members=members,
        models={
            key: msgspec.structs.replace(
                model,
                desired=_instead(model.desired, predecessor, founder),
                confirmed=_instead(model.confirmed, predecessor, founder),
                pinned=_instead(model.pinned, predecessor, founder),
            )
            for key, model in old.models.items()
        },
        users=dict(old.users),
        api_keys=dict(old.api_keys),
        key_usage={key: dict(by_node) for key, by_node in old.key_usage.items()},
        # With `auth.jwt_secret` the tokens of the old cluster are signed with the same key.
        revoked=dict(old.revoked),
    )


def _instead(nodes: tuple[NodeId, ...], old: NodeId, new: NodeId) -> tuple[NodeId, ...]:
    return tuple(sorted(new if node_id == old else node_id for node_id in nodes))
