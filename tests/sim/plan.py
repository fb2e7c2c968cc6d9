"""From a seed to a scenario: what the cluster is like and what will befall it, as plain values.

A scenario is complete before the run begins, so a failing run can be made smaller by leaving
faults out. Each fault ends by itself, but for a wiped disk: without it, its end is gone as well.
"""

import dataclasses
import random
from dataclasses import dataclass
from enum import StrEnum

from ollamad.raft.private import Timing

LIMP_S = 35.0  # at least: longer than anybody's patience with the others
CALM_S = 8.0  # after a wiped disk: by then every frame of the host that is gone has come
LEADER = -1  # in the place of a host's number: whoever leads when the fault comes


class Kind(StrEnum):
    """What can happen. The comments name the values of `Fault.args`."""

    WIPE = "wipe"  # the disk is lost, and with it the node's key: seconds until a new node starts
    CRASH = "crash"  # how (see Crash), frames or writes before it, seconds until the restart
    BLACKOUT = "blackout"  # all crash at once: seconds until the last one is back
    STOP = "stop"  # in good order: seconds until the restart
    PAUSE = "pause"  # SIGSTOP: seconds
    CLOCK = "clock"  # the clock's rate, seconds
    SLOW_DISK = "slow disk"  # seconds that each write takes, seconds
    STALLED_DISK = "stalled disk"  # seconds
    BROKEN_DISK = "broken disk"  # the next write fails: seconds until the restart
    FULL_DISK = "full disk"  # seconds
    CUT = "cut"  # one way: the other host, seconds
    ISOLATE = "isolate"  # from all others: Way, seconds
    PARTITION = "partition"  # the numbers on one side, seconds
    BAD_NETWORK = "bad network"  # loss, duplication, jitter in seconds, seconds
    RESET = "reset"  # the connection to another host, with what is in flight
    MISTAKE = "mistake"  # the link to another host is wrongly said to be down: seconds
    ADD = "add voter"  # asked at: another host's number, or LEADER
    REMOVE = "remove voter"  # as ADD
    TRANSFER = "transfer"  # leadership
    BURST = "burst"  # of writes through that host, at once: how many


class Crash(StrEnum):
    """When exactly a process dies."""

    NOW = "now"
    AT_SEND = "at a send"  # in the middle of a step, after so many frames
    BEFORE_WRITE = "before a write"
    AFTER_WRITE = "after a write"  # but before the process knows


class Way(StrEnum):
    """Which direction of a host's links is cut."""

    BOTH = "both"
    IN = "in"
    OUT = "out"


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that happens `at` seconds after the start to the host of that number."""

    at: float
    kind: Kind
    who: int
    args: tuple[object, ...] = ()

    def __str__(self) -> str:
        who = "the leader" if self.who == LEADER else f"host {self.who}"
        details = ", ".join(f"{a:.3g}" if isinstance(a, float) else str(a) for a in self.args)
        return f"{self.at:7.3f}  {self.kind} {who} ({details})"


@dataclass(frozen=True, slots=True)
class Lame:
    """What goes on being wrong with one host after the rest is healed: `kind` of `Fault`."""

    kind: Kind
    who: int
    args: tuple[object, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Network:
    """What the network is like when nothing in particular is wrong with it."""

    streams: bool  # connections with `Links`, or single frames that anything may happen to
    ordered: bool  # whether the single frames from one host to another keep their order
    latency_s: float
    jitter_s: float
    loss: float = 0.0  # share of the frames
    duplication: float = 0.0
    straggling: float = 0.01  # share of the frames that are later than all others,
    straggling_s: float = 0.5  # by up to that


@dataclass(frozen=True, slots=True)
class Tuning:
    """Limits of the product, made small so that what is behind them happens often."""

    compact_entries: int
    compaction_tail: int
    snapshot_chunk: int  # bytes
    max_entries: int  # in one message
    catch_up_entries: int


@dataclass(frozen=True, slots=True)
class Scenario:
    """One simulated cluster and its misfortunes."""

    seed: int
    voters: int  # in the beginning
    spares: int  # learners in the beginning
    grows: bool  # from a founder alone, or begins complete
    duration_s: float  # of faults and load; then all is healed
    network: Network
    tuning: Tuning
    timing: Timing
    sync_s: float  # what a write to disk takes
    clients: int
    think_s: float  # mean pause of a client between two operations
    faults: tuple[Fault, ...]
    lame: Lame | None  # what is healed last
    creep_s: float  # what each look at a host's clock takes

    @property
    def hosts(self) -> int:
        return self.voters + self.spares


def scenario(seed: int, *, wipes: bool = True) -> Scenario:
    """The scenario of that seed; without `wipes`, disks are never lost for good."""
    rng = random.Random(f"{seed} plan")
    late = random.Random(
        f"{seed} late"
    )  # of its own: what came later leaves older seeds as they are
    voters = rng.choices((3, 5, 7, 2, 1), (3, 10, 1, 0.5, 0.5))[0]
    spares = rng.choices((0, 1, 2), (3, 4, 2))[0] if voters < 7 else 0
    duration_s = rng.uniform(15, 30)
    drawn = Scenario(
        seed,
        voters,
        spares,
        grows=rng.random() < 0.25,
        duration_s=duration_s,
        network=_network(rng),
        tuning=Tuning(
            compact_entries=rng.choice((3, 8, 20, 20, 4096)),
            compaction_tail=rng.choice((1, 2, 4, 10, 1024)),
            snapshot_chunk=rng.choice((300, 1500, 256 * 1024)),
            max_entries=rng.choice((1, 3, 16384)),
            catch_up_entries=rng.choice((3, 256)),
        ),
        # Timeouts that lie close together make candidates compete.
        timing=rng.choice((Timing(), Timing(), Timing(0.1, 0.4, 0.45))),
        sync_s=rng.choice((0.0003, 0.002, 0.01, 0.03)),
        clients=rng.randint(2, 4),
        think_s=rng.choice((0.2, 0.5, 1.0)),
        faults=_faults(rng, voters + spares, duration_s),
        lame=_lame(late, voters + spares) if late.random() < 0.4 else None,
        creep_s=late.choice((0.0, 0.0, 1e-6, 1e-4)),
    )
    if voters == 1 and spares and late.random() < 0.7:
        # Who leads alone leads before the disk knows: that lasts long enough to be heard of.
        return dataclasses.replace(drawn, sync_s=late.choice((0.1, 0.2)))
    if wipes and voters >= 3 and not drawn.grows and late.random() < 0.25:
        return dataclasses.replace(drawn, faults=_with_a_wipe(late, drawn))
    return drawn


def _with_a_wipe(rng: random.Random, drawn: Scenario) -> tuple[Fault, ...]:
    """One host loses its disk for good, and a new node comes in its place.

    Where a voter is gone for ever while a change of the voters is under way, the majority may be
    lost with it, as in any Raft; so nobody asks for one before.
    """
    at = rng.uniform(2.0, 12.0)
    who = LEADER if rng.random() < 0.5 else rng.randrange(drawn.voters)
    wipe = Fault(at, Kind.WIPE, who, (rng.uniform(0.1, 5.0),))
    changes = (Kind.ADD, Kind.REMOVE)
    rest = [f for f in drawn.faults if f.kind not in changes or f.at > at + CALM_S]
    return tuple(sorted([wipe, *rest], key=lambda fault: fault.at))


def _lame(rng: random.Random, hosts: int) -> Lame:
    seconds = LIMP_S + rng.uniform(5.0, 30.0)
    who = LEADER if rng.random() < 0.5 else rng.randrange(hosts)
    kind = rng.choice((Kind.STALLED_DISK, Kind.FULL_DISK, Kind.PAUSE, Kind.SLOW_DISK, Kind.ISOLATE))
    match kind:
        case Kind.ISOLATE:
            return Lame(kind, who, (rng.choice(list(Way)), seconds), seconds)
        case Kind.SLOW_DISK:
            return Lame(kind, who, (0.6, seconds), seconds)
        case _:
            return Lame(kind, who, (seconds,), seconds)


def _network(rng: random.Random) -> Network:
    latency_s = rng.choice((0.0003, 0.001, 0.005, 0.02, 0.05))
    jitter_s = rng.choice((0.0002, 0.002, 0.02))
    match rng.choices(("streams", "ordered", "calm", "wild"), (3, 3, 2, 3))[0]:
        case "streams":
            return Network(True, True, latency_s, jitter_s)
        case "ordered":
            return Network(False, True, latency_s, jitter_s, rng.choice((0.0, 0.02)))
        case "calm":
            return Network(False, False, latency_s, jitter_s)
        case _:
            loss, duplication = rng.choice((0.0, 0.02)), rng.choice((0.02, 0.3))
            straggling, straggling_s = rng.choice(((0.01, 0.5), (0.05, 2.0), (0.2, 3.0)))
            return Network(
                False, False, latency_s, jitter_s, loss, duplication, straggling, straggling_s
            )


# How often each kind is drawn; each seed leaves some out, so that the rest meets more often.
_WEIGHTS = {
    Kind.CRASH: 6.0,
    Kind.BLACKOUT: 0.5,
    Kind.STOP: 1.0,
    Kind.PAUSE: 2.0,
    Kind.CLOCK: 1.0,
    Kind.SLOW_DISK: 1.0,
    Kind.STALLED_DISK: 1.0,
    Kind.BROKEN_DISK: 1.0,
    Kind.FULL_DISK: 1.0,
    Kind.CUT: 2.0,
    Kind.ISOLATE: 3.0,
    Kind.PARTITION: 3.0,
    Kind.BAD_NETWORK: 2.0,
    Kind.RESET: 1.0,
    Kind.MISTAKE: 1.0,
    Kind.ADD: 2.0,
    Kind.REMOVE: 2.0,
    Kind.TRANSFER: 1.0,
    Kind.BURST: 1.0,
}

_CHANGES_OF_LEADERS = (
    Kind.CRASH,
    Kind.PAUSE,
    Kind.CUT,
    Kind.ISOLATE,
    Kind.PARTITION,
    Kind.BAD_NETWORK,
    Kind.ADD,
    Kind.REMOVE,
    Kind.TRANSFER,
    Kind.BURST,
)
_CUTS = (Kind.CUT, Kind.ISOLATE, Kind.PARTITION)


def _faults(rng: random.Random, hosts: int, duration_s: float) -> tuple[Fault, ...]:
    drawn = list(_WEIGHTS)
    kinds = [kind for kind in drawn if rng.random() < 0.7] or drawn
    mean_pause_s = rng.choice((0.4, 1.0, 2.0, 4.0))
    leader_share = rng.choice((0.1, 0.4, 0.8))
    if rng.random() < 0.3:
        # Leaders come and go, so that what one began meets the next.
        kinds, mean_pause_s, leader_share = list(_CHANGES_OF_LEADERS), 0.4, 0.9
    weights = [_WEIGHTS[kind] for kind in kinds]
    faults = []
    at = rng.uniform(0.5, 3.0)
    while at < duration_s:
        kind = rng.choices(kinds, weights)[0]
        who = LEADER if rng.random() < leader_share else rng.randrange(hosts)
        faults.append(Fault(at, kind, who, _arguments(rng, kind, hosts)))
        if kind in _CUTS and rng.random() < 0.5:
            # What a leader takes in now will conflict with what the next one does.
            faults.append(Fault(at + rng.uniform(0, 0.5), Kind.BURST, who, (rng.randint(1, 6),)))
        if kind in _CUTS and rng.random() < 0.3:
            # Changes that a leader without a majority must not make in two steps either.
            for _ in range(rng.randint(2, 4)):
                change = Kind.ADD if rng.random() < 0.2 else Kind.REMOVE
                soon = at + rng.uniform(0, 0.6)
                faults.append(Fault(soon, change, rng.randrange(hosts), (LEADER,)))
        # Now and then a second one follows at once.
        at += rng.uniform(0.001, 0.1) if rng.random() < 0.2 else rng.expovariate(1 / mean_pause_s)
    return tuple(sorted(faults, key=lambda fault: fault.at))


def _arguments(rng: random.Random, kind: Kind, hosts: int) -> tuple[object, ...]:
    brief_s, long_s = rng.uniform(0.05, 1.0), rng.uniform(0.5, 5.0)
    lasting_s = rng.choice((brief_s, long_s))
    other = rng.randrange(hosts)
    match kind:
        case Kind.CRASH:
            return rng.choice(list(Crash)), rng.randint(1, 6), lasting_s
        case Kind.BLACKOUT | Kind.STOP | Kind.STALLED_DISK | Kind.BROKEN_DISK | Kind.FULL_DISK:
            return (lasting_s,)
        case Kind.PAUSE:
            return (lasting_s,)
        case Kind.CLOCK:
            return rng.choice((0.5, 0.8, 0.95, 1.05, 1.3, 3.0)), long_s
        case Kind.SLOW_DISK:
            return rng.choice((0.05, 0.2, 0.6)), long_s
        case Kind.CUT | Kind.MISTAKE:
            return other, lasting_s
        case Kind.ISOLATE:
            return rng.choice(list(Way)), lasting_s
        case Kind.PARTITION:
            side = rng.sample(range(hosts), rng.randint(1, max(1, hosts - 1)))
            return tuple(sorted(side)), lasting_s
        case Kind.BAD_NETWORK:
            return rng.choice((0.05, 0.2, 0.5)), 0.1, rng.choice((0.05, 0.3)), long_s
        case Kind.RESET | Kind.ADD | Kind.REMOVE:
            return (other,)
        case Kind.BURST:
            return (rng.randint(1, 20),)
        case Kind.TRANSFER:
            return ()
