"""A client that reads answers while nodes die, and goes on at another one (docs/scheduling.md).

It knows the API only, and keeps what it needs to judge: the text, the tokens, how often and how
long nothing came, and each error that the death of the node that it was connected to is no reason
for.
"""

import secrets
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.system.harness import ANSWER_TIMEOUT_S, Node, ok

GIVE_UP_S = 120.0  # for one request, on a machine that is busy with a hundred
PAUSE_S = 0.2
CONNECT_S = 3.0
DEATH_SHOWS_S = 2.0  # connections break a moment before the end of a killed process is seen
# Answers of a node that cannot help now: another one may. 409 and 4xx are mistakes.
ELSEWHERE = {502, 503, 504}


@dataclass
class Answer:
    """One request and what came of it."""

    prompt: str
    text: str = ""
    tokens: int = 0
    end: dict[str, Any] | None = None
    lengths: dict[int, int] = field(default_factory=lambda: {0: 0})  # of the text, by its tokens
    resumed_at: list[int] = field(default_factory=list)  # tokens, when it went on at another node
    longest_silence_s: float = 0.0
    first_token_s: float = 0.0
    entry: str = ""  # the first one's name
    failure: str = ""
    errors: list[str] = field(default_factory=list)  # of nodes that were ready, and lived on
    seams: list[dict[str, Any]] = field(default_factory=list)  # failovers that the answer tells of

    @property
    def resumed(self) -> int:
        """Times that the client went on at another node."""
        return len(self.resumed_at)


class _Unavailable(Exception):
    """A node says that it cannot help now."""


class Client:
    """Asks a cluster; `body` is the request but for the prompt."""

    def __init__(self, nodes: Sequence[Node], token: str, body: dict[str, Any]) -> None:
        self._nodes = nodes
        self._headers = {"Authorization": f"Bearer {token}"}
        self._body = body

    def ask(self, prompt: str, first: int = 0, *, route: str = "/generate") -> Answer:
        """The whole answer, through as many nodes as it takes; `first` is the one to begin at."""
        answer = Answer(prompt, entry=self._nodes[first % len(self._nodes)].name)
        name = secrets.token_hex(8)
        begun = heard = time.monotonic()
        place = first
        while answer.end is None and not answer.failure:
            if time.monotonic() - begun > GIVE_UP_S:
                answer.failure = answer.failure or f"not in {GIVE_UP_S:g} s"
                break
            body = self._body | {"prompt": prompt, "request_id": name, "stream": True}
            if answer.text:
                body |= {"resume_from": answer.tokens, "received": answer.text}
            node = self._nodes[place % len(self._nodes)]
            daemon = node.process if node.serves else None
            try:
                heard = self._read(node, route, body, answer, heard)
                continue
            except _Unavailable as error:
                if daemon is not None:  # else it is starting
                    answer.errors.append(f"{node.name}: {error}")
            except httpx.TransportError as error:
                if daemon is not None and _lives_on(daemon):
                    answer.errors.append(f"{node.name}: {error!r}")
            place += 1
            if answer.text:
                answer.resumed_at.append(answer.tokens)
            time.sleep(PAUSE_S)
        if not answer.first_token_s and answer.text:
            answer.first_token_s = time.monotonic() - begun
        return answer

    def _read(
        self, node: Node, route: str, body: dict[str, Any], answer: Answer, heard: float
    ) -> float:
        begun = time.monotonic()
        timeout = httpx.Timeout(GIVE_UP_S, connect=CONNECT_S)
        with (
            httpx.Client(headers=self._headers, timeout=timeout, trust_env=False) as client,
            client.stream("POST", f"{node.url}/api/v1{route}", json=body) as response,
        ):
            if response.status_code != 200:
                response.read()
                if response.status_code in ELSEWHERE:
                    raise _Unavailable(f"{response.status_code} {response.text}")
                answer.failure = f"{response.status_code} {response.text}"
                return heard
            for line in response.iter_lines():
                item = httpx.Response(200, text=line).json()
                if "error" in item:
                    answer.failure = line
                    return heard
                now = time.monotonic()
                text = item.get("response") or ""
                if text:
                    if not answer.text:
                        answer.first_token_s = now - begun
                    else:
                        answer.longest_silence_s = max(answer.longest_silence_s, now - heard)
                    heard = now
                    answer.text += text
                    answer.tokens = item["token"]
                    answer.lengths[answer.tokens] = len(answer.text)
                if item.get("done"):
                    answer.end = item
                    answer.seams = item.get("failovers") or []
                    return heard
        raise httpx.ReadError("the stream ended without its end")


def _lives_on(daemon: subprocess.Popen[bytes]) -> bool:
    """Whether a daemon whose connection broke did not end."""
    try:
        daemon.wait(DEATH_SHOWS_S)
    except subprocess.TimeoutExpired:
        return True
    return False


def ask_runner(node: Node, path: str, body: Any = None) -> Any:
    """Ask the only runner of a node itself, past the daemon; without a body, by GET."""
    [socket] = (node.data_dir / "run").glob("*.sock")
    transport = httpx.HTTPTransport(uds=str(socket))
    with httpx.Client(transport=transport, timeout=ANSWER_TIMEOUT_S) as client:
        method = "GET" if body is None else "POST"
        return ok(client.request(method, f"http://runner{path}", json=body))


def continuation(node: Node, ids: list[int], count: int, *, read_anew: bool = False) -> str:
    """What the model says behind these tokens, greedy; `read_anew`: whatever its cache has."""
    body = {"prompt": ids, "n_predict": count, "temperature": 0, "cache_prompt": not read_anew}
    return str(ask_runner(node, "/completion", body)["content"])


def sign_in(node: Node) -> str:
    """A token that every node of the cluster takes; the first node knows the password."""
    password = (node.data_dir / "admin-password").read_text().strip()
    body = {"username": "admin", "password": password}
    return str(node.post("/auth/login", body, token="")["token"])


def at_once(jobs: Sequence[Callable[[], None]]) -> list[threading.Thread]:
    """Threads that run; join them."""
    threads = [threading.Thread(target=job, daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    return threads
