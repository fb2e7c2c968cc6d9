"""What the engine costs on top of llama.cpp: tokens a second and time to the first token.

Run with `python -m tests.bench.bench_engine MODEL.gguf`. The bare side asks the same runner over
the same socket with a blocking client that does no more than count events; both sides take turns
in one run, so that a busy machine troubles both alike.
"""

import argparse
import glob
import json
import socket
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import trio

from ollamad.core.inference import Chunk, Failed, Finished, GenerateRequest, Options
from ollamad.engine.engine import Engine
from ollamad.engine.spec import EngineSettings, ModelSpec

TOKENS = 100  # a stream
COUNTED = 12  # numbers in a prompt; a model goes on counting, so that no stream ends early
RUNNER = (sys.executable, "-m", "ollamad.engine.runner")
MEMORY = 64 << 30  # bytes; nothing is to be evicted here
HEADING = (
    "streams  bare tok/s  engine tok/s  ratio  median  bare first  engine first  engine CPU/token"
)

Round = list[tuple[float, float]]  # of each stream: seconds to the first token, seconds in all


def prompt_of(marker: int) -> str:
    """A prompt of its own for every stream, so that none finds another one's cache."""
    return " ".join(str(1000 * marker + number) for number in range(1, COUNTED + 1))


def bare_body(prompt: str) -> dict[str, object]:
    """What the runner is asked when nothing is in between."""
    # The same sampling as the engine's: greedy, and none of llama.cpp's other filters.
    return {
        "prompt": prompt,
        "stream": True,
        "return_tokens": True,
        "n_predict": TOKENS,
        "temperature": 0,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0,
        "repeat_penalty": 1.0,
    }


def bare_stream(path: str, prompt: str, result: Round) -> None:
    """One completion with the leanest client; appends (seconds to first token, seconds in all)."""
    data = json.dumps(bare_body(prompt)).encode()
    head = f"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    started = time.perf_counter()
    connection.sendall(head.encode() + data)
    first = 0.0
    tail = b""
    while b'"stop":true' not in tail:
        part = connection.recv(1 << 16)
        if not first and b"data: " in part:
            first = time.perf_counter() - started
        tail = tail[-64:] + part
    result.append((first, time.perf_counter() - started))
    connection.close()


def bare_round(path: str, streams: int, marker: int) -> Round:
    """Some bare streams at once."""
    results: Round = []
    prompts = [prompt_of(marker * 10 + index) for index in range(streams)]
    threads = [threading.Thread(target=bare_stream, args=(path, p, results)) for p in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


async def engine_round(engine: Engine, spec: ModelSpec, streams: int, marker: int) -> Round:
    """The same number of streams through the engine."""
    results: Round = []

    async def one(prompt: str) -> None:
        options = Options(temperature=0, num_predict=TOKENS)
        request = GenerateRequest(spec.name, prompt=prompt, raw=True, options=options)
        started = time.perf_counter()
        first = 0.0
        async with engine.generate(spec, request) as events:
            async for event in events:
                if isinstance(event, Chunk):
                    first = first or time.perf_counter() - started
                elif isinstance(event, Failed):
                    raise RuntimeError(event.message)
                elif isinstance(event, Finished) and event.eval_count != TOKENS:
                    raise RuntimeError(f"the answer ended after {event.eval_count} tokens")
        results.append((first, time.perf_counter() - started))

    async with trio.open_nursery() as nursery:
        for index in range(streams):
            nursery.start_soon(one, prompt_of(marker * 10 + index))
    return results


def speed(results: Round) -> float:
    """Tokens a second of all streams together."""
    return TOKENS * len(results) / max(seconds for _, seconds in results)


async def main(spec: ModelSpec, rounds: int) -> None:
    """Print the figures and the ratios."""
    with tempfile.TemporaryDirectory() as directory:
        settings = EngineSettings(runtime_dir=Path(directory), runner_command=RUNNER)
        engine = Engine(settings, lambda: MEMORY)
        async with trio.open_nursery() as nursery:
            await nursery.start(engine.run)
            await engine.load(spec)
            (path,) = glob.glob(f"{directory}/*.sock")  # noqa: PTH207 - pathlib blocks no less
            await engine_round(engine, spec, 1, 0)
            marker = 1
            print(HEADING)
            for streams in (1, 4):
                bare: list[Round] = []
                ours: list[Round] = []
                cpu_s = 0.0
                for number in range(rounds):
                    for is_engine in (number % 2 == 0, number % 2 == 1):
                        if is_engine:
                            before = time.process_time()
                            ours.append(await engine_round(engine, spec, streams, marker))
                            cpu_s += time.process_time() - before
                        else:
                            run = trio.to_thread.run_sync
                            bare.append(await run(bare_round, path, streams, marker))
                        marker += 1
                report(streams, bare, ours, cpu_s / (rounds * streams * TOKENS))
            nursery.cancel_scope.cancel()


def report(streams: int, bare: list[Round], ours: list[Round], cpu_s: float) -> None:
    """One line of the table.

    Other processes only ever slow a round down, so the best rounds are compared; the median of
    the pairs stands beside.
    """
    pairs = [(speed(b), speed(o)) for b, o in zip(bare, ours, strict=True)]
    best_bare = max(pair[0] for pair in pairs)
    best_ours = max(pair[1] for pair in pairs)
    firsts = [
        1000 * min(statistics.median(first for first, _ in results) for results in side)
        for side in (bare, ours)
    ]
    print(
        f"{streams:7}  {best_bare:10.1f}  {best_ours:12.1f}  {best_ours / best_bare:.3f}"
        f"  {statistics.median(o / b for b, o in pairs):6.3f}"
        f"  {firsts[0]:7.1f} ms  {firsts[1]:9.1f} ms  {1e6 * cpu_s:7.0f} µs"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("--rounds", type=int, default=8)
    arguments = parser.parse_args()
    size = arguments.model.stat().st_size
    model = ModelSpec("bench:latest", "sha256:bench", str(arguments.model), size)
    trio.run(main, model, arguments.rounds)
