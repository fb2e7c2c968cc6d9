"""A daemon in a cluster that is put together and does not run."""

import contextlib
import datetime
from collections.abc import AsyncIterator

from ollamad.daemon import Daemon
from ollamad.datadir import DataDir
from ollamad.peers.identity import make_ca
from ollamad.settings import ApiSettings, P2pSettings, RaftSettings, Settings
from tests.fakes.tls_nodes import TlsNode, utc_now

ANY_PORT = "127.0.0.1:0"


@contextlib.asynccontextmanager
async def built_daemon(
    directory: DataDir, *, certified: datetime.datetime | None = None
) -> AsyncIterator[Daemon]:
    """`certified` is when its certificate was issued, if not now."""
    ca = make_ca(utc_now())
    node = TlsNode(directory.identity).enter(ca, at=certified)
    settings = Settings(
        api=ApiSettings(listen=ANY_PORT, ollama_listen="off"),
        p2p=P2pSettings(listen=ANY_PORT),
        raft=RaftSettings(listen=ANY_PORT),
    )
    daemon = await Daemon.build(settings, directory, node.identity)
    state = daemon._machine.state
    state.cluster_id, state.ca, state.jwt_key = "c", ca, bytes(32)
    yield daemon
    for listening in daemon._api_sockets:
        listening.close()
    for listener in (*daemon._p2p_listeners, *daemon._raft_listeners):
        await listener.aclose()
