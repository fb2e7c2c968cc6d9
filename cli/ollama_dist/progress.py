"""Live progress on stderr: bars on a terminal, a line for each change elsewhere.

`follow` watches transfers of the cluster. It only reads: whoever stops watching stops nothing.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from ollama_dist.client import Json, path
from ollama_dist.commands.nodes import names_of
from ollama_dist.errors import ApiError, CliError, NoConnection
from ollama_dist.session import Session
from ollama_dist.text import clock, one_line, plural, short_id, size

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

# The daemon allows 100 requests a minute; the first looks are quicker for small models.
FIRST_POLL_S = 0.2
POLL_S = 1.0
PATIENCE_S = 30.0  # without an answer: longer than an election and a restart take
REPLICA_PATIENCE_S = 10.0  # until the cluster should have begun the copies that were asked for
T = TypeVar("T")

ENDED = ("completed", "failed", "cancelled")


def pause(seconds: float) -> None:
    """Wait; Ctrl-C ends it."""
    time.sleep(seconds)  # noqa: TID251 - this program has no event loop to block


class TransferView:
    """Shows transfers while they change: bars on a terminal, else one line for each state."""

    def __init__(self, session: Session, names: dict[str, str]) -> None:
        self._session = session
        self._names = names  # node id -> name
        self._live = session.err.is_terminal
        self._bars: dict[str, TaskID] = {}
        self._told: dict[str, str] = {}
        self._progress: Progress | None = None

    def __enter__(self) -> "TransferView":
        if self._live:
            self._progress = _bars(self._session)
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def show(self, transfers: list[Json]) -> None:
        """Bring what is seen up to date."""
        for transfer in transfers:
            if self._progress is not None:
                self._draw(self._progress, transfer)
            else:
                self._tell(transfer)

    def _draw(self, progress: "Progress", transfer: Json) -> None:
        identity = transfer["id"]
        if identity not in self._bars:
            label = f"{transfer.get('model_name', '')} → {self._node(transfer)}"
            self._bars[identity] = progress.add_task(one_line(label), total=100.0, detail="")
        progress.update(
            self._bars[identity],
            completed=float(transfer.get("progress") or 0.0),
            detail=_detail(transfer),
        )

    def _tell(self, transfer: Json) -> None:
        state = str(transfer.get("status"))
        if self._told.get(transfer["id"]) == state:
            return
        self._told[transfer["id"]] = state
        label = f"{transfer.get('model_name', '')} to {self._node(transfer)}"
        self._session.note(one_line(f"{label}: {state} {_detail(transfer)}".strip()))

    def _node(self, transfer: Json) -> str:
        identity = str(transfer.get("node_id") or "")
        return self._names.get(identity) or short_id(identity)


def _detail(transfer: Json) -> str:
    if transfer.get("status") in ENDED:
        if transfer.get("status") == "completed":
            return f"{size(transfer.get('bytes_total'))}, done"
        return str(transfer.get("status"))
    if transfer.get("status") == "pending":
        return "waiting"
    parts = [f"{size(transfer.get('bytes_done'))} of {size(transfer.get('bytes_total') or None)}"]
    if transfer.get("speed"):
        parts.append(f"{size(transfer['speed'])}/s")
    if transfer.get("eta") is not None:
        parts.append(clock(transfer["eta"]))
    return ", ".join(parts)


def _bars(session: Session) -> "Progress":
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
    from rich.table import Column

    return Progress(
        TextColumn(
            "{task.description}",
            markup=False,
            table_column=Column(no_wrap=True, overflow="ellipsis", max_width=28),
        ),
        BarColumn(bar_width=None, table_column=Column(min_width=8, ratio=1)),
        TaskProgressColumn("{task.percentage:>3.0f}%", table_column=Column(width=4)),
        TextColumn("{task.fields[detail]}", markup=False, table_column=Column(no_wrap=True)),
        console=session.err,
        expand=True,
    )


@contextmanager
def file_progress(session: Session, label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Progress of `total` bytes of a file; call what it gives with the bytes that are done."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
        console=session.err,
        expand=True,
        disable=not session.err.is_terminal,
    )
    with progress:
        task = progress.add_task(one_line(label), total=total)
        yield lambda count: progress.update(task, advance=count)


def node_names(session: Session) -> dict[str, str]:
    """The names of all nodes by their ids."""
    return names_of(session.api.get(path("nodes"))["nodes"])


def follow(
    session: Session, *, transfer_id: str | None, model: str | None, replicas: int = 1
) -> list[Json]:
    """Show transfers until all of them have ended; return them as they ended.

    With a `transfer_id` that one, and whatever else brings `model` to a node meanwhile.
    Without one, all that are active. With more than one of `replicas` it also waits for the
    copies, as long as the cluster is at it.
    """
    before: set[str] | None = None
    idle_since: float | None = None
    wait_s = FIRST_POLL_S
    with TransferView(session, node_names(session)) as view:
        while True:
            listed = {t["id"]: t for t in _patiently(lambda: _transfers(session))}
            if transfer_id and transfer_id not in listed:
                # Where it was listed before, its node is away for a moment, or for good.
                passing = (404,) if before is not None else ()
                wanted = partial(_transfer, session, transfer_id)
                listed[transfer_id] = _patiently(wanted, passing)
            if before is None:
                before = {t["id"] for t in listed.values() if t.get("status") in ENDED}
            if transfer_id and model is not None:
                # A source such as pypi:PACKAGE says what the model is called.
                model = listed[transfer_id].get("model_name") or model
            chosen = _chosen(list(listed.values()), before, transfer_id, model)
            view.show(chosen)
            if all(each.get("status") in ENDED for each in chosen):
                idle_since = idle_since or time.monotonic()
                if _satisfied(session, model, replicas, idle_since, chosen):
                    return chosen
            else:
                idle_since = None
            pause(wait_s)
            wait_s = min(POLL_S, wait_s * 1.5)


def _transfers(session: Session) -> list[Json]:
    found: list[Json] = session.api.get(path("transfers"))["transfers"]
    return found


def _transfer(session: Session, transfer_id: str) -> Json:
    found: Json = session.api.get(path("transfers", transfer_id))["transfer"]
    return found


def _chosen(
    transfers: list[Json], before: set[str], transfer_id: str | None, model: str | None
) -> list[Json]:
    """Those to follow, without what had ended `before` we looked, but for the one asked for."""
    return [
        each
        for each in transfers
        if each["id"] == transfer_id
        or (
            each["id"] not in before
            and (transfer_id is None or (model is not None and each.get("model_name") == model))
        )
    ]


def _satisfied(
    session: Session, model: str | None, replicas: int, idle_since: float, ended: list[Json]
) -> bool:
    if model is None or replicas < 2 or any(t.get("status") != "completed" for t in ended):
        return True
    found = _patiently(lambda: session.api.get(path("models", model)))["model"]
    ready = len(found.get("replicas") or ())
    if ready >= replicas:
        return True
    if time.monotonic() - idle_since < REPLICA_PATIENCE_S:
        return False
    session.note(
        f"{plural(ready, 'replica')} of {replicas} ready; the cluster makes the others when it can."
    )
    return True


def _patiently(call: Callable[[], T], also: tuple[int, ...] = ()) -> T:
    """Call until it works: an election, a restart or a rate limit is no reason to look away."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return call()
        except (NoConnection, ApiError) as problem:
            passing = isinstance(problem, NoConnection) or problem.status in (429, 503, *also)
            if not passing or time.monotonic() >= deadline:
                raise
            pause(max(POLL_S, getattr(problem, "retry_after_s", 0)))


def tell_outcome(session: Session, transfers: list[Json]) -> None:
    """Tell the warnings of transfers that completed, and raise for the first that did not.

    Raises:
      CliError: with the transfer's own reason.
    """
    for transfer in transfers:
        if transfer.get("status") != "completed":
            reason = transfer.get("error") or f"the transfer was {transfer.get('status')}"
            raise CliError(f"{transfer.get('model_name', 'the transfer')}: {reason}")
        if transfer.get("warning"):
            session.note(one_line(f"Warning: {transfer['warning']}"))
