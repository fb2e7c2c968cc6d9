"""How long one node takes to give a file to many, beside what people use instead.

    python -m tests.bench.bench_swarm [--nodes 4,8,16] [--mbit 100] [--mib 256] [--skip pair]

Swarm: each host is a network namespace with a link that `tc tbf` slows to 100 Mbit/s both ways
(slow enough that two cores can play nine hosts). Time counts from the start of the transfer to the
moment when the last host has the file, verified; the limit is size over link rate. All contenders
run in the same topology, one after the other. rsync and nginx send from one source to all, so
their ratio does not depend on the size; they get a smaller file. A node is a process with the
store, the links and the transfer (`swarm_node.py`), not a whole daemon.

Pair: two processes over plain loopback, with nothing to limit them but the processor, beside nginx
and curl (plain) and rsync over ssh (encrypted). Short rounds alternate; the ratio is the median
over them. Files are in memory (/dev/shm), since nine hosts would share this machine's one disk.
"""

import argparse
import contextlib
import datetime
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import trio

from ollamad.core.ids import NodeId
from ollamad.core.state import Layer
from ollamad.peers.identity import Identity, issue_certificate, make_ca
from ollamad.store.models import ModelStore
from tests.system.namespaces import Network, NotPermitted
from tests.system.swarm_node import write_config

MIB = 1 << 20
GOAL_SWARM = 1.15  # times the limit
GOAL_PLAIN = 0.9  # of nginx and curl
GOAL_ENCRYPTED = 1.0  # of rsync over ssh
ONE_SOURCE_MIB = 32  # for those whose ratio does not depend on it
PAIR_MIB = 512
PAIR_ROUNDS = 5
PORT = 9000
TIMEOUT_S = 330.0


class Missing(Exception):
    """A contender cannot run here; the message says why."""


@dataclass(frozen=True, slots=True)
class Outcome:
    seconds: float  # until the last host had it
    processor_s: float  # of all processes of the contender
    load: float  # busy share of this machine's processors, whoever used them
    sent_by_source: float | None = None  # times the file


class Meter:
    """What the machine's processors did since."""

    def __init__(self) -> None:
        self._busy, self._all = self._read()

    def load(self) -> float:
        busy, all_ = self._read()
        return (busy - self._busy) / max(1, all_ - self._all)

    @staticmethod
    def _read() -> tuple[int, int]:
        ticks = [int(text) for text in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        os.chmod(name, 0o755)  # noqa: PTH101 - nginx's workers are somebody else
        yield Path(name)


def random_file(path: Path, mib: int) -> None:
    with open(path, "wb") as file:
        for _ in range(mib):
            file.write(os.urandom(MIB))


def children_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def tool(name: str) -> str:
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    if found is None:
        raise Missing(f"{name} is not installed (apt install {name})")
    return found


# Ours.


def make_nodes(root: Path, hosts: Sequence[str], source: Path, *, plain: bool) -> Layer:
    """The directories of nodes at those addresses; the first one has the file."""
    now = datetime.datetime.now(datetime.UTC)
    ca = make_ca(now)
    addresses: dict[NodeId, str] = {}
    for number, host in enumerate(hosts):
        identity = Identity.load_or_create(root / str(number))
        identity.install(issue_certificate(ca, identity.public_key, now), ca.certificate_pem)
        addresses[identity.node_id] = host
    for number, node_id in enumerate(addresses):
        write_config(
            root / str(number),
            id=node_id,
            listen=addresses[node_id],
            addresses=addresses,
            plain=plain,
        )

    async def put() -> Layer:
        store = ModelStore(root / "0" / "models", keep_free_bytes=0)
        await store.prepare()
        digest, piece_map = await store.import_file(source)
        return Layer("m", digest, piece_map.size, piece_map.piece_size, piece_map.root())

    return trio.run(put)


Prefix = tuple[str, ...]


class Peers:
    """Processes that say `ready`, `done` and `bye`."""

    def __init__(self, commands: Sequence[Sequence[str]]) -> None:
        self.processes = [
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
            )
            for command in commands
        ]
        for process in self.processes:
            self.hear(process, "ready")

    def hear(self, process: "subprocess.Popen[str]", word: str) -> list[str]:
        assert process.stdout is not None
        words = process.stdout.readline().split()
        if not words or words[0] != word:
            raise RuntimeError(f"a peer said {words} instead of {word}")
        return words[1:]

    def tell(self, process: "subprocess.Popen[str]", line: str) -> None:
        assert process.stdin is not None
        process.stdin.write(f"{line}\n")
        process.stdin.flush()

    def run(self, line: str, size: int, *, source_begins: bool) -> Outcome:
        meter, began = Meter(), time.perf_counter()
        begin = self.processes if source_begins else self.processes[1:]
        for process in begin:
            self.tell(process, line)
        for process in begin:
            self.hear(process, "done")
        seconds, load = time.perf_counter() - began, meter.load()
        last = []
        for process in self.processes:
            self.tell(process, "stop")
            last.append(self.hear(process, "bye"))
        used = sum(float(words[0]) for words in last)
        return Outcome(seconds, used, load, int(last[0][1]) / size)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


def ours(prefixes: Sequence[Prefix], hosts: Sequence[str], mib: int, *, plain: bool) -> Outcome:
    with scratch() as root:
        random_file(root / "file", mib)
        layer = make_nodes(root, hosts, root / "file", plain=plain)
        commands = [
            (*prefix, sys.executable, "-m", "tests.system.swarm_node", str(root / str(number)))
            for number, prefix in enumerate(prefixes)
        ]
        peers = Peers(commands)
        try:
            line = f"fetch {msgspec.json.encode(layer).decode()}"
            return peers.run(line, layer.size, source_begins=False)
        finally:
            peers.close()


# Others.


def libtorrent(prefixes: Sequence[Prefix], hosts: Sequence[str], mib: int) -> Outcome:
    try:
        import libtorrent as lt
    except ImportError:
        raise Missing("libtorrent is not installed (pip install libtorrent)") from None
    with scratch() as root:
        for number in range(len(hosts)):
            (root / str(number)).mkdir()
        random_file(root / "0" / "file", mib)
        files = lt.list_files(str(root / "0" / "file"))
        torrent = lt.create_torrent(files, piece_size=MIB)
        lt.set_piece_hashes(torrent, str(root / "0"))
        (root / "torrent").write_bytes(lt.bencode(torrent.generate()))
        commands = [
            (
                *prefix,
                sys.executable,
                "-m",
                "tests.bench.swarm_torrent",
                str(root / "torrent"),
                str(root / str(number)),
                hosts[number],
                # Each pair connects once: those that connect at once would drop one another.
                *hosts[:number],
            )
            for number, prefix in enumerate(prefixes)
        ]
        peers = Peers(commands)
        try:
            return peers.run("go", mib * MIB, source_begins=True)
        finally:
            peers.close()


def fetch_all(commands: Sequence[Sequence[str]]) -> tuple[float, float]:
    """Run all at once: seconds until the last has ended, and the load meanwhile."""
    meter, began = Meter(), time.perf_counter()
    processes = [subprocess.Popen(command) for command in commands]
    for process in processes:
        if process.wait(TIMEOUT_S):
            raise RuntimeError(f"{process.args!r} failed")
    return time.perf_counter() - began, meter.load()


@contextlib.contextmanager
def serving(command: Sequence[str], ready: Callable[[], bool]) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 10
        while not ready():
            if time.monotonic() > deadline or process.poll() is not None:
                raise RuntimeError(f"{command[0]} does not serve")
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(10)


def nginx(prefixes: Sequence[Prefix], hosts: Sequence[str], mib: int) -> Outcome:
    server, curl = tool("nginx"), tool("curl")
    with scratch() as root:
        random_file(root / "file", mib)
        (root / "nginx.conf").write_text(
            f"daemon off; pid {root}/pid; error_log {root}/error.log;\n"
            "events { worker_connections 512; }\n"
            f"http {{ access_log off; sendfile on; client_body_temp_path {root}/body;\n"
            f"  proxy_temp_path {root}/p; fastcgi_temp_path {root}/f; uwsgi_temp_path {root}/u;\n"
            f"  scgi_temp_path {root}/s;\n"
            f"  server {{ listen {hosts[0]}; root {root}; }} }}\n"
        )
        command = (*prefixes[0], server, "-p", str(root), "-c", str(root / "nginx.conf"))
        before = children_s()
        with serving(command, (root / "pid").exists):
            time.sleep(0.3)
            seconds, load = fetch_all(
                [
                    (*prefix, curl, "-sS", "-o", f"{root}/{number}", f"http://{hosts[0]}/file")
                    for number, prefix in enumerate(prefixes[1:])
                ]
            )
        return Outcome(seconds, children_s() - before, load)


def rsync(prefixes: Sequence[Prefix], hosts: Sequence[str], mib: int) -> Outcome:
    program = tool("rsync")
    with scratch() as root:
        (root / "module").mkdir()
        random_file(root / "module" / "file", mib)
        host, port = hosts[0].rsplit(":", 1)
        (root / "conf").write_text(
            f"address = {host}\nport = {port}\nuse chroot = no\nreverse lookup = no\n"
            f"[m]\npath = {root}/module\nread only = yes\nuid = root\ngid = root\n"
        )
        command = (*prefixes[0], program, "--daemon", "--no-detach", f"--config={root}/conf")
        before = children_s()
        with serving(command, lambda: True):
            time.sleep(0.5)
            seconds, load = fetch_all(
                [
                    (*prefix, program, "--whole-file", f"rsync://{hosts[0]}/m/file", f"{root}/{n}")
                    for n, prefix in enumerate(prefixes[1:])
                ]
            )
        return Outcome(seconds, children_s() - before, load)


def rsync_over_ssh(host: str, mib: int) -> Outcome:
    server, program, keygen = tool("sshd"), tool("rsync"), tool("ssh-keygen")
    with scratch() as root:
        os.chmod(root, 0o700)  # noqa: PTH101
        for key in ("host", "user"):
            subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", str(root / key)])
        (root / "authorized").write_text((root / "user.pub").read_text())
        (root / "authorized").chmod(0o600)
        address, port = host.rsplit(":", 1)
        Path("/run/sshd").mkdir(exist_ok=True)
        (root / "conf").write_text(
            f"ListenAddress {address}\nPort {port}\nHostKey {root}/host\nUsePAM no\n"
            f"AuthorizedKeysFile {root}/authorized\nPidFile {root}/pid\nStrictModes no\n"
            "PermitRootLogin yes\n"
        )
        random_file(root / "file", mib)
        shell = (
            f"ssh -p {port} -i {root}/user -o StrictHostKeyChecking=no -o LogLevel=ERROR "
            f"-o UserKnownHostsFile={root}/known"
        )
        command = (program, "--whole-file", "-e", shell, f"{address}:{root}/file", f"{root}/copy")
        before = children_s()
        with serving((server, "-D", "-f", str(root / "conf")), (root / "pid").exists):
            seconds, load = fetch_all([command])
        return Outcome(seconds, children_s() - before, load)


# Tables.


def swarm(nodes: int, mbit: int, mib: int, only: str) -> bool:
    """One file to so many nodes; whether ours reached its goal."""
    print(f"\n1 node gives a file to {nodes}, links of {mbit} Mbit/s")
    print(f"{'':24}{'MiB':>5}{'s':>8}{'limit s':>9}{'ratio':>8}{'CPU s':>8}{'load':>7}{'left':>7}")
    contenders: list[tuple[str, int, Callable[..., Outcome]]] = [
        ("ollamad (encrypted)", mib, lambda *a: ours(*a, plain=False)),
        ("ollamad (plain)", mib, lambda *a: ours(*a, plain=True)),
        ("libtorrent", mib, libtorrent),
        ("nginx + curl", min(mib, ONE_SOURCE_MIB), nginx),
        ("rsync", min(mib, ONE_SOURCE_MIB), rsync),
    ]
    reached = False
    for name, size, run in contenders:
        if only and only not in name:
            continue
        with Network() as network:
            for number in range(nodes + 1):
                network.limit(network.add(f"h{number}"), mbit)
            prefixes = [host.command for host in network.hosts]
            port = "" if run is libtorrent else f":{PORT}"
            try:
                outcome = run(prefixes, [f"{h.address}{port}" for h in network.hosts], size)
            except Missing as missing:
                print(f"{name:24} not run: {missing}")
                continue
        limit = size * MIB * 8 / (mbit * 1e6)
        ratio = outcome.seconds / limit
        left = "" if outcome.sent_by_source is None else f"{outcome.sent_by_source:6.2f}x"
        print(
            f"{name:24}{size:5}{outcome.seconds:8.1f}{limit:9.1f}{ratio:8.2f}"
            f"{outcome.processor_s:8.1f}{outcome.load:7.0%}{left:>7}",
            flush=True,
        )
        if name == "ollamad (encrypted)":
            reached = ratio <= GOAL_SWARM
    return reached


def pair(mib: int) -> bool:
    """One file from one process to another over loopback; whether ours reached its goals."""
    print(f"\none pair over loopback, {mib} MiB, {PAIR_ROUNDS} rounds")
    hosts = [f"127.0.0.1:{PORT + 100 + number}" for number in range(2)]
    nobody: list[Prefix] = [(), ()]
    contenders: dict[str, Callable[[], Outcome]] = {
        "ollamad (plain)": lambda: ours(nobody, hosts, mib, plain=True),
        "nginx + curl": lambda: nginx(nobody, hosts, mib),
        "ollamad (encrypted)": lambda: ours(nobody, hosts, mib, plain=False),
        "rsync over ssh": lambda: rsync_over_ssh(hosts[0], mib),
    }
    outcomes: dict[str, list[Outcome]] = {name: [] for name in contenders}
    for _ in range(PAIR_ROUNDS):
        for name, run in list(contenders.items()):
            try:
                outcomes[name].append(run())
            except Missing as missing:
                print(f"{name:24} not run: {missing}")
                del contenders[name]
    print(f"{'':24}{'MB/s':>8}{'CPU s per GB':>14}")
    size = mib * MIB
    for name, found in outcomes.items():
        if found:
            rate = statistics.median(size / 1e6 / outcome.seconds for outcome in found)
            used = statistics.median(outcome.processor_s / (size / 1e9) for outcome in found)
            print(f"{name:24}{rate:8.0f}{used:14.2f}")
    reached = True
    for mine, other, goal in (
        ("ollamad (plain)", "nginx + curl", GOAL_PLAIN),
        ("ollamad (encrypted)", "rsync over ssh", GOAL_ENCRYPTED),
    ):
        both = zip(outcomes[mine], outcomes[other], strict=False)
        ratios = [theirs.seconds / my.seconds for my, theirs in both]
        if ratios:
            ratio = statistics.median(ratios)
            print(f"{mine}, of {other}: {ratio:.2f} (goal {goal:g})")
            reached = reached and ratio >= goal
    return reached


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_swarm")
    parser.add_argument("--nodes", default="8,4,16")
    parser.add_argument("--mbit", type=int, default=100)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--only", default="", help="contenders whose name has this")
    parser.add_argument("--skip", default="", choices=["", "pair", "swarm"])
    options = parser.parse_args()
    reached = True
    try:
        for nodes in options.nodes.split(",") if options.skip != "swarm" else ():
            reached = swarm(int(nodes), options.mbit, options.mib, options.only) and reached
    except NotPermitted as error:
        print(f"the swarm was not measured: {error}")
        reached = False
    if options.skip != "pair":
        reached = pair(PAIR_MIB) and reached
    return not reached


if __name__ == "__main__":
    sys.exit(main())
