"""Where models come from. Knows the network outside and nothing of the store or the cluster.

    from ollamad.sources.references import resolve_source
    from ollamad.sources.origins import Origins

    wanted = resolve_source("hf.co/user/repo:Q4_K_M")   # a name, a URL, pypi:NAME, ...
    async with Origins(settings).open(wanted.reference) as source:
        offer = await source.resolve()                   # a manifest, files, or a package
        file = source.blob(digest, size)                 # of a manifest
        await source.download(file, target, progress)    # only pieces that the target lacks
        await source.unpack(path, store.ingest)          # of a package

Everything that goes wrong is a SourceError that says what to do, except what sink and target
raise. What may be asked at all is in `policy.py`, and held where connections are made.
"""
