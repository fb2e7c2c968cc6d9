"""Writes a journal with everything in it, by the version that runs this: `… make_raft_journal DIR`.

`tests/unit/test_raft_store.py` reads the files that earlier versions wrote. When the format
changes, run this with the last version before the change and commit what it made:

- `closed/`: as after an orderly stop;
- `killed/`: as after `kill -9`, with the latest changes only in the write-ahead log.
"""

import shutil
import sys
from pathlib import Path

import trio

from ollamad.core.commands import Proposal, SetDraining
from ollamad.core.ids import NodeId
from ollamad.core.state import (
    Capacity,
    CertificateAuthority,
    ClusterState,
    JoinToken,
    Layer,
    Member,
    Model,
    ModelDetails,
    Remembered,
    Settings,
    User,
)
from ollamad.machine import Machine
from ollamad.raft.journal import Journal
from ollamad.raft.sqlite_store import SqliteStore
from ollamad.wire.codec import encode
from ollamad.wire.raftwire import NO_OP, REGULAR, encode_voters

A, B, C = (NodeId(letter * 52) for letter in "ABC")


def state() -> ClusterState:
    """A state with a value in every field."""
    capacity = Capacity(8, 64 << 30, 1 << 40, 1, 24 << 30)
    members = {
        node: Member(node, name, f"{name}:8080", f"{name}:9000", f"{name}:7000", capacity, 1.5e9)
        for node, name in ((A, "one"), (B, "two"), (C, "three"))
    }
    digest = "sha256:" + "ab" * 32
    layer = Layer("application/vnd.ollama.image.model", digest, 1 << 30, 4 << 20, "cd" * 32)
    details = ModelDetails(family="llama", families=("llama",), parameter_size="1B")
    model = Model("smollm2:135m", digest, b"{}", details, (layer,), 1.6e9, (A, B), (A,))
    return ClusterState(
        cluster_id="9d5c2d94-6f0c-4f7e-9a53-0d4c8a1f7d10",
        ca=CertificateAuthority(b"certificate", b"key"),
        jwt_key=bytes(range(32)),
        settings=Settings(auto_distribution=False),
        members=members,
        departed={NodeId("D" * 52): 1.7e9},
        models={"smollm2:135m": model},
        users={"admin": User("admin", "$argon2id$", "admin", 1.5e9)},
        join_tokens={"t": JoinToken("t", b"secret", 1.8e9)},
        revoked={"session": 1.9e9},
        recent={"c1": Remembered(), "c2": Remembered("NOT_FOUND", "no such model")},
    )


async def write(journal: Journal, store: SqliteStore) -> None:
    batch = journal.take()
    assert batch is not None
    await store.commit(batch)
    journal.synced()


async def fill(store: SqliteStore) -> None:
    journal = Journal(await store.load())
    machine = Machine()
    machine.state = state()
    journal.add(encode_voters(frozenset({A, B, C})), 1, 0)
    journal.set_hint(frozenset({A}))
    for index in range(2, 41):
        journal.add(bytes([NO_OP]), index, 1)
    await write(journal, store)
    journal.setCurrentTerm(7, B)
    journal.setRaftCommitIndex(38)
    journal.compact(machine.snapshot(), 36)
    await write(journal, store)
    await store.aclose()


async def go_on(store: SqliteStore) -> None:
    journal = Journal(await store.load())
    for index in (41, 42):
        command = encode(Proposal(f"p{index}", 1.6e9, SetDraining(C, index % 2 == 0)))
        journal.add(bytes([REGULAR]) + command, index, 7)
        await write(journal, store)


def make(directory: Path) -> None:
    closed, killed = directory / "closed", directory / "killed"
    closed.mkdir(parents=True)
    killed.mkdir()
    path = closed / "raft.db"
    trio.run(fill, SqliteStore(path))
    store = SqliteStore(path)
    trio.run(go_on, store)
    for file in closed.glob("raft.db*"):
        if not file.name.endswith("-shm"):
            shutil.copy(file, killed)
    trio.run(store.aclose)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
