"""ollamad: one daemon per host; daemons that share a token form one cluster.

Layers, from pure decisions to I/O (see docs/architecture.md):

    core/       pure decisions: ids, cluster state, commands, apply, placement, routing
    wire/       pure: frames, messages, handshake state machines (sans-I/O)
    raft/       the only importer of pysyncobj
    peers/      identity, mTLS, join, heartbeats, one multiplexed way to ask another node
    store/      blobs and manifests on disk, GGUF metadata
    sources/    where models come from
    transfer/   pieces between peers
    engine/     runners: start, watch, stop, stream
    scheduler/  one request's life: admit, route, forward
    api/        quart-trio: the REST surface
    daemon.py   the task tree: the one place that knows every package
"""

__version__ = "0.2.0"
