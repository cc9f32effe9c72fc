"""Slots, in which nobody waits behind all that another owner has sent, and streamed zips."""

import asyncio
import gc
import io
import zipfile
from collections.abc import Sequence

from service.api.results import Slots, zip_stream
from tests.service.api.uploads.zips import png


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


async def parts_of(pictures: Sequence[bytes]) -> list[bytes]:
    async def read(index: int) -> bytes:
        return pictures[index]

    return [part async for part in zip_stream(read, range(len(pictures)))]


def test_the_pictures_are_in_the_zip_byte_for_byte_under_the_names_of_an_upload() -> None:
    pictures = [png(seed) for seed in range(12)]
    parts = asyncio.run(parts_of(pictures))
    with zipfile.ZipFile(io.BytesIO(b"".join(parts))) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [f"{i}.png" for i in range(12)]
        assert [archive.read(name) for name in archive.namelist()] == pictures
        assert {entry.external_attr >> 16 for entry in archive.infolist()} == {0o644}
    assert asyncio.run(parts_of(pictures)) == parts
