"""Calls to storage that hang: their callers go on, and no more threads are taken than there are."""

import asyncio
import threading
from functools import partial

import pytest

from service.storage_threads import Stalled, StorageThreads


def test_calls_return_in_order_and_raise_what_they_raise() -> None:
    threads = StorageThreads(2)
    assert threads.all([lambda i=i: i for i in range(5)], 60) == [0, 1, 2, 3, 4]  # type: ignore[misc]
    with pytest.raises(ZeroDivisionError):
        threads.all([lambda: 1, lambda: 1 // 0], 60)
    assert asyncio.run(threads.one(lambda: 7, 60)) == 7
    assert threads.all([], 60) == []


def test_calls_behind_one_that_hangs_are_given_up() -> None:
    threads, hang, begun = StorageThreads(1), threading.Event(), threading.Event()
    calls = list[int]()

    def hanging() -> None:
        begun.set()
        hang.wait()

    late = threads.submit(hanging)
    begun.wait()
    with pytest.raises(Stalled, match=r"within 0\.01 s"):
        threads.all([partial(calls.append, 1)], 0.01)
    hang.set()
    late.result()
    threads.submit(lambda: None).result()
    threads.all([partial(calls.append, 3)], 60)
    assert calls == [3]


def test_the_event_loop_goes_on_while_a_call_hangs() -> None:
    threads, hang = StorageThreads(1), threading.Event()

    async def work() -> str:
        other = asyncio.create_task(asyncio.sleep(0, "done"))
        with pytest.raises(Stalled):
            await threads.one(hang.wait, 0.01)
        with pytest.raises(Stalled):  # the only thread is taken
            await threads.one(lambda: None, 0.01)
        return await other

    assert asyncio.run(work()) == "done"
    hang.set()
