"""Pictures at the size that a client asks for."""

import io

from PIL import Image

from service.openai.sizes import scaled, size_of
from tests.service.api.answers import png_with


def test_a_scaled_picture_is_an_rgb_png_without_a_recipe() -> None:
    small = Image.open(io.BytesIO(scaled(png_with("{}", (64, 48)), (1024, 768))))
    assert (small.size, small.mode, small.info) == ((1024, 768), "RGB", {})


def test_the_size_is_the_largest_within_the_asked_one_that_is_not_distorted() -> None:
    assert size_of((320, 240), "1024x1024") == (1024, 768)
    assert size_of((320, 240), "1x2048") == (1, 1)
    assert size_of((320, 240), "auto") == (320, 240)
