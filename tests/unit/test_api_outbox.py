"""What waits for a slow reader: in order, bounded, what is out of date first to go."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollamad.api.outbox import MAX_BYTES, MAX_MESSAGES, Outbox


def notice(count: int) -> bytes:
    return b"dropped %d" % count


def drain(outbox: Outbox) -> list[bytes]:
    taken = []
    while outbox:
        taken.append(outbox.pop())
    with pytest.raises(IndexError):
        outbox.pop()
    return taken


def test_what_fits_comes_out_in_order() -> None:
    outbox = Outbox(notice)
    assert drain(outbox) == []
    frames = [b"%d" % number for number in range(MAX_MESSAGES)]
    for frame in frames:
        outbox.put(frame)
    assert drain(outbox) == frames


def test_the_newest_of_a_key_is_kept_and_the_loss_is_told_once() -> None:
    outbox = Outbox(notice)
    for key, frame in [("m", b"m1"), ("", b"e1"), ("m", b"m2"), ("p", b"p1"), ("m", b"m3")]:
        outbox.put(frame, key)
    assert drain(outbox) == [b"dropped 2", b"e1", b"p1", b"m3"]
    outbox.put(b"m4", "m")
    assert drain(outbox) == [b"m4"]


def test_metrics_go_before_events() -> None:
    outbox = Outbox(notice)
    outbox.put(b"e0")
    outbox.put(b"old metrics", "m")
    outbox.put(b"progress", "p")
    for number in range(1, MAX_MESSAGES):
        outbox.put(b"e%d" % number)
    assert drain(outbox) == [b"dropped 2", *(b"e%d" % number for number in range(MAX_MESSAGES))]


def test_then_the_oldest_events_go() -> None:
    outbox = Outbox(notice)
    for number in range(MAX_MESSAGES + 3):
        outbox.put(b"%d" % number)
    assert drain(outbox) == [b"dropped 3", *(b"%d" % n for n in range(3, MAX_MESSAGES + 3))]


def test_bytes_are_bounded_too() -> None:
    outbox = Outbox(notice)
    large = b"x" * (MAX_BYTES // 2)
    for _ in range(3):
        outbox.put(large)
    assert drain(outbox) == [b"dropped 1", large, large]


def test_all_can_be_dropped() -> None:
    outbox = Outbox(notice)
    outbox.put(b"a")
    outbox.put(b"b", "k")
    outbox.drop_all()
    outbox.put(b"close")
    assert drain(outbox) == [b"dropped 2", b"close"]


@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from(["", "m", "p", "q"]), st.integers(0, MAX_BYTES // 3)),
            st.none(),  # one is taken
        ),
        max_size=60,
    )
)
def test_each_frame_is_taken_or_counted_and_events_stay_in_order(
    steps: list[tuple[str, int] | None],
) -> None:
    outbox = Outbox(notice)
    put, taken, dropped = 0, [], 0

    def take() -> None:
        nonlocal dropped
        frame = outbox.pop()
        if frame.startswith(b"dropped"):
            dropped += int(frame.split()[1])
        else:
            taken.append(int(frame.split(b":")[0]))

    for step in steps:
        if step is None:
            if outbox:
                take()
        else:
            key, size = step
            outbox.put(b"%d:" % put + b"x" * size, key)
            put += 1
    while outbox:
        take()
    assert len(taken) + dropped == put
    assert taken == sorted(taken)
