"""Pictures as bytes: float to 8 bits, PNG, grids."""

import io

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torchvision.utils import make_grid


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """(N, C, H, W) in [-1, 1] -> (N, H, W, C)."""
    scaled = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return np.asarray(scaled.permute(0, 2, 3, 1).contiguous().cpu().numpy())


def to_images(pictures: NDArray[np.uint8]) -> Tensor:
    """(N, H, W, C) -> (N, C, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def png_bytes(picture: NDArray[np.uint8], text: dict[str, str] | None = None) -> bytes:
    """PNG of (H, W, 3), with `text` in its metadata."""
    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, value)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def read_png(data: bytes) -> NDArray[np.uint8]:
    """(H, W, 3) of a PNG."""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
        return np.asarray(picture.convert("RGB"))


def grid(images: Tensor, columns: int = 8, padding: int = 2) -> NDArray[np.uint8]:
    """(N, 3, H, W) in [-1, 1] -> one picture, `columns` to a row."""
    sheet = make_grid(images.float().clamp(-1, 1), nrow=columns, padding=padding, pad_value=-1.0)
    return np.asarray(to_uint8(sheet[None])[0])
