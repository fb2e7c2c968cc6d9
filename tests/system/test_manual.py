"""The document's "Manual testing": its curl commands, as they are printed, against `ollamad start
--dev`, and its WebSocket by a client library, with the addresses as they are printed."""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect

from tests.fakes.document import DOCUMENT, differences, read_examples, read_socket_examples
from tests.system.conftest import open_cluster
from tests.system.harness import Node, wait_until

TEXT = DOCUMENT.read_text()
PRINTED = "localhost:8080"
EXAMPLES = read_examples()
OF_CLIENT, OF_SERVER = read_socket_examples()

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")


def commands() -> dict[str, str]:
    """Each command of the section by the comment above it."""
    [block] = re.findall(r"### Manual Testing\n.*?```bash\n(.*?)```", TEXT, flags=re.DOTALL)
    found = {}
    for part in block.strip().split("\n\n"):
        comment, _, command = part.partition("\n")
        found[comment.removeprefix("# ")] = command
    return found


# The answer that each of them has in the document.
ANSWERS = {
    "Health check": "GET /health",
    "Get cluster status": "GET /cluster/status",
    "Download a model": "POST /models/:name/download",
    "Enable auto-distribution": "POST /distribution/auto-configure",
}


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """`ollamad start --dev`, which cannot reach any registry."""
    settings = {"OLLAMAD_SOURCES__REGISTRY": "http://127.0.0.1:9", "OLLAMA_MAX_QUEUE": "8"}
    for cluster in open_cluster(tmp_path_factory, **settings):
        node = cluster.new_node()
        node.start("--dev")
        yield node


def curl(node: Node, command: str) -> Any:
    """Run a printed command in a shell, at the port that the node has here; its JSON."""
    assert PRINTED in command
    shown = command.replace(PRINTED, f"localhost:{node.api_port}")
    done = subprocess.run(
        ["sh", "-c", shown], capture_output=True, text=True, timeout=60, check=True, cwd="/"
    )
    return json.loads(done.stdout)


def test_the_section_was_read() -> None:
    assert commands().keys() == ANSWERS.keys()
    for command in commands().values():
        assert shlex.split(command, comments=True)[0] == "curl"


@needs_curl
@pytest.mark.parametrize("comment", list(ANSWERS))
def test_the_curl_commands_work_as_printed(dev: Node, comment: str) -> None:
    answer = curl(dev, commands()[comment])
    assert differences(EXAMPLES[ANSWERS[comment]]["Response"], answer) == []
    if comment == "Download a model":
        assert answer["model"] == "llama2:latest"
        transfer = dev.get(f"/transfers/{answer['transfer_id']}")["transfer"]
        assert transfer["model_name"] == "llama2:latest"
    if comment == "Enable auto-distribution":
        assert dev.get("/distribution") == {"enabled": True}


@needs_curl
def test_signing_in_as_the_document_has_it(dev: Node) -> None:
    """Its three routes, and its headers."""
    routes = re.findall(r"^- `POST (/api/v1/auth/\w+)`", TEXT, flags=re.MULTILINE)
    login, refresh, logout = (f"http://{PRINTED}{route}" for route in routes)
    [headers] = re.findall(
        r"## Authentication\n.*?\*\*Headers:\*\*\n```\n(.*?)```", TEXT, re.DOTALL
    )
    authorization, content_type = headers.strip().splitlines()
    password = (dev.data_dir / "admin-password").read_text().strip()

    def post(url: str, body: dict[str, str], token: str = "") -> Any:
        shown = authorization.replace("<JWT_TOKEN>", token)
        with_token = f"-H '{shown}'" if token else ""
        return curl(dev, f"curl -H '{content_type}' {with_token} -d '{json.dumps(body)}' {url}")

    first = post(login, {"username": "admin", "password": password})
    assert first["user"]["role"] == "admin"
    second = post(refresh, {"refresh_token": first["refresh_token"]})
    assert post(logout, {}, second["token"])["message"]
    dead = post(logout, {}, second["token"])
    assert (dead["code"], set(dead)) == ("UNAUTHORIZED", {"error", "code", "details"})


def printed_sockets() -> list[str]:
    return re.findall(r"^ws://\S+$", TEXT, flags=re.MULTILINE)


def opened(node: Node, url: str, **headers: str) -> ClientConnection:
    shown = url.replace(PRINTED, f"localhost:{node.api_port}")
    return connect(shown, additional_headers=headers, proxy=None)


def test_the_websocket_opens_as_printed(dev: Node) -> None:
    bare, with_query = printed_sockets()
    assert with_query == f"{bare}?token=<JWT_TOKEN>"
    token = dev.admin_token()
    ways: list[tuple[str, dict[str, str]]] = [
        (bare, {}),  # `--dev` asks programs of this host for nothing
        (with_query.replace("<JWT_TOKEN>", token), {}),
        (bare, {"Authorization": f"Bearer {token}"}),
    ]
    for url, headers in ways:
        with opened(dev, url, **headers) as socket:
            status, metrics = json.loads(socket.recv(10)), json.loads(socket.recv(10))
            assert differences(OF_SERVER["Cluster Status"], status) == []
            assert differences(OF_SERVER["Real-time Metrics"], metrics) == []
            socket.send(json.dumps(OF_CLIENT["Ping"]))
            assert json.loads(socket.recv(10)) == OF_SERVER["Pong"]
            socket.send(json.dumps(OF_CLIENT["Subscribe to Channel"]))
            assert json.loads(socket.recv(10)) == OF_SERVER["Subscription Acknowledgment"]
            pushed = wait_until("metrics come", lambda s=socket: json.loads(s.recv(10)))
            assert differences(OF_SERVER["Real-time Metrics"], pushed) == []
            socket.send(json.dumps(OF_CLIENT["Unsubscribe from Channel"]))
            while (ack := json.loads(socket.recv(10)))["type"] == "metrics":
                pass
            assert ack["status"] == "unsubscribed"
    with pytest.raises(InvalidStatus) as refused:
        opened(dev, with_query)  # with the placeholder for a token
    assert refused.value.response.status_code == 401
