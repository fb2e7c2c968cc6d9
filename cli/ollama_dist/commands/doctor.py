"""`doctor`: goes over what commonly goes wrong, and says of each what to do.

It only asks what every viewer may ask, and changes nothing. The findings are a pure function of
the answers, so that they can be tested without a cluster.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ollama_dist.commands.cluster import quorum_text
from ollama_dist.commands.nodes import names_of
from ollama_dist.errors import CliError, NoConnection
from ollama_dist.session import Session, command
from ollama_dist.text import percent, plural

Grade = Literal["ok", "warning", "problem"]
Json = dict[str, Any]

NEARLY_FULL = 0.95  # of a disk or of the memory; above it pulls and loads begin to be refused
SHOWN = 5  # names in one line; a large cluster has more than a person reads


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found: how bad it is, in words, and what to do about it."""

    check: str
    grade: Grade
    found: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """The answers that the checks go over, each as the API gave it."""

    own_version: str
    version: Json
    user: Json
    cluster: Json
    consensus: Json
    nodes: Sequence[Json]
    models: Sequence[Json]
    transfers: Sequence[Json]


@command
def doctor(session: Session) -> None:
    """Look for what is wrong with the cluster, and say what to do; fails if anything is."""
    findings = examine(_ask(session))
    worst = any(finding.grade == "problem" for finding in findings)
    if session.wants_data:
        session.data({"healthy": not worst, "findings": [asdict(each) for each in findings]})
    else:
        _show(session, findings)
    if worst:
        count = sum(finding.grade == "problem" for finding in findings)
        raise CliError(f"{plural(count, 'problem')} found")


def examine(facts: Facts) -> list[Finding]:
    """All checks, in the order in which a person would go over them."""
    return [
        *_access(facts),
        *_quorum(facts),
        *_nodes(facts),
        *_versions(facts),
        *_room(facts),
        *_models(facts),
        *_transfers(facts),
    ]


def _access(facts: Facts) -> Iterator[Finding]:
    name, role = facts.user.get("username") or "nobody by name", facts.user.get("role") or "-"
    advice = ""
    if role in ("viewer", "inference"):
        advice = "To change models and nodes: ollama-dist auth login"
    yield Finding("access", "ok", f"the node answers; you are {name}, role {role}", advice)


def _quorum(facts: Facts) -> Iterator[Finding]:
    cluster = facts.cluster
    words, concern = quorum_text(cluster, list(facts.nodes))
    if not cluster.get("has_quorum", cluster.get("quorum")):
        advice = "Start the voters that are missing; if they are gone for good: ollamad recover"
        yield Finding("quorum", "problem", words, advice)
    elif concern:
        yield Finding("quorum", "warning", words, "Start what is offline, or add a node")
    else:
        yield Finding("quorum", "ok", words)
    if facts.consensus.get("disk_full"):
        found = "the node's disk is full: it stands aside"
        yield Finding("log", "problem", found, "Free space on the disk of its data directory")
    elif facts.consensus.get("disk_hangs"):
        found = "the node's disk does not answer: it stands aside"
        yield Finding("log", "problem", found, "See dmesg and the log of that host")


def _nodes(facts: Facts) -> Iterator[Finding]:
    names = names_of(list(facts.nodes))
    offline = [names[node["id"]] for node in facts.nodes if node.get("status") == "offline"]
    draining = [
        names[node["id"]]
        for node in facts.nodes
        if node.get("draining") and node.get("status") != "offline"
    ]
    if offline:
        yield Finding(
            "nodes",
            "warning",
            f"{plural(len(offline), 'node')} of {len(facts.nodes)} offline: {_some(offline)}",
            "On each: systemctl status ollamad. If one is gone: ollama-dist cluster leave NODE",
        )
    else:
        yield Finding("nodes", "ok", f"{len(facts.nodes)} of {len(facts.nodes)} online")
    if draining:
        advice = "When the work on them is done: ollama-dist nodes undrain NODE"
        yield Finding("nodes", "warning", f"takes no work: {_some(draining)} (drained)", advice)


def _versions(facts: Facts) -> Iterator[Finding]:
    versions = sorted({str(node["version"]) for node in facts.nodes if node.get("version")})
    if len(versions) > 1:
        found = f"nodes run {', '.join(versions)}"
        yield Finding("versions", "warning", found, "Upgrade them one after the other")
    server = facts.version.get("version")
    if server != facts.own_version:
        found = f"this program is {facts.own_version}, the node {server}"
        yield Finding("versions", "warning", found, "Install the same on both")
    if len(versions) <= 1 and server == facts.own_version:
        yield Finding("versions", "ok", f"{server} everywhere")


def _room(facts: Facts) -> Iterator[Finding]:
    names = names_of(list(facts.nodes))
    advice = {
        "disk": "Delete models, move them by ollama-dist models replicas, or give it a larger disk",
        "memory": "See what is loaded: ollama-dist ps; unload it: ollama-dist stop MODEL",
    }
    well = True
    for what in ("disk", "memory"):
        full = [
            f"{names[node['id']]} {percent(used)}"
            for node in facts.nodes
            if node.get("status") != "offline"
            and (used := (node.get("usage") or {}).get(f"{what}_usage") or 0.0) >= NEARLY_FULL
        ]
        if full:
            well = False
            yield Finding("room", "warning", f"{what} nearly full: {_some(full)}", advice[what])
    if well:
        yield Finding("room", "ok", f"disk and memory below {percent(NEARLY_FULL)} on every node")


def _models(facts: Facts) -> Iterator[Finding]:
    online = {node["id"] for node in facts.nodes if node.get("status") != "offline"}
    lost, few = [], []
    for model in facts.models:
        there = len(online.intersection(model.get("replicas") or ()))
        wanted = model.get("replicas_wanted") or len(model.get("desired") or ()) or 1
        if not there:
            lost.append(str(model["name"]))
        elif there < wanted:
            few.append(f"{model['name']} ({there} of {wanted})")
    if lost:
        yield Finding(
            "models",
            "problem",
            f"on no node that is online: {_some(lost)}",
            "Start a node that has it, or pull it anew: ollama-dist models pull MODEL",
        )
    if few:
        yield Finding(
            "models",
            "warning",
            f"with fewer copies than wanted: {_some(few)}",
            "Copies are made by themselves; if not, see why: ollama-dist models show MODEL",
        )
    if not lost and not few:
        yield Finding("models", "ok", f"{plural(len(facts.models), 'model')}, all copies there")


def _transfers(facts: Facts) -> Iterator[Finding]:
    failed = [each for each in facts.transfers if each.get("status") == "failed"]
    for each in failed[:SHOWN]:
        found = f"{each['model_name']}: {each.get('error') or 'failed'}"
        yield Finding("transfers", "warning", found, "See: ollama-dist transfers list")
    if not failed:
        active = sum(each.get("status") == "active" for each in facts.transfers)
        yield Finding("transfers", "ok", f"{active} running, none failed")


def _some(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _ask(session: Session) -> Facts:
    from importlib.metadata import version

    from ollama_dist.client import path

    api = session.api
    try:
        told = api.get(path("version"))
    except NoConnection as problem:
        raise NoConnection(
            problem.message,
            hint="On that host: systemctl status ollamad, journalctl -u ollamad; elsewhere give a "
            "node's address with --host",
            exit_code=problem.exit_code,
        ) from None
    return Facts(
        own_version=version("ollama-distributed"),
        version=told,
        user=api.get(path("auth", "me")).get("user") or {},
        cluster=api.get(path("cluster", "status")),
        consensus=api.get(path("cluster", "consensus")),
        nodes=api.get(path("nodes"))["nodes"],
        models=api.get(path("models"))["models"],
        transfers=api.get(path("transfers"))["transfers"],
    )


def _show(session: Session, findings: Sequence[Finding]) -> None:
    from rich.text import Text

    from ollama_dist.text import printable

    marks = {"ok": ("ok", "green"), "warning": ("!", "yellow"), "problem": ("x", "red")}
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        mark, style = marks[finding.grade]
        line = Text(f"{mark:<3}", style)
        line.append(f"{finding.check:<{width}}  {printable(finding.found)}", "default")
        session.out.print(line, soft_wrap=True)
        if finding.advice:
            session.out.print(Text(f"{'':<{width + 5}}{finding.advice}", "dim"), soft_wrap=True)
