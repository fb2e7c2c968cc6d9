"""ollama-dist: the command line of Ollama Distributed. It knows the daemon's REST API only.

    main.py         the root command, its global options, which command is where
    session.py      one call's settings; errors become exit codes here
    client.py       the REST client: signing in, refreshing, streams, uploads
    credentials.py  sign-ins on disk, and the daemon's own token on the same host
    address.py      what `--host` may look like
    errors.py       what can go wrong, with its exit code
    text.py         sizes, times and untrusted text, for people
    show.py         tables, JSON, YAML
    progress.py     live progress of transfers and files
    markdown.py     an answer that appears while it is written
    completion.py   model and node names for the shell
    commands/       one module for each group of commands

httpx and rich are imported inside functions: `--help` and completion must be quick.
"""
