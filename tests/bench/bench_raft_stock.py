"""PySyncObj as it comes, in a process of its own that never imports `ollamad.raft`.

That package changes the library's module for its whole process. Here the library has its own
transport, threads, pickle and FileJournal, which does not sync.
"""

import json
import logging
import sys
import threading
import time

from pysyncobj import FAIL_REASON, SyncObj, SyncObjConf, replicated

from tests.bench.bench_raft_process import COMMAND, Answer, serve

PROPOSE_S = 20.0


class Stock(SyncObj):  # type: ignore[misc]
    """Replicates bytes and does nothing with them."""

    @replicated  # type: ignore[untyped-decorator]
    def put(self, command: bytes) -> None:
        pass


class Truncations(logging.Handler):
    """Counts how often the library deleted entries that it had applied, which it logs."""

    def __init__(self) -> None:
        super().__init__(logging.CRITICAL)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "truncating already-applied" in record.msg


class Node:
    def __init__(self, port: int, others: list[int], journal: str, use_batch: bool) -> None:
        conf = SyncObjConf(appendEntriesUseBatch=use_batch, journalFile=journal)
        addresses = [f"127.0.0.1:{other}" for other in others]
        self._address = f"127.0.0.1:{port}"
        self._object = Stock(self._address, addresses, conf)
        self._truncations = Truncations()
        logging.getLogger("pysyncobj").addHandler(self._truncations)

    def perform(self, task: str, runs: int = 0, time_s: float = 0, depth: int = 0) -> Answer:
        match task:
            case "status":
                leader = self._object.getStatus()["leader"]
                ready = self._object.isReady() and leader is not None
                return {
                    "leader": str(leader) if ready else None,
                    "me": self._address,
                    "truncations": self._truncations.count,
                }
            case "latency":
                times = []
                for _ in range(runs):
                    started = time.perf_counter()
                    self._object.put(COMMAND, sync=True, timeout=PROPOSE_S)
                    times.append(time.perf_counter() - started)
                return {"times": times}
            case "pipelined":
                return self._pipelined(time_s, depth)
        raise AssertionError(task)

    def _pipelined(self, time_s: float, depth: int) -> Answer:
        done, failed = 0, 0
        slots = threading.Semaphore(depth)

        def count(result: object, error: int) -> None:
            nonlocal done, failed
            if error == FAIL_REASON.SUCCESS:
                done += 1
            else:
                failed += 1
            slots.release()

        started = time.perf_counter()
        # The library forgets some callbacks: who waits for all of them waits for ever.
        while (left_s := started + time_s - time.perf_counter()) > 0:
            if slots.acquire(timeout=left_s):
                self._object.put(COMMAND, callback=count)
        took_s = time.perf_counter() - started
        return {"done": done, "failed": failed, "took_s": took_s}


if __name__ == "__main__":
    node = Node(**json.loads(sys.argv[1]))
    assert "ollamad" not in sys.modules
    serve(node.perform)
