"""`events`, `top` and `distribution`: what they show, and how they end."""

from typing import Any

import pytest

from ollama_dist.commands.events import describe
from tests.fakes import cli_fixtures
from tests.fakes.cli_fixtures import Cli, Terminal, ok
from tests.fakes.fake_api import ALPHA, BETA, Answer, FakeApi, error

cli, fake_api, home = cli_fixtures.cli, cli_fixtures.fake_api, cli_fixtures.home

NAMES = {ALPHA: "alpha"}
METRICS = {
    "models_loaded": 1,
    "requests_per_second": 2.5,
    "active_connections": 3,
    "average_latency": 12,
    "error_rate": 0.5,
    "scheduler_stats": {"completed_requests": 7, "failed_requests": 1, "queued_requests": 4},
}


def node_event(kind: str, node_id: str = ALPHA) -> dict[str, Any]:
    return {"type": "node_event", "event_type": kind, "node_id": node_id, "data": {}}


def model_event(kind: str, **data: Any) -> dict[str, Any]:
    where = {"node_id": ALPHA, **data}
    return {"type": "model_event", "event_type": kind, "model_name": "m:1", "data": where}


WORDS = [
    (node_event("node_online"), "node alpha is online"),
    (node_event("node_offline", BETA), "node QmBeta2222 is offline"),
    (node_event("node_joined"), "node alpha joined the cluster"),
    (node_event("leader_changed"), "node alpha leads now"),
    (node_event("leader_changed", ""), "nobody leads the cluster"),
    (model_event("model_replicated"), "m:1 is on node alpha"),
    (model_event("model_loaded"), "m:1 is loaded on node alpha"),
    (model_event("model_deleted"), "m:1 was deleted"),
    (model_event("download_started"), "m:1 to alpha: started"),
    (
        model_event(
            "download_progress", progress=45.2, bytes_done=10**6, bytes_total=10**7, speed=10**6
        ),
        "m:1 to alpha: 45%, 1.0 MB of 10.0 MB, 1.0 MB/s",
    ),
    (model_event("download_failed", status="failed", error="full"), "m:1 to alpha: failed full"),
    ({"type": "alert", "level": "warning", "message": "Low", "state": "raised"}, "warning: Low"),
    ({"type": "alert", "level": "info", "message": "Well", "state": "cleared"}, "over: Well"),
    ({"type": "dropped", "count": 4}, "4 messages were dropped: this reader is too slow"),
    ({"type": "new", "x": 1}, 'new: {"type": "new", "x": 1}'),
]


@pytest.mark.parametrize(("message", "words"), WORDS)
def test_events_in_words(message: dict[str, Any], words: str) -> None:
    assert describe(message, NAMES) == words


def test_events_wants_channels_that_are_there(cli: Cli) -> None:
    result = cli("events", "-c", "nonsense")
    assert result.exit_code == 2
    assert "there is no channel 'nonsense'. Use one of nodes, models" in result.output


def test_events_of_a_daemon_without_a_websocket_end_with_a_reason(
    cli: Cli, fake_api: FakeApi
) -> None:
    fake_api.answers["GET", "/auth/me"] = Answer(200, {"user": {}})
    result = cli("events")
    assert result.exit_code == 5
    assert "Traceback" not in result.output


def test_distribution_is_switched(cli: Cli, fake_api: FakeApi) -> None:
    said = {"message": "Auto-distribution disabled", "status": "success"}
    fake_api.answers["POST", "/distribution/auto-configure"] = Answer(200, said)
    assert ok(cli("distribution", "off")) == "Auto-distribution disabled\n"
    assert fake_api.requests[-1].json == {"enabled": False}
    assert '"status": "success"' in ok(cli("-o", "json", "distribution", "on"))
    assert fake_api.requests[-1].json == {"enabled": True}
    fake_api.answers["POST", "/distribution/auto-configure"] = error(403, "needs operator")
    assert cli("distribution", "on").exit_code == 4


def test_top_looks_once_without_a_terminal(cli: Cli, fake_api: FakeApi) -> None:
    fake_api.answers["GET", "/metrics"] = Answer(200, METRICS)
    shown = ok(cli("top"))
    assert "2 of 3 nodes online, 1 models in memory" in shown
    for word in ("alpha", "beta", "gamma", "offline"):
        assert word in shown
    assert "2.5/s, 3 active, 12 ms, 0.5% failed. Generations: 7 done, 1 failed, 4 queued" in shown


def test_top_lives_on_a_terminal_and_ends_cleanly(fake_api: FakeApi, home: object) -> None:
    fake_api.answers["GET", "/metrics"] = Answer(200, METRICS)
    with Terminal("--host", fake_api.url, "top", "--interval", "3") as terminal:
        terminal.expect("nodes online")
        terminal.expect("2.5/s")
        fake_api.answers["GET", "/metrics"] = Answer(200, METRICS | {"requests_per_second": 99.5})
        terminal.expect("99.5/s")
        terminal.type("\x03")
        assert terminal.exit_code() == 0
        assert "Traceback" not in terminal.seen
