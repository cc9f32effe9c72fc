"""PNGs from outside: which kinds are accepted, and that damaged ones are read right or refused."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from service.api.uploads.png import PngError, check_picture
from shared.pictures import read_png
from tests.service.api.uploads.zips import GOOD, png


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "LA"])
def test_pngs_of_every_colour_type_are_accepted(mode: str) -> None:
    assert check_picture(png(mode=mode, size=(20, 10)), 20) == (20, 10)


def test_sixteen_bits_are_refused_rather_than_clipped() -> None:
    buffer = io.BytesIO()
    Image.new("I;16", (8, 8), 40000).save(buffer, "PNG")
    with pytest.raises(PngError, match="more than 8 bits a channel; save it with 8"):
        check_picture(buffer.getvalue(), 8)


@given(st.lists(st.tuples(st.integers(0, len(GOOD["0.png"]) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_damaged_pngs_are_read_right_or_refused(changes: list[tuple[int, int]]) -> None:
    content = bytearray(GOOD["0.png"])
    for at, byte in changes:
        content[at] = byte
    try:
        size = check_picture(bytes(content), 64)
    except PngError:
        return
    assert read_png(bytes(content)).shape == (size[1], size[0], 3)
