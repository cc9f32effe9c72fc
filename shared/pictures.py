"""Pictures as 8-bit arrays, PNGs and grids."""

import io
import struct
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo, putchunk
from torch import Tensor
from torch.nn import functional as F
from zlib_ng import zlib_ng

from shared.rgb import to_rgb

# bluish green and vermilion, which colour-blind people can tell apart (Okabe & Ito 2008)
RIGHT, WRONG = (0, 158, 115), (213, 94, 0)
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
GAP = 2  # pixels around each picture of a grid
SUB = 1  # the PNG filter that subtracts a pixel's left neighbour
TICK = [[(0.05, 0.5), (0.35, 0.85), (0.95, 0.1)]]  # polylines in a unit square
CROSS = [[(0.1, 0.1), (0.9, 0.9)], [(0.1, 0.9), (0.9, 0.1)]]


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """Convert (N, C, H, W) in [-1, 1], clamped to it, to (N, H, W, C) in 0..255."""
    pixels = images.permute(0, 2, 3, 1).to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    return np.asarray(pixels.clamp_(-1, 1).add_(1).mul_(127.5).round_().to(torch.uint8).cpu().numpy())


def to_images(pictures: NDArray[np.uint8]) -> Tensor:
    """Convert (N, H, W, C) in 0..255 to (N, C, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (N, C, H, W) to `size`, a height and a width, smoothly. Pictures of that size stay as they are."""
    if images.shape[-2:] == size:
        return images
    return F.interpolate(images, size, mode="bilinear", antialias=True)


def without_padding(images: Tensor, aspect: float) -> Tensor:
    """Crop the borders off pictures padded to squares: (N, C, S, S) -> (N, C, H, W) with W / H about `aspect`."""
    side = images.shape[-1]
    height, width = round(side / max(1.0, aspect)), round(side * min(1.0, aspect))
    top, left = (side - height) // 2, (side - width) // 2
    return images[..., top : top + height, left : left + width]


def png_bytes(picture: NDArray[np.uint8], text: dict[str, str] | None = None) -> bytes:
    """Encode a picture (H, W, 3) as PNG, with `text` in its metadata.

    Pillow would look for the best filter of each row, and takes three times as long for about the same size.
    """
    height, width, channels = picture.shape
    pixels = picture.reshape(height, width * channels)
    rows = np.empty((height, 1 + width * channels), np.uint8)
    rows[:, 0], rows[:, 1 : 1 + channels] = SUB, pixels[:, :channels]
    np.subtract(pixels[:, channels:], pixels[:, :-channels], out=rows[:, 1 + channels :])
    # only runs of equal bytes: searching for other repetitions makes sampled pictures larger (docs/dev/decisions.md)
    deflate = zlib_ng.compressobj(1, strategy=zlib_ng.Z_RLE)
    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, value)
    buffer = io.BytesIO(PNG_SIGNATURE)
    buffer.seek(len(PNG_SIGNATURE))
    putchunk(buffer, b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0))  # 8 bits, RGB
    for kind, data, *_ in info.chunks:
        putchunk(buffer, kind, data)
    putchunk(buffer, b"IDAT", deflate.compress(rows) + deflate.flush())
    putchunk(buffer, b"IEND")
    return buffer.getvalue()


def read_png(data: bytes) -> NDArray[np.uint8]:
    """Decode a PNG to (H, W, 3). Raises what Pillow raises, and ValueError as `to_rgb`."""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
        return np.asarray(to_rgb(picture))


def grid(images: Tensor, columns: int = 8) -> NDArray[np.uint8]:
    """Arrange pictures (N, 3, H, W) in [-1, 1] as `sheet` does."""
    return sheet(to_uint8(images), columns)


def sheet(pictures: NDArray[np.uint8], columns: int = 8) -> NDArray[np.uint8]:
    """Arrange pictures (N, H, W, 3) on black, `columns` to a row. A single one stays as it is, as in torchvision."""
    n, height, width, channels = pictures.shape
    if n == 1:
        return pictures.reshape(height, width, channels)
    step_x, step_y, columns = width + GAP, height + GAP, min(columns, n)
    whole = np.zeros((GAP + -(-n // columns) * step_y, GAP + columns * step_x, channels), np.uint8)
    for i, picture in enumerate(pictures):
        x, y = GAP + i % columns * step_x, GAP + i // columns * step_y
        whole[y : y + height, x : x + width] = picture
    return whole


def marked_grid(pictures: NDArray[np.uint8], right: Sequence[bool], columns: int) -> NDArray[np.uint8]:
    """Arrange pictures (N, H, W, 3): a green frame with a tick if `right`, else a red frame with a cross."""
    n, height, width, _ = pictures.shape
    frame = max(2, min(height, width) // 24)
    bar = max(15, min(height, width) // 5)  # holds the mark, below the picture
    step_x, step_y = width + 2 * frame + GAP, height + frame + bar + GAP
    sheet = Image.new("RGB", (GAP + columns * step_x, GAP + -(-n // columns) * step_y))
    draw = ImageDraw.Draw(sheet)
    for i, (picture, good) in enumerate(zip(pictures, right, strict=True)):
        x, y = GAP + i % columns * step_x, GAP + i // columns * step_y
        draw.rectangle((x, y, x + step_x - GAP - 1, y + step_y - GAP - 1), RIGHT if good else WRONG)
        sheet.paste(Image.fromarray(picture), (x + frame, y + frame))
        side = bar - 5
        left, top = x + (step_x - GAP - side) // 2, y + frame + height + 2
        for line in TICK if good else CROSS:
            draw.line([(left + u * side, top + v * side) for u, v in line], "white", width=max(2, bar // 7))
    return np.asarray(sheet)
