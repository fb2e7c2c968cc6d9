"""The daemon's WebSocket: what happens in the cluster, as it happens.

A connection that breaks is made again by itself, since a restart of one node is no reason to stop
watching a cluster; what happened meanwhile is not told.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

from ollama_dist.client import CONNECT_TIMEOUT_S, Json
from ollama_dist.errors import ApiError, NoConnection
from ollama_dist.session import Session
from ollama_dist.text import one_line

# In seconds; the last one again and again.
PAUSES_S = (0.5, 1.0, 2.0, 5.0)
# Without a message or a ping for so long the connection is dead; the daemon pings after 25 s.
SILENCE_S = 60.0
MAX_MESSAGE = 1 << 20
_NEVER_AGAIN = (1008,)  # the token does not count any more


def messages(
    session: Session, channels: Sequence[str], on_lost: Callable[[str], None]
) -> Iterator[Json]:
    """The messages of these channels, without end. `on_lost` is told why when one breaks off.

    Raises:
      CliError: the first connection failed, or the daemon refuses.
    """
    failures = 0
    connected = False
    while True:
        try:
            for message in _connection(session, channels):
                connected, failures = True, 0
                yield message
        except NoConnection as problem:
            if not connected:
                raise
            on_lost(str(problem))
        pause = PAUSES_S[min(failures, len(PAUSES_S) - 1)]
        failures += 1
        time.sleep(pause)  # noqa: TID251 - this program has no event loop to block


def _connection(session: Session, channels: Sequence[str]) -> Iterator[Json]:
    from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
    from websockets.sync.client import connect

    token = session.api.bearer()  # also finds out whether anybody is there
    address = session.address
    stack = ExitStack()
    try:
        connection = connect(
            f"ws{address.url.removeprefix('http')}/api/v1/ws",
            additional_headers={} if token is None else {"Authorization": f"Bearer {token}"},
            open_timeout=CONNECT_TIMEOUT_S,
            ping_timeout=SILENCE_S,
            max_size=MAX_MESSAGE,
            compression=None,
            proxy=None,
        )
        socket = stack.enter_context(connection)
    except InvalidStatus as refused:
        response = refused.response
        raise session.api.refused(
            response.status_code, response.body, response.headers.get("Retry-After")
        ) from None
    except (OSError, InvalidHandshake, TimeoutError) as problem:
        raise NoConnection(f"no WebSocket at {address.url}: {one_line(problem)}") from None
    with stack:
        try:
            for channel in channels:
                socket.send(json.dumps({"type": "subscribe", "channel": channel}))
            for text in socket:
                message = json.loads(text)
                if message.get("type") == "error":
                    status = 403 if message.get("code") == "FORBIDDEN" else 400
                    raise ApiError(one_line(message.get("error")), status=status)
                yield message
        except ConnectionClosed:
            pass
        reason = socket.close_reason or "it was closed"
        if socket.close_code in _NEVER_AGAIN:
            raise ApiError(one_line(reason), status=401)
        raise NoConnection(f"the connection to {address.url} was lost: {one_line(reason)}")
