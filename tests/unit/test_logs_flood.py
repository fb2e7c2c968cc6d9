"""Log lines that other hosts cause: the first ones are told, a flood is counted."""

import logging

import pytest

from ollamad import logs
from ollamad.core.ratelimit import RateLimit
from ollamad.logs import LINES_OF_A_KIND, LINES_PER_HOST, LINES_PERIOD_S, FloodFilter

LINE = "closing a connection of %s: %s"


class Log:
    """What comes through the filter, at a time of the test's own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(logs.time, "monotonic", lambda: self.now)
        self._filter = FloodFilter()

    def tell(self, text: str, *args: object, name: str = "ollamad.peers.doorman") -> str | None:
        record = logging.LogRecord(name, logging.WARNING, "f", 1, text, args, None)
        return record.getMessage() if self._filter.filter(record) else None


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    return Log(monkeypatch)


def test_a_flood_of_one_host_makes_a_few_lines_and_a_count(log: Log) -> None:
    told = [log.tell(LINE, "10.0.0.1", number) for number in range(10_000)]
    assert told[0] == "closing a connection of 10.0.0.1: 0"
    assert sum(line is not None for line in told) == LINES_PER_HOST
    log.now += LINES_PERIOD_S
    left_out = 10_000 - LINES_PER_HOST
    again = f"closing a connection of 10.0.0.1: x (and {left_out} more such lines)"
    assert log.tell(LINE, "10.0.0.1", "x") == again
    assert log.tell(LINE, "10.0.0.1", "y") == "closing a connection of 10.0.0.1: y"


def test_other_hosts_and_other_lines_are_told_all_the_same(log: Log) -> None:
    for number in range(1000):
        log.tell(LINE, "10.0.0.1", number)
    assert "10.0.0.2: x" in (log.tell(LINE, "10.0.0.2", "x") or "")
    assert log.tell("join: refused %s", "10.0.0.1") is not None


def test_a_flood_from_many_addresses_is_bounded_too(log: Log) -> None:
    told = [log.tell(LINE, f"10.{n >> 8}.{n & 255}.1", n) for n in range(10_000)]
    assert sum(line is not None for line in told) == LINES_OF_A_KIND


def test_what_nobody_outside_causes_is_never_held_back(log: Log) -> None:
    for number in range(1000):
        assert log.tell("applied %s", number, name="ollamad.raft.node") == f"applied {number}"
        assert log.tell("the same", name="ollamad.cluster") == "the same"


def test_the_memory_of_it_is_bounded(log: Log) -> None:
    for number in range(20_000):
        log.tell(LINE, str(number), number)
    limit = log._filter._of_host
    assert isinstance(limit, RateLimit)
    assert len(limit._arrival) <= 10_000
    assert len(log._filter._left_out) <= 1


def test_the_daemon_uses_it(capsys: pytest.CaptureFixture[str]) -> None:
    root, own = logging.getLogger(), logging.getLogger("ollamad")
    before = root.handlers, root.level, own.level
    try:
        logs.set_up("info", "text", to_journal=True)
        for number in range(100):
            logging.getLogger("ollamad.peers.doorman").warning(LINE, "h", number)
    finally:
        root.handlers, level, own_level = before
        root.setLevel(level)
        own.setLevel(own_level)
    assert len(capsys.readouterr().err.splitlines()) == LINES_PER_HOST
