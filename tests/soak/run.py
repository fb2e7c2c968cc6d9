"""The soak: daemons, clients that do all kinds of things, a killer, and samples of every daemon.

One node is never killed, so that what it takes can be followed. Its memory is judged by the trend
of the second half. What can be counted swings by tens with what is asked and who was killed, so it
is counted at rest, before and after. Of the other nodes each life is looked at for what is left
behind on the disk.
"""

import contextlib
import itertools
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from tests.system.harness import Cluster, Node
from tests.system.streams import Client, sign_in

MODEL = "soak"
CLIENTS = 6
KILL_EVERY_S = (12.0, 30.0)
SAMPLE_EVERY_S = 1.0
WARM_UP = 0.5  # of the time: caches fill, imports happen; what comes then is the second half
PARTS = 12  # of that; of each the least counts, so that requests in flight do not
# What memory may grow by in the second half, however long that is: so half an hour shows leaks that
# are fifteen times slower than two minutes do. Without a leak it was 0.7 MB at most of two.
ALLOWED_MB = 4.0
# What may be more at rest after the end than before. Without a leak: as many tasks, two files more.
ALLOWED = {"fds": 6, "tasks": 4, "threads": 4, "temp_files": 0}
REST_S = 4.0  # that is looked at for the least of each
WORDS = ("river", "stone", "lamp", "garden", "letter", "window", "bread", "cloud", "music")


@dataclass
class Sample:
    """What one daemon takes at a moment."""

    at_s: float
    rss_mb: float
    fds: int
    tasks: int
    threads: int
    temp_files: int  # sockets of runners, uploads that were not finished, and the like


@dataclass
class Found:
    """What a soak came to."""

    seconds: float
    samples: list[Sample] = field(default_factory=list)  # of the node that is never killed
    at_rest: list[dict[str, int]] = field(default_factory=list)  # its counts, before and after
    done: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    kills: int = 0
    left_behind: list[str] = field(default_factory=list)  # after the end

    def growth(self) -> tuple[float, float]:
        """MB an hour by which memory grew in the second half, and by which it may."""
        since = WARM_UP * self.seconds
        late = [(one.at_s / 3600, one.rss_mb) for one in self.samples if one.at_s >= since]
        return trend(floors(late)), ALLOWED_MB * 3600 / (self.seconds - since)

    def leaks(self) -> list[str]:
        """What has grown by more than it may."""
        growth, allowed = self.growth()
        found = [f"memory grows by {growth:.0f} MB an hour"] if growth > allowed else []
        before, after = self.at_rest
        return found + [
            f"{name} at rest: {before[name]} -> {after[name]}"
            for name, allowed in ALLOWED.items()
            if after[name] - before[name] > allowed
        ]

    def report(self) -> str:
        """For people."""
        lines = [
            f"{self.seconds:.0f} s, {self.kills} kills, {sum(self.done.values())} requests "
            f"({', '.join(f'{count} {what}' for what, count in sorted(self.done.items()))}), "
            f"{len(self.failures)} failed",
            f"memory: {statistics.median(one.rss_mb for one in self.samples):.0f} MB, grew in the "
            "second half by {:.1f} MB an hour, and may by {:.0f}".format(*self.growth()),
            f"{'at rest':<12}{'before':>8}{'after':>8}{'may grow by':>13}",
        ]
        before, after = self.at_rest
        lines += [
            f"{name:<12}{before[name]:>8}{after[name]:>8}{allowed:>13}"
            for name, allowed in ALLOWED.items()
        ]
        return "\n".join(lines)


def floors(values: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The least value of each part of the time, with the middle of that part."""
    size = max(1, len(values) // PARTS)
    parts = [values[start : start + size] for start in range(0, len(values) - size + 1, size)]
    return [(part[len(part) // 2][0], min(value for _, value in part)) for part in parts]


def trend(points: Sequence[tuple[float, float]]) -> float:
    """The slope by Theil and Sen: the median over all pairs, which no single step moves."""
    slopes = [
        (after - before) / (later - sooner)
        for (sooner, before), (later, after) in itertools.combinations(points, 2)
    ]
    return statistics.median(slopes)


class Soak:
    """Runs on a cluster whose first node is never killed; the model is on all nodes."""

    def __init__(self, cluster: Cluster, seconds: float, seed: int = 1) -> None:
        self.found = Found(seconds)
        self._cluster = cluster
        self._rng = random.Random(seed)
        self._over = threading.Event()
        self._token = sign_in(cluster.nodes[0])
        self._lock = threading.Lock()
        self._begun = time.monotonic()

    def run(self) -> Found:
        """All of it; raises nothing for what clients met, it is in `failures`."""
        self._post("/generate", {"model": MODEL, "prompt": ""})  # loaded, as it will be at the end
        self.found.at_rest.append(at_rest(self._cluster.nodes[0]))
        self._begun = time.monotonic()
        threads = [
            threading.Thread(target=self._client, args=(self._rng.getrandbits(32),), daemon=True)
            for _ in range(CLIENTS)
        ]
        threads.append(threading.Thread(target=self._kill_now_and_then, daemon=True))
        for thread in threads:
            thread.start()
        while (now := time.monotonic() - self._begun) < self.found.seconds:
            with contextlib.suppress(httpx.HTTPError, psutil.Error):
                self.found.samples.append(sample(self._cluster.nodes[0], now))
            time.sleep(SAMPLE_EVERY_S)
        self._over.set()
        for thread in threads:
            thread.join(90)
            if thread.is_alive():
                self.found.failures.append("a client hangs")
        self._cluster.revive()
        self.found.at_rest.append(at_rest(self._cluster.nodes[0]))
        self.found.left_behind = [
            str(path) for node in self._cluster.nodes for path in leftovers(node)
        ]
        return self.found

    def _client(self, seed: int) -> None:
        rng = random.Random(seed)
        actions = (self._stream, self._stream, self._leave, self._chat, self._embed, self._look)
        while not self._over.is_set():
            action = rng.choice((*actions, self._nonsense))
            try:
                action(rng)
            except AssertionError as error:
                with self._lock:
                    self.found.failures.append(f"{action.__name__}: {error}"[:300])
            with self._lock:
                self.found.done[action.__name__.strip("_")] += 1

    def _kill_now_and_then(self) -> None:
        rng = random.Random(self._rng.getrandbits(32))
        while not self._over.wait(rng.uniform(*KILL_EVERY_S)):
            victim = rng.choice(self._cluster.nodes[1:])
            if rng.random() < 0.3:
                for runner in victim.runners():
                    with contextlib.suppress(psutil.Error):
                        runner.kill()
            else:
                victim.kill()
                time.sleep(rng.uniform(0.1, 3.0))
                victim.start()
                self._cluster.wait_whole(60)
            self.found.kills += 1

    # What clients do.

    def _stream(self, rng: random.Random) -> None:
        options = {"num_predict": rng.randint(2, 24), "num_thread": 1, "temperature": 0}
        body = {"model": MODEL, "options": options, "failover": rng.choice(("continue", "replay"))}
        client = Client(self._cluster.nodes, self._token, body)
        answer = client.ask(text(rng, 20), rng.randrange(len(self._cluster.nodes)))
        assert not answer.failure, answer.failure

    def _leave(self, rng: random.Random) -> None:
        """A client that goes away in the middle."""
        body = {"model": MODEL, "prompt": text(rng, 10), "stream": True}
        node = rng.choice(self._cluster.nodes)
        with (
            contextlib.suppress(httpx.TransportError),
            self._http() as client,
            client.stream("POST", f"{node.url}/api/v1/generate", json=body) as response,
        ):
            for count, _ in enumerate(response.iter_lines()):
                if count >= 2:
                    return

    def _chat(self, rng: random.Random) -> None:
        """Some turns, through the node that is never killed."""
        messages: list[dict[str, str]] = []
        for _ in range(rng.randint(1, 3)):
            messages.append({"role": "user", "content": text(rng, 12)})
            options = {"num_predict": 8, "num_thread": 1}
            body = {"model": MODEL, "messages": messages, "options": options}
            answer = self._post("/chat", body)
            messages.append(answer["message"])

    def _embed(self, rng: random.Random) -> None:
        self._post("/embeddings", {"model": MODEL, "input": [text(rng, 8), text(rng, 8)]})

    def _look(self, rng: random.Random) -> None:
        self._post("/explain", {"model": MODEL, "prompt": text(rng, 50)})
        with self._http() as client:
            for path in ("/nodes", "/cluster/status", "/models", "/metrics"):
                response = client.get(f"{self._cluster.nodes[0].url}/api/v1{path}")
                # The general limit of requests holds for the soak, too.
                assert response.status_code in (200, 429), response.text

    def _nonsense(self, rng: random.Random) -> None:
        with self._http() as client:
            url = f"{self._cluster.nodes[0].url}/api/v1/generate"
            response = client.post(url, json={"model": MODEL, "options": {"num_ctx": "no"}})
            assert response.status_code == 400, response.text

    def _post(self, path: str, body: object) -> dict[str, dict[str, str]]:
        with self._http() as client:
            response = client.post(f"{self._cluster.nodes[0].url}/api/v1{path}", json=body)
        assert response.status_code in (200, 429), f"{response.status_code} {response.text}"
        if response.status_code == 429:
            return {"message": {"role": "assistant", "content": "-"}}
        answer: dict[str, dict[str, str]] = response.json()
        return answer

    def _http(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self._token}"}
        return httpx.Client(headers=headers, timeout=120, trust_env=False)


def sample(node: Node, at_s: float) -> Sample:
    """What a daemon takes now."""
    process = psutil.Process(node.pid)
    with process.oneshot():
        rss, fds, threads = process.memory_info().rss, process.num_fds(), process.num_threads()
    with node.client() as client:
        text = client.get(f"{node.url}/metrics").text
    tasks = next(
        float(line.split()[1]) for line in text.splitlines() if line.startswith("ollamad_tasks ")
    )
    return Sample(at_s, rss / 1e6, fds, int(tasks), threads, len(leftovers(node)))


def at_rest(node: Node) -> dict[str, int]:
    """The counts of a daemon that nobody asks anything: the least of each, for it pauses seldom."""
    begun = time.monotonic()
    samples: list[Sample] = []
    while (now := time.monotonic() - begun) < REST_S:
        samples.append(sample(node, now))
        time.sleep(0.2)
    return {name: min(int(getattr(one, name)) for one in samples) for name in ALLOWED}


def leftovers(node: Node) -> list[Path]:
    """Files that only exist for a while: sockets beyond the runners', parts, temporary files."""
    sockets = sorted((node.data_dir / "run").glob("runner-*.sock"))
    extra = sockets[: max(0, len(sockets) - len(node.runners()))]
    models = node.data_dir / "models"
    partial = [path for path in models.rglob("*") if path.name.startswith((".", "tmp", "incoming"))]
    return [*extra, *(path for path in partial if path.is_file())]


def text(rng: random.Random, words: int) -> str:
    """A prompt that nobody else has."""
    return " ".join(rng.choices(WORDS, k=words))
