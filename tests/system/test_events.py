"""What the WebSockets of a real cluster tell: of every node, at every node."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from tests.fakes.document import differences, read_socket_examples
from tests.system.harness import Cluster, clean_environment, ok, refused, run_cli, wait_until
from tests.system.sockets import Listener

MODEL = "smollm2:135m"
OF_CLIENT, OF_SERVER = read_socket_examples()


def test_the_tour_of_a_model_is_told_at_every_node_as_the_document_has_it(
    trio_of_nodes: Cluster, smollm2_path: Path
) -> None:
    first, second, third = trio_of_nodes.nodes
    with Listener(third, "metrics", "models", "nodes", "cluster", "transfers") as heard:
        first.import_model(smollm2_path, MODEL)
        copies = wait_until(
            "both copies are told of",
            lambda: (told := heard.all("model_event", event_type="model_replicated"))[1:] and told,
            60,
        )
        assert copies[0]["data"]["node_id"] == first.id
        receiver = copies[1]["data"]["node_id"]
        for kind in ("download_started", "download_completed"):
            event = heard.wait("model_event", event_type=kind, model_name=MODEL)
            assert event["data"]["node_id"] == receiver
        assert ok(second.answer("/generate", model=MODEL, prompt="hi", options={"num_predict": 1}))
        loaded = heard.wait("model_event", event_type="model_loaded", model_name=MODEL)
        assert loaded["data"]["node_id"] in {node.id for node in (first, second, third)}
        first.delete(f"/models/{MODEL}")
        heard.wait("model_event", event_type="model_unloaded", model_name=MODEL)
        heard.wait("model_event", event_type="model_deleted", model_name=MODEL)
        first.post(f"/nodes/{second.id}/drain")
        heard.wait("node_event", event_type="node_draining", node_id=second.id)
        first.post(f"/nodes/{second.id}/undrain")
        heard.wait("node_event", event_type="node_undrained", node_id=second.id)
        heard.wait("metrics")
        heard.socket.send(json.dumps(OF_CLIENT["Ping"]))
        heard.wait("pong")
        for heading, example in OF_SERVER.items():
            if heading == "Alerts":
                continue  # see below
            messages = heard.all(example["type"])
            assert messages, heading
            assert [d for m in messages for d in differences(example, m)] == []
        keys = [(m["event_type"], m["data"]["node_id"]) for m in heard.all("model_event")]
        without_progress = [key for key in keys if key[0] != "download_progress"]
        assert len(without_progress) == len(set(without_progress)), "told twice"


def test_a_node_that_dies_is_told_of_raised_once_and_cleared_once(trio_of_nodes: Cluster) -> None:
    cluster = trio_of_nodes
    leader = cluster.leader()
    follower, watched = cluster.followers()
    with Listener(watched, "nodes", "cluster", "alerts") as heard:
        leader.kill()
        heard.wait("node_event", event_type="node_offline", node_id=leader.id)
        changed = heard.wait("node_event", event_type="leader_changed")
        alert = heard.wait("alert", alert="node_offline", subject=leader.id, state="raised")
        assert differences(OF_SERVER["Alerts"], alert) == []
        assert leader.name in alert["message"]
        assert heard.wait("cluster_status")["data"]["status"] in ("healthy", "degraded")
        with Listener(follower, "alerts") as late:  # it still stands
            late.wait("alert", alert="node_offline", subject=leader.id, state="raised")
        follower.kill()
        quorum = heard.wait("alert", alert="no_quorum", state="raised")
        assert quorum["level"] == "critical"
        cluster.revive()
        heard.wait("node_event", event_type="node_online", node_id=leader.id)
        for kind, subject in (("node_offline", leader.id), ("node_offline", follower.id)):
            heard.wait("alert", alert=kind, subject=subject, state="cleared")
        heard.wait("alert", alert="no_quorum", state="cleared")
        told = [(m["alert"], m["subject"], m["state"]) for m in heard.all("alert")]
        assert len(told) == len(set(told)), f"told twice: {told}"
        assert changed["node_id"] != leader.id


def test_a_download_that_fails_is_told_of_with_its_reason(trio_of_nodes: Cluster) -> None:
    first, second, _ = trio_of_nodes.nodes
    with Listener(second, "models", "transfers") as heard:
        first.post("/models/nowhere/download", {"source": "http://10.0.0.1/x.gguf"})
        event = heard.wait("model_event", event_type="download_failed", model_name="nowhere:latest")
    assert event["data"]["status"] == "failed"
    assert "sources.allow_http: 10.0.0.1" in event["data"]["error"]


def test_who_may_open_one(trio_of_nodes: Cluster) -> None:
    node = trio_of_nodes.nodes[0]
    for token, status in (("nonsense", 401),):
        with pytest.raises(InvalidStatus) as refused:
            connect(f"ws://{node.address}/ws?token={token}", proxy=None).__enter__()
        assert refused.value.response.status_code == status
        assert json.loads(refused.value.response.body)["code"] == "UNAUTHORIZED"
    with connect(f"ws://{node.address}/api/v1/ws?token={node.admin_token()}", proxy=None) as one:
        assert json.loads(one.recv(5))["type"] == "cluster_status"
        assert json.loads(one.recv(5))["type"] == "metrics"


def test_a_logout_at_one_node_closes_the_sockets_at_another(trio_of_nodes: Cluster) -> None:
    first, second, _ = trio_of_nodes.nodes
    body = {"username": "watcher", "password": "a password for watching", "role": "viewer"}
    first.post("/users", body)
    pair = first.post("/auth/login", {k: body[k] for k in ("username", "password")})
    with Listener(second, token=pair["token"]) as heard:
        heard.send(type="subscribe", channel="logs")
        heard.wait("error", code="FORBIDDEN")
        first.post("/auth/logout", token=pair["token"])
        assert heard.closed() == 1008
    with pytest.raises(InvalidStatus):
        connect(f"ws://{second.address}/ws?token={pair['token']}", proxy=None).__enter__()


def test_distribution_is_switched_for_the_whole_cluster(trio_of_nodes: Cluster) -> None:
    first, second, _ = trio_of_nodes.nodes

    def seen(enabled: bool) -> None:
        wait_until("all know", lambda: second.get("/distribution") == {"enabled": enabled})

    off = run_cli(first, "distribution", "off")
    assert (off.returncode, off.stdout) == (0, "Auto-distribution disabled\n"), off.stderr
    seen(False)
    assert run_cli(second, "distribution", "status").stdout == "Auto-distribution is off.\n"
    assert run_cli(first, "-o", "json", "distribution", "on").returncode == 0
    seen(True)


def test_the_command_line_tells_events(trio_of_nodes: Cluster) -> None:
    node, other, _ = trio_of_nodes.nodes
    environment = clean_environment(node.directory) | {
        "OLLAMA_DIST_HOST": node.address,
        "OLLAMAD_DATA_DIR": str(node.data_dir),
    }
    program = [sys.executable, "-c", "from ollama_dist.main import main; main()", "events"]

    def start(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*program, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )

    def drained(process: subprocess.Popen[str]) -> str:
        """Drain and undrain until the program has told of it."""

        def once() -> bool:
            for action in ("drain", "undrain"):
                other.post(f"/nodes/{other.id}/{action}")
            return process.poll() is not None

        wait_until("it has heard two events", once, every_s=0.5)
        assert process.stdout is not None
        return process.stdout.read()

    with start("-c", "nodes", "--limit", "2") as words:
        told = drained(words)
        assert words.wait(10) == 0
    assert f"node {other.name} is " in told
    with start("-c", "nodes", "--limit", "2", "-o", "json") as data:
        lines: list[Any] = [json.loads(line) for line in drained(data).splitlines()]
        assert data.wait(10) == 0
    assert [line["type"] for line in lines] == ["node_event", "node_event"]
    with start("-c", "metrics") as stopped:
        assert stopped.stdout is not None
        assert "this node: CPU" in stopped.stdout.readline()
        stopped.send_signal(signal.SIGINT)
        assert stopped.wait(10) == 130
        assert stopped.stderr is not None
        assert "Traceback" not in stopped.stderr.read()


def test_the_command_line_looks_at_the_whole_cluster(trio_of_nodes: Cluster) -> None:
    node = trio_of_nodes.nodes[0]
    seen = run_cli(node, "top")
    assert seen.returncode == 0, seen.stderr
    for name in (each.name for each in trio_of_nodes.nodes):
        assert name in seen.stdout
    assert "3 of 3 nodes online" in seen.stdout
    data = json.loads(run_cli(node, "-o", "json", "top").stdout)
    assert set(data) == {"metrics", "nodes", "transfers"}


def test_prometheus_reads_a_real_node(trio_of_nodes: Cluster) -> None:
    node = trio_of_nodes.nodes[0]
    with node.client() as client:
        answer = client.get(f"{node.url}/metrics")
    assert answer.status_code == 200
    assert "ollamad_cluster_nodes_online 3.0" in answer.text
    assert "process_resident_memory_bytes" in answer.text
    foreign = {"X-Forwarded-For": "192.0.2.1"}
    stranger = node.request("GET", f"{node.url}/metrics", token="", headers=foreign)
    refused(stranger, 401, "UNAUTHORIZED")
