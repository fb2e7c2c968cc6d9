"""`top`: the cluster at a glance, again every few seconds."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ollama_dist.session import Session, command
from ollama_dist.show import Column
from ollama_dist.text import clock, short_id, size

if TYPE_CHECKING:
    from rich.console import RenderableType

# Three requests a look: with the least interval half of what the daemon allows in a minute.
INTERVAL_S, MIN_INTERVAL_S = 4.0, 3.0
MAX_TRANSFERS = 8  # of those that ended; all that run are shown

_MODEL_COLUMNS = (
    Column("MODEL", gives_way=True),
    Column("NODE", gives_way=True),
    Column("SIZE", right=True),
    Column("SLOTS", right=True),
    Column("BUSY", right=True),
    Column("QUEUED", right=True),
)
_TRANSFER_COLUMNS = (
    Column("TRANSFER", gives_way=True),
    Column("TO", gives_way=True),
    Column("STATUS"),
    Column("DONE", right=True),
    Column("SPEED", right=True),
    Column("ETA", right=True),
)


@command
def top(
    session: Session,
    interval: Annotated[
        float,
        typer.Option("--interval", "-i", min=MIN_INTERVAL_S, help="Seconds between two looks."),
    ] = INTERVAL_S,
) -> None:
    """Nodes, loaded models, transfers and requests, live; Ctrl-C ends it.

    Without a terminal, and with --output json or yaml, it looks once.
    """
    if session.wants_data:
        session.data(look(session))
        return
    if not session.out.is_terminal:
        session.out.print(screen(session, look(session)))
        return
    from rich.live import Live

    from ollama_dist.errors import CliError
    from ollama_dist.progress import pause

    seen = look(session)  # what is wrong with the address or the token ends it here
    try:
        with Live(
            screen(session, seen), console=session.out, screen=True, auto_refresh=False
        ) as live:
            while True:
                pause(interval)
                try:
                    seen, trouble = look(session), ""
                except CliError as problem:
                    trouble = str(problem)  # a node that restarts comes back
                live.update(screen(session, seen, trouble), refresh=True)
    except KeyboardInterrupt:
        return


def look(session: Session) -> dict[str, Any]:
    """All that is shown, as the API has it."""
    api = session.api
    return {
        "metrics": api.get("/metrics"),
        "nodes": api.get("/nodes")["nodes"],
        "transfers": api.get("/transfers")["transfers"],
    }


def screen(session: Session, seen: dict[str, Any], trouble: str = "") -> "RenderableType":
    """The whole screen; `trouble` tells why it is old."""
    from rich.console import Group
    from rich.text import Text

    from ollama_dist.commands.nodes import NODE_COLUMNS, names_of, node_row
    from ollama_dist.show import table
    from ollama_dist.text import one_line

    nodes, metrics = seen["nodes"], seen["metrics"]
    names = names_of(nodes)
    loaded = [
        (item.get("name", "-"), names[node["id"]], size(item.get("size")),
         item.get("slots", "-"), item.get("busy", 0), item.get("queued", 0))
        for node in nodes
        for item in node.get("loaded") or ()
        if node.get("status") != "offline"
    ]  # fmt: skip
    running = [t for t in seen["transfers"] if t.get("status") in ("pending", "active")]
    ended = [t for t in seen["transfers"] if t not in running][:MAX_TRANSFERS]
    transfers = [
        (
            transfer.get("model_name", "-"),
            names.get(transfer.get("node_id", "")) or short_id(transfer.get("node_id", "-")),
            transfer.get("status", "-"),
            f"{transfer.get('progress') or 0:.0f}%",
            f"{size(transfer['speed'])}/s" if transfer.get("speed") else "-",
            clock(transfer.get("eta")),
        )
        for transfer in (*running, *ended)
    ]
    online = sum(node.get("status") != "offline" for node in nodes)
    head = f"{session.address.url}: {online} of {len(nodes)} nodes online, "
    head += f"{metrics.get('models_loaded', 0)} models in memory"
    parts: list[Any] = [Text(one_line(head), style="bold")]
    if trouble:
        parts.append(Text(one_line(trouble), style="red"))
    parts += [Text(), table(NODE_COLUMNS, [node_row(node) for node in nodes])]
    parts += [Text(), table(_MODEL_COLUMNS, loaded) if loaded else Text("No model is in memory.")]
    if transfers:
        parts += [Text(), table(_TRANSFER_COLUMNS, transfers)]
    parts += [Text(), Text(one_line(_requests(metrics)))]
    return Group(*parts)


def _requests(metrics: dict[str, Any]) -> str:
    stats = metrics.get("scheduler_stats") or {}
    return (
        f"Requests of this node: {metrics.get('requests_per_second', 0):.1f}/s, "
        f"{metrics.get('active_connections', 0)} active, "
        f"{metrics.get('average_latency', 0)} ms, {metrics.get('error_rate', 0):.1f}% failed. "
        f"Generations: {stats.get('completed_requests', 0)} done, "
        f"{stats.get('failed_requests', 0)} failed, {stats.get('queued_requests', 0)} queued"
    )
