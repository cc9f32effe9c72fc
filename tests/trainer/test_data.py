"""Reading a data set folder: squares made by hand, the cache of decoded pictures, and every bad folder."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shared.diffusion.layouts import OUTSIDE, as_rotations
from shared.pictures import to_images, without_padding
from shared.vocabulary import ICLEVR, LabelError, Vocabulary
from tests.service.api.uploads.zips import png_of_16_bits
from tests.trainer_fixtures import write_data_folder
from trainer import data
from trainer.data import Dataset, in_vocabulary, load_dataset, read_picture, to_float, to_square
from trainer.errors import TrainerError


def _rows(*values: int, width: int) -> Image.Image:
    """Return a picture whose rows have these gray values."""
    return Image.fromarray(np.repeat(np.array(values, np.uint8)[:, None, None], width, 1).repeat(3, 2))


def test_pad_repeats_the_edge_rows() -> None:
    padded = np.asarray(to_square(_rows(10, 20, width=4), 4, "pad"))
    assert padded[:, :, 0].tolist() == [[10] * 4, [10] * 4, [20] * 4, [20] * 4]


def test_pad_of_an_odd_difference_and_of_a_tall_picture() -> None:
    assert np.asarray(to_square(_rows(10, 20, width=3), 3, "pad"))[:, 0, 0].tolist() == [10, 20, 20]
    tall = _rows(10, 20, width=4).transpose(Image.Transpose.ROTATE_90)  # 2 wide, 4 high, columns 10 and 20
    assert np.asarray(to_square(tall, 4, "pad"))[0, :, 0].tolist() == [10, 10, 20, 20]


@pytest.mark.parametrize(("height", "width"), [(24, 32), (32, 24), (3, 6), (8, 8)])
def test_cropping_the_padding_restores_the_picture(height: int, width: int) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), np.uint8)
    padded = data.pad(pictures)
    assert padded.shape == (2, max(height, width), max(height, width), 3)
    inside = without_padding(to_images(padded), width / height)
    assert torch.equal(inside, to_images(pictures))


def test_a_padded_data_set_knows_its_pictures_proportions(tmp_path: Path) -> None:
    wide = write_data_folder(tmp_path / "wide", width=16, height=12)
    tall = write_data_folder(tmp_path / "tall", width=12, height=16)
    assert load_dataset(wide, size=8, fit="squeeze").aspect == 1.0
    padded = [load_dataset(folder, size=8, fit="pad") for folder in (wide, tall)]
    assert [one.aspect for one in padded] == [16 / 12, 12 / 16]
    assert data.merge([padded[0], padded[0]]).aspect == 16 / 12
    with pytest.raises(TrainerError, match="the folders' pictures differ in proportions"):
        data.merge(padded)


def test_pictures_of_different_proportions_can_be_squeezed_but_not_padded(tmp_path: Path) -> None:
    folder = write_data_folder(tmp_path / "d", pictures=4)
    tall = sorted((folder / "iclevr").iterdir())[-1]
    Image.new("RGB", (12, 16)).save(tall)
    assert load_dataset(folder, size=8, fit="squeeze").aspect == 1.0
    with pytest.raises(TrainerError, match="pictures differ in proportions"):
        load_dataset(folder, size=8, fit="pad")


def test_squeeze_shows_the_whole_picture() -> None:
    halves = np.zeros((6, 16, 3), np.uint8)
    halves[:, 8:] = 200
    squeezed = np.asarray(to_square(Image.fromarray(halves), 4, "squeeze"))
    assert squeezed.shape == (4, 4, 3)
    assert squeezed[:, 0].max() == 0
    assert squeezed[:, 3].min() == 200
    padded = np.asarray(to_square(Image.fromarray(halves), 16, "pad"))
    np.testing.assert_array_equal(padded, np.broadcast_to(halves[:1], (16, 16, 3)))


def test_a_square_of_the_right_size_is_unchanged() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    for fit in ("squeeze", "pad"):
        np.testing.assert_array_equal(to_square(Image.fromarray(picture), 8, fit), picture)  # type: ignore[arg-type]


def test_other_modes_become_rgb() -> None:
    gray = Image.new("L", (8, 8), 77)
    assert np.asarray(to_square(gray, 8, "squeeze")).tolist() == [[[77] * 3] * 8] * 8


def test_transparent_pixels_become_white_in_every_mode(tmp_path: Path) -> None:
    icon = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    icon.paste((0, 0, 0, 255), (2, 2, 4, 4))
    for kind in ("RGBA", "LA", "P"):
        icon.convert(kind).save(tmp_path / "icon.png")
        with Image.open(tmp_path / "icon.png") as picture:
            assert np.unique(np.asarray(to_square(picture, 8, "squeeze"))).tolist() == [0, 255]


def test_opaque_pictures_keep_their_values() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    opaque = Image.fromarray(np.dstack([pixels, np.full((64, 64), 255, np.uint8)]))
    np.testing.assert_array_equal(to_square(opaque, 64, "squeeze"), pixels)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["I;16", "F"])
def test_more_than_8_bits_are_refused_rather_than_clipped(kind: str) -> None:
    with pytest.raises(ValueError, match="more than 8 bits a channel; save it with 8"):
        to_square(Image.new(kind, (8, 8)), 8, "squeeze")


@pytest.mark.parametrize("colour_type", [0, 2, 4, 6])  # grey, RGB, both with alpha
def test_a_file_of_16_bits_a_channel_is_refused(tmp_path: Path, colour_type: int) -> None:
    (tmp_path / "a.png").write_bytes(png_of_16_bits(colour_type))
    with pytest.raises(ValueError, match="more than 8 bits a channel; save it with 8"):
        read_picture(tmp_path / "a.png")


def test_a_photograph_is_rotated_as_its_exif_says(tmp_path: Path) -> None:
    lying = _rows(*[0] * 16, *[250] * 16, width=16)
    exif = lying.getexif()
    exif[274] = 6  # orientation: rotate clockwise by a quarter
    lying.save(tmp_path / "photo.jpg", exif=exif)
    pixels = np.asarray(read_picture(tmp_path / "photo.jpg"))
    assert pixels.shape == (16, 32, 3)
    assert (pixels[:, 0].min() > 240, pixels[:, -1].max() < 10) == (True, True)


def test_pictures_and_labels(tmp_path: Path) -> None:
    dataset = load_dataset(write_data_folder(tmp_path / "d"), size=8)
    assert dataset.images.shape == (24, 3, 8, 8)
    assert dataset.images.dtype == torch.uint8
    assert torch.equal(dataset.labels, torch.eye(24))
    assert dataset.vocabulary == ICLEVR
    assert dataset.images[5, :, 3, 3].tolist() == [80, 180, 160]
    floats = to_float(dataset.images[:2])
    assert floats[0, :, 0, 0].tolist() == pytest.approx([v / 127.5 - 1 for v in (40, 220, 60)])


def test_pictures_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, decoded, advanced = write_data_folder(tmp_path / "d"), [], []
    original: Callable[..., Image.Image] = to_square

    def counting(picture: Image.Image, size: int, fit: data.Fit) -> Image.Image:
        decoded.append(size)
        return original(picture, size, fit)

    monkeypatch.setattr(data, "to_square", counting)
    first = load_dataset(folder, size=8, advance=advanced.append)
    again = load_dataset(folder, size=8)
    assert len(decoded) == sum(advanced) == 24
    assert torch.equal(first.images, again.images)
    load_dataset(folder, size=8, fit="pad")
    assert len(decoded) == 48
    os.utime(folder / "iclevr" / "CLEVR_train_000007_0.png", (1, 1))  # another picture under the same name
    load_dataset(folder, size=8)
    assert len(decoded) == 72
    kept = sorted(path.name.rpartition("-")[0] for path in (folder / ".cache").iterdir())
    assert kept == ["8-pad", "8-squeeze"]  # no former pictures


def test_a_picture_of_another_size_and_the_same_time_is_decoded_again(tmp_path: Path) -> None:
    folder = write_data_folder(tmp_path / "d", pictures=1)
    (path,) = (folder / "iclevr").iterdir()
    before, time = load_dataset(folder, size=8).images, path.stat().st_mtime_ns
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)).save(path)
    os.utime(path, ns=(time, time))  # as an archive may, which gives all its files one time
    assert not torch.equal(load_dataset(folder, size=8).images, before)


@pytest.mark.parametrize("content", [b"junk", b"", b"half", b"other pictures"])
def test_a_damaged_cache_is_written_again(tmp_path: Path, content: bytes) -> None:
    folder = write_data_folder(tmp_path / "d")
    wanted = load_dataset(folder, size=8).images
    (cache,) = (folder / ".cache").iterdir()
    whole = cache.read_bytes()
    if content == b"other pictures":
        np.save(cache, wanted[1:].numpy())
    else:
        cache.write_bytes(whole[: len(whole) // 2] if content == b"half" else content)
    assert torch.equal(load_dataset(folder, size=8).images, wanted)
    assert cache.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_still_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_data_folder(tmp_path / "d")

    def full(path: Path, _: object) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert len(load_dataset(folder, size=8)) == 24
    assert list((folder / ".cache").iterdir()) == []
    (folder / ".cache").rmdir()
    (folder / ".cache").write_text("no folder")
    assert len(load_dataset(folder, size=8)) == 24


def test_the_folder_that_data_sets_are_in_is_refused(tmp_path: Path) -> None:
    for name in ("train", "heldout"):
        write_data_folder(tmp_path / name)
    with pytest.raises(TrainerError, match=f"{tmp_path} is no data set, but {tmp_path}/heldout is one"):
        load_dataset(tmp_path, size=8)


@pytest.mark.parametrize(
    ("index", "content", "message"),
    [
        (0, lambda png: None, r'picture "CLEVR_train_000000_0.png" is in none of iclevr, images'),
        (9, lambda png: None, r"CLEVR_train_000009_0.png: cannot be read as a picture"),
        (9, lambda png: png[:45], r"CLEVR_train_000009_0.png: cannot be read as a picture"),
        (9, lambda png: b"", r"CLEVR_train_000009_0.png: cannot be read as a picture"),
        (9, lambda png: png[:8] + b"\0\0\0\2IHDR" + bytes(6), r"CLEVR_train_000009_0.png: cannot be read as a picture"),
    ],
)
def test_missing_and_broken_pictures_are_refused(
    tmp_path: Path, index: int, content: Callable[[bytes], bytes | None], message: str
) -> None:
    folder = write_data_folder(tmp_path / "d")
    path = folder / "iclevr" / f"CLEVR_train_{index:06d}_0.png"
    changed = content(path.read_bytes())
    path.unlink() if changed is None else path.write_bytes(changed)
    with pytest.raises(TrainerError, match=message):
        load_dataset(folder, size=8)
    assert not list(folder.glob(".cache/*")), "a half-read folder must leave no cache"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train.json", '{"a.png": ["red cub"]}', 'entry "a.png": unknown label "red cub"; did you mean "red cube"'),
        ("objects.json", '{"red cube": 1}', "is not one of 0..0"),
    ],
)
def test_bad_label_files_are_refused(tmp_path: Path, file: str, content: str, message: str) -> None:
    folder = write_data_folder(tmp_path / "d")
    (folder / file).write_text(content)
    with pytest.raises(LabelError, match=re.escape(message)):
        load_dataset(folder, size=8)


def test_labels_move_to_another_vocabulary_with_positions_and_rotations() -> None:
    labels = torch.tensor([[1.0, 0, 1], [0, 0, 1]])
    positions = torch.full((2, 3, 2), OUTSIDE).where(labels[..., None] == 0, torch.tensor([0.2, 0.3]))
    rotations = as_rotations(torch.tensor([[0.1, torch.nan, 0.2], [torch.nan, torch.nan, 0.3]]))
    before = Dataset(Vocabulary(("a", "unused", "c")), torch.zeros(2, 3, 4, 4), labels, positions, rotations)
    after = in_vocabulary(before, Vocabulary(("b", "c", "a")), "model")
    assert after.labels.tolist() == [[0, 1, 1], [0, 1, 0]]
    assert after.positions is not None
    assert after.rotations is not None
    for moved, original in ((after.positions, positions), (after.rotations, rotations)):
        assert torch.equal(moved[:, [2, 1]], original[:, [0, 2]])
    assert (after.positions[:, 0] == OUTSIDE).all()
    assert (after.rotations[:, 0] == 0).all()
    with pytest.raises(TrainerError, match="model does not know labels of the folder: c"):
        in_vocabulary(before, Vocabulary(("a", "b")), "model")
    both = data.merge([after, before])
    assert both.vocabulary == after.vocabulary
    assert torch.equal(both.labels, torch.cat([after.labels, after.labels]))
