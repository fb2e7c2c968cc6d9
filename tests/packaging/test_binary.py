"""The program in one file, on a Debian with nothing else on it (`make binary`, then this)."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.ggml_files import ggml_bytes
from tests.fakes.llama_program import llama_server
from tests.fakes.tiny_llama import ids_of, parrot
from tests.packaging.machines import ROOT, inside, run

MAX_SIZE = 150_000_000  # bytes
HELP_LIMIT_S = 0.3
READY_LIMIT_S = 2.0
TRIES = 5  # of which the best counts
NEWER, OLDER = "asked", "worked"  # what tiny models say, of the present format and of an old one

START = "ollamad start >/log 2>&1 & daemon=$!"
FORGET = "rm -rf /var/cache/ollamad-root"  # the next start is the first
UNTIL_READY = (
    "until ollama-dist status >/status 2>&1; do kill -0 $daemon || break; sleep 0.05; done"
)


def test_it_is_no_larger_than_it_may_be(binary: Path) -> None:
    assert binary.stat().st_size <= MAX_SIZE


def test_it_runs_where_no_python_is(bare: Path) -> None:
    assert not list(bare.glob("usr/bin/python3*"))
    told = inside(bare, f"{FORGET}; ollamad version").stdout
    assert re.search(r"^ollamad [\d.]+ \(commit [0-9a-f]{12}, built \d{4}-\d\d-\d\dT", told), told
    for engine in ("xllamacpp", "ctransformers"):
        assert engine in told
    assert "Commands" in inside(bare, "ollama-dist --help").stdout
    (unpacked,) = (bare / "var/cache/ollamad-root").iterdir()
    assert unpacked.stat().st_mode & 0o077 == 0


def test_a_model_answers_in_a_runner_of_its_own(bare: Path, smollm2_path: Path) -> None:
    shutil.copy(smollm2_path, bare / "model.gguf")
    done = inside(
        bare,
        f"""
        {START}
        {UNTIL_READY}
        ollama-dist models import /model.gguf --name smollm2 >&2
        ollama-dist generate smollm2 "The capital of France is" --raw --option num_predict=8 \\
            --option temperature=0
        for process in /proc/[0-9]*; do tr '\\0' ' ' < $process/cmdline; echo; done > /processes
        begun=$(date +%s%N)
        kill -INT $daemon
        wait $daemon
        echo "ended with $? after $((($(date +%s%N) - begun) / 1000000)) ms"
        """,
    )
    log = (bare / "log").read_text()
    assert "Paris" in done.stdout, done.stdout + done.stderr + log
    # A runner is the program itself, from where it was unpacked.
    assert re.search(
        r"^/var/cache/ollamad-root/\w+/ollamad runner ", (bare / "processes").read_text(), re.M
    )
    found = re.search(r"ended with (\d+) after (\d+) ms", done.stdout)
    assert found is not None
    assert found[1] == "0", log
    assert int(found[2]) < 10_000
    assert "Traceback" not in log


@pytest.fixture(scope="module")
def asked(bare: Path) -> Path:
    """What a daemon with a llama-server of the user's answered, one file for each question.

    The models are tiny: behind an `x` they say a word. A script stands before the real llama-server
    and notes where it is told to look for libraries; OpenMP, which this Debian lacks, it brings.
    """
    found = bare / "asked"
    found.mkdir()
    (bare / "newer").write_bytes(parrot(ids_of(NEWER)).gguf())
    (bare / "older").write_bytes(ggml_bytes("gpt2", OLDER.encode()))
    program = bare / "opt/llama-server"
    program.write_text(
        "#!/bin/sh\n"
        'echo "${LD_LIBRARY_PATH-none}" >>/asked/libraries\n'
        'LD_LIBRARY_PATH=/opt/openmp exec /opt/llama/llama-server "$@"\n'
    )
    program.chmod(0o755)
    done = inside(
        bare,
        f"""
        ollamad version
        mkdir /opt/openmp
        cp /var/cache/ollamad-root/*/_internal/libgomp.so.1 /opt/openmp
        export OLLAMAD_ENGINE__LLAMA_SERVER=/opt/llama-server
        {START}
        {UNTIL_READY}
        get() {{
            bash -c 'exec 3<>/dev/tcp/127.0.0.1/8080
                printf "GET $0 HTTP/1.0\\r\\nHost: localhost\\r\\n\\r\\n" >&3; cat <&3' "$1"
        }}
        get / > /asked/root
        get /api/v1/version > /asked/version
        for name in newer older; do
            ollama-dist models import /$name --name $name >&2
            ollama-dist generate $name x --raw --option temperature=0 > /asked/$name
        done
        cat /proc/[0-9]*/cmdline | tr '\\0' ' ' > /asked/processes
        kill $daemon
        wait $daemon
        """,
        f"--bind-ro={llama_server().parent}:/opt/llama",
    )
    assert (found / "processes").exists(), done.stdout + done.stderr + (bare / "log").read_text()
    print(done.stderr, (bare / "log").read_text())  # shown where a test fails
    return found


def test_over_http_it_says_what_it_is(asked: Path) -> None:
    head, _, body = (asked / "root").read_text().partition("\n\n")
    assert " 200 " in head.splitlines()[0]
    assert body == "Ollama is running"
    version = json.loads((asked / "version").read_text().partition("\n\n")[2])
    assert re.fullmatch(r"[0-9a-f]{12}", version["git_commit"])
    assert re.match(r"\d{4}-\d\d-\d\dT", version["build_time"])
    assert version["engine_versions"].keys() == {"xllamacpp", "ctransformers", "llama-server"}


def test_a_llama_server_of_the_users_runs_without_the_programs_own_libraries(asked: Path) -> None:
    assert (asked / "newer").read_text().strip() == NEWER
    assert "/opt/llama/llama-server --host" in (asked / "processes").read_text()
    assert set((asked / "libraries").read_text().split()) == {"none"}


def test_an_old_file_runs_in_the_other_engine(asked: Path) -> None:
    assert (asked / "older").read_text().strip() == OLDER
    assert re.search(r"/ollamad runner .*--engine ctransformers", (asked / "processes").read_text())


def test_later_starts_are_quick(bare: Path) -> None:
    """By the processor's time, which is all of it on a machine that has nothing else to do."""
    done = inside(
        bare,
        f"""
        ollama-dist --help >/dev/null
        for number in $(seq {TRIES}); do
            sh -c 'ollama-dist --help >/dev/null; times' | sed -n '2s/^/help /p'
        done
        for number in $(seq {TRIES}); do
            rm -f /log
            begun=$(date +%s%N)
            {START}
            until grep -q "is ready" /log 2>/dev/null; do kill -0 $daemon || break; sleep 0.02; done
            echo "ready within $(($(date +%s%N) - begun))"
            echo "ready $(cut -d ' ' -f 14,15 /proc/$daemon/stat)"
            kill $daemon
            wait $daemon
        done
        """,
    )
    told = done.stdout + done.stderr
    helped = [
        60 * (int(m) + int(n)) + float(s) + float(t)
        for m, s, n, t in re.findall(r"^help (\d+)m([\d.]+)s (\d+)m([\d.]+)s$", told, re.M)
    ]
    ready = [
        (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
        for user, system in re.findall(r"^ready (\d+) (\d+)$", told, re.M)
    ]
    within = [int(ns) / 1e9 for ns in re.findall(r"^ready within (\d+)$", told, re.M)]
    assert len(helped) == len(ready) == TRIES, told
    print(f"help {min(helped):.2f} s, ready {min(ready):.2f} s; here and now {min(within):.2f} s")
    assert min(helped) <= HELP_LIMIT_S, helped
    assert min(ready) <= READY_LIMIT_S, ready


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("ollamad", "Usage: ollamad"),
        ("ollamad begin", "No such command 'begin'"),
        ("ollamad start --join nonsense", "token"),
        ("OLLAMAD_LOG__LEVEL=loud ollamad start", "OLLAMAD_LOG__LEVEL"),
        ("ollama-dist status", "ollamad"),  # nobody listens
        ("env -u HOME setpriv --reuid 65534 ollamad version", "set HOME or OLLAMAD_UNPACK_DIR"),
        ("OLLAMAD_UNPACK_DIR=/proc/x ollamad version", "set OLLAMAD_UNPACK_DIR"),
    ],
)
def test_what_is_wrong_is_told_in_one_place(bare: Path, given: str, told: str) -> None:
    done = inside(bare, given)
    assert done.returncode != 0
    assert told in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_disk_leaves_nothing_half_unpacked(bare: Path) -> None:
    done = inside(
        bare,
        "OLLAMAD_UNPACK_DIR=/small ollamad version; echo $?; ls -A /small | wc -l",
        "--tmpfs=/small:size=20m",
    )
    assert done.stdout.split() == ["1", "0"]
    assert re.search(r"free \d+ MB there, or set OLLAMAD_UNPACK_DIR", done.stderr)


def test_a_damaged_copy_is_never_unpacked(bare: Path) -> None:
    done = inside(
        bare,
        """
        program=$(command -v ollamad)
        cp "$program" /damaged
        middle=$(($(stat -c %s /damaged) / 2))
        printf 0123456789 | dd of=/damaged bs=1 seek=$middle conv=notrunc 2>/dev/null
        head -c 1000000 "$program" > /cut
        chmod +x /cut
        export OLLAMAD_UNPACK_DIR=/unpacked-here
        for copy in /damaged /cut; do "$copy" version; echo $?; done
        ls -A /unpacked-here 2>/dev/null | wc -l
        """,
    )
    assert done.stdout.split() == ["1", "1", "0"]
    assert done.stderr.count("is damaged or cut off; copy it again") == 2


def test_it_says_when_it_must_not_run_where_it_is_unpacked(bare: Path) -> None:
    done = inside(bare, "OLLAMAD_UNPACK_DIR=/data ollamad version", "--tmpfs=/data:noexec")
    assert done.returncode == 1
    assert "noexec" in done.stderr


def test_nothing_is_started_that_somebody_else_may_have_put_there(bare: Path) -> None:
    done = inside(
        bare,
        """
        mkdir -m 777 /shared
        setpriv --reuid 65534 env OLLAMAD_UNPACK_DIR=/shared/cache ollamad version >/dev/null
        OLLAMAD_UNPACK_DIR=/shared/cache ollamad version
        """,
    )
    assert done.returncode == 1
    assert "belongs to somebody else" in done.stderr


def test_two_first_starts_at_once_end_with_one_copy(bare: Path) -> None:
    done = inside(bare, f"{FORGET}; ollamad version & ollama-dist --help & wait")
    assert "ollamad 0" in done.stdout
    assert "Commands" in done.stdout
    assert not done.stderr.count("cannot unpack")
    assert len(list((bare / "var/cache/ollamad-root").iterdir())) == 1


def test_what_a_killed_start_has_left_is_cleared_away(bare: Path) -> None:
    inside(bare, FORGET)
    left = bare / "var/cache/ollamad-root/unpacking-abcdef"
    left.mkdir(parents=True)
    fresh = left.with_name("unpacking-ghijkl")
    fresh.mkdir()
    run("touch", "--date=2 hours ago", left)
    assert inside(bare, "ollamad version").returncode == 0
    assert not left.exists()
    assert fresh.exists(), "somebody may be unpacking there now"


@pytest.fixture(scope="module")
def parts(binary: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(binary.with_name("ollamad.cdx.json").read_text())
    return found


def test_the_list_of_parts_has_each_with_its_version_and_licence(parts: dict[str, Any]) -> None:
    assert parts["bomFormat"] == "CycloneDX"
    components = parts["components"]
    components += [inner for part in components for inner in part.get("components", ())]
    for part in components:
        assert part["version"], part["name"]
        assert part["licenses"], part["name"]
    names = {part["name"] for part in components}
    for name in (
        *("trio", "Hypercorn", "pysyncobj", "xllamacpp", "ctransformers", "llama.cpp"),
        *("CPython", "PyInstaller bootloader", "libssl3", "libgomp1"),
    ):
        assert name in names
    for tool in ("pip", "pyinstaller", "setuptools", "pytest", "mypy"):
        assert tool not in names, "it is not inside"


def test_the_list_of_parts_has_the_licences_texts(parts: dict[str, Any]) -> None:
    """An MIT licence, for one, is to be passed on with every copy."""
    components = parts["components"]
    components += [inner for part in components for inner in part.get("components", ())]
    without = {
        part["name"]
        for part in components
        if not any(
            choice.get("license", {}).get("text")
            for choice in (*part["licenses"], *part.get("evidence", {}).get("licenses", ()))
        )
    }
    assert without <= {"nvidia-ml-py"}, "its wheel has none"


def test_the_list_of_parts_misses_no_library(bare: Path, parts: dict[str, Any]) -> None:
    inside(bare, f"{FORGET}; ollamad version")
    (unpacked,) = (bare / "var/cache/ollamad-root").iterdir()
    listed = {part["name"] for part in parts["components"]}
    for library in unpacked.glob("_internal/lib*.so*"):
        if library.name.startswith("libpython"):
            continue
        owner = run("dpkg-query", "--search", f"*/{library.name}").splitlines()[-1]
        assert owner.split(":")[0] in listed, library


def test_the_recipe_is_pinned() -> None:
    """What a build takes from elsewhere has a version, or it is another program each day."""
    recipe = (ROOT / "packaging/binary.py").read_text()
    for tool in ("pyinstaller", "pyinstaller-hooks-contrib", "cyclonedx-bom"):
        assert re.search(rf'"{tool}==\d', recipe)
    assert subprocess.run(["sh", "-n", ROOT / "packaging/unpack.sh"], check=False).returncode == 0
