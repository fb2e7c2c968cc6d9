"""Blobs between nodes, in verified pieces, from several holders at once.

    lanes = BulkLanes(bulk_peers, upload=Limit(...), download=Limit(...))
    fetcher = Fetcher(peers, lanes, store, corrupt=PieceCorrupt, rotten=PiecesRotten)
    await fetcher.fetch_blob(layer, holders, progress)      # FetchFailed, or the store's errors

    server = PieceServer(store, lanes, missing=BlobMissing, unmapped=PieceMapMissing)
    peers.handle(ollamad.wire.pieces.METHOD, server.handle)
    await nursery.start(server.run)

    table = TransferTable(node_id, run, wall=time.time, steady=time.monotonic)
    id_ = table.begin("smollm2:135m", "replication", bytes_total=size, cancel=scope.cancel)
    table.update(id_, bytes_done=..., received=..., peer_id=...)
    table.complete(id_)                                     # or fail, cancelled

| module | what it does | what it does not know |
| --- | --- | --- |
| `fetch.py` | one blob into this store: retries, bans, resume | who should have which blob |
| `server.py` | pieces to others, from complete and arriving blobs | why they are wanted |
| `turns.py` | who sends next | what |
| `lanes.py` | the bytes of pieces from disk to disk, in threads | sockets, TLS |
| `limits.py` | bytes a second, over all lanes | |
| `transfers.py` | the table behind `GET /transfers` | how bytes move |
| `ports.py` | what it needs of the links and the store | |
| `core/piece_picker.py` | which piece of whom; windows, back-off, bans | bytes, hashes, streams |
| `core/spread.py` | what the source of a blob shows to whom | |
| `core/pacing.py` | limits, and how much goes side by side | |
| `wire/pieces.py`, `wire/lane.py` | messages, frames, both state machines | files, hashes, tasks |

A piece is believed when the store has verified it against the map, whose root is in the
replicated state; the store checks the whole blob at the end. `docs/piece-protocol.md` has the
protocol.
"""
