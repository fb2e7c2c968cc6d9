"""The `nodes` group, and `ps`: what the machines have, and what they hold in memory."""

from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from ollama_dist.completion import node_names
from ollama_dist.errors import CliError
from ollama_dist.session import Session, command
from ollama_dist.show import Column
from ollama_dist.text import ago, percent, plural, short_id, size, until

app = typer.Typer(no_args_is_help=True, help="The machines of the cluster.")

NodeArgument = Annotated[
    str,
    typer.Argument(
        metavar="NODE", help="A node's name, id or unique prefix.", autocompletion=node_names
    ),
]

DRAIN_POLL_S = 0.5  # between two looks at a node that drains

NODE_COLUMNS = (
    Column("  NAME", gives_way=True),
    Column("ID"),
    Column("STATUS"),
    Column("ADDRESS", gives_way=True),
    Column("CPU", right=True),
    Column("MEM", right=True),
    Column("GPU", right=True),
    Column("MODELS", right=True),
)
_LOADED_COLUMNS = (
    Column("MODEL", gives_way=True),
    Column("NODE", gives_way=True),
    Column("SIZE", right=True),
    Column("ON"),
    Column("ENGINE"),
    Column("CTX", right=True),
    Column("BUSY", right=True),
    Column("UNTIL"),
)


def names_of(nodes: list[dict[str, Any]]) -> dict[str, str]:
    """What to call each node, by its id."""
    return {node["id"]: node.get("name") or short_id(node["id"]) for node in nodes}


def node_state(node: dict[str, Any]) -> str:
    """The node's status, with what a person wants to know more."""
    state = str(node.get("status", "-"))
    return "draining" if node.get("draining") and state == "online" else state


def node_row(node: dict[str, Any]) -> tuple[object, ...]:
    """A node as a row of NODE_COLUMNS; usage is in fractions as `GET /nodes` has it."""
    usage = node.get("usage") or {}
    # What an offline node last said about itself is no longer true.
    live = usage if node.get("status") != "offline" else {}
    gpus = (node.get("capacity") or {}).get("gpu_count")
    return (
        f"{'*' if node.get('is_leader') else ' '} {node.get('name') or '-'}",
        short_id(node["id"]),
        node_state(node),
        node.get("address", "-"),
        percent(live.get("cpu_usage")),
        percent(live.get("memory_usage")),
        percent(live.get("gpu_usage")) if gpus else "-",
        len(node.get("models") or ()),
    )


@app.command("list")
@command
def list_nodes(session: Session) -> None:
    """All nodes; the star marks the leader."""
    from ollama_dist.client import path
    from ollama_dist.show import show_table

    answer = session.api.get(path("nodes"))
    if session.wants_data:
        session.data(answer)
        return
    rows = [node_row(node) for node in answer["nodes"]]
    show_table(session.out, NODE_COLUMNS, rows, "No nodes.")


@app.command("show")
@command
def show_node(session: Session, node: NodeArgument) -> None:
    """One node: hardware, usage, models."""
    from ollama_dist.client import path
    from ollama_dist.show import show_facts, show_table

    answer = session.api.get(path("nodes", node))
    if session.wants_data:
        session.data(answer)
        return
    found = answer["node"]
    usage = found.get("usage") or {}
    now = datetime.now(UTC)
    facts: list[tuple[str, object]] = [
        ("Name", found.get("name") or "-"),
        ("Id", found["id"]),
        ("Status", node_state(found)),
        ("Role", "leader" if found.get("is_leader") else "follower"),
        ("Address", found.get("address", "-")),
        ("Version", found.get("version") or "-"),
        ("Last seen", ago(found.get("last_seen"), now)),
        ("Hardware", _hardware(found.get("capacity") or {})),
    ]
    facts += [("GPU", _gpu(gpu)) for gpu in found.get("gpus") or ()]
    if (rest := found.get("drain")) is not None:
        facts.append(("Drained", "yes" if rest.get("done") else f"waits for {_drain_rest(rest)}"))
    if found.get("status") != "offline":
        facts.append(("Usage", _usage(usage)))
    facts.append(("Models", "\n".join(found.get("models") or ()) or "none"))
    show_facts(session.out, facts)
    loaded = found.get("loaded") or ()
    if loaded:
        session.out.print()
        rows = [_loaded_row(item, found.get("name") or found["id"], now) for item in loaded]
        show_table(session.out, _LOADED_COLUMNS, rows, "")


def _hardware(capacity: dict[str, Any]) -> str:
    parts = [
        plural(capacity.get("cpu_cores") or 0, "core"),
        f"{capacity.get('memory_gb', '-')} GB memory",
        f"{capacity.get('disk_gb', '-')} GB disk",
        plural(capacity.get("gpu_count") or 0, "GPU"),
    ]
    return ", ".join(parts)


def _gpu(gpu: dict[str, Any]) -> str:
    return f"{gpu.get('name', '-')}, {size(gpu.get('memory_total'))}"


def _usage(usage: dict[str, Any]) -> str:
    parts = [f"CPU {usage.get('cpu', 0):.0f}%", f"memory {usage.get('memory', 0):.0f}%"]
    if usage.get("disk_usage") is not None:
        parts.append(f"disk {percent(usage['disk_usage'])}")
    parts.append(f"network {size(usage.get('bandwidth') or 0)}/s")
    return ", ".join(parts)


@app.command("drain")
@command
def drain(
    session: Session,
    node: NodeArgument,
    wait: Annotated[
        bool, typer.Option("--wait", help="Until nothing runs there and nothing is only there.")
    ] = False,
) -> None:
    """Send no new requests to a node; what runs there finishes, what only it has is copied."""
    _switch(session, node, "drain")
    if wait:
        _wait_drained(session, node)


def _wait_drained(session: Session, node: str) -> None:
    from ollama_dist import progress
    from ollama_dist.client import path

    said = ""
    while True:
        found = session.api.get(path("nodes", node))["node"]
        rest = found.get("drain")
        if rest is None:
            raise CliError(f"{found.get('name')} does not drain any more: somebody undrained it")
        if rest.get("done"):
            session.note(f"{found.get('name')} is drained.")
            return
        waits = _drain_rest(rest)
        if waits != said:
            session.note(f"{found.get('name')} waits for {waits}.")
        said = waits
        progress.pause(DRAIN_POLL_S)


def _drain_rest(rest: dict[str, Any]) -> str:
    """What a node that drains still waits for, in words."""
    sole, answers = rest.get("sole_models") or (), rest.get("answers") or 0
    parts = [plural(answers, "answer")] if answers else []
    if sole:
        parts.append(f"copies of {', '.join(sole)}")
    return " and ".join(parts) or "nothing"


@app.command("undrain")
@command
def undrain(session: Session, node: NodeArgument) -> None:
    """Let a drained node serve again."""
    _switch(session, node, "undrain")


def _switch(session: Session, node: str, action: str) -> None:
    from ollama_dist.client import path

    answer = session.api.post(path("nodes", node, action))
    if session.wants_data:
        session.data(answer)
    else:
        session.say(answer.get("message") or "done")


@command
def ps(session: Session) -> None:
    """The models in memory, over the whole cluster."""
    from ollama_dist.client import path
    from ollama_dist.show import show_table

    nodes = session.api.get(path("nodes"))["nodes"]
    loaded = [(node, item) for node in nodes for item in node.get("loaded") or ()]
    if session.wants_data:
        session.data({"models": [{**item, "node_id": node["id"]} for node, item in loaded]})
        return
    now = datetime.now(UTC)
    rows = [
        _loaded_row(item, node.get("name") or short_id(node["id"]), now) for node, item in loaded
    ]
    show_table(session.out, _LOADED_COLUMNS, rows, "No model is in memory.")
    reasons = {
        f"{item['name']}: {item['engine']}, because {item['engine_reason']}"
        for _, item in loaded
        if item.get("engine_reason")
    }
    for reason in sorted(reasons):
        session.say(reason)


def _loaded_row(item: dict[str, Any], node: str, now: datetime) -> tuple[object, ...]:
    return (
        item.get("name", "-"),
        node,
        size(item.get("size")),
        _processor(item),
        item.get("engine") or "-",
        item.get("context_length") or "-",
        _busy(item),
        until(item.get("expires_at"), now),
    )


def _busy(item: dict[str, Any]) -> str:
    """Requests that it answers, and those that wait for it, as `2 +1`."""
    busy, queued = int(item.get("busy") or 0), int(item.get("queued") or 0)
    return f"{busy} +{queued}" if queued else str(busy)


def _processor(item: dict[str, Any]) -> str:
    total, on_gpu = item.get("size") or 0, item.get("size_vram") or 0
    if not total:
        return "-"
    share = min(100, round(100 * on_gpu / total))
    if share in (0, 100):
        return "GPU" if share else "CPU"
    return f"{share}% GPU"
