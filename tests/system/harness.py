"""Runs real daemons for the system tests: start, kill, stop, ask, and clean up after them.

Each node is one process group with its own ports and directory. A node tells that it is ready on
a socket of the harness, as it does to systemd. Nothing here knows the daemon's code.
"""

import contextlib
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

import httpx
import psutil

START_TIMEOUT_S = 60.0  # a loaded machine; a warm start takes about a second
STOP_TIMEOUT_S = 20.0
SETTLE_S = 60.0  # a node that was away catches up, on a busy machine
WAIT_S = 30.0  # for what usually takes a second or two
ANSWER_TIMEOUT_S = 120.0  # a generation on a machine that is busy with other tests
# Below the range that the system takes ports for outgoing connections from, so that a node that
# is started again finds its ports free.
PORTS = range(12000, 32000)
DAEMON = (sys.executable, "-m", "ollamad")
LONG_FAULTS = "OLLAMAD_FAULT_SECONDS"  # the variable that `make faults` sets
# How many voters there are where it costs too much time to try both each time.
VOTERS = (3, 5) if LONG_FAULTS in os.environ else (5,)
FAULT_S = 15.0  # without it: several rounds of any fault
LOG_LINES = 60  # of each node, shown when a test fails

T = TypeVar("T")

# Variables that would change what a daemon or the command line does.
_FOREIGN = ("OLLAMA", "PIP_", "API_LISTEN", "P2P_LISTEN", "RAFT_BIND_ADDR", "LOG_LEVEL")
_FOREIGN += ("NODE_ID", "BOOTSTRAP", "NOTIFY_SOCKET", "JOURNAL_STREAM", "XDG_", "NO_COLOR")


def clean_environment(home: Path) -> dict[str, str]:
    """This process's variables without those that are settings of ours, and a home of its own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(_FOREIGN)}
    # Native libraries start a thread a core otherwise, and there are many processes here.
    return kept | {"HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}


def wait_until(
    what: str, predicate: Callable[[], T | None], timeout_s: float = WAIT_S, every_s: float = 0.05
) -> T:
    """Call `predicate` until it gives something true, and return that.

    Nobody listening, and a token file that is not there, count as not yet.

    Raises:
      AssertionError: it did not in time; tells what came last.
    """
    deadline = time.monotonic() + timeout_s
    last: object = None
    while True:
        try:
            last = predicate()
        except (httpx.TransportError, FileNotFoundError) as error:
            last = error
        else:
            if last:
                return last
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {what}; last: {last!r}")
        time.sleep(every_s)


def free_ports(count: int) -> list[int]:
    """Ports on which nobody listens now."""
    chosen: list[int] = []
    with contextlib.ExitStack() as stack:
        while len(chosen) < count:
            port = random.choice(PORTS)
            candidate = stack.enter_context(socket.socket())
            candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                candidate.bind(("127.0.0.1", port))
            except OSError:
                continue
            chosen.append(port)
    return chosen


class ReadySocket:
    """What systemd is to a service: hears `READY=1` on a datagram socket.

    It has a file: names without one are seen in their own network namespace only.
    """

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)
        self.address = str(path)
        self.heard: list[str] = []

    def listen(self) -> list[str]:
        """All messages so far."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.heard.append(self._socket.recv(4096).decode())
        return self.heard

    def close(self) -> None:
        self._socket.close()


class Host(Protocol):
    """Where a daemon runs: an address, and what is put before its command line to get there."""

    @property
    def address(self) -> str: ...
    @property
    def command(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class Loopback:
    """This machine."""

    address: str = "127.0.0.1"
    command: Sequence[str] = ()


class Network(Protocol):
    """Makes hosts."""

    def add(self, name: str) -> Host: ...


class Node:
    """One daemon, also while it does not run. Requests carry the admin token of its directory."""

    def __init__(
        self,
        directory: Path,
        name: str,
        environment: Mapping[str, str] | None = None,
        host: Host | None = None,
    ) -> None:
        self.name = name
        self.host = host or Loopback()
        self.directory = directory
        self.directory.mkdir(parents=True)
        self.data_dir = directory / "data"
        self.log_path = directory / "log"
        self.api_port, self.p2p_port, self.raft_port = free_ports(3)
        self.environment = dict(environment or {})
        self.process: subprocess.Popen[bytes] | None = None
        self._ready: ReadySocket | None = None
        self._is_ready = False
        self._pids: set[int] = set()
        self._id = ""

    # Running.

    def start(self, *arguments: str, wait: bool = True) -> "Node":
        """Start the daemon; `wait` until it says that it is ready.

        Raises:
          AssertionError: it ended or was not ready in time; tells its last lines.
        """
        for attempt in range(3):
            self.launch(*arguments)
            if not wait:
                return self
            try:
                self.wait_ready()
                wait_until("its id is known", lambda: self.id)
                return self
            except AssertionError:
                # Somebody else took a port in between; only a first start may choose anew.
                if attempt == 2 or self._id or "cannot listen" not in self.log():
                    raise
                self.api_port, self.p2p_port, self.raft_port = free_ports(3)
        raise AssertionError("not reached")

    def launch(self, *arguments: str) -> subprocess.Popen[bytes]:
        assert self.process is None or self.process.poll() is not None, "it runs already"
        if self._ready is not None:
            self._ready.close()
        self._ready = ReadySocket(self.directory / "ready")
        self._is_ready = False
        if "--join" in arguments:
            self._id = ""  # who joins has a new one
        environment = clean_environment(self.directory) | {
            "API_LISTEN": self.address,
            "P2P_LISTEN": f"/ip4/{self.host.address}/tcp/{self.p2p_port}",
            "RAFT_BIND_ADDR": f"{self.host.address}:{self.raft_port}",
            "NODE_ID": self.name,
            # The one port that daemons of the same host would all want.
            "OLLAMAD_API__OLLAMA_LISTEN": "off",
            # Tests ask more often than people; those of the limits set them.
            "OLLAMAD_RATE_LIMITS__GENERAL": "0",
            "OLLAMAD_RATE_LIMITS__MODEL_OPS": "0",
            "NOTIFY_SOCKET": self._ready.address,
        }
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                [
                    *self.host.command,
                    *DAEMON,
                    "start",
                    "--data-dir",
                    str(self.data_dir),
                    *arguments,
                ],
                env=environment | self.environment,
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._pids.add(self.process.pid)
        return self.process

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        process, ready = self.process, self._ready
        assert process is not None
        assert ready is not None

        def is_ready() -> bool:
            if any("READY=1" in message for message in ready.listen()):
                return True
            if process.poll() is not None:
                raise AssertionError(
                    f"{self.name} ended with {process.returncode} instead of becoming ready:\n"
                    + self.tail()
                )
            return False

        wait_until(f"{self.name} is ready:\n{self.tail()}", is_ready, timeout_s, 0.02)
        self._is_ready = True

    def notifications(self) -> list[str]:
        """What the daemon told the service manager since its start."""
        assert self._ready is not None
        return self._ready.listen()

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def serves(self) -> bool:
        """Whether it runs and has said that it is ready."""
        return self.running and self._is_ready

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the daemon alone, not to its runners."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """kill -9 of the daemon."""
        self.signal(signal.SIGKILL)
        self.wait_end()

    def pause(self) -> None:
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)

    def stop(self) -> int:
        """Stop in order; the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait_end()

    def wait_end(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        assert self.process is not None
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} still runs:\n{self.tail()}") from None

    def restart(self) -> None:
        if self.running:
            self.stop()
        self.start()

    def destroy(self) -> list[str]:
        """End everything of this node; the processes that should have ended by themselves."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                self.resume()
            try:
                self.stop()
            except AssertionError:
                os.killpg(self.pid, signal.SIGKILL)
                self.wait_end()
        left: list[str] = []
        deadline = time.monotonic() + 3
        while (members := self._processes()) and time.monotonic() < deadline:
            time.sleep(0.02)
        for member in members:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.append(f"{self.name}: {member.pid} {' '.join(member.cmdline())}")
                member.kill()
        if self._ready is not None:
            self._ready.close()
            self._ready = None
        return left

    def _processes(self) -> list[psutil.Process]:
        """The living processes of this node: its daemons' groups, and runners of its models."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                mine = os.getpgid(process.pid) in self._pids or any(
                    argument.startswith(f"{self.data_dir}/") for argument in process.cmdline()
                )
                if mine and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def runners(self) -> list[psutil.Process]:
        """The runner processes, those of a daemon that was killed included."""
        return [one for one in self._processes() if "runner" in one.cmdline()]

    # Reading.

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def tail(self, lines: int = LOG_LINES) -> str:
        return "\n".join(self.log().splitlines()[-lines:])

    @property
    def id(self) -> str:
        """The node id (`Qm…`)."""
        if not self._id:
            self._id = self.get("/cluster/status")["node_id"]
        return self._id

    @property
    def address(self) -> str:
        return f"{self.host.address}:{self.api_port}"

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    @property
    def p2p(self) -> str:
        return f"{self.host.address}:{self.p2p_port}"

    def admin_token(self) -> str:
        return (self.data_dir / "cli-token").read_text().strip()

    # Asking.

    def client(self, *, token: str | None = None, timeout_s: float = ANSWER_TIMEOUT_S) -> Any:
        """An HTTP client of this node; without a token, and so under the loopback rule, for ''."""
        token = self.admin_token() if token is None else token
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx.Client(
            base_url=f"{self.url}/api/v1", headers=headers, timeout=timeout_s, trust_env=False
        )

    def request(
        self,
        method: str,
        path: str,
        *,
        token: str | None = None,
        timeout_s: float = 30,
        **more: Any,
    ) -> httpx.Response:
        with self.client(token=token, timeout_s=timeout_s) as client:
            answer: httpx.Response = client.request(method, path, **more)
            return answer

    def get(self, path: str, **more: Any) -> Any:
        """The JSON of an answer that must be a success."""
        return ok(self.request("GET", path, **more))

    def post(self, path: str, body: object = None, **more: Any) -> Any:
        return ok(self.request("POST", path, json={} if body is None else body, **more))

    def delete(self, path: str, **more: Any) -> Any:
        return ok(self.request("DELETE", path, **more))

    def answer(self, route: str, **body: Any) -> httpx.Response:
        """An inference, whole."""
        return self.request("POST", route, json=body, timeout_s=ANSWER_TIMEOUT_S)

    @contextlib.contextmanager
    def stream(
        self,
        route: str,
        *,
        headers: Mapping[str, str] | None = None,
        token: str | None = None,
        **body: Any,
    ) -> Iterator["Stream"]:
        """An inference, streamed; leaving the context early hangs up."""
        body["stream"] = True
        with (
            self.client(token=token) as client,
            client.stream("POST", route, json=body, headers=headers) as response,
        ):
            yield Stream(response)

    def import_model(self, file: Path, name: str, *projectors: Path) -> Any:
        """What `ollama-dist models import` does."""
        digests = {}
        with self.client() as client:
            for each in (file, *projectors):
                with open(each, "rb") as opened:
                    digest = "sha256:" + hashlib.file_digest(opened, "sha256").hexdigest()
                if client.head(f"/blobs/{digest}").status_code != 200:
                    with open(each, "rb") as opened:
                        ok(client.post(f"/blobs/{digest}", content=_chunks(opened)))
                digests[each.name] = digest
            return ok(client.post("/models", json={"name": name, "files": digests}))["model"]

    def node(self, other: "Node") -> Any:
        """The entry of a node in this one's `/nodes`."""
        return next(n for n in self.get("/nodes")["nodes"] if n["id"] == other.id)

    def loaded(self) -> list[Any]:
        """The models in this node's memory, as it says itself."""
        loaded: list[Any] = self.node(self)["loaded"]
        return loaded


class Stream:
    """A streamed answer, line by line."""

    def __init__(self, response: httpx.Response) -> None:
        self.status = response.status_code
        self.served_by = response.headers.get("X-Ollamad-Node", "")
        self._lines = response.iter_lines()

    def __iter__(self) -> Iterator[Any]:
        return (json.loads(line) for line in self._lines)  # none is blank

    def next(self) -> Any:
        return next(iter(self))


class Cluster:
    """Some nodes of one cluster; a context manager that ends them all."""

    def __init__(self, directory: Path, environment: Mapping[str, str] | None = None) -> None:
        self.directory = directory
        self.environment = dict(environment or {})
        self.network: Network | None = None  # gives each node a host; without, all run here
        self.nodes: list[Node] = []
        self._numbers = itertools.count(1)

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        left = [line for node in self.nodes for line in node.destroy()]
        for node in self.nodes:
            shutil.rmtree(node.data_dir, ignore_errors=True)  # models are large
        assert not left, f"processes were left behind: {left}"

    def new_node(self, environment: Mapping[str, str] | None = None) -> Node:
        """A node that is not started yet."""
        number = next(self._numbers)
        name = f"node-{number}"
        node = Node(
            self.directory / f"n{number}",
            name,
            self.environment | dict(environment or {}),
            self.network.add(name) if self.network else None,
        )
        self.nodes.append(node)
        return node

    def found(self) -> Node:
        """Start the first node."""
        return self.new_node().start()

    def join_token(self, ttl_s: float = 600) -> str:
        made = self.asked.post("/cluster/token", {"ttl_seconds": ttl_s})
        return str(made["token"])

    def grow(self, count: int = 1) -> Node:
        """Start nodes that join through the first one, and wait until they are voters."""
        token = self.join_token()
        for _ in range(count):
            self.new_node().start("--join", f"{token}@{self.nodes[0].p2p}")
        self.wait_whole()
        return self.nodes[-1]

    def dismiss(self, node: Node) -> None:
        """Take a node out of the cluster, and out of the harness once it has ended."""
        other = next(each for each in self.running if each is not node)
        other.post("/cluster/leave", {"node_id": node.id}, timeout_s=60)
        assert node.wait_end() == 0
        self.nodes.remove(node)
        assert node.destroy() == []
        self.wait_whole()

    @property
    def running(self) -> list[Node]:
        return [node for node in self.nodes if node.running]

    @property
    def asked(self) -> Node:
        """A node that runs."""
        return self.running[0]

    def revive(self) -> None:
        """Start the nodes that do not run, and wait until all are one cluster."""
        stopped = [node for node in self.nodes if not node.running]
        for node in stopped:
            node.start(wait=False)
        for node in stopped:
            node.wait_ready()
        self.wait_whole(START_TIMEOUT_S)

    def wait_whole(self, timeout_s: float = WAIT_S) -> None:
        """Wait until every running node sees all of them, as voters, and the same leader."""
        nodes = self.running

        def whole() -> bool:
            views = [node.get("/cluster/status") for node in nodes]
            return (
                len({view["leader"] for view in views}) == 1
                and views[0]["leader"] != ""
                and all(view["has_quorum"] for view in views)
                and all(view["nodes_online"] == len(nodes) for view in views)
                and all(len(view["voters"]) >= len(nodes) for view in views)
            )

        wait_until(f"{len(nodes)} nodes form one cluster", whole, timeout_s)

    def leader(self, among: Sequence[Node] | None = None, timeout_s: float = WAIT_S) -> Node:
        """The node that all of those (the running ones) follow."""
        asked = self.running if among is None else among

        def leader() -> Node | None:
            views = [node.get("/cluster/status")["leader"] for node in asked]
            [*names] = {view for view in views if view}
            if len(names) != 1:
                return None
            return next((n for n in self.running if n.id == names[0]), None)

        return wait_until("the nodes agree on a leader", leader, timeout_s)

    def settled(self, timeout_s: float = SETTLE_S) -> str:
        """Wait until all running nodes have applied the same entries; the hash of their state.

        Raises:
          AssertionError: two nodes have applied the same entries and differ, or not in time.
        """

        def settled() -> str | None:
            views = {node.name: node.get("/cluster/consensus") for node in self.running}
            hashes: dict[int, set[str]] = {}
            for view in views.values():
                hashes.setdefault(view["applied_index"], set()).add(view["state_hash"])
            assert all(len(each) == 1 for each in hashes.values()), f"they differ: {views}"
            [*known] = hashes.values()
            return known[0].pop() if len(known) == 1 else None

        return wait_until("all nodes have applied the same", settled, timeout_s)

    def followers(self) -> list[Node]:
        leader = self.leader()
        return [node for node in self.running if node is not leader]

    def wait_replicas(self, model: str, nodes: Sequence[Node], timeout_s: float = 60) -> None:
        """Wait until exactly these nodes hold a model."""
        wanted = sorted(node.id for node in nodes)
        asked = self.asked
        wait_until(
            f"{model} is on {[node.name for node in nodes]}",
            lambda: sorted(asked.get(f"/models/{model}")["model"]["replicas"]) == wanted,
            timeout_s,
        )


def fault_seconds() -> float:
    """How long tests that break something in a loop go on."""
    return float(os.environ.get(LONG_FAULTS, FAULT_S))


def ok(response: httpx.Response) -> Any:
    """The JSON of a response that must be a success."""
    if not response.is_success:
        response.read()
        raise AssertionError(
            f"{response.request.method} {response.request.url}: "
            f"{response.status_code} {response.text}"
        )
    return response.json()


def refused(response: httpx.Response, status: int, code: str) -> Any:
    """The details of an error answer of that kind, which has the one shape of all errors."""
    body = response.json()
    assert (response.status_code, body["code"]) == (status, code), body
    assert set(body) == {"error", "code", "details"}, body
    assert body["error"], body
    return body["details"]


def run_cli(
    node: Node, *arguments: str, input: str = "", home: Path | None = None, timeout_s: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run `ollama-dist` against a node, as its own user on its host (or of another home)."""
    environment = clean_environment(home or node.directory) | {
        "OLLAMA_DIST_HOST": node.address,
        "OLLAMAD_DATA_DIR": str(home or node.data_dir),
    }
    return subprocess.run(
        [sys.executable, "-c", "from ollama_dist.main import main; main()", *arguments],
        input=input,
        capture_output=True,
        text=True,
        env=environment,
        cwd=node.directory,
        timeout=timeout_s,
        check=False,
    )


def run_daemon(
    directory: Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `ollamad` to its end, for starts that must fail."""
    return subprocess.run(
        [*DAEMON, *arguments],
        capture_output=True,
        text=True,
        env=clean_environment(directory) | dict(environment or {}),
        cwd=directory,
        timeout=START_TIMEOUT_S,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def _chunks(file: Any) -> Iterator[bytes]:
    while chunk := file.read(1 << 20):
        yield chunk
