"""Converts any picture that Pillow reads to RGB. Imports no torch, so the API may use it too."""

from PIL import Image


def to_rgb(picture: Image.Image) -> Image.Image:
    """Return the picture as RGB on white. ValueError for more than 8 bits a channel, which Pillow would clip."""
    if picture.mode.startswith(("I", "F")):
        raise ValueError(f"mode {picture.mode}: more than 8 bits a channel; save it with 8 bits")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA")).convert("RGB")
