"""Untrusted PNGs, read without torch: their size, whether they decode, and the recipe in their metadata.

Counts a file's chunks before Pillow sees it: Pillow keeps what every chunk holds, and takes microseconds for each,
however many there are.
"""

import io
import struct

from PIL import Image, UnidentifiedImageError
from pydantic import ValidationError

from service.contract.recipe import KEYWORD, Recipe
from shared.options import LIMITS
from shared.rgb import to_rgb

SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHUNK = struct.Struct(">I4s")  # length of the content and type, before the content
OVERHEAD = CHUNK.size + 4  # of a chunk, with the checksum after its content
END = b"IEND"
KEPT = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", END)  # all that the pixels depend on
TEXTS = (b"tEXt", b"zTXt", b"iTXt")
RECIPE = KEYWORD.encode() + b"\0"  # begins the content of a recipe's chunk
AFTER_HEADER = 2  # in a list of the signature and the chunks
MAX_CHUNKS = 64  # besides the pixels'; cameras and editors write about ten
MAX_RECIPE_BYTES = 1 << 20  # the longest recipe, of a grid of 256 pictures, has about 400 KB
BYTES_A_PIXEL = 8  # at most, before compression
PIXEL_CHUNK = 1024  # bytes of pixels in a chunk, on average at least: encoders write 8 KiB or more


class PngError(ValueError):
    """Bytes that are not a usable PNG. The message says why."""


def reduced(png: bytes, side: int | None = None) -> bytes:
    """Return the PNG with only the chunks that decide its pixels, and its recipe. It may still be damaged.

    side: the most pixels of width and height. More data than such a picture needs is refused.

    The recipe moves to the front: Pillow reads a text after the pixels only once it has decoded them.

    Raises PngError if it has more than MAX_CHUNKS chunks besides those of pixels, or more of these than encoders write,
    and for more than one recipe, or one that is too long or cut short.
    """
    if not png.startswith(SIGNATURE):
        raise PngError("not a PNG")
    kept, at, kind = [SIGNATURE], len(SIGNATURE), b""
    left, recipes = {False: MAX_CHUNKS, True: MAX_CHUNKS + len(png) // PIXEL_CHUNK}, 0
    most_data = len(png) if side is None else (BYTES_A_PIXEL * side + 1) * side * 9 // 8 + 4096
    while at < len(png) and kind != END:
        length, kind = CHUNK.unpack_from(png, at) if at + CHUNK.size <= len(png) else (0, b"")
        chunk = png[at : at + OVERHEAD + length]  # the last one may be cut short
        at += OVERHEAD + length
        left[kind == b"IDAT"] -= 1
        if min(left.values()) < 0:
            raise PngError(f"a PNG with too many chunks; at most {MAX_CHUNKS} besides its pixels are allowed")
        if kind == b"IDAT":
            most_data -= len(chunk)
        if most_data < 0:
            raise PngError(f"a PNG with more data than {side}x{side} pixels need")
        if kind in TEXTS and chunk.startswith(RECIPE, CHUNK.size):
            recipes += 1
            if recipes > 1 or not OVERHEAD + length == len(chunk) <= MAX_RECIPE_BYTES:
                faults = f"several recipes, or one that is cut short or has more than {MAX_RECIPE_BYTES} bytes"
                raise PngError(f"a damaged PNG: {faults}")
            kept.insert(AFTER_HEADER, chunk)
        elif kind in KEPT:
            kept.append(chunk)
    return b"".join(kept)


def _open(png: bytes) -> Image.Image:
    """Open a reduced PNG without decoding it. Raises ValueError if anything but its pixels is damaged."""
    try:
        return Image.open(io.BytesIO(png), formats=["PNG"])
    except UnidentifiedImageError as error:  # whose message is an object's address
        raise ValueError("its header, palette or recipe is damaged") from error


def check_picture(png: bytes, side: int) -> tuple[int, int]:
    """Decode a reduced PNG and return (width, height). Raises PngError if it fails or a side exceeds `side` pixels."""
    try:
        with _open(png) as picture:
            if max(picture.size) > side:
                raise ValueError("{}x{} pixels; at most {}x{} are allowed".format(*picture.size, side, side))
            return to_rgb(picture).size
    except Exception as error:  # Pillow raises a dozen kinds for damaged files
        raise PngError(f"a PNG that cannot be used: {error}") from error


def recipe_of(png: bytes) -> Recipe:
    """Return the recipe in the metadata of a PNG, without decoding pixels. Raises PngError without a valid recipe."""
    small = reduced(png)
    try:
        with _open(small) as picture:
            text = picture.info.get(KEYWORD)
    except Exception as error:
        raise PngError(f"a damaged PNG: {error}") from error
    if not isinstance(text, str):
        raise PngError(f"a PNG without a recipe: it has no text {KEYWORD!r} in its metadata")
    if text.count("[") + text.count("{") > LIMITS.max_parts:  # before Python creates an object for each
        raise PngError(f"a PNG whose recipe has more than {LIMITS.max_parts} lists and objects")
    try:
        return Recipe.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        raise PngError(f"a PNG whose recipe cannot be read: {where + ': ' if where else ''}{reason}") from error
