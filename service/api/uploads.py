"""What clients upload: PNGs with recipes, and zips of pictures to score, in the test file's order: 0.png, 1.png, ...

Every byte is untrusted. A zip's bytes are counted while they are unpacked, whatever a header claims. A PNG's chunks are
counted before Pillow sees it: Pillow keeps what every chunk holds, and takes microseconds for each. Knows no torch.
"""

import io
import re
import struct
import zipfile
import zlib
from collections.abc import Sequence

from PIL import Image, UnidentifiedImageError
from pydantic import ValidationError

from service.contract.errors import BadRequest
from service.contract.recipe import KEYWORD, Recipe
from service.settings import Settings
from shared.options import LIMITS
from shared.rgb import to_rgb

# PNGs.
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

# Zips.
PICTURES = "pictures"  # the form's field
CENTRAL_HEADER = b"PK\x01\x02"  # begins every entry of a zip's directory
NAME = re.compile(r"(0|[1-9][0-9]{0,5})\.png")
BOUNDED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # zipfile cannot limit how much the other methods unpack
SHOWN_CHARACTERS = 80  # of an entry's name
Fault = tuple[str | None, str]  # an entry, or None for the zip itself, and what is wrong with it
# What zipfile raises for damaged and malicious archives.
UNREADABLE = (zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, ValueError, RuntimeError, OverflowError)


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


def read_submission(content: bytes, count: int, settings: Settings) -> list[bytes]:
    """Return the PNGs 0.png to COUNT - 1.png of a zip, all of one size and `reduced`. They may be in one folder.

    Raises BadRequest, with every fault that was found.
    """
    if content.count(CENTRAL_HEADER) > settings.zip_entries:  # before zipfile creates an object for each
        raise _refused((None, f"more than {settings.zip_entries} entries"))
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
    except UNREADABLE as error:
        raise _refused((None, f"not a zip: {error}")) from error
    small, faults = list[bytes](), list[Fault]()
    sizes = dict[str, tuple[int, int]]()
    most, unpacked, decoded = settings.zip_unpacked_bytes, 0, 0
    with archive:
        for i, entry in enumerate(_in_order(archive.infolist(), count)):
            name = f"{i}.png"
            try:
                png = _unpack(archive, entry, name, most - unpacked + 1)
                unpacked += len(png)
                if unpacked > most:
                    raise _refused((name, f"with it the zip unpacks to more than {most} bytes"))
                small.append(reduced(png, settings.picture_side))
                width, height = sizes[name] = check_picture(small[-1], settings.picture_side)
            except PngError as error:
                faults.append((name, str(error)))
                continue
            first, size = next(iter(sizes.items()))
            if (width, height) != size:
                faults.append((name, f"{width}x{height} pixels, but {first} has {size[0]}x{size[1]}"))
            decoded += 3 * width * height
            if decoded > most:
                faults.append((name, f"with it the pictures have more than {most} bytes"))
                break
    if faults:
        raise _refused(*faults)
    return small


def _unpack(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, name: str, most: int) -> bytes:
    """Return up to `most` bytes of an entry, whatever its header claims. PngError for another compression.

    BadRequest if it cannot be unpacked: nobody counts the bytes before that, so no further entry is.
    """
    if entry.compress_type not in BOUNDED:
        raise PngError(f"compression {entry.compress_type}; use stored or deflated")
    try:
        with archive.open(entry) as file:
            return file.read(most)
    except UNREADABLE as error:
        raise _refused((name, f"cannot be unpacked: {error}")) from error


def _in_order(entries: Sequence[zipfile.ZipInfo], count: int) -> list[zipfile.ZipInfo]:
    """Return the entries by their number, without folders and the files that operating systems hide in zips."""
    # Not is_dir: in Python 3.11 it raises for an empty name. Some archivers write 0.png as ./0.png.
    named = [(entry.filename.removeprefix("./"), entry) for entry in entries if not entry.filename.endswith("/")]
    files = [(path, entry) for path, entry in named if not _is_hidden(path)]
    folders = sorted({path.rpartition("/")[0] for path, _ in files})
    if len(folders) > 1:
        shown = ", ".join(_shown(folder or "no folder") for folder in folders[:3])
        raise _refused((None, f"files in several folders ({shown}); put all pictures into one"))
    found: dict[int, zipfile.ZipInfo] = {}
    faults: list[Fault] = []
    for path, entry in files:
        name = path.rpartition("/")[2]
        match = NAME.fullmatch(name)
        if match is None:
            faults.append((_shown(name), f"not one of the names 0.png to {count - 1}.png"))
        elif int(match[1]) >= count:
            faults.append((name, f"the test file has {count} label lists; their last picture is {count - 1}.png"))
        elif int(match[1]) in found:
            faults.append((name, "duplicate name"))
        else:
            found[int(match[1])] = entry
    faults += [(f"{i}.png", "is missing") for i in range(count) if i not in found]
    if faults:
        raise _refused(*faults)
    return [found[i] for i in range(count)]


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.split("/"))


def _shown(name: str) -> str:
    """Return an entry's name for a message: printable and of limited length."""
    short = name if len(name) <= SHOWN_CHARACTERS else name[:SHOWN_CHARACTERS] + "..."
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in short)


def _refused(*faults: Fault) -> BadRequest:
    return BadRequest.from_errors(
        [
            {"loc": ["body", PICTURES, *([] if entry is None else [entry])], "msg": message, "type": "zip"}
            for entry, message in faults
        ]
    )
