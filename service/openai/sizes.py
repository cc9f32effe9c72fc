"""Scales pictures to the sizes that clients of OpenAI's API ask for. The verdicts are about the pictures as sampled."""

import base64
import io
import re
import struct
import zlib
from collections.abc import AsyncIterator, Iterator
from typing import Final

from fastapi.concurrency import run_in_threadpool
from PIL import Image, ImageChops
from PIL.PngImagePlugin import putchunk

from service.api.results import Slots
from service.api.uploads.png import SIGNATURE
from shared.rgb import to_rgb

LARGEST: Final = 2048  # pixels along a side
MOST_PIXELS: Final = 20_000_000  # of one answer's pictures: ten of OpenAI's 1792x1024
BAND_PIXELS: Final = 1 << 16  # that are scaled together
UP: Final = b"\2"  # begins a row of differences from the row above
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


def scaled(png: bytes, size: Size) -> Iterator[bytes]:
    """Yield the parts of a PNG at another size, each scaled once it is asked for: few pixels are in memory at any time.

    Without the recipe, since it is not what the recipe's job sampled. A picture that has the size stays as it is.
    """
    with Image.open(io.BytesIO(png)) as picture:
        if picture.size == size:
            yield png
            return
        source = to_rgb(picture)
    width, height = size
    yield SIGNATURE + _chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0))  # 8 bits, RGB
    packer, above = zlib.compressobj(1), Image.new("RGB", (width, 1))
    rows, scale = max(1, BAND_PIXELS // width), source.height / height
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        box = (0, top * scale, source.width, bottom * scale)
        band = source.resize((width, bottom - top), Image.Resampling.LANCZOS, box)
        before = Image.new("RGB", band.size)
        before.paste(above)
        before.paste(band, (0, 1))
        above = band.crop((0, band.height - 1, width, band.height))
        differences = ImageChops.subtract_modulo(band, before).tobytes()  # PNG's filter "Up"
        lines = (UP + differences[at : at + 3 * width] for at in range(0, len(differences), 3 * width))
        yield _chunk(b"IDAT", packer.compress(b"".join(lines)))
    yield _chunk(b"IDAT", packer.flush()) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, content: bytes) -> bytes:
    chunk = io.BytesIO()
    putchunk(chunk, kind, content)
    return chunk.getvalue()


async def one_by_one(parts: Iterator[bytes], slots: Slots, owner: str) -> AsyncIterator[bytes]:
    """Yield the parts of a scaled picture, which are computed in a thread, while the owner has a slot."""
    while True:
        async with slots.of(owner):
            part = await run_in_threadpool(next, parts, None)
        if part is None:
            return
        yield part


async def with_base64(text: str, parts: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """Yield a JSON text whose `b64_json` is empty, with a picture in it."""
    before, name, after = text.partition('"b64_json":"')
    yield before + name
    rest = b""
    async for part in parts:
        part = rest + part
        whole = len(part) - len(part) % 3  # three bytes are four characters
        yield base64.b64encode(part[:whole]).decode()
        rest = part[whole:]
    yield base64.b64encode(rest).decode() + after
