"""The journal's thread: results, errors, order, cancellation, its end."""

import threading

import pytest
import trio
import trio.testing

from ollamad.raft.worker import Worker


async def test_it_calls_in_one_other_thread_and_hands_back_what_comes() -> None:
    worker = Worker()
    first = await worker.run(threading.current_thread)
    second = await worker.run(threading.current_thread)
    assert first is second
    assert first is not threading.current_thread()
    with pytest.raises(ZeroDivisionError):
        await worker.run(lambda: 1 // 0)
    assert await worker.run(threading.current_thread) is first
    worker.close()
    await trio.to_thread.run_sync(first.join, 10)
    assert not first.is_alive()


async def test_calls_are_carried_out_in_order() -> None:
    worker = Worker()
    gate = threading.Event()
    done: list[int] = []

    async def ask(number: int) -> None:
        assert await worker.run(lambda: done.append(number)) is None

    async with trio.open_nursery() as nursery:
        nursery.start_soon(worker.run, gate.wait)
        await trio.testing.wait_all_tasks_blocked()
        for number in range(5):
            nursery.start_soon(ask, number)
            await trio.testing.wait_all_tasks_blocked()
        assert done == []
        gate.set()
    assert done == [0, 1, 2, 3, 4]
    worker.close()


async def test_cancellation_abandons_the_call_which_happens_all_the_same() -> None:
    worker = Worker()
    gate = threading.Event()
    done: list[int] = []

    def first() -> None:
        gate.wait(10)
        done.append(1)

    with trio.CancelScope() as scope:
        scope.cancel()
        await worker.run(first)
    assert scope.cancelled_caught
    assert done == []  # nobody waits for a disk that hangs
    gate.set()
    await worker.run(lambda: done.append(2))
    assert done == [1, 2]  # in order: nothing is written behind a later write
    worker.close()


def test_a_call_may_end_after_the_loop() -> None:
    gate = threading.Event()
    threads: list[threading.Thread] = []

    async def main() -> None:
        worker = Worker()
        threads.append(await worker.run(threading.current_thread))
        with trio.move_on_after(0):
            await worker.run(gate.wait)
        worker.close()

    trio.run(main)
    assert threads[0].is_alive()
    gate.set()
    threads[0].join(10)
    assert not threads[0].is_alive()


async def test_close_lets_what_was_asked_happen_and_a_later_call_begin_again() -> None:
    worker = Worker()
    worker.close()  # nothing was begun
    gate = threading.Event()
    first: list[threading.Thread] = []

    def work() -> None:
        gate.wait()
        first.append(threading.current_thread())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(worker.run, work)
        await trio.testing.wait_all_tasks_blocked()
        worker.close()
        gate.set()
    await trio.to_thread.run_sync(first[0].join, 10)
    assert not first[0].is_alive()
    assert await worker.run(threading.current_thread) is not first[0]
    worker.close()
