"""Zips of pictures for tests: good ones, damaged ones and malicious ones."""

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

LISTS = [["red cube", "blue sphere"], ["gray cylinder"], ["cyan cube"]]
TEST_FILE = ("test.json", json.dumps(LISTS))


def png(seed: int = 0, size: tuple[int, int] = (16, 16), mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def zipped(files: Mapping[str, bytes] | Sequence[tuple[str, bytes]], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in files.items() if isinstance(files, Mapping) else files:
            archive.writestr(name, content)
    return buffer.getvalue()


GOOD = {f"{i}.png": png(i) for i in range(3)}


def without(name: str) -> dict[str, bytes]:
    return {key: value for key, value in GOOD.items() if key != name}


def lying(content: bytes, size: int) -> bytes:
    """Return a zip of one entry whose headers claim that it unpacks to `size` bytes."""
    local, central = content.index(b"PK\x03\x04"), content.index(b"PK\x01\x02")
    claimed = struct.pack("<I", size)
    content = content[: local + 22] + claimed + content[local + 26 :]
    return content[: central + 24] + claimed + content[central + 28 :]


def encrypted(content: bytes) -> bytes:
    central = content.index(b"PK\x01\x02")
    return content[: central + 8] + b"\x01" + content[central + 9 :]


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of_16_bits(colour_type: int, side: int = 8) -> bytes:
    """Return a square PNG with 16 bits a channel, of colour type 0 (grey), 2 (RGB), 4 (grey and alpha) or 6 (RGBA)."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]
    header = struct.pack(">2I5B", side, side, 16, colour_type, 0, 0, 0)
    data = zlib.compress((b"\0" + bytes(2 * channels * side)) * side)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND")


def with_chunks(content: bytes, chunks: bytes) -> bytes:
    """Return a PNG with more chunks after its header."""
    header = 8 + 25
    return content[:header] + chunks + content[header:]
