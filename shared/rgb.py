"""Converts any picture that Pillow reads to RGB. Imports no torch, so the API may use it too."""

import re

from PIL import Image, ImageFile

# How Pillow names 16 bits a channel in a file: "RGB;16B", by the order of the bytes. "BGR;16" is 16 bits a pixel.
SIXTEEN_BITS = re.compile(r"\w+;16[BLN]")


def to_rgb(picture: Image.Image) -> Image.Image:
    """Return the picture as RGB on white. ValueError as of `check_depth`."""
    check_depth(picture)
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA")).convert("RGB")


def check_depth(picture: Image.Image) -> None:
    """Raise ValueError for a picture with more than 8 bits a channel, which Pillow would clip.

    Of a decoded colour picture the depth is no longer known, so pass one as `Image.open` returns it.
    """
    tiles = picture.tile if isinstance(picture, ImageFile.ImageFile) else []
    depths = [picture.mode] if picture.mode.startswith(("I", "F")) else []
    depths += [match[0] for tile in tiles if (match := SIXTEEN_BITS.search(str(tile.args)))]
    if depths:
        raise ValueError(f"mode {depths[0]}: more than 8 bits a channel; save it with 8 bits")
