"""Converts any picture that Pillow reads to RGB. Imports no torch, so the API may use it too."""

import re

from PIL import Image, ImageFile

# How Pillow names 16 bits a channel in a file: "RGB;16B", by the order of the bytes. "BGR;16" is 16 bits a pixel.
SIXTEEN_BITS = re.compile(r"\w+;16[BLN]")


def to_rgb(picture: Image.Image) -> Image.Image:
    """Return the picture as RGB on white. ValueError for more than 8 bits a channel, which Pillow would clip.

    Of a decoded colour picture the depth is no longer known, so pass one as `Image.open` returns it.
    """
    if depth := _too_deep(picture):
        raise ValueError(f"mode {depth}: more than 8 bits a channel; save it with 8 bits")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA")).convert("RGB")


def _too_deep(picture: Image.Image) -> str | None:
    """Return the mode of a picture with more than 8 bits a channel, in memory or in its file; None for any other."""
    if picture.mode.startswith(("I", "F")):
        return picture.mode
    tiles = picture.tile if isinstance(picture, ImageFile.ImageFile) else []
    found = [match[0] for tile in tiles if (match := SIXTEEN_BITS.search(str(tile.args)))]
    return found[0] if found else None
