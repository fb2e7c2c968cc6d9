"""The engine: runs the models of one node, each in a child process of its own.

Use (this package itself imports nothing, for the runner's quick start):

    from ollamad.engine.engine import Engine
    from ollamad.engine.spec import EngineSettings, ModelSpec

    settings = EngineSettings(runtime_dir=data_dir / "run")
    engine = Engine(settings, free_memory)        # free_memory() -> bytes
    await nursery.start(engine.run)               # owns the runners; cancel it to end them

    async with engine.generate(spec, request) as events:   # ModelSpec, core.GenerateRequest
        async for event in events:                # core.Chunk…, then Finished or Failed
            ...                                   # leaving the block early cancels

    await engine.embed(spec, embed_request)       # -> core.Embeddings; InferenceError
    await engine.load(spec, options, keep_alive_s)  # InferenceError
    await engine.unload(name)                     # -> bool; after the last running answer
    engine.loaded()                               # -> tuple[core.LoadedModel, ...]
    engine.estimate(spec, options)                # -> bytes

The program that embeds it must have a subcommand that calls `runner.run_runner(arguments)`;
`EngineSettings.runner_command` says how to start it. That child must not import more than it
needs: its start is part of every load.

Inside: `pool` (which models are in memory) holds `process` (one runner), which is spoken to by
`llama_client` (llama-server's protocol). `engine` joins `prompt` (messages to token ids),
`sampling` (options to llama.cpp's) and `assembly` (events to chunks). `spec` holds the values.

Failure codes: RUNNER_DIED, LOAD_FAILED and ENGINE_ERROR (500; while a model is not started again,
503 with `retry_after`); INSUFFICIENT_MEMORY, QUEUE_FULL and STOPPED (503); PROMPT_TOO_LONG,
INVALID_OPTION, INVALID_FORMAT, INVALID_REQUEST and EMPTY_INPUT (400).
"""
