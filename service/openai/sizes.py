"""Scales pictures to the sizes that clients of OpenAI's API ask for. The verdicts are about the pictures as sampled."""

import io
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from fastapi.concurrency import run_in_threadpool
from PIL import Image

from service.api.results import Slots
from shared.rgb import to_rgb

LARGEST: Final = 2048  # pixels along a side
MOST_PIXELS: Final = 20_000_000  # of one answer's pictures: ten of OpenAI's 1792x1024
FAST: Final = 1  # zlib's level
FORM: Final = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")
SIDE: Final = "([1-9][0-9]{0,2}|1[0-9]{3}|20[0-3][0-9]|204[0-8])"
PATTERN: Final = f"{SIDE}x{SIDE}"  # for the OpenAPI document: a form with sides of at most LARGEST

Size = tuple[int, int]  # width, height


def parse_size(text: str) -> Size:
    """Read a size such as "1024x1024". ValueError for another form, or more than LARGEST pixels along a side."""
    sides = FORM.fullmatch(text)
    if sides is None:
        raise ValueError(f'"{text}"; wanted WIDTHxHEIGHT, such as 1024x1024')
    size = int(sides[1]), int(sides[2])
    if max(size) > LARGEST:
        raise ValueError(f"{text} is too large; at most {LARGEST}x{LARGEST}")
    return size


def size_of(own: Size, asked: str | None) -> Size:
    """Return the largest size within a request's `size`, which has been checked, that has the proportions of `own`."""
    if asked is None or asked == "auto":
        return own
    width, height = parse_size(asked)
    scale = min(width / own[0], height / own[1])
    return max(1, round(own[0] * scale)), max(1, round(own[1] * scale))


def scaled(png: bytes, size: Size) -> bytes:
    """Return a PNG at another size, without the recipe, since it is not what the recipe's job sampled."""
    larger = io.BytesIO()
    with Image.open(io.BytesIO(png)) as picture:
        to_rgb(picture).resize(size, Image.Resampling.LANCZOS).save(larger, "PNG", compress_level=FAST)
    return larger.getvalue()


@asynccontextmanager
async def at_size(png: bytes, size: Size, slots: Slots, owner: str) -> AsyncIterator[bytes]:
    """Give a PNG at this size; one that has it stays as it is.

    A scaled one holds the owner's slot until it is sent, so that clients that do not read leave one in memory.
    """
    with Image.open(io.BytesIO(png)) as picture:
        own = picture.size
    if own == size:
        yield png
    else:
        async with slots.of(owner):
            yield await run_in_threadpool(scaled, png, size)
