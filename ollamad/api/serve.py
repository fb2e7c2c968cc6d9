"""Listening sockets, and the server on top of them.

The sockets are bound here, before anything else of the daemon starts: a port in use is one
clear error, port 0 works, and the daemon knows its addresses. What happens on an accepted
connection is in `http.py`.
"""

import errno
import logging
import resource
import socket
from collections.abc import Sequence

import trio
from hypercorn.config import Config
from hypercorn.typing import ASGIFramework
from hypercorn.utils import repr_socket_addr, wrap_app

from ollamad.api.auth import is_loopback_address
from ollamad.api.http import ConnectionLimits, Connections, SocketHandler

BACKLOG = 512  # connections that wait for accept; a burst of clients after a leader change
ACCEPTED_PER_PASS = 32  # of trio's loop; each takes a tenth of a millisecond
# The process or the host has no files or memory for one more connection.
NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
NO_ROOM_PAUSE_S = 0.1
GRACEFUL_TIMEOUT_S = 3.0  # for open answers at shutdown; the whole daemon has 10 s
# What an answer that was cancelled may take to unwind before its connection is cut under it.
ABORT_AFTER_S = 1.0
MAX_HEADER_BYTES = 32 << 10  # a token and some cookies fit several times
# hypercorn asks for some limit; this one is no nuisance to a busy proxy.
MAX_REQUESTS_PER_CONNECTION = 1_000_000
# The kernel's part of the buffers: what a client leaves unread of a stream of tokens.
SEND_BUFFER = 256 << 10
# Files that are not connections of the API: models, the journal, links to other nodes, runners.
RESERVED_FILES = 512
MIN_CONNECTIONS = 64
# Unacknowledged bytes for so long mean that the client is gone without a word.
USER_TIMEOUT_MS = 20_000
# A client that waits silently for a long prompt is asked whether it is still there.
KEEPALIVE_IDLE_S = 30
KEEPALIVE_INTERVAL_S = 10
KEEPALIVE_PROBES = 3

NO_LIMITS = ConnectionLimits()

OLLAMA_ADDRESS = "127.0.0.1:11434"  # Ollama's default, which its clients use unless told otherwise
AUTO, OFF = "auto", "off"

log = logging.getLogger(__name__)

# hypercorn's own "Running on …" would repeat what the daemon says.
_server_log = logging.getLogger("ollamad.api.hypercorn")
_server_log.setLevel(logging.WARNING)


class CannotListen(Exception):
    """An address cannot be listened on; the message says which and why, for people."""


async def open_listeners(binds: Sequence[str]) -> list[socket.socket]:
    """Bind sockets for `host:port` texts (IPv6 in brackets; port 0 for any free one).

    The caller owns them until `serve_api` takes them over.

    Raises:
      CannotListen: an address is malformed, in use, not of this host, or not allowed.
    """
    sockets: list[socket.socket] = []
    try:
        for bind in binds:
            sockets += await _bind_all(bind)
    except BaseException:
        for each in sockets:
            each.close()
        raise
    return sockets


async def open_ollama_listeners(setting: str) -> list[socket.socket]:
    """Bind what `api.ollama_listen` says: an address, `auto`, or `off`.

    `auto` is OLLAMA_ADDRESS if nobody else has it; somebody else is most likely an Ollama, which
    is no reason not to start.

    Raises:
      CannotListen: an address that was asked for cannot be had.
    """
    if setting == OFF:
        return []
    if setting != AUTO:
        return await open_listeners([setting])
    try:
        return await open_listeners([OLLAMA_ADDRESS])
    except CannotListen:
        log.warning(
            "%s, where programs look for Ollama, is in use: most likely Ollama itself runs here, "
            "and they reach it and not this node. Stop it and start this node again, or point "
            "them to this node's API; with api.ollama_listen: off it is not tried",
            OLLAMA_ADDRESS,
        )
        return []


async def serve_api(
    app: ASGIFramework,
    sockets: Sequence[socket.socket],
    shutdown: trio.Event,
    *,
    limits: ConnectionLimits = NO_LIMITS,
    websockets: SocketHandler | None = None,
    graceful_timeout_s: float = GRACEFUL_TIMEOUT_S,
    task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the app on these sockets until `shutdown` is set; then end and return.

    Takes the sockets over and closes them. `task_status` gets the URLs once connections are
    accepted. After `shutdown` no connection is accepted; answers have `graceful_timeout_s` to
    end, are cancelled then, and ABORT_AFTER_S later what is left is cut off.

    Cancellation: the answers are cancelled at once. A client that has stopped reading can hold
    it up for `http.UNREAD_TIMEOUT_S`; prefer `shutdown`.
    """
    config = Config()
    config.keep_alive_max_requests = MAX_REQUESTS_PER_CONNECTION
    config.h11_max_incomplete_size = MAX_HEADER_BYTES
    config.include_server_header = False
    config.accesslog = None
    config.errorlog = _server_log
    connections = Connections(wrap_app(app, 0, "asgi"), config, limits, websockets)
    urls = [f"http://{repr_socket_addr(one.family, one.getsockname())}" for one in sockets]
    async with trio.open_nursery() as aborting:
        aborting.start_soon(connections.turns.run)
        async with trio.open_nursery() as serving:
            async with trio.open_nursery() as accepting:
                for one in sockets:
                    accepting.start_soon(_accept, one, connections, serving)
                task_status.started(urls)
                await shutdown.wait()
                accepting.cancel_scope.cancel()
            await connections.close_idle()
            serving.cancel_scope.deadline = trio.current_time() + graceful_timeout_s

            async def abort_late() -> None:
                await trio.sleep(graceful_timeout_s + ABORT_AFTER_S)
                connections.abort()

            aborting.start_soon(abort_late)
        aborting.cancel_scope.cancel()


def connections_allowed(wanted: int) -> int:
    """How many connections there may be of those wanted (0: any number), by the limit of files.

    Raises that limit as far as the system lets it: the usual one of 1,024 stands for programs
    that wait with select(2), which this is none of.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    most = max(MIN_CONNECTIONS, hard - RESERVED_FILES)
    if wanted > most:
        log.warning(
            "api.max_connections is %d, but this process may open %d files: it takes %d "
            "connections. Raise LimitNOFILE of the service, or `ulimit -Hn`",
            wanted,
            hard,
            most,
        )
    return min(wanted or most, most)


async def _accept(listener: socket.socket, connections: Connections, serving: trio.Nursery) -> None:
    """Serve what connects, until cancelled; then the listener is closed.

    trio's own would accept one in each pass of its loop, and have many wait that connect at once.
    """
    with listener:
        only_local = is_loopback_address(str(listener.getsockname()[0]))
        listener.setblocking(False)
        while True:
            await trio.lowlevel.wait_readable(listener)
            for _ in range(ACCEPTED_PER_PASS):
                try:
                    accepted, _ = listener.accept()
                except BlockingIOError:
                    break
                except OSError as error:
                    if error.errno in NO_ROOM:
                        log.error("cannot take connections for now: %s", error.strerror)
                        await trio.sleep(NO_ROOM_PAUSE_S)
                        break
                    continue  # that client has gone already
                stream = trio.SocketStream(trio.socket.from_stdlib_socket(accepted))
                serving.start_soon(connections.serve, stream, only_local)


async def _bind_all(bind: str) -> list[socket.socket]:
    host, colon, port_text = bind.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port_text.isdecimal() or int(port_text) > 65535:
        raise CannotListen(f"cannot listen on {bind!r}: write HOST:PORT, such as 0.0.0.0:8080")
    try:
        listeners = await trio.open_tcp_listeners(int(port_text), host=host, backlog=BACKLOG)
    except OSError as error:
        raise CannotListen(f"cannot listen on {bind}: {_reason(error)}") from error
    return [_tune(listener.socket) for listener in listeners]


def _tune(bound: trio.socket.SocketType) -> socket.socket:
    """A plain socket with the options that accepted connections inherit."""
    plain = socket.socket(fileno=bound.detach())
    tcp = socket.IPPROTO_TCP
    plain.setsockopt(tcp, socket.TCP_NODELAY, 1)  # a token must not wait for the next one
    plain.setsockopt(tcp, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    plain.setsockopt(tcp, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    plain.setsockopt(tcp, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    plain.setsockopt(tcp, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
    return plain


def _reason(error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return "the port is in use; is another ollamad running?"
        case errno.EADDRNOTAVAIL:
            return "this host has no such address"
        case errno.EACCES:
            return "not allowed; ports below 1024 need a privilege"
        case _:
            return error.strerror or str(error)
