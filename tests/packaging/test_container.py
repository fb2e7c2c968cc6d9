"""The recipe of the container image: no engine runs here, so it is read and its parts are tried."""

import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from ollamad.settings import Settings, load, parse_listen
from tests.packaging.containerfile import Stage, Wrong, health_command, read
from tests.packaging.machines import ROOT

RECIPE = ROOT / "packaging/Containerfile"


@pytest.fixture(scope="module")
def stages() -> list[Stage]:
    return read(RECIPE, ROOT)


def test_it_is_built_from_source_and_holds_the_result_only(stages: list[Stage]) -> None:
    build, final = stages
    assert any(one.rest == "make binary" for one in build.instructions)
    copies = [one for one in final.instructions if one.name == "COPY"]
    assert copies
    assert all(one.flags["from"] == build.name for one in copies)


def test_it_does_not_run_as_root(stages: list[Stage]) -> None:
    assert stages[-1].last("USER").rest == "ollamad"
    order = [one.name for one in stages[-1].instructions]
    assert order.index("USER") > max(n for n, name in enumerate(order) if name == "RUN")


def test_its_state_is_a_volume_that_every_command_uses(stages: list[Stage]) -> None:
    """Also `start --join ...`, which takes the place of CMD."""
    final = stages[-1]
    (volume,) = final.last("VOLUME").words
    variables = dict(word.split("=", 1) for word in final.last("ENV").words)
    assert load(None, variables, {}).settings.data_dir == volume
    assert final.last("CMD").words == ["start"]
    assert final.last("ENTRYPOINT").words == ["ollamad"]


def test_it_names_the_ports_that_the_daemon_listens_on(stages: list[Stage]) -> None:
    settings = Settings()
    ports = {
        str(parse_listen(listen)[1])
        for listen in (settings.api.listen, settings.p2p.listen, settings.raft.listen)
    }
    assert set(stages[-1].last("EXPOSE").words) == ports


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_its_health_is_the_nodes(stages: list[Stage], status: int, healthy: bool) -> None:
    command = health_command(stages[-1].last("HEALTHCHECK"))
    asked = []

    class Node(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers["Host"]))
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Node) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        listen = f"0.0.0.0:{server.server_port}"
        done = subprocess.run(command, env={"API_LISTEN": listen}, check=False, timeout=20)
        thread.join()
    assert (done.returncode == 0) == healthy
    assert asked == [("/api/v1/health", "localhost")]


def test_it_is_not_healthy_while_nobody_listens(stages: list[Stage]) -> None:
    command = health_command(stages[-1].last("HEALTHCHECK"))
    done = subprocess.run(
        command, env={"API_LISTEN": "127.0.0.1:1"}, check=False, capture_output=True, timeout=20
    )
    assert done.returncode != 0


@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        ("RUN true", "line 1: RUN before FROM"),
        ("FROM x\nRUNN true", "line 2: there is no instruction 'RUNN'"),
        ("FROM x\nRUN if true; then", "line 2: "),
        ('FROM x\nCMD ["a", b]', "line 2: "),
        ("FROM x\nCMD []", "line 2: not a list of strings"),
        ("FROM x\nCOPY --from=build a b", "line 2: there is no stage 'build'"),
        ("FROM x\nCOPY no-such-file b", "line 2: there is no no-such-file"),
        ("FROM x\nCOPY --fron=y a b", "line 2: COPY has no --fron"),
        ("FROM x\nEXPOSE http", "line 2: EXPOSE PORT"),
        ("FROM x\nHEALTHCHECK --interval=soon CMD true", "line 2: --interval=soon is no time"),
        ("FROM ${BASE}", "line 1: $BASE is no ARG"),
        ("FROM x AS", "line 1: FROM IMAGE"),
        ("FROM x\n# a comment\nRUN true \\\n", "line 3: the file ends in a continued line"),
        ("FROM x\nUSER", "line 2: USER of nothing"),
        ("# nothing", "no FROM"),
    ],
)
def test_mistakes_are_found(tmp_path: Path, mistake: str, told: str) -> None:
    path = tmp_path / "Containerfile"
    path.write_text(mistake)
    with pytest.raises(Wrong, match=told.replace("$", r"\$")):
        read(path, tmp_path)
