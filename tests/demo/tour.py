"""`make demo`: three daemons on this machine become one cluster, and a machine is lost.

A tour for people, with timings; `--once` makes it a smoke test that ends by itself. Everything
is real: processes, consensus, TLS, the model, the bytes on disk.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

MODEL = "smollm2:135m"
QUESTION = "Why is the sky blue? Answer in two sentences."
KILL_AFTER = 25  # parts of an answer, which are words mostly
SECOND_QUESTION = "Name three things that are good about owning several old computers."
START_TIMEOUT_S = 30.0
PULL_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 12.0

console = Console(highlight=False)


class DemoFailed(Exception):
    """The tour cannot go on; the message says where it stopped."""


class Node:
    """One daemon of the demo."""

    def __init__(self, name: str, base: Path) -> None:
        self.name = name
        self.dir = base / name
        self.log = base / f"{name}.log"
        self.api, self.p2p, self.raft = free_ports(3)
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.api}"

    def start(self, join: str | None = None) -> None:
        environment = os.environ | {
            "API_LISTEN": f"127.0.0.1:{self.api}",
            "P2P_LISTEN": f"127.0.0.1:{self.p2p}",
            "RAFT_BIND_ADDR": f"127.0.0.1:{self.raft}",
            "NODE_ID": self.name,
            # The tour looks at everything many times a second.
            "OLLAMAD_RATE_LIMITS__GENERAL": "0",
        }
        command = [sys.executable, "-m", "ollamad", "start", "--data-dir", str(self.dir)]
        if join:
            command += ["--join", join]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        wait_for(f"{self.name} to be ready", self.is_ready, self)

    def is_ready(self) -> bool:
        return self.get("/health").status_code == 200 and (self.dir / "cli-token").exists()

    def kill(self) -> None:
        """As if the power failed: the daemon has no chance to say anything."""
        assert self.process is not None, "it was started"
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def headers(self) -> dict[str, str]:
        token = self.dir / "cli-token"
        return {"Authorization": f"Bearer {token.read_text()}"} if token.exists() else {}

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}/api/v1{path}", headers=self.headers(), timeout=10)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        url = f"{self.url}/api/v1{path}"
        answer = httpx.post(url, json=body, headers=self.headers(), timeout=60)
        if answer.is_error:
            raise DemoFailed(f"POST {path} on {self.name}: {answer.text}")
        result: dict[str, Any] = answer.json()
        return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--once", action="store_true", help="stop the cluster at the end")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the daemons must not outlive it
    base = Path(tempfile.mkdtemp(prefix="ollamad-demo-"))
    nodes = [Node(f"node-{number}", base) for number in (1, 2, 3)]
    try:
        tour(nodes)
        if not options.once:
            leave_running(nodes)
    except (DemoFailed, httpx.HTTPError) as error:
        console.print(f"\n[bold red]The demo stopped:[/] {error}", soft_wrap=True)
        for node in nodes:
            if node.log.exists():
                console.print(f"\n[dim]last lines of {node.name}'s log[/]")
                console.print("\n".join(node.log.read_text().splitlines()[-8:]), markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("\ninterrupted")
        return 130
    finally:
        with console.status("stopping the daemons"):
            for node in nodes:
                node.stop()
            shutil.rmtree(base, ignore_errors=True)
        console.print("[dim]stopped; the demo's data is removed[/]")
    return 0


def tour(nodes: list[Node]) -> None:
    first, second, third = nodes
    headline("1. Three daemons become one cluster")
    with stopwatch("node-1 starts and founds a cluster"):
        first.start()
    invitation = first.post("/cluster/token", {"ttl_seconds": 600})["command"].split()[-1]
    say(f"ollamad start --join {invitation[:22]}…@127.0.0.1:{first.p2p}")
    for node in (second, third):
        with stopwatch(f"{node.name} joins with the token"):
            node.start(join=invitation)
            wait_for("the join to be known", lambda node=node: knows(first, node.name), first)
    with stopwatch("all three vote"):
        wait_for("three voters", lambda: len(status(first)["voters"]) == 3, first)
    show_nodes(first)

    headline(f"2. node-1 pulls {MODEL}; a second node gets it from node-1")
    started = time.monotonic()
    first.post(f"/models/{MODEL}/download", {"nodes": [first.name, second.name]})
    follow_transfers(first)
    say(f"there in {time.monotonic() - started:.1f} s: downloaded once, verified on both nodes")

    headline("3. node-3, which has no copy, is asked")
    ask(third, QUESTION, nodes)

    headline("4. node-3 is asked again. The node that answers is killed in the middle of it")
    victim = ask(third, SECOND_QUESTION, nodes, kill_after=KILL_AFTER)
    rest = [node for node in nodes if node is not victim]
    with stopwatch("the others have a leader"):
        wait_for("a leader", lambda: new_leader(rest[0], victim), rest[0])
    with stopwatch(f"{victim.name} is shown as offline"):
        wait_for("offline", lambda: node_status(rest[0], victim) == "offline", rest[0])
    with stopwatch(f"{victim.name} comes back and is online"):
        victim.start()
        wait_for("online", lambda: node_status(rest[0], victim) == "online", rest[0])
    show_nodes(rest[0])


def leave_running(nodes: list[Node]) -> None:
    first = nodes[0]
    headline("The cluster stays up. Try, in another terminal:")
    bin_dir = Path(sys.executable).parent
    console.print(
        f"  export OLLAMA_DIST_HOST={first.url} OLLAMAD_DATA_DIR={first.dir}\n"
        f"  {bin_dir}/ollama-dist status\n"
        f"  {bin_dir}/ollama-dist run {MODEL}\n"
        f"  curl {nodes[2].url}/api/v1/chat -H 'Content-Type: application/json' -d "
        f'\'{{"model": "{MODEL}", "messages": [{{"role": "user", "content": "Hello!"}}]}}\'\n'
        f"  kill -9 {nodes[1].process.pid if nodes[1].process else ''}    # and ask again",
        soft_wrap=True,
    )
    console.print("\nCtrl-C stops everything and removes the demo's data.")
    with contextlib.suppress(KeyboardInterrupt):
        signal.pause()


def ask(node: Node, question: str, nodes: list[Node], *, kill_after: int = 0) -> Node:
    """Stream an answer from a node; tell who made it and how quickly. Returns who began it.

    With `kill_after` that node is killed after so many parts of its answer.
    """
    console.print(f"\n  [bold]{node.name}[/] [cyan]>>>[/] {question}")
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": question}],
        "stream": True,
        "options": {"temperature": 0, "num_predict": 90},
    }
    asked = time.monotonic()
    first_token: float | None = None
    done: dict[str, Any] = {}
    console.print("  ", end="")
    with httpx.stream(
        "POST", f"{node.url}/api/v1/chat", json=body, headers=node.headers(), timeout=120
    ) as answer:
        if answer.is_error:
            raise DemoFailed(f"{node.name} did not answer: {answer.read().decode()}")
        names = {n["id"]: n["name"] for n in members(node)}
        served_by = names[answer.headers["X-Ollamad-Node"]]
        server = next(each for each in nodes if each.name == served_by)
        for number, line in enumerate(answer.iter_lines(), 1):
            event = json.loads(line)
            if "error" in event:
                raise DemoFailed(f"the answer broke off: {event['error']}")
            if first_token is None:
                first_token = time.monotonic() - asked
            text = event["message"]["content"].replace("\n", "\n  ")
            console.print(text, end="", markup=False, soft_wrap=True, style="green")
            if number == kill_after:
                server.kill()
                console.print(f" [bold red]<kill -9 {served_by}>[/] ", end="", soft_wrap=True)
            done = event
    if not done.get("done"):
        raise DemoFailed("the answer ended without its last line")
    rate = done["eval_count"] / max(done["eval_duration"] / 1e9, 1e-9)
    console.print()
    moves = done.get("failovers", [])
    if kill_after and not moves:
        raise DemoFailed(f"the answer was over before {served_by} was killed")
    if not moves:
        say(
            f"served by {served_by}: first token after {first_token:.2f} s "
            f"(of it {done['load_duration'] / 1e9:.2f} s loading), {rate:.0f} tokens/s"
        )
    for move in moves:
        say(
            f"{names[move['from_node']]} was lost after {move['after_tokens']} tokens; "
            f"{names[move['to_node']]} went on after {move['silence_ms'] / 1000:.2f} s "
            f"({done['load_duration'] / 1e9:.2f} s of it loading the model)"
        )
    return server


def follow_transfers(node: Node) -> None:
    """Progress bars until every transfer has ended."""
    columns = (
        TextColumn("  {task.description:<34}"),
        BarColumn(bar_width=24),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    deadline = time.monotonic() + PULL_TIMEOUT_S
    bars: dict[str, Any] = {}
    with Progress(*columns, console=console) as progress:
        while time.monotonic() < deadline:
            names = {n["id"]: n["name"] for n in members(node)}
            transfers = node.get("/transfers").json()["transfers"]
            for transfer in reversed(transfers):
                if transfer["status"] == "failed":
                    raise DemoFailed(f"the transfer failed: {transfer['error']}")
                source = names.get(transfer["peer_id"], transfer["peer_id"]) or "origin"
                what = f"{source} -> {names[transfer['node_id']]}"
                if transfer["id"] not in bars:
                    bars[transfer["id"]] = progress.add_task(what)
                progress.update(
                    bars[transfer["id"]],
                    description=what,
                    total=transfer["bytes_total"] or None,
                    completed=transfer["bytes_done"],
                )
            if node.get(f"/models/{MODEL}").status_code == 200:
                model = node.get(f"/models/{MODEL}").json()["model"]
                if len(model["replicas"]) >= 2:
                    return
            time.sleep(0.1)
    raise DemoFailed("the model did not arrive in time")


def show_nodes(node: Node) -> None:
    table = Table(box=None, padding=(0, 2))
    for column in ("", "node", "status", "role", "address", "models"):
        table.add_column(column)
    for member in members(node):
        color = {"online": "green", "offline": "red"}.get(member["status"], "yellow")
        role = "leader" if member["is_leader"] else "voter" if member["voter"] else "member"
        table.add_row(
            "",
            member["name"],
            f"[{color}]{member['status']}[/]",
            role,
            member["address"],
            ", ".join(member["models"]),
        )
    console.print(table)


def members(node: Node) -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = node.get("/nodes").json()["nodes"]
    return nodes


def status(node: Node) -> dict[str, Any]:
    answer: dict[str, Any] = node.get("/cluster/status").json()
    return answer


def knows(node: Node, name: str) -> bool:
    return any(m["name"] == name and m["status"] == "online" for m in members(node))


def node_status(node: Node, other: Node) -> str:
    return next((m["status"] for m in members(node) if m["name"] == other.name), "")


def new_leader(node: Node, old: Node) -> bool:
    now = status(node)
    return bool(now["leader"]) and now["leader_name"] not in ("", old.name) and now["has_quorum"]


def wait_for(what: str, condition: Callable[[], bool], node: Node) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if node.process is not None and node.process.poll() is not None:
            raise DemoFailed(f"{node.name} ended while waiting for {what}")
        with contextlib.suppress(httpx.HTTPError, KeyError, ValueError):
            if condition():
                return
        time.sleep(0.02)
    raise DemoFailed(f"waited {START_TIMEOUT_S:.0f} s for {what}")


@contextlib.contextmanager
def stopwatch(what: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    console.print(f"  [green]✓[/] {what} [dim]{time.monotonic() - started:.2f} s[/]")


def headline(text: str) -> None:
    console.print(f"\n[bold]{text}[/]")


def say(text: str) -> None:
    console.print(f"  [dim]{text}[/]", soft_wrap=True)


def free_ports(count: int) -> list[int]:
    """Ports that are free now. Held together, so that they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


if __name__ == "__main__":
    sys.exit(main())
