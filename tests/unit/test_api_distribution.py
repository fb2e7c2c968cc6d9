"""Whether models are spread by themselves: a setting of the whole cluster."""

from typing import Any

import pytest

from ollamad.core.commands import ChangeSettings
from tests.fakes.api_client import ApiClient

PATH = "/distribution/auto-configure"


async def test_it_is_switched_off_and_on_for_the_whole_cluster() -> None:
    client = ApiClient(role="operator")
    cluster = client.world.cluster
    assert (await client.call("GET", "/distribution", role="viewer")).json == {"enabled": True}
    for enabled, word in [(False, "disabled"), (True, "enabled")]:
        answer = await client.call("POST", PATH, {"enabled": enabled})
        message = f"Auto-distribution {word}"
        assert (answer.status, answer.json) == (200, {"message": message, "status": "success"})
        assert cluster.state.settings.auto_distribution is enabled
        assert (await client.call("GET", "/distribution")).json == {"enabled": enabled}


async def test_what_is_so_already_needs_no_command() -> None:
    client = ApiClient()
    assert (await client.call("POST", PATH, {"enabled": True})).status == 200
    assert not [c for c in client.world.cluster.proposed if isinstance(c, ChangeSettings)]


@pytest.mark.parametrize("body", [{}, {"enabled": "yes"}, {"enabled": 1}, {"enabled": None}, []])
async def test_a_body_that_does_not_say_it_is_refused(body: Any) -> None:
    answer = await ApiClient().call("POST", PATH, body)
    assert (answer.status, answer.code) == (400, "INVALID_REQUEST")


async def test_it_takes_an_operator_and_a_quorum() -> None:
    client = ApiClient(role="inference")
    assert (await client.call("POST", PATH, {"enabled": False})).status == 403
    client.world.cluster.has_quorum = False
    answer = await client.call("POST", PATH, {"enabled": False}, role="operator")
    assert (answer.status, answer.code) == (503, "NO_QUORUM")
    assert client.world.cluster.state.settings.auto_distribution
