"""Zips of pictures to score: PNGs named in the test file's order, 0.png, 1.png, ...

Every byte is untrusted. A size in a header is not believed: bytes are counted while they are unpacked. Knows no HTTP
and no torch.
"""

import io
import re
import struct
import zipfile
import zlib
from collections.abc import Sequence

from service.api.uploads.png import PngError, check_picture, reduced
from service.contract.errors import BadRequest
from service.settings import Settings

PICTURES = "pictures"  # the form's field
CENTRAL_HEADER = b"PK\x01\x02"  # begins every entry of a zip's directory
NAME = re.compile(r"(0|[1-9][0-9]{0,5})\.png")
BOUNDED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # zipfile cannot limit how much the other methods unpack
SHOWN_CHARACTERS = 80  # of an entry's name
Fault = tuple[str | None, str]  # an entry, or None for the zip itself, and what is wrong with it
# What zipfile raises for damaged and malicious archives.
UNREADABLE = (zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, ValueError, RuntimeError, OverflowError)


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
