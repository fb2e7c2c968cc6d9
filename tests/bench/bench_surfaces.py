"""What each surface of the API adds to the runner: time to the first token, and tokens a second.

    python -m tests.bench.bench_surfaces [--rounds N] [--looks N]

Two daemons on loopback; the model is in the first one's runner. The same chat goes straight to the
runner's Unix socket, to each surface of the first daemon (local), and to those of the second one,
which forwards it over mutual TLS. All take turns within one run, so that a busy machine troubles
all alike, and all clients are the same few lines over a blocking socket.

The first token: one client, a chat that the runner has in its cache, one token. Speed: several
clients at once, each with a chat of its own, until the last one has its last token; of the surfaces
for chats, and forwarded of two.
"""

import argparse
import json
import re
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.bench.bench_engine import COUNTED
from tests.conftest import smollm2_file
from tests.system.harness import Cluster, Node

TOKENS = 64  # a stream
ROUNDS = 5
LOOKS = 200  # at the first token
STREAM_COUNTS = (1, 4, 16)
MAX_ADDED_MS = {50: 2.0, 99: 6.0}  # to the first token, locally
MIN_SPEED = {"local": 0.99, "forwarded": 0.97}  # of the runner's
MODEL = "bench"

Body = dict[str, Any]
# Of a prompt, and of how many tokens are wanted.
MakeBody = Callable[[str, int], Body]


class Way(NamedTuple):
    """One way to the model."""

    name: str
    where: str  # runner, local or forwarded
    address: str  # HOST:PORT, or the path of a Unix socket
    path: str
    make_body: MakeBody
    first: bytes  # what stands in front of the first token's text
    end: bytes  # what stands in the last event
    count: bytes  # what stands in front of the number of tokens
    token: str = ""


class Stream(NamedTuple):
    first_s: float
    total_s: float
    tokens: int


def chat_of(marker: int) -> str:
    """What a stream says, which no other one says; a model goes on counting."""
    numbers = " ".join(str(1000 * marker + number) for number in range(1, COUNTED + 1))
    return f"Count on: {numbers}"


def messages_of(text: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]


def openai_body(text: str, tokens: int) -> Body:
    return {
        "model": MODEL,
        "messages": messages_of(text),
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
        "max_tokens": tokens,
    }


def ollama_body(text: str, tokens: int) -> Body:
    options = {"temperature": 0, "num_predict": tokens}
    return {"model": MODEL, "messages": messages_of(text), "stream": True, "options": options}


def generate_body(text: str, tokens: int) -> Body:
    options = {"temperature": 0, "num_predict": tokens}
    asked = {"model": MODEL, "system": "Be brief.", "prompt": text}
    return asked | {"stream": True, "options": options}


def completion_body(text: str, tokens: int) -> Body:
    return {
        "model": MODEL,
        "prompt": templated(text),
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
        "max_tokens": tokens,
    }


def responses_body(text: str, tokens: int) -> Body:
    return {
        "model": MODEL,
        "input": messages_of(text),
        "stream": True,
        "temperature": 0,
        "max_output_tokens": tokens,
    }


def anthropic_body(text: str, tokens: int) -> Body:
    return {
        "model": MODEL,
        "system": "Be brief.",
        "messages": messages_of(text)[1:],
        "stream": True,
        "temperature": 0,
        "max_tokens": tokens,
    }


def templated(text: str) -> str:
    """What the model's template makes of the chat."""
    lines = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages_of(text)]
    return "".join((*lines, "<|im_start|>assistant\n"))


def runner_body(text: str, tokens: int) -> Body:
    """What the engine asks."""
    return {
        "prompt": templated(text),
        "stream": True,
        "return_tokens": True,
        "n_predict": tokens,
        "temperature": 0,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0,
        "repeat_penalty": 1.0,
    }


CHATS = (
    ("/api/v1/chat", ollama_body, b'"content":', b'"done":true', b'"eval_count":'),
    ("/api/chat", ollama_body, b'"content":', b'"done":true', b'"eval_count":'),
    ("/v1/chat/completions", openai_body, b'"delta":', b"[DONE]", b'"completion_tokens":'),
    # It ends as completed or, where it reached its limit, as incomplete; either way with the usage.
    ("/v1/responses", responses_body, b"text.delta", b"output_tokens_details", b'"output_tokens":'),
    ("/v1/messages", anthropic_body, b"text_delta", b"message_stop", b'"output_tokens":'),
)
SURFACES = (
    *CHATS,
    ("/api/v1/generate", generate_body, b'"response":', b'"done":true', b'"eval_count":'),
    ("/api/generate", generate_body, b'"response":', b'"done":true', b'"eval_count":'),
    ("/v1/completions", completion_body, b'"text":', b"[DONE]", b'"completion_tokens":'),
)
# The paths whose speed is measured, by where they are asked.
STREAMED = {
    "runner": {"/completion"},
    "local": {path for path, *_ in CHATS},
    "forwarded": {"/api/chat", "/v1/chat/completions"},
}


def ways(first: Node, second: Node, runner: str) -> list[Way]:
    direct = Way(
        "runner", "runner", runner, "/completion", runner_body, b"data: ", b'"stop":true',
        b'"tokens_predicted":',
    )  # fmt: skip
    found = [direct]
    for node, where in ((first, "local"), (second, "forwarded")):
        for path, make_body, mark, end, count in SURFACES:
            token = node.admin_token()
            found.append(Way(path, where, node.address, path, make_body, mark, end, count, token))
    return found


def ask(way: Way, text: str, tokens: int) -> Stream:
    """One chat, read to its end."""
    data = json.dumps(way.make_body(text, tokens)).encode()
    head = [f"POST {way.path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    head += [f"Authorization: Bearer {way.token}"] if way.token else []
    request = "\r\n".join([*head, f"Content-Length: {len(data)}", "", ""]).encode() + data
    if way.where == "runner":
        connection = socket.socket(socket.AF_UNIX)
        address: Any = way.address
    else:
        connection = socket.socket(socket.AF_INET)
        host, _, port = way.address.rpartition(":")
        address = (host, int(port))
    with connection:
        connection.connect(address)
        started = time.perf_counter()
        connection.sendall(request)
        first = 0.0
        seen = b""
        while way.end not in seen[-65536:]:
            part = connection.recv(1 << 16)
            if not part:
                raise RuntimeError(f"{way.name}: the stream ended early: {seen[-300:]!r}")
            seen += part
            if not first and way.first in seen:
                first = time.perf_counter() - started
        total = time.perf_counter() - started
    counts = re.findall(way.count + rb"(\d+)", seen)
    if b'"error":{' in seen or not counts:
        raise RuntimeError(f"{way.name}: {seen[-300:]!r}")
    return Stream(first, total, int(counts[-1]))


def many(way: Way, streams: int, marker: int) -> float:
    """Tokens a second of some streams at once."""
    results: list[Stream] = []
    texts = [chat_of(marker * 20 + index) for index in range(streams)]
    threads = [
        threading.Thread(target=lambda text=text: results.append(ask(way, text, TOKENS)))
        for text in texts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(results) != streams:
        raise RuntimeError("a stream failed; see above")
    tokens = sum(result.tokens for result in results)
    return tokens / max(result.total_s for result in results)


def compare_first_tokens(found: Sequence[Way], looks: int) -> bool:
    times: dict[Way, list[float]] = {way: [] for way in found}
    text = chat_of(1)
    for way in found:
        for _ in range(5):
            ask(way, text, 1)
    for number in range(looks):
        shift = number % len(found)
        for way in (*found[shift:], *found[:shift]):
            times[way].append(1000 * ask(way, text, 1).first_s)
    print(f"{'way':<32} {'p50 ms':>8} {'added':>7} {'p99 ms':>8} {'added':>7}")
    base = {percent: percentile(times[found[0]], percent) for percent in MAX_ADDED_MS}
    reached = True
    for way in found:
        shown = f"{way.where} {way.path}" if way.where != "runner" else "runner"
        line = f"{shown:<32}"
        for percent, limit in MAX_ADDED_MS.items():
            value = percentile(times[way], percent)
            added = value - base[percent]
            line += f" {value:>8.2f} {added:>7.2f}"
            reached = reached and (way.where != "local" or added <= limit)
        print(line)
    goals = ", ".join(f"p{percent} {limit:g} ms" for percent, limit in MAX_ADDED_MS.items())
    print(f"goal for what a local surface adds: {goals}\n")
    return reached


def compare_speeds(found: Sequence[Way], streams: int, rounds: int) -> bool:
    speeds: dict[Way, list[float]] = {way: [] for way in found}
    for number in range(rounds):
        shift = number % len(found)
        for place, way in enumerate((*found[shift:], *found[:shift])):
            marker = 1000 * streams + 40 * number + place
            speeds[way].append(many(way, streams, marker))
    reached = True
    for way in found:
        ratios = [a / b for a, b in zip(speeds[way], speeds[found[0]], strict=True)]
        ratio, goal = statistics.median(ratios), MIN_SPEED.get(way.where)
        reached = reached and (goal is None or ratio >= goal)
        shown = f"{way.where} {way.path}" if way.where != "runner" else "runner"
        speed = statistics.median(speeds[way])
        print(f"{streams:>7}  {shown:<32} {speed:>8.1f} {ratio:>7.3f} {goal or '':>6}", flush=True)
    return reached


def percentile(values: Sequence[float], percent: int) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


def main(arguments: Sequence[str] = ()) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the daemons must not outlive it
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--looks", type=int, default=LOOKS)
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="ollamad-bench-") as directory:
        environment = {
            "OLLAMAD_MODELS__REPLICAS": "1",
            "OLLAMA_KEEP_ALIVE": "-1",
            "OLLAMA_NUM_PARALLEL": str(max(STREAM_COUNTS)),
            "OLLAMA_CONTEXT_LENGTH": "512",
        }
        with Cluster(Path(directory), environment) as cluster:
            first = cluster.found()
            second = cluster.grow()
            cluster.wait_whole()
            first.post("/distribution/auto-configure", {"enabled": False})  # nor copied when hot
            first.import_model(smollm2_file(), MODEL)
            first.answer("generate", model=MODEL, prompt="")  # loads it
            [runner] = (first.data_dir / "run").glob("*.sock")
            found = ways(first, second, str(runner))
            reached = [compare_first_tokens(found, chosen.looks)] if chosen.looks else []
            streamed = [way for way in found if way.path in STREAMED[way.where]]
            print(f"{'streams':>7}  {'way':<32} {'tokens/s':>8} {'ratio':>7} {'goal':>6}")
            for streams in STREAM_COUNTS if chosen.rounds else ():
                reached.append(compare_speeds(streamed, streams, chosen.rounds))
    return 0 if all(reached) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
