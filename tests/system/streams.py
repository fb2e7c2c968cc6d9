"""A client that reads answers while nodes die, and goes on at another one (docs/scheduling.md).

It knows the API only, and keeps what it needs to judge: the text, the tokens, how often and how
long nothing came.
"""

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.system.harness import Node

GIVE_UP_S = 60.0  # for one request, on a machine that is busy with a hundred
PAUSE_S = 0.2
CONNECT_S = 3.0
# Answers of a node that cannot help now: another one may. 409 and 4xx are mistakes.
ELSEWHERE = {502, 503, 504}


@dataclass
class Answer:
    """One request and what came of it."""

    prompt: str
    text: str = ""
    tokens: int = 0
    end: dict[str, Any] | None = None
    resumed: int = 0  # times that the client went on at another node
    longest_silence_s: float = 0.0
    first_token_s: float = 0.0
    entry: str = ""  # the first one's name
    failure: str = ""
    seams: list[dict[str, Any]] = field(default_factory=list)  # failovers that the answer tells of


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
            try:
                heard = self._read(
                    self._nodes[place % len(self._nodes)], route, body, answer, heard
                )
            except httpx.TransportError:
                place += 1
                answer.resumed += bool(answer.text)
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
                    raise httpx.ConnectError(response.text)
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
                if item.get("done"):
                    answer.end = item
                    answer.seams = item.get("failovers") or []
                    return heard
        raise httpx.ReadError("the stream ended without its end")


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
