"""A client of etcd, run by the Python of the virtual environment that has `grpcio`.

etcd's own protocol is gRPC; the one message that is needed is packed by hand. Its gateway for JSON
over HTTP is measured too, over a bare socket with a request made beforehand: with so little in
the client it answers sooner than gRPC does in Python.
"""

import base64
import json
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import grpc

from tests.bench.bench_raft_process import COMMAND, Answer, serve

CALL_S = 20.0
RETRY_S = 0.05  # between attempts during a failover, each at all members that are left
KEY = b"k"
GATEWAY_BODY = json.dumps(
    {"key": base64.b64encode(KEY).decode(), "value": base64.b64encode(COMMAND).decode()}
).encode()
GATEWAY_REQUEST = (
    b"POST /v3/kv/put HTTP/1.1\r\nHost: etcd\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n" % len(GATEWAY_BODY)
) + GATEWAY_BODY


def _varint(number: int) -> bytes:
    low, rest = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])


def _field(number: int, value: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _varint(len(value)) + value


PUT_REQUEST = _field(1, KEY) + _field(2, COMMAND)  # etcdserverpb.PutRequest


class Client:
    """Calls to the members, by port."""

    def __init__(self) -> None:
        self._puts: dict[int, Any] = {}
        self._sockets: dict[int, socket.socket] = {}

    def perform(
        self,
        task: str,
        port: int = 0,
        ports: list[int] | None = None,
        way: str = "",
        runs: int = 0,
        time_s: float = 0,
        depth: int = 0,
    ) -> Answer:
        match task:
            case "latency":
                put = self._gateway(port) if way == "gateway" else self._grpc(port)
                times = []
                for _ in range(runs):
                    started = time.perf_counter()
                    put()
                    times.append(time.perf_counter() - started)
                return {"times": times}
            case "pipelined":
                return self._pipelined(port, time_s, depth)
            case "failover":
                return self._failover(ports or [])
        raise AssertionError(task)

    def _put(self, port: int) -> Any:
        if port not in self._puts:
            # One that lost its member would wait longer and longer before it connects again.
            options = [("grpc.max_reconnect_backoff_ms", 100)]
            channel = grpc.insecure_channel(f"127.0.0.1:{port}", options)
            self._puts[port] = channel.unary_unary("/etcdserverpb.KV/Put")
        return self._puts[port]

    def _grpc(self, port: int) -> Callable[[], None]:
        put = self._put(port)
        return lambda: put(PUT_REQUEST, timeout=CALL_S)

    def _gateway(self, port: int) -> Callable[[], None]:
        if port not in self._sockets:
            connection = self._sockets[port] = socket.create_connection(("127.0.0.1", port))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = self._sockets[port]

        def put() -> None:
            connection.sendall(GATEWAY_REQUEST)
            answer = connection.recv(65536)  # it comes in one segment
            if not answer.startswith(b"HTTP/1.1 200"):
                raise OSError(answer)

        return put

    def _pipelined(self, port: int, time_s: float, depth: int) -> Answer:
        put = self._put(port)
        calls: deque[Any] = deque()
        done = 0
        started = time.perf_counter()
        while time.perf_counter() - started < time_s:
            if len(calls) >= depth:
                calls.popleft().result()
                done += 1
            calls.append(put.future(PUT_REQUEST, timeout=CALL_S))
        for call in calls:
            call.result()
            done += 1
        return {"done": done, "took_s": time.perf_counter() - started}

    def _failover(self, ports: list[int]) -> Answer:
        """Write to all members that are left until one acknowledges."""
        calls: list[Any] = []
        deadline = time.monotonic() + CALL_S
        next_attempt = 0.0
        while time.monotonic() < deadline:
            for call in [call for call in calls if call.done()]:
                calls.remove(call)
                if call.code() is grpc.StatusCode.OK:
                    at = time.monotonic()
                    for left in calls:
                        left.cancel()
                    return {"at": at}
            if time.monotonic() >= next_attempt:
                calls += [self._put(port).future(PUT_REQUEST, timeout=CALL_S) for port in ports]
                next_attempt = time.monotonic() + RETRY_S
            time.sleep(0.001)
        raise TimeoutError("no member acknowledged a write")


if __name__ == "__main__":
    serve(Client().perform)
