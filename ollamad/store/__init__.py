"""A node's models on disk, in Ollama's layout: blobs, manifests, GGUF headers.

Does not know the cluster, the network or the engines. Knows when bytes are durable.

    from ollamad.store.models import ModelStore

    store = ModelStore(root, keep_free_bytes=..., shelves=...)   # starts nothing
    await store.prepare()                           # StoreUnusable with one clear line

Blobs (`blobs.py`; digests are `sha256:<64 hex>`, everything else is InvalidDigest):

    await has_blob(digest) -> bool        await blob_size(digest) -> int
    await find_blob(digest) -> Path       await remove_blob(digest) -> freed bytes
    await import_file(path, progress=) -> (digest, PieceMap)
    await ingest(chunks, expected_digest=, size=, progress=) -> (digest, PieceMap)
    await put_bytes(data) -> (digest, PieceMap)
    await free_bytes() / total_bytes() -> int
    space.reserve({digest: bytes})        # a context: room for blobs that will come
    pins.hold(*digests)                   # an async context: nobody frees these; see `pins.py`

Pieces, for the transfer between nodes (`pieces.py`, `partial.py`):

    await piece_map(digest) -> PieceMap                 # may have to read the blob
    await open_piece_source(digest) -> PieceSource      # of a complete or still partial blob
        .digest .map .have .is_origin   with .open_piece(i) as Region   .close()
    await open_partial(digest, piece_map) -> PartialBlob     # is a PieceSource, too
        .have_count .have_bytes .complete
        await .write_piece(i, data) -> whether it was new   # PieceCorrupt, StoreFull
        await .finish()                                     # DigestMismatch
        .close()                                            # keeps the verified pieces
    await open_growing(digest, size, named=) -> PartialBlob     # from an origin: no map yet
    await open_growing_source(digest) -> PieceSource            # also of one that grows
    await partials() -> [digest]          await discard_partial(digest)

Models (`models.py`, `manifests.py`, `details.py`, `gguf.py`):

    await build_model(name, gguf_digest, template=, system=, params=, license=) -> Model
    await derive_model(name, manifest_bytes, changes) -> Model   # of another one's manifest
    await describe_model(model) -> Description
    await model_of(name, manifest_bytes) -> Model      # of a manifest whose blobs are here
    await runtime_parts(model) -> RuntimeParts(gguf, template, …, adapters, projector)
    await read_header(gguf_digest) -> GgufHeader       # facts_of(header), details_of(facts)
    describe(manifest_bytes) -> Manifest               # .config .layers .blobs
    manifest_digest(manifest_bytes) -> digest
    await write_manifest(name, bytes) / read_manifest(name) / delete_manifest(name)
    await list_manifests() -> [StoredManifest(name, data, modified_at)]
    await free(keep, among=, grace_s=) -> Freed(size, held)

Errors are StoreError and its kinds (`errors.py`), GgufError for a bad model file, InvalidName
for a bad name. Everything async may be cancelled; see each docstring for what then is there.
"""
