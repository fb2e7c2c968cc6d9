"""A llama-server of the user's is looked at before anything is served."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio

from ollamad.engine import llama_server
from ollamad.engine.llama_server import NEEDED, Unusable, inspect
from ollamad.engine.runner import _default_batch, _parse, server_arguments


def program(tmp_path: Path, version: str, help_: str, *, code: int = 0) -> str:
    path = tmp_path / "llama-server"
    (tmp_path / "help").write_text(help_)
    path.write_text(
        "#!/bin/sh\n"
        f'if [ "$1" = --version ]; then echo "{version}" >&2; exit {code}; fi\n'
        f"cat {tmp_path / 'help'}\n"
    )
    path.chmod(0o755)
    return str(path)


def help_with(options: tuple[str, ...]) -> str:
    return "----- common params -----\n" + "\n".join(f"{option} N   words" for option in options)


async def test_a_good_one(tmp_path: Path):
    path = program(tmp_path, "version: 6123 (abcdef0)", help_with(NEEDED))
    assert (await inspect(path)).version == "6123 (abcdef0)"


@pytest.mark.parametrize("option", NEEDED)
async def test_each_feature_is_needed(tmp_path: Path, option: str):
    # An option that another one begins with is not there for that.
    rest = tuple(other for other in NEEDED if other != option)
    path = program(tmp_path, "version: 3000 (0)", help_with(rest) + f" {option}-and-more ")
    with pytest.raises(Unusable, match=r"\(version 3000 \(0\)\) does not know") as caught:
        await inspect(path)
    assert option in str(caught.value)
    assert "newer llama.cpp" in str(caught.value)


def test_it_is_given_no_option_that_was_not_looked_for():
    arguments = _parse(
        [
            *("--socket", "/x.sock", "--model", "m", "--embedding", "--pooling", "mean"),
            *("--chat-template", "t", "--adapter", "a", "--projector", "p", "--gpu-layers", "3"),
        ]
    )
    given = {word for word in server_arguments(arguments) if word.startswith("--")}
    # As old as llama.cpp's server.
    old = {"--host", "--model", "--ctx-size", "--threads", "--batch-size", "--log-verbosity"}
    assert given - old <= set(NEEDED)


async def test_what_is_no_llama_server(tmp_path: Path):
    cases = {
        "llama-server": "no absolute path",
        str(tmp_path / "missing"): "there is no file",
        str(tmp_path): "no program that may be run",
        program(tmp_path, "GNU coreutils", ""): "says 'GNU coreutils'",
        "/bin/false": "--version fails with 1",
    }
    for path, reason in cases.items():
        with pytest.raises(Unusable) as caught:
            await inspect(path)
        assert reason in str(caught.value)


async def test_one_that_is_hidden_from_the_service(monkeypatch: pytest.MonkeyPatch):
    """As systemd hides /home; by a fake, since root sees everything."""

    path, plain = "/home/eve/llama-server", os.stat

    def stat(asked: str | int | Path, **more: bool) -> os.stat_result:
        if asked == path:
            raise PermissionError(13, "Permission denied", path)
        return plain(asked, **more)

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(Unusable, match=r"hidden from this user.* put it below /opt"):
        await inspect(path)


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch):
    """As PyInstaller's loader leaves it."""
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setenv("LD_LIBRARY_PATH", "/usr/lib/ollamad/_internal:/opt/cuda")
    monkeypatch.setenv("LD_LIBRARY_PATH_ORIG", "/opt/cuda")


@pytest.mark.usefixtures("frozen")
async def test_it_does_not_get_the_libraries_of_the_frozen_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shown = "version: ${LD_LIBRARY_PATH-none} ${LD_LIBRARY_PATH_ORIG-none}"
    path = program(tmp_path, shown, help_with(NEEDED))
    assert (await inspect(path)).version == "/opt/cuda none"
    monkeypatch.delenv("LD_LIBRARY_PATH_ORIG")
    assert (await inspect(path)).version == "none none"
    # As a package of Python, it is the user's own path.
    monkeypatch.delattr(sys, "frozen")
    assert (await inspect(path)).version == "/usr/lib/ollamad/_internal:/opt/cuda none"


@pytest.mark.usefixtures("frozen")
def test_nor_do_its_runners(tmp_path: Path):
    path = tmp_path / "llama-server"
    path.write_text("#!/bin/sh\necho $1 $LD_LIBRARY_PATH\n")
    path.chmod(0o755)
    script = "import sys; sys.frozen = True; from ollamad.engine.runner import run_runner; "
    script += "sys.exit(run_runner(sys.argv[1:]))"
    with subprocess.Popen(
        [
            *(sys.executable, "-c", script),
            *("--engine", "llama-server", "--program", path, "--list-devices"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as runner:
        assert runner.stdout is not None
        assert runner.stdout.read() == "--list-devices /opt/cuda\n"


async def test_one_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(llama_server, "TIMEOUT_S", 0.2)
    path = tmp_path / "slow"
    path.write_text("#!/bin/sh\nexec sleep 60\n")
    path.chmod(0o755)
    with trio.fail_after(20), pytest.raises(Unusable, match=r"no answer in 0\.2 s"):
        await inspect(str(path))


async def test_one_that_may_not_be_run(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("#!/no/such/interpreter\n")
    with pytest.raises(Unusable, match="no program that may be run"):
        await inspect(str(path))
    path.chmod(0o755)
    with pytest.raises(Unusable, match="cannot be run"):
        await inspect(os.fspath(path))


def test_without_layers_on_the_gpu_both_engines_take_a_cpus_batch(monkeypatch: pytest.MonkeyPatch):
    kinds = SimpleNamespace(GGML_BACKEND_DEVICE_TYPE_CPU=0)
    library = SimpleNamespace(
        ggml_backend_dev_type=kinds, get_device_info=lambda: [{"type": 0}, {"type": 1}]
    )
    monkeypatch.setitem(sys.modules, "xllamacpp", library)
    for layers, batch in ((0, 64), (-1, 512), (3, 512)):
        line = server_arguments(_parse(["--gpu-layers", str(layers)]))
        assert line[line.index("--batch-size") + 1] == str(_default_batch(layers)) == str(batch)
