"""Slots, in which nobody waits behind all that another owner has sent."""

import asyncio
import gc

from service.api.results import Slots


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
