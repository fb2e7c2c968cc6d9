"""Connections of strangers and broken members to a node, made without the daemon's code.

Each comes from an address of its own in 127/8, so that the limits that hold for an address hold
for one test.
"""

import contextlib
import itertools
import socket
import ssl
import struct
from collections.abc import Iterator
from pathlib import Path

from tests.system.harness import Node

addresses = (f"127.{n >> 16}.{n >> 8 & 255}.{n & 255}" for n in itertools.count(300))


@contextlib.contextmanager
def connected(node: Node, port: str, source: str | None = None) -> Iterator[socket.socket]:
    address = ("127.0.0.1", getattr(node, port))
    with socket.create_connection(
        address, timeout=20, source_address=(source or next(addresses), 0)
    ) as stranger:
        yield stranger


def client_context(identity: Path | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if identity is not None:
        context.load_cert_chain(identity / "node.crt", identity / "node.key")
    return context


@contextlib.contextmanager
def secured(
    node: Node, port: str, identity: Path | None = None, source: str | None = None
) -> Iterator[ssl.SSLSocket]:
    with (
        connected(node, port, source) as plain,
        client_context(identity).wrap_socket(plain) as stream,
    ):
        yield stream


def read_all(stream: socket.socket) -> bytes:
    """What comes until the other side closes."""
    data = b""
    with contextlib.suppress(ConnectionError, ssl.SSLError, ssl.SSLEOFError):
        while part := stream.recv(65536):
            data += part
    return data


def send(stream: socket.socket, data: bytes) -> None:
    """Send what the other side may not want to read any more."""
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        stream.sendall(data)


def new_warnings(node: Node, before: str) -> list[str]:
    return [line for line in node.log()[len(before) :].splitlines() if "WARNING" in line]


def closed(stream: socket.socket) -> bool:
    stream.setblocking(False)
    try:
        return stream.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def framed(data: bytes) -> bytes:
    return struct.pack("!I", len(data)) + data
