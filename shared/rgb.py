"""Pictures of every kind that Pillow reads as RGB, for all who show them to a network. Imports no torch."""

from PIL import Image


def to_rgb(picture: Image.Image) -> Image.Image:
    """What is transparent shows white. ValueError for more than 8 bits a channel, which Pillow would clip."""
    if picture.mode.startswith(("I", "F")):
        raise ValueError(f"mode {picture.mode}: more than 8 bits a channel; save it with 8")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA")).convert("RGB")
