"""What clients upload: PNGs with recipes, and zips of pictures to score, in the test file's order: 0.png, 1.png, ...

Every byte is untrusted. Of a file, which may be on disk, one picture is in memory at a time. A PNG's chunks are counted
before Pillow sees it: Pillow keeps what every chunk holds, and takes microseconds for each. Knows no torch.
"""

import hashlib
import io
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO

from PIL import Image, UnidentifiedImageError
from pydantic import ValidationError

from service.contract.errors import BadRequest
from service.contract.recipe import KEYWORD, Recipe
from shared.options import LIMITS
from shared.rgb import to_rgb

# PNGs.
SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHUNK = struct.Struct(">I4s")  # length of the content and type, before the content
OVERHEAD = CHUNK.size + 4  # of a chunk, with the checksum after its content
DATA, END = b"IDAT", b"IEND"
KEPT = (b"IHDR", b"PLTE", b"tRNS", DATA, END)  # all that the pixels depend on
TEXTS = (b"tEXt", b"zTXt", b"iTXt")
RECIPE = KEYWORD.encode() + b"\0"  # begins the content of a recipe's chunk
AFTER_HEADER = 2  # in a list of the signature and the chunks
MAX_CHUNKS = 64  # besides the pixels'; cameras and editors write about ten
MAX_RECIPE_BYTES = 1 << 20  # the longest recipe, of a grid of 256 pictures, has about 400 KB
BYTES_A_PIXEL = 8  # at most, before compression
PIXEL_CHUNK = 1024  # bytes of pixels in a chunk, on average at least: encoders write 8 KiB or more
BLOCK = 1 << 16  # bytes that are read at once where they are only counted

# Zips.
PICTURES = "pictures"  # the form's field
CENTRAL_HEADER = b"PK\x01\x02"  # begins every entry of a zip's directory
NAME = re.compile(r"(0|[1-9][0-9]{0,5})\.png")
BOUNDED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # zipfile cannot limit how much the other methods unpack
ZIP_ENTRIES = 1024  # of an uploaded zip, with folders and files that operating systems add
ZIP_UNPACKED_BYTES = 64 << 20  # of its pictures: unpacked, and separately as pixels of 3 bytes
PICTURE_SIDE = 512  # pixels; maximum width and height of an uploaded picture
SHOWN_CHARACTERS = 80  # of an entry's name
Fault = tuple[str | None, str]  # an entry, or None for the zip itself, and what is wrong with it
# What zipfile raises for damaged and malicious archives.
UNREADABLE = (zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, ValueError, RuntimeError, OverflowError)


class PngError(Exception):
    """Bytes that are not a usable PNG. The message says why."""


@dataclass(frozen=True)
class Upload:
    """A picture of a zip, which was checked. It is unpacked again whenever it is read, so that few are in memory."""

    digest: str
    read: Callable[[], bytes]


def reduced(file: IO[bytes], side: int = 0) -> bytes:
    """Return the PNG with only the chunks that decide its pixels, and its recipe. It may still be damaged.

    side: the most pixels of width and height. More data than such a picture needs is refused. 0 leaves the pixels out.

    The recipe moves to the front: Pillow reads a text after the pixels only once it has decoded them.

    Raises PngError if it has more than MAX_CHUNKS chunks besides those of pixels, or more of these than encoders write,
    and for more than one recipe, or one that is too long or cut short.
    """
    if file.read(len(SIGNATURE)) != SIGNATURE:
        raise PngError("not a PNG")
    kept, kind = [SIGNATURE], b""
    left, recipes = {False: MAX_CHUNKS, True: MAX_CHUNKS}, 0
    most = (BYTES_A_PIXEL * side + 1) * side * 9 // 8 + 4096
    longest = max(most, MAX_RECIPE_BYTES)
    while kind != END and len(head := file.read(CHUNK.size)) == CHUNK.size:
        length, kind = CHUNK.unpack(head)
        chunk = head + file.read(min(OVERHEAD - CHUNK.size + length, longest))  # the last one may be cut short
        _skip(file, OVERHEAD + length - len(chunk))
        left[kind == DATA] += (kind == DATA) * length // PIXEL_CHUNK - 1
        if min(left.values()) < 0:
            raise PngError(f"a PNG with too many chunks; at most {MAX_CHUNKS} besides its pixels are allowed")
        if kind in TEXTS and chunk.startswith(RECIPE, CHUNK.size):
            recipes += 1
            if recipes > 1 or not OVERHEAD + length == len(chunk) <= MAX_RECIPE_BYTES:
                faults = f"several recipes, or one that is cut short or has more than {MAX_RECIPE_BYTES} bytes"
                raise PngError(f"a damaged PNG: {faults}")
            kept.insert(AFTER_HEADER, chunk)
        elif kind in KEPT and (side or kind != DATA):
            most -= len(chunk)
            if most < 0:
                raise PngError(f"a PNG with more data than {side}x{side} pixels need")
            kept.append(chunk)
    return b"".join(kept)


def _skip(file: IO[bytes], count: int) -> None:
    while count > 0 and (block := file.read(min(count, BLOCK))):
        count -= len(block)


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


def recipe_of(file: IO[bytes]) -> Recipe:
    """Return the recipe in the metadata of a PNG, without decoding pixels. Raises PngError without a valid recipe."""
    png = reduced(file)
    try:
        with _open(png + CHUNK.pack(0, DATA)) as picture:  # Pillow reads no further
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


def read_submission(file: IO[bytes], count: int) -> list[Upload]:
    """Check the PNGs 0.png to COUNT - 1.png of a zip, all of one size, and return them. They may be in one folder.

    Those returned can be read, `reduced`, while the file is open. Raises BadRequest, with every fault that was found.
    """
    # Before zipfile creates an object for each. One that begins in a block and ends in the next is not counted.
    if sum(block.count(CENTRAL_HEADER) for block in iter(partial(file.read, BLOCK), b"")) > ZIP_ENTRIES:
        raise _refused((None, f"more than {ZIP_ENTRIES} entries"))
    try:
        archive = zipfile.ZipFile(file)
    except UNREADABLE as error:
        raise _refused((None, f"not a zip: {error}")) from error
    found, faults = list[Upload](), list[Fault]()
    sizes = dict[str, tuple[int, int]]()
    most, unpacked, decoded = ZIP_UNPACKED_BYTES, 0, 0
    for i, entry in enumerate(_in_order(archive.infolist(), count)):
        name, read = f"{i}.png", partial(_unpack, archive, entry, PICTURE_SIDE)
        unpacked += entry.file_size  # zipfile returns no more than that
        if unpacked > most:
            faults.append((name, f"with it the zip unpacks to more than {most} bytes"))
            break
        try:
            png = read()
            width, height = sizes[name] = check_picture(png, PICTURE_SIDE)
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
        found.append(Upload(hashlib.sha256(png).hexdigest(), read))
    if faults:
        raise _refused(*faults)
    return found


def _unpack(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, side: int) -> bytes:
    """Return a PNG of a zip, `reduced`. PngError if it cannot be read."""
    if entry.compress_type not in BOUNDED:
        raise PngError(f"compression {entry.compress_type}; use stored or deflated")
    try:
        with archive.open(entry) as file:
            png = reduced(file, side)
            _skip(file, entry.file_size)  # to the end, where zipfile compares the checksum
            return png
    except UNREADABLE as error:
        raise PngError(f"cannot be unpacked: {error}") from error


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
