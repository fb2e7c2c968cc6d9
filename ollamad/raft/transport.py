"""The way out: turns what PySyncObj sends into our messages, and holds back what must be durable.

Answers carry the term and say no more than the message proved that they answer.
"""

from collections.abc import Callable
from typing import Any

from pysyncobj.node import Node
from pysyncobj.transport import Transport

from ollamad.core.ids import NodeId
from ollamad.raft.journal import Journal
from ollamad.wire.raftwire import (
    MEMBERSHIP,
    SNAPSHOT_CHUNK_SIZE,
    Ack,
    Append,
    Entry,
    Forward,
    Install,
    Message,
    Placed,
    TakeOver,
    Vote,
    VoteRequest,
)


class FencedTransport(Transport):  # type: ignore[misc]
    """The library's transport of one node; see the module's docstring."""

    def __init__(self, journal: Journal, send: Callable[[NodeId, Message], None]) -> None:
        super().__init__(None, None, [])
        self._journal = journal
        self._send = send
        self._held: list[tuple[int, NodeId, Message]] = []
        self.proved: int | None = None  # what the Append that is being handled proves
        self.resume: int | None = None
        self.is_silent = False  # whether that Append is not to be answered
        self.term: Callable[[], int] = lambda: 0

    def send(self, node: Node, message: dict[str, Any]) -> bool:
        to = NodeId(node.id)
        match message["type"]:
            case "append_entries":
                # May overtake our own sync of the entries, not that of the term.
                append = _to_append(message)
                if isinstance(append, Append) and any(_sets_voters(e) for e in append.entries):
                    # Who has it uses it at once. If its leader dies and has it not, whom it removed
                    # holds the longer log, and votes for nobody, but stands for nothing either.
                    self.emit_synced(to, append)
                else:
                    self.emit(to, append, self._journal.term_generation)
            case "next_node_idx":
                if not self.is_silent:
                    self.emit_synced(to, self._to_ack(message))
            case "request_vote":
                self.emit_synced(
                    to,
                    VoteRequest(
                        message["term"], message["last_log_index"], message["last_log_term"]
                    ),
                )
            case "response_vote":
                self.emit_synced(to, Vote(message["term"]))
            case "timeout_now":
                self.emit_synced(to, TakeOver(message["term"]))
            case "apply_command":
                self.emit(to, Forward(message["request_id"], message["command"]), 0)
            case "apply_command_response":
                # Says where an entry was put, not that it is safe there. But a voter alone that
                # dies before its term is on its disk leads the same one again, with other entries.
                self.emit(to, _to_placed(message), self._journal.term_generation)
            case unknown:
                raise AssertionError(f"the library sends {unknown!r}")
        return True

    def emit_synced(self, to: NodeId, message: Message) -> None:
        """Send as soon as all that this node has decided so far is durable."""
        self.emit(to, message, self._journal.generation)

    def emit(self, to: NodeId, message: Message, generation: int) -> None:
        """Send as soon as that generation of the journal is durable."""
        if generation <= self._journal.durable_generation:
            self._send(to, message)
        elif not self._journal.is_blocked:  # else it is lost: who knows how long to hold it
            self._held.append((generation, to, message))

    def release(self) -> None:
        """Send what was waiting for the sync that just ended."""
        held, self._held = self._held, []
        for generation, to, message in held:
            self.emit(to, message, generation)

    def forget_held(self) -> None:
        """Drop what waits for a sync that will not come soon; Raft asks again."""
        self._held = []

    def _to_ack(self, message: dict[str, Any]) -> Ack:
        next_index = message["next_node_idx"]
        if message["success"] and self.proved is not None:
            next_index = self.proved + 1
        elif message["reset"] and self.resume is not None:
            next_index = self.resume
        return Ack(self.term(), next_index, message["success"], message["reset"])


def _sets_voters(entry: Entry) -> bool:
    return entry.command[0] == MEMBERSHIP


def _to_append(message: dict[str, Any]) -> Append | Install:
    term = message["term"]
    if "serialized" in message:
        if message["serialized"] is None:
            return Install(term, 0, 0, bytes(32), b"")
        blob, offset = message["serialized"]
        data = blob.data[offset : offset + SNAPSHOT_CHUNK_SIZE]
        return Install(term, offset, len(blob.data), blob.sha256, data)
    entries = tuple(Entry(entry_term, command) for command, _, entry_term in message["entries"])
    return Append(
        term, message["commit_index"], message["prevLogIdx"], message["prevLogTerm"], entries
    )


def _to_placed(message: dict[str, Any]) -> Placed:
    if "error" in message:
        return Placed(message["request_id"], error=message["error"])
    return Placed(message["request_id"], message["log_idx"], message["log_term"])
