"""PNGs that come from outside, read without torch: their size, whether they can be decoded, the recipe they carry.

Looks at the size that a file claims before anything is decoded.
"""

import io
import struct

from PIL import Image, UnidentifiedImageError
from pydantic import ValidationError

from service.contract.recipe import KEYWORD, Recipe
from shared.rgb import to_rgb

SIGNATURE = b"\x89PNG\r\n\x1a\n"
HEADER = struct.Struct(">8s4x4sII")  # signature, length of the first chunk, its type, width and height
MAX_PIXELS = 1 << 26  # of a picture that is opened, not decoded: beyond any grid of ours


class PngError(ValueError):
    """Bytes that are no PNG, or not one that can be used. The message says why."""


def png_size(png: bytes) -> tuple[int, int]:
    """(width, height) as the header claims. PngError for anything that does not begin as a PNG does."""
    if len(png) < HEADER.size:
        raise PngError("not a PNG" if not png.startswith(SIGNATURE) else "a PNG that is cut short")
    signature, first, width, height = HEADER.unpack_from(png)
    if signature != SIGNATURE or first != b"IHDR":
        raise PngError("not a PNG")
    return width, height


def _open(png: bytes, size: tuple[int, int]) -> Image.Image:
    """The picture, not decoded. ValueError if it is not of the size that its first header claims: Pillow takes the last
    header's."""
    picture = Image.open(io.BytesIO(png), formats=["PNG"])
    if picture.size != size:
        raise ValueError(f"its first header says {size[0]}x{size[1]}, another {picture.size[0]}x{picture.size[1]}")
    return picture


def check_picture(png: bytes, side: int) -> tuple[int, int]:
    """(width, height) of a PNG that decodes as a picture of at most `side` pixels a side; PngError for any other."""
    width, height = png_size(png)
    if not (1 <= width <= side and 1 <= height <= side):
        raise PngError(f"{width}x{height} pixels; at most {side}x{side} are allowed")
    try:
        with _open(png, (width, height)) as picture:
            return to_rgb(picture).size
    except Exception as error:  # Pillow raises a dozen kinds for damaged files
        raise PngError(f"a PNG that cannot be used: {error}") from error


def recipe_of(png: bytes) -> Recipe:
    """The recipe in the metadata of a PNG; no pixel is decoded. PngError if it is no PNG or carries no good recipe."""
    width, height = png_size(png)
    if width * height > MAX_PIXELS:
        raise PngError(f"{width}x{height} pixels; no picture of ours is that large")
    try:
        with _open(png, (width, height)) as picture:
            text = picture.info.get(KEYWORD)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:  # what Pillow raises for broken chunks
        raise PngError(f"a damaged PNG: {error}") from error
    if not isinstance(text, str):
        raise PngError(f"a PNG without a recipe: it has no text {KEYWORD!r} in its metadata")
    try:
        return Recipe.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise PngError(f"a PNG whose recipe cannot be read: {where + ': ' if where else ''}{first['msg']}") from error
