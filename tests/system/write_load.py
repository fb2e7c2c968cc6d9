"""Writes through every node of a cluster while things break, and what became of each of them.

A write spends a refresh token that the test signed itself: one small replicated command, which
can be told afterwards from every node by its own id, and which must take effect at most once (a
second time is answered as a replay). Each client writes through one node only, so a node that
hangs stops no other client. Next to the writers, readers check that what was acknowledged is seen
at once: by its own node, and by any other one after a read barrier.
"""

import base64
import enum
import hashlib
import hmac
import http.client
import itertools
import json
import random
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from tests.system.harness import WAIT_S, Cluster, Node, wait_until

JWT_SECRET = "the system tests sign their own tokens"
ENVIRONMENT = {"OLLAMA_JWT_SECRET": JWT_SECRET}  # of every node under this load
CLIENTS_PER_NODE = 2
REQUEST_TIMEOUT_S = 8.0  # above what a daemon takes to say that the outcome is unknown
READ_TIMEOUT_S = 8.0
TOKEN_TTL_S = 3600
PAUSE_S = 0.01  # between two writes of a client, so that the daemons get the machine
REFUSED_PAUSE_S = 0.05  # after a refusal, as a client would wait
OWN_READ_EVERY = 8  # writes; each is followed by a read on the same node
SLOW_S = 1.0  # a gap without an acknowledgment that is worth a line


class Verdict(enum.Enum):
    """What the client was told."""

    ACKNOWLEDGED = "acknowledged"  # must be there
    REFUSED = "refused"  # must not be there, now or later
    UNKNOWN = "unknown"  # either


# What a daemon says when it promises that nothing was changed.
REFUSALS = {"NO_QUORUM", "NOT_READY"}


@dataclass(frozen=True, slots=True)
class Write:
    """One request; the times are monotonic seconds."""

    id: str
    node: Node
    begun: float
    ended: float
    verdict: Verdict
    reason: str  # status and code, or the error of the connection


class Client:
    """One connection to one node that is kept open; not for several threads."""

    def __init__(self, node: Node, timeout_s: float) -> None:
        self.node = node
        self._timeout_s = timeout_s
        self._connection: http.client.HTTPConnection | None = None

    def request(
        self, method: str, path: str, body: object = None, *, token: str = ""
    ) -> tuple[int, Any]:
        """Status and JSON.

        Raises:
          NotSent: nobody was there to take the request.
          OSError, http.client.HTTPException: it was sent, and no answer came.
        """
        if self._connection is None:
            fresh = http.client.HTTPConnection(
                self.node.host.address, self.node.api_port, timeout=self._timeout_s
            )
            try:
                fresh.connect()
            except OSError as error:
                fresh.close()
                raise NotSent(type(error).__name__) from None
            self._connection = fresh
        headers = {"Content-Type": "application/json"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        try:
            self._connection.request(
                method, f"/api/v1{path}", None if body is None else json.dumps(body), headers
            )
            response = self._connection.getresponse()
            answer = json.loads(response.read())
        except BaseException:
            self.close()
            raise
        if response.will_close:
            self.close()
        return response.status, answer

    @property
    def is_connected(self) -> bool:
        """Whether the next request goes to the same process as the last one."""
        return self._connection is not None

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class NotSent(Exception):
    """The request did not leave."""


@contextmanager
def client_of(node: Node, timeout_s: float) -> Iterator[Client]:
    client = Client(node, timeout_s)
    try:
        yield client
    finally:
        client.close()


class WriteLoad:
    """Clients that write until the context ends, and the account of it.

    Leaving the context waits for the requests that are under way. Violations that are seen
    meanwhile are told by `check`.
    """

    def __init__(self, cluster: Cluster, clients_per_node: int = CLIENTS_PER_NODE) -> None:
        self._cluster = cluster
        self._cluster_id = cluster.asked.get("/cluster/status")["cluster_id"]
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._begun = time.monotonic()
        self._ended = 0.0
        self.writes: list[Write] = []
        self.violations: list[str] = []
        self.barriers: Counter[str] = Counter()  # of the readers, by what became of them
        self.faults: list[tuple[float, str]] = []
        writers = [node for node in cluster.nodes for _ in range(clients_per_node)]
        self._threads = [
            *(threading.Thread(target=self._run, args=(self._write, node)) for node in writers),
            *(
                threading.Thread(target=self._run, args=(self._read, node))
                for node in cluster.nodes
            ),
        ]

    def __enter__(self) -> "WriteLoad":
        for thread in self._threads:
            thread.start()
        self.wait_progress()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._ended = time.monotonic()

    # While it runs.

    def count(self, verdict: Verdict) -> int:
        return sum(write.verdict is verdict for write in list(self.writes))

    def note(self, fault: str) -> float:
        """Something is about to break; the time of it."""
        now = time.monotonic()
        self.faults.append((now, fault))
        return now

    def wait_progress(
        self, more: int = 20, timeout_s: float = WAIT_S, node: Node | None = None
    ) -> None:
        """Wait until that many writes were acknowledged that began after this call."""
        begun, seen = time.monotonic(), len(self.writes)

        def progress() -> bool:
            new = (w for w in self.writes[seen:] if w.verdict is Verdict.ACKNOWLEDGED)
            return sum(w.begun > begun and node in (None, w.node) for w in new) >= more

        where = f" through {node.name}" if node else ""
        wait_until(f"{more} more writes are acknowledged{where}", progress, timeout_s)

    def during(self, begun: float, ended: float, node: Node) -> list[Write]:
        """Writes through a node that began and ended in that time."""
        return [
            w for w in list(self.writes) if w.node is node and begun < w.begun and w.ended < ended
        ]

    # Afterwards.

    def longest_gap_s(self, begun: float, ended: float) -> float:
        """The longest time without an acknowledgment that overlaps that time."""
        acks = sorted(w.ended for w in self.writes if w.verdict is Verdict.ACKNOWLEDGED)
        edges = [self._begun, *acks, self._ended or time.monotonic()]
        return max(
            (
                later - earlier
                for earlier, later in itertools.pairwise(edges)
                if later > begun and earlier < ended
            ),
            default=0.0,
        )

    def check(self) -> "Account":
        """Hold the state of the nodes, which must be equal, against what the clients were told.

        Raises:
          AssertionError: an acknowledged write is missing, a refused one is there, one took
            effect twice, or a read was old; tells which.
        """
        dead = [node.name for node in self._cluster.nodes if not node.running]
        assert not dead, f"{dead} ended"
        state_hash = self._cluster.settled()
        happened = self._happened()
        wrong = list(self.violations)
        for write in self.writes:
            expected = {Verdict.ACKNOWLEDGED: True, Verdict.REFUSED: False}.get(write.verdict)
            if expected is not None and (write.id in happened) != expected:
                what = "is missing" if expected else "has happened"
                wrong.append(
                    f"{write.verdict.value} ({write.reason}) through {write.node.name} at "
                    f"{write.ended - self._begun:.2f} s, and {what}"
                )
        account = Account(self, happened, state_hash)
        print(account)
        shown = "\n".join(wrong[:20])
        assert not wrong, f"{len(wrong)} violations:\n{shown}\n{account}"
        return account

    def _happened(self) -> set[str]:
        """The writes that are in the state. Nodes with equal hashes share the work."""
        nodes = self._cluster.running
        found: list[set[str]] = [set() for _ in nodes]
        failed: list[BaseException] = []

        def ask(place: int) -> None:
            try:
                with client_of(nodes[place], READ_TIMEOUT_S) as client:
                    for write in self.writes[place :: len(nodes)]:
                        if self._is_there(client, write.id):
                            found[place].add(write.id)
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(nodes))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed, failed
        return set().union(*found)

    # The threads.

    def _run(self, work: Callable[[Node], None], node: Node) -> None:
        try:
            work(node)
        except Exception as error:
            self._violate(f"a client of {node.name} failed: {error!r}")

    def _violate(self, what: str) -> None:
        with self._lock:
            self.violations.append(f"at {time.monotonic() - self._begun:.2f} s: {what}")

    def _write(self, node: Node) -> None:
        with client_of(node, REQUEST_TIMEOUT_S) as client:
            while not self._stop.is_set():
                write = self._write_once(client)
                with self._lock:
                    self.writes.append(write)
                    number = len(self.writes)
                acknowledged = write.verdict is Verdict.ACKNOWLEDGED
                if acknowledged and number % OWN_READ_EVERY == 0 and client.is_connected:
                    self._read_own(client, write)
                self._stop.wait(PAUSE_S if acknowledged else REFUSED_PAUSE_S)

    def _write_once(self, client: Client) -> Write:
        id = secrets.token_hex(12)
        begun = time.monotonic()
        try:
            status, answer = client.request(
                "POST", "/auth/refresh", {"refresh_token": self._token("refresh", id)}
            )
        except NotSent as error:
            verdict, reason = Verdict.REFUSED, f"not sent: {error}"
        except (OSError, http.client.HTTPException, ValueError) as error:
            verdict, reason = Verdict.UNKNOWN, type(error).__name__
        else:
            reason = f"{status} {answer.get('code', '')}".strip()
            if status == 200:
                verdict = Verdict.ACKNOWLEDGED
            elif answer.get("code") in REFUSALS:
                verdict = Verdict.REFUSED
            else:
                verdict = Verdict.UNKNOWN
                if status != 503:
                    self._violate(f"{client.node.name} took a write twice, or not at all: {answer}")
        return Write(id, client.node, begun, time.monotonic(), verdict, reason)

    def _read_own(self, client: Client, write: Write) -> None:
        try:
            seen = self._is_there(client, write.id)
        except (NotSent, OSError, http.client.HTTPException, ValueError):
            return
        if not seen:
            self._violate(f"{client.node.name} acknowledged a write and does not see it")

    def _read(self, node: Node) -> None:
        """Look at one node for the last write that was acknowledged anywhere, current or not."""
        last = 0
        with client_of(node, READ_TIMEOUT_S) as client:
            while not self._stop.wait(random.uniform(PAUSE_S, 4 * PAUSE_S)):
                with self._lock:
                    fresh, last = self.writes[last:], len(self.writes)
                known = [w for w in fresh if w.verdict is Verdict.ACKNOWLEDGED]
                if not known:
                    continue
                try:
                    status, answer = self._barrier(client)
                    if status != 200:
                        self.barriers[answer["code"]] += 1
                        continue
                    self.barriers["current"] += 1
                    if not self._is_there(client, known[-1].id):
                        self._violate(f"{node.name} said that it is current, and was not")
                except (NotSent, OSError, http.client.HTTPException, ValueError):
                    self.barriers["no answer"] += 1

    @staticmethod
    def _barrier(client: Client) -> tuple[int, Any]:
        token = client.node.admin_token()
        return client.request("GET", "/cluster/leader?consistent=true", token=token)

    def _is_there(self, client: Client, id: str) -> bool:
        status, answer = client.request("GET", "/auth/me", token=self._token("access", id))
        if status not in (200, 401):
            raise ValueError(f"{status} {answer}")
        return status == 401

    def _token(self, purpose: str, id: str) -> str:
        """A token of a session of its own. Whoever reads may, while this id was not spent."""
        now = int(time.time())
        claims = {
            "iss": "ollamad",
            "aud": self._cluster_id,
            "sub": "admin",
            "sid": f"session-{id}",
            "jti": id,
            "typ": purpose,
            "iat": now,
            "exp": now + TOKEN_TTL_S,
        }
        signed = f"{_base64({'alg': 'HS256', 'typ': 'JWT'})}.{_base64(claims)}"
        signature = hmac.digest(JWT_SECRET.encode(), signed.encode(), hashlib.sha256)
        return f"{signed}.{_base64(signature)}"


class Account:
    """What became of all writes; its text is for the test's output."""

    def __init__(self, load: WriteLoad, happened: set[str], state_hash: str) -> None:
        self._load = load
        self.state_hash = state_hash
        self.acknowledged, self.refused, self.unknown = (load.count(v) for v in Verdict)
        self.unknown_happened = sum(
            w.verdict is Verdict.UNKNOWN and w.id in happened for w in load.writes
        )
        faults = [*load.faults, (float("inf"), "")]
        self.gaps = [
            (fault, load.longest_gap_s(when, end))
            for (when, fault), (end, _) in itertools.pairwise(faults)
        ]

    @property
    def longest_gap_s(self) -> float:
        return max((gap for _, gap in self.gaps), default=0.0)

    def __str__(self) -> str:
        total = self.acknowledged + self.refused + self.unknown
        reasons = Counter(
            w.reason for w in self._load.writes if w.verdict is not Verdict.ACKNOWLEDGED
        )
        gaps = sorted(gap for _, gap in self.gaps)
        lines = [
            f"{total} writes: {self.acknowledged} acknowledged, {self.refused} refused, "
            f"{self.unknown} unknown ({100 * self.unknown / max(1, total):.2f} %), of which "
            f"{self.unknown_happened} happened",
            f"not acknowledged because of {dict(reasons)}",
            f"barriers: {dict(self._load.barriers)}; state {self.state_hash[:20]} on all nodes",
        ]
        if gaps:
            lines.append(
                f"{len(gaps)} faults; without an acknowledgment: median "
                f"{gaps[len(gaps) // 2]:.2f} s, longest {gaps[-1]:.2f} s"
            )
        lines += [f"  {gap:.2f} s at: {fault}" for fault, gap in self.gaps if gap > SLOW_S]
        return "\n".join(lines)


def _base64(part: Any) -> str:
    data = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
