"""`status`, `version`, and the `cluster` group."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ollama_dist.commands.nodes import NODE_COLUMNS, names_of, node_row
from ollama_dist.completion import node_names
from ollama_dist.errors import CliError, NoConnection, UsageProblem
from ollama_dist.session import Session, command
from ollama_dist.text import parse_duration, plural, short_id, size

if TYPE_CHECKING:
    from rich.text import Text

# As ollamad.service does it: whatever root leaves in that directory its user could not read.
PACKAGED_START = "sudo -u ollamad ollamad start --data-dir /var/lib/ollamad"

app = typer.Typer(no_args_is_help=True, help="The cluster: who leads, who joins, who leaves.")


def quorum_text(cluster: dict[str, Any], nodes: list[dict[str, Any]]) -> tuple[str, bool]:
    """What the cluster can lose, in words, and whether that is a reason to act."""
    voters = [str(voter) for voter in cluster.get("voters") or ()]
    state = {node["id"]: node.get("status") for node in nodes}
    online = sum(state.get(voter) != "offline" for voter in voters)
    majority = len(voters) // 2 + 1
    count = f"{online} of {plural(len(voters), 'voter')}"
    if not cluster.get("has_quorum", cluster.get("quorum")):
        missing = max(1, majority - online)
        verb = "is" if missing == 1 else "are"
        return f"lost: {count} online; nothing can change until {missing} more {verb} back", True
    spare = online - majority
    if len(voters) == 1:
        return "yes: 1 voter, it is the whole cluster; two more nodes let it survive a loss", False
    if len(voters) == 2:
        return f"yes: {count} online; survives no loss, add a third node", True
    if spare < 1:
        return f"yes: {count} online; survives no further loss", True
    return f"yes: {count} online; survives the loss of {spare}", online < len(voters)


@command
def status(session: Session) -> None:
    """The cluster at a glance: nodes, leader, quorum, models, versions."""
    from ollama_dist.client import path
    from ollama_dist.commands.models import summary_rows, summary_table
    from ollama_dist.show import show_facts, show_table

    api = session.api
    cluster = api.get(path("cluster", "status"))
    version = api.get(path("version"))
    nodes = api.get(path("nodes"))["nodes"]
    models = api.get(path("models"))["models"]
    if session.wants_data:
        session.data({"version": version, "cluster": cluster, "nodes": nodes, "models": models})
        return
    out = session.out
    show_facts(out, _facts(cluster, nodes, names_of(nodes)))
    versions = sorted({str(node["version"]) for node in nodes if node.get("version")})
    if len(versions) > 1:
        out.print(f"Versions differ: {', '.join(versions)}", style="yellow")
    out.print()
    show_table(out, NODE_COLUMNS, [node_row(node) for node in nodes], "No nodes.")
    out.print()
    if models:
        out.print(summary_table(summary_rows(models, datetime.now(UTC))))
        total = sum(model.get("size") or 0 for model in models)
        out.print(f"{plural(len(models), 'model')}, {size(total)}", style="dim")
    else:
        out.print('No models yet: try "ollama-dist models pull smollm2:135m".')


def _facts(
    cluster: dict[str, Any], nodes: list[dict[str, Any]], names: dict[str, str]
) -> list[tuple[str, object]]:
    online = sum(node.get("status") != "offline" for node in nodes)
    words, concern = quorum_text(cluster, nodes)
    leader = cluster.get("leader")
    facts: list[tuple[str, object]] = [
        ("Cluster", cluster.get("status", "-")),
        ("Nodes", f"{online} of {len(nodes)} online"),
        ("Leader", names.get(leader, leader) if leader else "none"),
        ("Quorum", _concerned(words) if concern else words),
    ]
    if not cluster.get("has_quorum", cluster.get("quorum")):
        voters = set(cluster.get("voters") or ())
        missing = [
            f"{node['name']} (last seen {node.get('last_seen')})"
            for node in nodes
            if node["id"] in voters and node.get("status") == "offline"
        ]
        facts.append(("Missing", ", ".join(missing) or "-"))
        facts.append(("Way out", "start the missing voters; if they are gone: ollamad recover"))
    return facts


def _concerned(words: str) -> "Text":
    from rich.text import Text

    return Text(words, style="yellow")


@command
def version(session: Session) -> None:
    """The versions of this program and of the daemon."""
    from importlib.metadata import version as installed

    from ollama_dist.client import path

    own = installed("ollama-distributed")
    server: dict[str, Any] | None = None
    try:
        server = session.api.get(path("version"))
    except NoConnection as problem:
        session.note(problem.message)
    if session.wants_data:
        session.data({"client": own, "server": server})
        return
    session.say(f"ollama-dist {own}")
    if server is not None:
        built = f"{server.get('git_commit')}, {server.get('build_time')}"
        session.say(f"ollamad {server.get('version')} ({built}, {server.get('platform')})")


@app.command("status")
@command
def cluster_status(session: Session) -> None:
    """The state of the consensus, as the node that is asked sees it."""
    from ollama_dist.client import path
    from ollama_dist.show import show_facts

    cluster = session.api.get(path("cluster", "status"))
    if session.wants_data:
        session.data(cluster)
        return
    nodes = session.api.get(path("nodes"))["nodes"]
    names = names_of(nodes)
    asked = str(cluster.get("node_id"))
    voters = [names.get(voter, short_id(voter)) for voter in cluster.get("voters") or ()]
    show_facts(
        session.out,
        [
            *_facts(cluster, nodes, names),
            ("Voters", ", ".join(voters) or "-"),
            ("Term", cluster.get("term", "-")),
            ("Id", cluster.get("cluster_id", "-")),
            ("Asked", names.get(asked, asked)),
        ],
    )


@app.command("leader")
@command
def leader(session: Session) -> None:
    """The id of the node that leads."""
    from ollama_dist.client import path

    answer = session.api.get(path("cluster", "leader"))
    if session.wants_data:
        session.data(answer)
        return
    if not answer.get("leader"):
        raise CliError("the cluster has no leader", hint="See: ollama-dist status")
    session.say(answer["leader"])


@app.command("token")
@command
def token(
    session: Session,
    ttl: Annotated[
        str, typer.Option("--ttl", metavar="TIME", help="How long it lets nodes in: 30m, 24h, 7d.")
    ] = "24h",
) -> None:
    """Make a token that lets nodes join, and print the command for them."""
    from ollama_dist.client import path

    try:
        ttl_seconds = parse_duration(ttl)
    except ValueError as problem:
        raise UsageProblem(f"--ttl: {problem}") from None
    made = session.api.post(path("cluster", "token"), {"ttl_seconds": ttl_seconds})
    if "@127." in (made.get("command") or ""):
        session.note(
            "Only nodes on the same host reach 127.0.0.1. For others, see to the network of the "
            "host that made the token (it is looked at each minute), or to its p2p.listen and "
            "node.advertise."
        )
    if session.wants_data:
        session.data(made)
        return
    # The command alone on stdout, so that it can be piped to the new node.
    session.note(f"Run this on the new node; the token works until {made.get('expires_at')}.")
    shown = made.get("command") or made["token"]
    session.say(shown)
    packaged = shown.replace("ollamad start", PACKAGED_START, 1)
    session.note(
        "With the package, stop its service (systemctl stop ollamad), run it as the service's "
        "user instead, and start the service again once it is ready:"
    )
    session.note(f"  {packaged}")


@app.command("join")
@command
def join(
    session: Session,
    node_id: Annotated[str, typer.Argument(metavar="NODE_ID", help="The waiting node's full id.")],
    address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="Where it waits.")],
) -> None:
    """Take in a node that waits with a token."""
    from ollama_dist.client import SLOW_TIMEOUT_S, path

    body = {"node_id": node_id, "address": address}
    _message(session, session.api.post(path("cluster", "join"), body, timeout_s=SLOW_TIMEOUT_S))


@app.command("leave")
@command
def leave(
    session: Session,
    node: Annotated[
        str,
        typer.Argument(
            metavar="NODE", help="A node's name, id or unique prefix.", autocompletion=node_names
        ),
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Also if models are lost that only it has.")
    ] = False,
    timeout: Annotated[
        str | None,
        typer.Option("--timeout", metavar="TIME", help="How long copying may take: 30s, 2h."),
    ] = None,
) -> None:
    """Take a node out of the cluster, after moving what only it has."""
    import sys

    from ollama_dist.client import SLOW_TIMEOUT_S, path

    if not yes:
        if not sys.stdin.isatty():
            raise UsageProblem("this cannot be undone", hint="Say --yes to do it unasked.")
        lost = ", and lose what only it has" if force else ""
        typer.confirm(f"Take {node} out of the cluster{lost}?", abort=True, err=True)
    body: dict[str, Any] = {"node_id": node}
    wait_s = SLOW_TIMEOUT_S
    if force:
        body["force"] = True
    if timeout is not None:
        try:
            body["timeout_seconds"] = parse_duration(timeout)
        except ValueError as problem:
            raise UsageProblem(f"--timeout: {problem}") from None
        wait_s += body["timeout_seconds"]
    _message(session, session.api.post(path("cluster", "leave"), body, timeout_s=wait_s))


def _message(session: Session, answer: dict[str, Any]) -> None:
    if session.wants_data:
        session.data(answer)
    else:
        session.say(answer.get("message") or "done")
