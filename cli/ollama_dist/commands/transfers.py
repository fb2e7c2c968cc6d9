"""The `transfers` group: models on their way to nodes."""

from typing import Annotated, Any

import typer

from ollama_dist.session import Session, command
from ollama_dist.show import Column
from ollama_dist.text import clock, one_line, short_id, size

app = typer.Typer(no_args_is_help=True, help="Models on their way to nodes.")

TransferArgument = Annotated[str, typer.Argument(metavar="ID", help="A transfer's id.")]

_COLUMNS = (
    Column("ID", gives_way=True),
    Column("MODEL", gives_way=True),
    Column("TYPE"),
    Column("NODE", gives_way=True),
    Column("STATUS"),
    Column("DONE", right=True),
    Column("SPEED", right=True),
    Column("ETA", right=True),
)


def _speed(transfer: dict[str, Any]) -> str:
    return f"{size(transfer['speed'])}/s" if transfer.get("speed") else "-"


@app.command("list")
@command
def list_transfers(session: Session) -> None:
    """Active and recent transfers."""
    from ollama_dist.client import path
    from ollama_dist.progress import node_names
    from ollama_dist.show import show_table

    answer = session.api.get(path("transfers"))
    if session.wants_data:
        session.data(answer)
        return
    names = node_names(session)
    rows = [
        (
            transfer["id"],
            transfer.get("model_name", "-"),
            transfer.get("type", "-"),
            names.get(transfer.get("node_id", "")) or short_id(transfer.get("node_id", "-")),
            transfer.get("status", "-"),
            f"{transfer.get('progress') or 0:.0f}%",
            _speed(transfer),
            clock(transfer.get("eta")),
        )
        for transfer in answer["transfers"]
    ]
    show_table(session.out, _COLUMNS, rows, "No transfers.")


@app.command("show")
@command
def show_transfer(session: Session, transfer_id: TransferArgument) -> None:
    """One transfer."""
    from ollama_dist.client import path
    from ollama_dist.progress import node_names
    from ollama_dist.show import show_facts

    answer = session.api.get(path("transfers", transfer_id))
    if session.wants_data:
        session.data(answer)
        return
    found = answer["transfer"]
    names = node_names(session)
    source, target = found.get("peer_id") or "", found.get("node_id") or ""
    done, total = size(found.get("bytes_done")), size(found.get("bytes_total"))
    facts = [
        ("Id", found["id"]),
        ("Model", found.get("model_name", "-")),
        ("Type", found.get("type", "-")),
        ("Status", found.get("status", "-")),
        ("From", names.get(source, source) or "-"),
        ("To", names.get(target, target) or "-"),
        ("Progress", f"{found.get('progress') or 0:.1f}%, {done} of {total}"),
        ("Speed", _speed(found)),
        ("Remaining", clock(found.get("eta"))),
    ]
    if found.get("error"):
        facts.append(("Error", one_line(found["error"])))
    show_facts(session.out, facts)


@app.command("watch")
@command
def watch(
    session: Session,
    transfer_id: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="One transfer; all active ones without it.")
    ] = None,
) -> None:
    """Follow transfers until they have ended; Ctrl-C stops watching, not them."""
    from ollama_dist.progress import follow, tell_outcome

    ended = follow(session, transfer_id=transfer_id, model=None)
    if session.wants_data:
        session.data({"transfers": ended})
    elif not ended:
        session.say("No transfer is active.")
    tell_outcome(session, ended)
