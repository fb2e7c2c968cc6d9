"""The child process that does the maths of one model: llama.cpp's server on a Unix socket.

Three engines speak that protocol: xllamacpp embeds the server, `llama-server` is a program built
elsewhere that this process turns into, and ctransformers gets the server of `legacy_runner`.

It knows nothing of the daemon but its standard input, a pipe that the daemon holds and never
writes to. When the daemon ends, in whatever way, the kernel closes the pipe and ends the runner
with it. The parent-death signal of Linux (PR_SET_PDEATHSIG) would be a trap here: it fires when
the *thread* that started the child ends, and trio starts processes in worker threads that end
after ten idle seconds.

Its start is part of every load, so it imports the standard library only, and xllamacpp inside
the function: the daemon never loads llama.cpp.
"""

import argparse
import contextlib
import fcntl
import os
import resource
import select
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

PROMPT_CACHE_MIB = 128  # kept of prompts whose slot another prompt took
OOM_SCORE_ADJUSTMENT = 500  # of 1000: under memory pressure a runner goes long before the daemon
# Tokens evaluated at once. On a CPU, prompts are not evaluated any faster by 512 than by 64
# (measured), but that long no stream gets a token and no cancellation is heard.
CPU_BATCH = 64
GPU_BATCH = 512  # llama.cpp's and Ollama's default
# llama.cpp's threads wait for each other by spinning before they sleep. With libgomp's default
# they spin out their time slice whenever another process holds a core: measured on 2 cores with
# one busy process beside, 3.6 tokens/s instead of 16, against no difference when alone.
SPIN_COUNT = 2000
LOG_VERBOSITY = 2  # llama.cpp's scale: errors and warnings
ENGINES = ("xllamacpp", "llama-server", "ctransformers")
CACHE_TYPES = ("f16", "q8_0", "q4_0")  # Ollama's choice
REFUSED = 3  # exit code of a check whose answer is no
F_SETSIG = 10  # missing in Python's fcntl module; Linux, all architectures


def run_runner(argv: Sequence[str]) -> int:
    """Serve one model until standard input closes; returns the exit code if the load fails.

    The engines print their reasons on standard error.
    """
    arguments = _parse(argv)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C is for the daemon, which ends this process
    # Both hold for whatever program this process becomes.
    _die_with_parent()
    _prefer_to_be_killed()
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))  # read when libgomp is loaded
    if arguments.list_devices:
        return _list_devices(arguments)
    if arguments.check:
        return _check(arguments)
    if arguments.engine == "llama-server":
        return _become(arguments.program, server_arguments(arguments))
    if arguments.engine == "ctransformers":
        from ollamad.engine.legacy_runner import serve

        return serve(arguments)
    return _serve_embedded(arguments)


def _become(program: str, arguments: Sequence[str]) -> int:
    """Turn into another program; returns only if that cannot be."""
    try:
        os.execve(program, [program, *arguments], outside_environment())
    except OSError as error:
        print(f"0.00.000.000 E {program} cannot be run: {error}", file=sys.stderr)
    return 1


def outside_environment() -> dict[str, str]:
    """The environment for a program that is not part of this one.

    PyInstaller's loader puts the folder of the frozen program first in LD_LIBRARY_PATH. The C++
    library there may be older than what a program that was built elsewhere needs.
    """
    variables = dict(os.environ)
    if getattr(sys, "frozen", False):
        variables.pop("LD_LIBRARY_PATH", None)
        before = variables.pop("LD_LIBRARY_PATH_ORIG", None)  # as the loader has kept it
        if before is not None:
            variables["LD_LIBRARY_PATH"] = before
    return variables


def server_arguments(arguments: argparse.Namespace) -> list[str]:
    """The command line of a `llama-server` that does the same as the embedded one."""
    batch = str(arguments.batch or (CPU_BATCH if arguments.gpu_layers == 0 else GPU_BATCH))
    line = ["--host", arguments.socket, "--model", arguments.model]
    line += ["--ctx-size", str(arguments.ctx * arguments.parallel)]
    line += ["--parallel", str(arguments.parallel)]
    line += ["--threads", str(arguments.threads), "--threads-batch", str(arguments.threads)]
    line += ["--batch-size", batch, "--ubatch-size", batch]
    line += ["--threads-http", str(_http_threads(arguments))]
    line += ["--cache-ram", str(PROMPT_CACHE_MIB), "--cache-type-k", arguments.cache_type]
    line += ["--cache-type-v", arguments.cache_type, "--context-shift", "--jinja", "--slots"]
    line += ["--metrics", "--no-warmup", "--offline", "--log-prefix", "--log-timestamps"]
    line += ["--log-verbosity", str(LOG_VERBOSITY)]
    if arguments.gpu_layers >= 0:
        line += ["--gpu-layers", str(arguments.gpu_layers)]
    if arguments.embedding:
        line += ["--embeddings", "--kv-unified"]
    if arguments.pooling:
        line += ["--pooling", arguments.pooling]
    if arguments.chat_template:
        line += ["--chat-template", arguments.chat_template]
    for path in arguments.adapter:
        line += ["--lora", path]
    if arguments.projector:
        line += ["--mmproj", arguments.projector]
    return line


def _serve_embedded(arguments: argparse.Namespace) -> int:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = arguments.model
    params.hostnames = [arguments.socket]
    params.n_ctx = arguments.ctx * arguments.parallel  # llama.cpp shares it among the slots
    params.n_parallel = arguments.parallel
    params.cpuparams.n_threads = arguments.threads
    params.cpuparams_batch.n_threads = arguments.threads
    params.n_batch = arguments.batch or _default_batch(arguments.gpu_layers)
    params.n_ubatch = params.n_batch
    params.n_gpu_layers = arguments.gpu_layers
    params.embedding = arguments.embedding
    # With a cache for each slot, llama.cpp cuts inputs of unequal lengths that share a batch, and
    # pools over the last cut alone: wrong vectors.
    params.kv_unified = arguments.embedding
    if arguments.pooling == "mean":
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    if arguments.chat_template:
        params.chat_template = arguments.chat_template
    params.lora_adapters = [
        xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in arguments.adapter
    ]
    if arguments.projector:
        params.mmproj.path = arguments.projector
    cache_type = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{arguments.cache_type.upper()}")
    params.cache_type_k = params.cache_type_v = cache_type
    params.ctx_shift = True  # a full context drops its older half after num_keep, as in Ollama
    params.cache_ram_mib = PROMPT_CACHE_MIB
    params.n_threads_http = _http_threads(arguments)
    params.ui = False
    params.endpoint_slots = True
    params.endpoint_metrics = True
    params.endpoint_props = False  # it would let a client change settings; reading works without
    params.warmup = False
    params.verbosity = LOG_VERBOSITY
    try:
        server = xllamacpp.Server(params)
    except RuntimeError:
        return 1  # llama.cpp has said why
    threading.Event().wait()
    del server
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ollamad runner", description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=ENGINES, default="xllamacpp")
    parser.add_argument("--program", default="", help="the llama-server to run")
    parser.add_argument("--legacy-type", default="gguf", help="what ctransformers calls the model")
    parser.add_argument(
        "--cache-type", choices=CACHE_TYPES, default="f16", help="of keys and values"
    )
    parser.add_argument("--list-devices", action="store_true", help="do nothing else")
    parser.add_argument("--check", action="store_true", help="see whether the file can be used")
    parser.add_argument("--socket", default="", help="Unix socket to listen on")
    parser.add_argument("--model", default="", help="the weights")
    parser.add_argument("--ctx", type=int, default=4096, help="tokens a slot")
    parser.add_argument("--parallel", type=int, default=1, help="slots")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=0, help="tokens evaluated at once; 0: auto")
    parser.add_argument("--gpu-layers", type=int, default=-1)
    parser.add_argument("--embedding", action="store_true", help="make embeddings, not text")
    parser.add_argument("--pooling", choices=["mean"], default=None)
    parser.add_argument("--chat-template", default="", help="Jinja, instead of the file's own")
    parser.add_argument("--adapter", action="append", default=[], help="LoRA; may be repeated")
    parser.add_argument("--projector", default="", help="GGUF that turns images into tokens")
    return parser.parse_args(argv)


def _list_devices(arguments: argparse.Namespace) -> int:
    """Print the devices that the engine can compute on, one a line."""
    if arguments.engine == "llama-server":
        return _become(arguments.program, ["--list-devices"])
    if arguments.engine == "xllamacpp":
        import xllamacpp

        for device in xllamacpp.get_device_info():
            print(f"{device['name']}: {device['description']}")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    """Have llama.cpp read all of a file but its weights; REFUSED if it says no."""
    # Without memory for weights a file that is right leads to an assertion after it was read: that
    # is the good end. Nobody needs its backtrace or a core file.
    os.environ["GGML_NO_BACKTRACE"] = "1"
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = arguments.model
    params.no_alloc = True
    params.fit_params = False
    params.n_gpu_layers = 0
    params.warmup = False
    params.n_ctx = params.n_batch = params.n_ubatch = CPU_BATCH
    params.verbosity = LOG_VERBOSITY
    params.hostnames = [arguments.socket]  # which is bound before the model is read
    try:
        xllamacpp.Server(params)
    except RuntimeError:
        return REFUSED  # llama.cpp has said why
    os._exit(0)


def _http_threads(arguments: argparse.Namespace) -> int:
    """A stream and a question beside it for every slot, and the daemon's idle connections.

    When the HTTP threads run out, a request waits for a connection to time out.
    """
    return 2 * int(arguments.parallel) + 4


def _default_batch(gpu_layers: int) -> int:
    if gpu_layers == 0:
        return CPU_BATCH
    import xllamacpp

    cpu = xllamacpp.ggml_backend_dev_type.GGML_BACKEND_DEVICE_TYPE_CPU
    has_gpu = any(device["type"] != cpu for device in xllamacpp.get_device_info())
    return GPU_BATCH if has_gpu else CPU_BATCH


def _die_with_parent() -> None:
    """Have the kernel kill this process when the other end of standard input closes.

    A thread that reads would come too late: the constructor of the server holds the GIL until
    the model is loaded, which can take minutes.
    """
    stdin = sys.stdin.fileno()
    fcntl.fcntl(stdin, F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(stdin, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(stdin, fcntl.F_SETFL, fcntl.fcntl(stdin, fcntl.F_GETFL) | os.O_ASYNC)
    # The daemon may have died before the line above.
    poll = select.poll()
    poll.register(stdin, select.POLLHUP)
    if poll.poll(0):
        os._exit(0)


def _prefer_to_be_killed() -> None:
    with contextlib.suppress(OSError):  # not on Linux, or not permitted: a wish, not a need
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE_ADJUSTMENT))


if __name__ == "__main__":
    sys.exit(run_runner(sys.argv[1:]))
