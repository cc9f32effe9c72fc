"""Scaled pictures: the parts make a PNG of the same pixels as Pillow's."""

import io

import numpy as np
import pytest
from PIL import Image

from service.openai.sizes import scaled, size_of
from tests.service.api.answers import pixels
from tests.service.api.uploads.zips import png


def smooth() -> Image.Image:
    y, x = np.mgrid[:48, :64] / 8
    waves = np.stack([np.sin(x), np.cos(y), np.sin(x + y)], -1)
    return Image.fromarray((127 + 120 * waves).astype(np.uint8))


@pytest.mark.parametrize("size", [(1024, 768), (2048, 2047), (65, 1), (1, 2048), (32, 24)])
def test_a_scaled_picture_has_pillows_pixels(size: tuple[int, int]) -> None:
    source, file = smooth(), io.BytesIO()
    source.save(file, "PNG")
    found = pixels(b"".join(scaled(file.getvalue(), size)))
    assert np.abs(found - np.asarray(source.resize(size, Image.Resampling.LANCZOS))).max() <= 2  # it rounds in between


def test_the_size_is_the_largest_within_the_asked_one_that_is_not_distorted() -> None:
    assert size_of((320, 240), "1024x1024") == (1024, 768)
    assert size_of((320, 240), "1x2048") == (1, 1)
    assert size_of((320, 240), "auto") == (320, 240)


def test_a_picture_that_has_the_size_stays_as_it_is() -> None:
    own = png(1, size=(16, 16))
    assert list(scaled(own, (16, 16))) == [own]
