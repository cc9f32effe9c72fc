"""PNGs from outside: which kinds are accepted, and that damaged ones and their recipes are read right or refused."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api import uploads
from service.api.uploads import MAX_CHUNKS, SIGNATURE, PngError, check_picture
from service.contract.recipe import JudgedRecipe, Recipe, example
from shared.options import LIMITS
from shared.pictures import png_bytes, read_png
from tests.service.api.answers import png_with
from tests.service.api.uploads.zips import GOOD, chunk, png, png_of_16_bits, with_chunks
from tests.service.contract.strategies import recipes


def reduced(png: bytes, side: int = 64) -> bytes:
    return uploads.reduced(io.BytesIO(png), side)


def recipe_of(png: bytes) -> Recipe:
    return uploads.recipe_of(io.BytesIO(png))


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "1"])
def test_pngs_of_every_colour_type_are_accepted(mode: str) -> None:
    assert check_picture(png(mode=mode, size=(20, 10)), 20) == (20, 10)


@pytest.mark.parametrize("colour_type", [0, 2])
def test_sixteen_bits_are_refused_rather_than_clipped(colour_type: int) -> None:
    with pytest.raises(PngError, match="more than 8 bits a channel; save it with 8"):
        check_picture(png_of_16_bits(colour_type), 8)


@pytest.mark.parametrize(
    "header", [chunk(b"IHDR", struct.pack(">2I5B", side, side, 8, 2, 0, 0, 0)) for side in (17, 1 << 20)]
)
def test_a_second_header_counts_before_anything_is_decoded(header: bytes) -> None:
    with pytest.raises(PngError, match="cannot be used: "):
        check_picture(with_chunks(png(), header), 16)


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


END = chunk(b"IEND")
EXIF = chunk(b"eXIf", b"MM\0\x2a\0\0\0\x08\0\0")
RECIPE = chunk(b"iTXt", b"labelgrid\0\0\0\0\0{}")
PACKED = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * (1 << 20)))


def test_a_recipe_after_the_pixels_is_read() -> None:
    late = chunk(b"zTXt", b"labelgrid\0\0" + zlib.compress(json.dumps(example()).encode()))
    assert recipe_of(png().replace(END, late + END)) == Recipe.model_validate(example())


def test_a_damaged_recipe_is_reported_without_an_objects_address() -> None:
    content = png().replace(END, RECIPE[:-1] + bytes([RECIPE[-1] ^ 1]) + END)
    for read in (recipe_of, lambda png: check_picture(reduced(png), 64)):
        with pytest.raises(PngError, match="its header, palette or recipe is damaged"):
            read(content)


def test_only_pixels_and_recipe_are_kept() -> None:
    assert reduced(WITH_RECIPE) == WITH_RECIPE
    assert reduced(with_chunks(WITH_RECIPE, EXIF + PACKED) + b"appended") == WITH_RECIPE


def test_the_number_of_chunks_is_limited() -> None:
    header_and_end = 2
    fits = with_chunks(png(), EXIF * (MAX_CHUNKS - header_and_end))
    assert reduced(fits) == png()
    with pytest.raises(PngError, match="too many chunks; at most 64"):
        reduced(with_chunks(fits, EXIF))


BOMBS = {
    "empty chunks": (with_chunks(png(), chunk(b"teXt") * (1 << 20)), "too many chunks"),
    "empty pixel chunks": (png().replace(chunk(b"IEND"), chunk(b"IDAT") * (1 << 20)), "too many chunks"),
    "packed texts": (with_chunks(png(), PACKED * 65), "too many chunks"),
    "a recipe cut short": (png().replace(END, RECIPE[:-1]), "one that is cut short"),
    "two recipes": (with_chunks(png(), RECIPE * 2), "several recipes"),
    "a long recipe": (with_chunks(png(), chunk(b"iTXt", b"labelgrid\0" + bytes(1 << 20))), "more than 1048576 bytes"),
}


@pytest.mark.parametrize(("content", "words"), BOMBS.values(), ids=BOMBS)
def test_pillow_never_sees_a_bomb(content: bytes, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("PIL.Image.open")
    with pytest.raises(PngError, match=words):
        recipe_of(content)
    with pytest.raises(PngError, match=words):
        reduced(content)


def test_more_data_than_the_pixels_need_is_not_kept() -> None:
    with pytest.raises(PngError, match="more data than 16x16 pixels need"):
        reduced(png().replace(END, chunk(b"IDAT", bytes(1 << 20)) + END), 16)
    noise = png(size=(16, 16))
    assert reduced(noise, 16) == noise


def test_many_chunks_of_pixels_are_accepted() -> None:
    """libpng writes 8 KiB of them at a time; these have 1 KiB."""
    data = zlib.compress(bytes(512 * (1 + 3 * 512)), 0)
    pixels = b"".join(chunk(b"IDAT", data[at : at + 1024]) for at in range(0, len(data), 1024))
    content = SIGNATURE + chunk(b"IHDR", struct.pack(">2I5B", 512, 512, 8, 2, 0, 0, 0)) + pixels + END
    assert reduced(content, 512) == content
    assert check_picture(content, 512) == (512, 512)


PIXELS = np.zeros((2, 3, 3), np.uint8)


@given(recipes)
def test_a_recipe_reads_back_unchanged_from_its_png_of_its_verdicts_the_places(recipe: JudgedRecipe) -> None:
    places = [{"places": verdict.model_dump()["places"]} for verdict in recipe.verdicts]
    expected = recipe.model_copy(update={"evaluator": None}).model_dump() | {"verdicts": places}
    assert recipe_of(png_bytes(PIXELS, recipe.text())).model_dump() == expected


def test_a_recipe_of_very_many_parts_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recipe, "model_validate_json", None)
    text = json.dumps({**example(), "verdicts": [[]] * LIMITS.max_parts})
    packed = zlib.compress(text.encode(), 9)
    assert len(packed) < 1000
    content = png().replace(END, chunk(b"zTXt", b"labelgrid\0\0" + packed) + END)
    with pytest.raises(PngError, match="more than 10000 lists and objects"):
        recipe_of(content)


def test_the_longest_recipe_is_read() -> None:
    point = {"x": 0.5, "y": 0.5}
    labels = [[f"label {i}" for i in range(LIMITS.max_labels)]] * LIMITS.max_pictures_per_request
    verdict = {"accuracy": 1.0, "exact": True, "f1": 1.0, "scores": dict.fromkeys("abcdefghijklmnopqrstu", 0.5)}
    more = {"labels": labels, "layouts": [[point] * LIMITS.max_labels] * len(labels), "verdicts": [verdict] * 256}
    assert recipe_of(png_with(json.dumps(example() | more))).labels == labels
