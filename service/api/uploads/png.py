"""Untrusted PNGs, read without torch: their size, whether they decode, and the recipe in their metadata.

Checks the size that a file claims before decoding anything.
"""

import io
import struct

from PIL import Image
from pydantic import ValidationError

from service.contract.recipe import KEYWORD, Recipe
from shared.rgb import to_rgb

SIGNATURE = b"\x89PNG\r\n\x1a\n"
HEADER = struct.Struct(">8s4x4sII")  # signature, length of the first chunk, its type, width and height
MAX_PIXELS = 1 << 26  # of a picture that is opened without decoding: more than any grid of this service has


class PngError(ValueError):
    """Bytes that are not a usable PNG. The message says why."""


def png_size(png: bytes) -> tuple[int, int]:
    """Return (width, height) as the header claims. Raises PngError for anything that does not begin as a PNG."""
    if len(png) < HEADER.size:
        raise PngError("not a PNG" if not png.startswith(SIGNATURE) else "a PNG that is cut short")
    signature, first, width, height = HEADER.unpack_from(png)
    if signature != SIGNATURE or first != b"IHDR":
        raise PngError("not a PNG")
    return width, height


def _open(png: bytes, size: tuple[int, int]) -> Image.Image:
    """Open a picture without decoding it. Raises ValueError if it does not have the size that its first header claims:
    Pillow believes the last header."""
    picture = Image.open(io.BytesIO(png), formats=["PNG"])
    if picture.size != size:
        raise ValueError(f"its first header says {size[0]}x{size[1]}, another {picture.size[0]}x{picture.size[1]}")
    return picture


def check_picture(png: bytes, side: int) -> tuple[int, int]:
    """Decode a PNG and return (width, height). Raises PngError if it fails or a side has more than `side` pixels."""
    width, height = png_size(png)
    if not (1 <= width <= side and 1 <= height <= side):
        raise PngError(f"{width}x{height} pixels; at most {side}x{side} are allowed")
    try:
        with _open(png, (width, height)) as picture:
            return to_rgb(picture).size
    except Exception as error:  # Pillow raises a dozen kinds for damaged files
        raise PngError(f"a PNG that cannot be used: {error}") from error


def recipe_of(png: bytes) -> Recipe:
    """Return the recipe in the metadata of a PNG, without decoding pixels. Raises PngError without a valid recipe."""
    width, height = png_size(png)
    if width * height > MAX_PIXELS:
        raise PngError(f"{width}x{height} pixels; no picture of this service is that large")
    try:
        with _open(png, (width, height)) as picture:
            text = picture.info.get(KEYWORD)
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damaged chunks
        raise PngError(f"a damaged PNG: {error}") from error
    if not isinstance(text, str):
        raise PngError(f"a PNG without a recipe: it has no text {KEYWORD!r} in its metadata")
    try:
        return Recipe.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise PngError(f"a PNG whose recipe cannot be read: {where + ': ' if where else ''}{first['msg']}") from error
