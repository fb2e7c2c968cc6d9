"""What somebody should look after: raised once when it has lasted, cleared once when it is over.

Hysteresis in value and in time keeps an alert from coming and going with every sample: what makes
an alert and what ends it are two different marks, and what lies between them changes nothing.
Pure: the time is an argument.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from ollamad.core.ids import NodeId
from ollamad.core.presence import Presence
from ollamad.core.state import ClusterState, Member

AlertKind = Literal["low_memory", "low_disk", "node_offline", "under_replicated", "no_quorum"]
Level = Literal["info", "warning", "critical"]

# Of a host's memory in use. Above the mark the kernel begins to take pages from runners.
MEMORY_HIGH, MEMORY_WELL = 0.95, 0.90
# Free bytes where models are kept: a twentieth of the disk, which for large disks is plenty.
DISK_LOW_SHARE, DISK_LOW_MOST, DISK_LOW_LEAST = 0.05, 20_000_000_000, 2_000_000_000
DISK_WELL = 1.25  # times the low mark
# How long it must last. Silence and elections are damped before they come here; a model that is
# being copied has less than its copies for as long as that takes.
RAISE_AFTER_S: Mapping[AlertKind, float] = {
    "low_memory": 5.0,
    "low_disk": 5.0,
    "node_offline": 2.0,
    "under_replicated": 30.0,
    "no_quorum": 2.0,
}
CLEAR_AFTER_S = 2.0


@dataclass(frozen=True, slots=True)
class Alert:
    """An alert that was raised or cleared. `at` is Unix seconds: when that happened."""

    kind: AlertKind
    subject: str  # the node's id, the model's name, or the cluster's id
    level: Level
    message: str
    at: float
    raised: bool


@dataclass(frozen=True, slots=True)
class Finding:
    """What one look says of one subject. Neither bad nor well: nobody can say, or in between."""

    kind: AlertKind
    subject: str
    bad: bool
    well: bool
    trouble: str
    relief: str
    level: Level = "warning"


@dataclass(slots=True)
class _Record:
    finding: Finding
    bad_since: float | None = None
    well_since: float | None = None
    alert: Alert | None = None  # while it is raised


class AlertBook:
    """Remembers what is raised. `look` is called with all findings, about once a second."""

    def __init__(self) -> None:
        self._records: dict[tuple[AlertKind, str], _Record] = {}

    def standing(self) -> list[Alert]:
        """The alerts that are raised now, oldest first."""
        raised = [r.alert for r in self._records.values() if r.alert is not None]
        return sorted(raised, key=lambda alert: alert.at)

    def look(self, findings: Iterable[Finding], now: float, wall: float) -> list[Alert]:
        """What was raised and cleared by that. `now` is monotonic, `wall` Unix seconds."""
        changes = []
        seen = set()
        for finding in findings:
            key = (finding.kind, finding.subject)
            seen.add(key)
            record = self._records.setdefault(key, _Record(finding))
            record.finding = finding
            if (change := _follow(record, now, wall)) is not None:
                changes.append(change)
        for key in self._records.keys() - seen:  # the node left, the model was deleted
            record = self._records.pop(key)
            if record.alert is not None:
                over = f"No longer of this cluster: {record.finding.trouble}"
                changes.append(_cleared(record.finding, over, wall))
        return changes


def _follow(record: _Record, now: float, wall: float) -> Alert | None:
    finding = record.finding
    if not finding.bad:
        record.bad_since = None
    elif record.bad_since is None:
        record.bad_since = now
    if not finding.well:
        record.well_since = None
    elif record.well_since is None:
        record.well_since = now
    if record.alert is None:
        since = record.bad_since
        if since is not None and now - since >= RAISE_AFTER_S[finding.kind]:
            record.alert = Alert(
                finding.kind, finding.subject, finding.level, finding.trouble, wall, True
            )
            return record.alert
    elif record.well_since is not None and now - record.well_since >= CLEAR_AFTER_S:
        record.alert = None
        return _cleared(finding, finding.relief, wall)
    return None


def _cleared(finding: Finding, message: str, wall: float) -> Alert:
    return Alert(finding.kind, finding.subject, "info", message, wall, False)


def findings(
    state: ClusterState, presence: Mapping[NodeId, Presence], *, has_quorum: bool
) -> list[Finding]:
    """What there is to say of a cluster now. `presence` has an entry for each member."""
    found = [
        Finding(
            "no_quorum",
            state.cluster_id,
            bad=not has_quorum,
            well=has_quorum,
            trouble="The cluster has no quorum: nothing can be changed until a majority is back",
            relief="The cluster has a quorum again",
            level="critical",
        )
    ]
    for member in state.members.values():
        found += _of_node(member, presence[member.id])
    for model in state.models.values():
        alive = sum(1 for n in model.confirmed if n in presence and presence[n].online)
        wanted = max(1, len(model.desired))
        found.append(
            Finding(
                "under_replicated",
                model.name,
                bad=alive < wanted,
                well=alive >= wanted,
                trouble=f"Model {model.name} has {alive} of {wanted} copies online",
                relief=f"Model {model.name} has all its copies again",
                level="warning" if alive else "critical",
            )
        )
    return found


def _of_node(member: Member, presence: Presence) -> list[Finding]:
    name, online = member.name, presence.online
    usage, disk_bytes = presence.beat.usage, member.capacity.disk_bytes
    # What a silent node said last is old, and one that never spoke said nothing.
    known = online and presence.beat.sent_at > 0
    low_mark = max(DISK_LOW_LEAST, min(DISK_LOW_MOST, DISK_LOW_SHARE * disk_bytes))
    return [
        Finding(
            "node_offline",
            member.id,
            bad=not online,
            well=online,
            trouble=f"Node {name} is offline",
            relief=f"Node {name} is online again",
        ),
        Finding(
            "low_memory",
            member.id,
            bad=known and usage.memory >= MEMORY_HIGH,
            well=known and usage.memory <= MEMORY_WELL,
            trouble=f"Node {name} is running low on memory",
            relief=f"Node {name} has enough memory again",
        ),
        Finding(
            "low_disk",
            member.id,
            bad=known and usage.disk_free < low_mark,
            well=known and usage.disk_free >= DISK_WELL * low_mark,
            trouble=f"Node {name} is running low on disk space",
            relief=f"Node {name} has enough disk space again",
        ),
    ]
