"""Slots, in which nobody waits behind all that another owner has sent."""

import asyncio
import gc
import threading
from pathlib import Path
from typing import cast

from service.api.results import ResultReader, Slots
from service.pictures import PictureFiles
from service.store.async_jobs import AsyncJobs


def test_an_owner_takes_one_slot_however_much_they_send() -> None:
    async def run() -> list[str]:
        slots, order, go = Slots(2), list[str](), asyncio.Event()

        async def work(owner: str) -> None:
            async with slots.of(owner):
                order.append(owner)
                await go.wait()

        tasks = [asyncio.create_task(work(owner)) for owner in ["alice"] * 5 + ["bob", "carol"]]
        while len(order) < 2:
            await asyncio.sleep(0)
        go.set()
        await asyncio.gather(*tasks)
        del tasks
        gc.collect()
        assert not slots._own  # nothing stays of an owner who waits for nothing
        return order

    order = asyncio.run(run())
    assert order[:2] == ["alice", "bob"]
    assert order.index("carol") == 2


def test_an_owner_who_reads_much_from_slow_storage_leaves_threads_to_others(tmp_path: Path) -> None:
    answers = threading.Event()

    class Slow(PictureFiles):
        def read(self, job_id: str, name: str, start: int = 0, end: int | None = None) -> bytes:
            assert job_id == "bobs" or answers.wait(60)
            return b"png"

    async def run() -> bytes:
        reader = ResultReader(cast(AsyncJobs, None), Slow(tmp_path))
        alices = [asyncio.create_task(reader.image("alices", "alice", i)) for i in range(40)]
        await asyncio.sleep(0)
        found = await reader.image("bobs", "bob", 0)
        answers.set()
        await asyncio.gather(*alices)
        return found

    assert asyncio.run(run()) == b"png"
