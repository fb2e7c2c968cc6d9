"""`events`: what happens in the cluster, line by line, as it happens."""

import json
import sys
from datetime import datetime
from typing import Annotated, Any

import typer

from ollama_dist.session import Output, Session, command
from ollama_dist.text import one_line, percent, short_id, size

CHANNELS = ("nodes", "models", "transfers", "cluster", "alerts", "metrics", "logs")
DEFAULT = ("nodes", "models", "cluster", "alerts")
_COLORS = {"critical": "red", "warning": "yellow", "error": "red"}


def channel_names(incomplete: str) -> list[str]:
    """The channels that start with `incomplete`."""
    return [name for name in CHANNELS if name.startswith(incomplete)]


@command
def events(
    session: Session,
    channel: Annotated[
        list[str] | None,
        typer.Option(
            "--channel",
            "-c",
            metavar="CHANNEL",
            help=f"One of {', '.join(CHANNELS)}; may be given more than once. "
            "Without it: nodes, models, cluster and alerts. logs needs an admin.",
            autocompletion=channel_names,
        ),
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", "-n", min=0, help="Stop after so many; 0 for never.")
    ] = 0,
) -> None:
    """Tell what happens in the cluster; Ctrl-C ends it.

    With --output json one object a line, with --output yaml one document each.
    """
    from ollama_dist.commands.nodes import names_of
    from ollama_dist.errors import UsageProblem
    from ollama_dist.live import messages

    channels = channel or list(DEFAULT)
    for name in channels:
        if name not in CHANNELS:
            raise UsageProblem(
                f"there is no channel {name!r}", hint=f"Use one of {', '.join(CHANNELS)}."
            )
    names: dict[str, str] = {}
    if not session.wants_data:
        names = names_of(session.api.get("/nodes")["nodes"])
    left = limit
    greetings = 2  # what every connection begins with: nobody asked for it

    def lost(why: str) -> None:
        nonlocal greetings
        greetings = 2
        session.note(f"{why}; trying again")

    for message in messages(session, channels, lost):
        kind = message.get("type")
        if kind == "subscription_ack":
            continue
        if greetings and kind in ("cluster_status", "metrics"):
            greetings -= 1
            continue
        if session.wants_data:
            _write_data(session.output, message)
        else:
            if kind == "node_event" and message.get("node_id"):
                names[message["node_id"]] = message["data"].get("name") or ""
            _write_line(session, message, names)
        left -= 1
        if left == 0:
            return


def _write_data(output: Output, message: dict[str, Any]) -> None:
    if output is Output.YAML:
        import yaml

        sys.stdout.write(yaml.safe_dump(message, sort_keys=False, allow_unicode=True) + "---\n")
    else:
        sys.stdout.write(json.dumps(message, ensure_ascii=False) + "\n")
    sys.stdout.flush()  # whoever reads the pipe wants it now


def _write_line(session: Session, message: dict[str, Any], names: dict[str, str]) -> None:
    stamp = message.get("timestamp")
    moment = datetime.fromtimestamp(stamp) if isinstance(stamp, int) else datetime.now()
    level = message.get("level") if message.get("type") == "alert" else ""
    style = _COLORS.get(str(level or (message.get("data") or {}).get("level")), "")
    line = f"{moment:%H:%M:%S}  {one_line(describe(message, names))}"
    session.out.print(line, style=style, soft_wrap=True)


def describe(message: dict[str, Any], names: dict[str, str]) -> str:
    """A message in words."""
    data = message.get("data") or {}

    def name(identity: object) -> str:
        return names.get(str(identity)) or short_id(identity) or "nobody"

    match message.get("type"):
        case "node_event":
            return _node_event(message, name(message.get("node_id")))
        case "model_event":
            return _model_event(message, data, name(data.get("node_id")))
        case "alert":
            cleared = message.get("state") == "cleared"
            return f"{'over' if cleared else message.get('level')}: {message.get('message')}"
        case "cluster_status":
            return (
                f"the cluster is {data.get('status')}: {data.get('nodes_online')} of "
                f"{data.get('cluster_size')} nodes online, leader {name(data.get('leader'))}"
            )
        case "metrics":
            cpu, memory = (percent((data.get(key) or 0) / 100) for key in ("cpu", "memory"))
            return f"this node: CPU {cpu}, memory {memory}; {data.get('models')} models"
        case "log":
            return f"{data.get('level')} {data.get('logger')}: {data.get('message')}"
        case "dropped":
            return f"{message.get('count')} messages were dropped: this reader is too slow"
        case other:
            return f"{other}: {json.dumps(message, ensure_ascii=False)}"


def _node_event(message: dict[str, Any], node: str) -> str:
    words = {
        "node_online": "is online",
        "node_offline": "is offline",
        "node_joined": "joined the cluster",
        "node_left": "left the cluster",
        "node_draining": "is being drained",
        "node_undrained": "is drained no longer",
        "leader_changed": "leads now",
    }
    kind = str(message.get("event_type"))
    if kind == "leader_changed" and not message.get("node_id"):
        return "nobody leads the cluster"
    return f"node {node} {words.get(kind, kind)}"


def _model_event(message: dict[str, Any], data: dict[str, Any], node: str) -> str:
    model, kind = message.get("model_name"), str(message.get("event_type"))
    match kind:
        case "download_progress":
            done = f"{size(data.get('bytes_done'))} of {size(data.get('bytes_total') or None)}"
            speed = f", {size(data['speed'])}/s" if data.get("speed") else ""
            return f"{model} to {node}: {data.get('progress') or 0:.0f}%, {done}{speed}"
        case "download_failed":
            return f"{model} to {node}: {data.get('status')} {data.get('error') or ''}".rstrip()
        case "download_started" | "download_completed":
            return f"{model} to {node}: {kind.removeprefix('download_')}"
        case "model_deleted":
            return f"{model} was deleted"
        case "model_replicated":
            return f"{model} is on node {node}"
        case _:
            return f"{model} is {kind.removeprefix('model_')} on node {node}"
