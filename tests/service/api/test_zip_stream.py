"""A streamed zip: other programs read it, its bytes follow from the pictures."""

import asyncio
import io
import zipfile
from collections.abc import Sequence

from service.api.results import zip_stream
from tests.service.api.uploads.zips import png


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


def test_each_picture_is_a_part_of_its_own() -> None:
    pictures = [png(seed) for seed in range(3)]
    *sent, directory = asyncio.run(parts_of(pictures))
    assert [pictures[i] in part for i, part in enumerate(sent)] == [True] * 3
    assert not any(picture in directory for picture in pictures)


def test_a_zip_of_nothing_is_a_zip() -> None:
    (only,) = asyncio.run(parts_of([]))
    assert zipfile.ZipFile(io.BytesIO(only)).namelist() == []
