"""Runs each target with atheris (libFuzzer), one process after the other, for some seconds.

    python -m tests.fuzz [--seconds N] [--corpus DIR] [TARGET ...]

Exits with 1 if one of them found something; the input stands in the output, to be made a test of.
Inputs that reached new code are kept in DIR, to go on from.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

MAX_INPUT = 1024  # bytes; what is longer is only more of the same
UNIT_TIMEOUT_S = 5  # for one input
RSS_LIMIT_MIB = 1024


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--corpus", type=Path, help="keep inputs here, and go on from them")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("targets", nargs="*")
    options, _ = parser.parse_known_args()
    if options.inside:
        return _fuzz(options.targets[0])
    try:
        import atheris  # noqa: F401
    except ImportError:
        print("atheris is not installed (pip install atheris; CPython up to 3.13)")
        return 1
    from tests.fuzz.targets import SEEDS, TARGETS

    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.targets or TARGETS:
            corpus = (options.corpus or Path(scratch)) / name
            corpus.mkdir(parents=True, exist_ok=True)
            for number, seed in enumerate(SEEDS[name]):
                (corpus / f"seed-{number}").write_bytes(seed)
            print(f"== {name}", flush=True)
            command = [sys.executable, "-m", "tests.fuzz", "--inside", name]
            command += [f"-max_total_time={options.seconds}", f"-max_len={MAX_INPUT}"]
            command += [f"-timeout={UNIT_TIMEOUT_S}", f"-rss_limit_mb={RSS_LIMIT_MIB}"]
            command += ["-print_final_stats=1", "-verbosity=0", f"-artifact_prefix={scratch}/"]
            if subprocess.run([*command, str(corpus)], check=False).returncode:
                failed.append(name)
    print(f"found something in: {', '.join(failed)}" if failed else "nothing was found")
    return 1 if failed else 0


def _fuzz(name: str) -> int:
    import atheris

    with atheris.instrument_imports(include=["ollamad", "tests.fuzz"]):
        from tests.fuzz.targets import TARGETS
    arguments = [sys.argv[0], *(a for a in sys.argv[1:] if a not in ("--inside", name))]
    atheris.Setup(arguments, TARGETS[name])
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
