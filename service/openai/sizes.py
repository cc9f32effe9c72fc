"""Scales pictures to the sizes that clients of OpenAI's API ask for. The verdicts are about the pictures as sampled."""

import base64
import io
import math
import re
from typing import Final

from fastapi.concurrency import run_in_threadpool
from PIL import Image

LARGEST: Final = 2048  # pixels along a side
MOST_PIXELS: Final = 20_000_000  # of one answer's pictures, which are in memory together: ten of OpenAI's 1792x1024
PIXELS_A_REQUEST: Final = 100_000  # that take as long to scale as one usual request
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


def cost_of_scaling(pixels: int) -> int:
    """Return as how many requests the rate limit counts scaling to so many pixels."""
    return math.ceil(pixels / PIXELS_A_REQUEST)


def fitted(own: Size, asked: Size) -> Size:
    """Return the largest size within `asked` that has the proportions of `own`."""
    scale = min(asked[0] / own[0], asked[1] / own[1])
    return max(1, round(own[0] * scale)), max(1, round(own[1] * scale))


def size_of(own: Size, asked: str | None) -> Size:
    """Return the size of a picture for a request's `size`, which has been checked."""
    return own if asked is None or asked == "auto" else fitted(own, parse_size(asked))


async def in_base64(png: bytes, size: Size) -> str:
    """Return the picture at another size as base64, made in a thread."""
    return base64.b64encode(await run_in_threadpool(scaled, png, size)).decode()


def scaled(png: bytes, size: Size) -> bytes:
    """Return the picture at another size, as a PNG without the recipe: it is not what the recipe's job sampled."""
    with Image.open(io.BytesIO(png)) as picture:
        if picture.size == size:
            return png
        out = io.BytesIO()
        picture.resize(size, Image.Resampling.LANCZOS).save(out, "PNG", compress_level=1)
        return out.getvalue()
