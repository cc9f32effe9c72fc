"""PNGs from outside: which kinds are accepted, and that damaged ones and their recipes are read right or refused."""

import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from service.api.uploads.png import PngError, check_picture, recipe_of
from service.contract.recipe import Recipe, example
from shared.pictures import png_bytes, read_png
from tests.service.api.answers import png_with
from tests.service.api.uploads.zips import GOOD, png
from tests.service.contract.strategies import recipes, texts
from tests.shared.test_vocabulary import any_json


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


WITH_RECIPE = png_with(json.dumps(example()))


@given(
    cut=st.integers(0, len(WITH_RECIPE)),
    changes=st.lists(st.tuples(st.integers(0, len(WITH_RECIPE) - 1), st.integers(0, 255)), max_size=4),
)
def test_recipes_of_damaged_pngs_are_read_right_or_refused(cut: int, changes: list[tuple[int, int]]) -> None:
    content = bytearray(WITH_RECIPE)
    for position, value in changes:
        content[position] = value
    try:
        recipe = recipe_of(bytes(content[:cut]))
    except PngError:
        return
    assert recipe == Recipe.model_validate(example())  # chunks have checksums: what is read is what was written


PIXELS = np.zeros((2, 3, 3), np.uint8)


@given(recipes)
def test_a_recipe_reads_back_unchanged_from_its_png(recipe: Recipe) -> None:
    assert recipe_of(png_bytes(PIXELS, recipe.text())) == recipe


@given(
    any_json.map(json.dumps)
    | texts
    | st.builds(
        lambda name, value: json.dumps(example() | {name: value}),
        texts | st.sampled_from([*Recipe.model_fields]),
        any_json,
    )
)
def test_any_text_is_a_recipe_or_refused(text: str) -> None:
    try:
        recipe = recipe_of(png_with(text))
    except PngError:
        return
    assert recipe_of(png_bytes(PIXELS, recipe.text())) == recipe
