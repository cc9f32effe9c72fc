"""Reading a data set folder: squares made by hand, the cache of decoded pictures, and every bad folder."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from iclevr.labels import ICLEVR
from shared.diffusion.layouts import OUTSIDE, as_rotations
from shared.pictures import to_images, without_padding
from shared.vocabulary import LabelError, Vocabulary
from tests.service.api.uploads.zips import png_of_16_bits
from tests.trainer_fixtures import write_data_folder
from trainer import data
from trainer.data import Dataset, as_tensor, in_vocabulary, labelled, load_dataset, to_float, to_square
from trainer.data_folder import find_pictures, read_picture
from trainer.errors import TrainerError
from trainer.joined import Joined, chunks


def _rows(*values: int, width: int) -> Image.Image:
    """Return a picture whose rows have these gray values."""
    return Image.fromarray(np.repeat(np.array(values, np.uint8)[:, None, None], width, 1).repeat(3, 2))


def test_pad_repeats_the_edge_rows_or_columns() -> None:
    wide = _rows(10, 20, width=4)
    assert np.asarray(to_square(wide, 4, "pad"))[:, :, 0].tolist() == [[10] * 4, [10] * 4, [20] * 4, [20] * 4]
    assert np.asarray(to_square(_rows(10, 20, width=3), 3, "pad"))[:, 0, 0].tolist() == [10, 20, 20]
    tall = wide.transpose(Image.Transpose.ROTATE_90)  # 2 wide, 4 high, columns 10 and 20
    assert np.asarray(to_square(tall, 4, "pad"))[0, :, 0].tolist() == [10, 10, 20, 20]


@pytest.mark.parametrize(("height", "width"), [(24, 32), (6, 3)])
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
    assert (squeezed.shape, squeezed[:, 0].max(), squeezed[:, 3].min()) == ((4, 4, 3), 0, 200)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_become_white_in_every_mode(tmp_path: Path, mode: str) -> None:
    icon = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    icon.paste((0, 0, 0, 255), (2, 2, 4, 4))
    icon.convert(mode).save(tmp_path / "icon.png")
    assert np.unique(np.asarray(read_picture(tmp_path / "icon.png"))).tolist() == [0, 255]


@pytest.mark.parametrize("colour_type", [0, 2, 4, 6])  # grey, RGB, both with alpha
def test_a_file_of_16_bits_a_channel_is_refused(tmp_path: Path, colour_type: int) -> None:
    (tmp_path / "a.png").write_bytes(png_of_16_bits(colour_type))
    with pytest.raises(TrainerError, match=r"a\.png: cannot be read .*more than 8 bits a channel; save it with 8"):
        read_picture(tmp_path / "a.png")


def test_a_photograph_is_rotated_as_its_exif_says(tmp_path: Path) -> None:
    lying = _rows(*[0] * 16, *[250] * 16, width=16)
    exif = lying.getexif()
    exif[274] = 6  # orientation: rotate clockwise by a quarter
    lying.save(tmp_path / "photo.jpg", exif=exif)
    pixels = np.asarray(read_picture(tmp_path / "photo.jpg"))
    assert pixels.shape == (16, 32, 3)
    assert (pixels[:, 0].min() > 240, pixels[:, -1].max() < 10) == (True, True)


def test_full_size_pictures_have_the_size_of_the_first_or_the_one_asked_for(tmp_path: Path) -> None:
    folder = write_data_folder(tmp_path / "data", pictures=3, width=32, height=24)
    Image.new("RGB", (64, 48), "red").save(folder / "iclevr" / "CLEVR_train_000002_0.png")
    own = find_pictures([folder], None)
    assert [own.read(i).size for i in range(3)] == [own.size] * 3 == [(32, 24)] * 3
    assert own.read(2).getpixel((5, 5)) == (255, 0, 0)
    assert as_tensor(find_pictures([folder], "20x12").read(0)).shape == (3, 12, 20)
    for size in ("20", "0x12", "99999x1"):
        with pytest.raises(TrainerError, match=f'--size "{size}" is not of the form 320x240'):
            find_pictures([folder], size)


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
    path = folder / "iclevr/CLEVR_train_000007_0.png"
    time = path.stat().st_mtime_ns
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)).save(path)
    os.utime(path, ns=(time, time))  # as an archive may, which gives all its files one time
    changed = load_dataset(folder, size=8).images
    assert [i for i in range(24) if not torch.equal(changed[i], first.images[i])] == [7]
    os.utime(path, (1, 1))  # another picture of the same size
    load_dataset(folder, size=8)
    assert len(decoded) == 96
    kept = sorted(path.name.rpartition("-")[0] for path in (folder / ".cache").iterdir())
    assert kept == ["8-pad", "8-squeeze"]  # no former pictures


@pytest.mark.parametrize("kept", [0, 4, 1000])
def test_a_damaged_cache_is_written_again(tmp_path: Path, kept: int) -> None:
    folder = write_data_folder(tmp_path / "d")
    wanted = load_dataset(folder, size=8).images.clone()
    (cache,) = (folder / ".cache").iterdir()
    whole = cache.read_bytes()
    cache.write_bytes(whole[:kept])
    assert torch.equal(load_dataset(folder, size=8).images, wanted)
    assert cache.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_still_read(tmp_path: Path) -> None:
    folder = write_data_folder(tmp_path / "d")
    (folder / ".cache").write_text("no folder")
    assert len(load_dataset(folder, size=8)) == 24


def test_the_folder_that_data_sets_are_in_is_refused(tmp_path: Path) -> None:
    write_data_folder(tmp_path / "train", pictures=1)
    with pytest.raises(TrainerError, match=f"{tmp_path} is no data set, but {tmp_path}/train is one"):
        load_dataset(tmp_path, size=8)


@pytest.mark.parametrize(
    ("index", "content", "message"),
    [
        (0, lambda png: None, r'picture "CLEVR_train_000000_0.png" is neither in it nor'),
        (9, lambda png: None, r"CLEVR_train_000009_0.png: cannot be read as a picture"),
        (9, lambda png: png[:45], r"CLEVR_train_000009_0.png: cannot be read as a picture"),
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


def test_a_bad_label_file_is_refused(tmp_path: Path) -> None:
    folder = write_data_folder(tmp_path / "d")
    (folder / "train.json").write_text('{"a.png": ["red cub"]}')
    with pytest.raises(LabelError, match=r'entry "a\.png": unknown label "red cub"; did you mean "red cube"'):
        load_dataset(folder, size=8)


def test_pictures_without_labels_go_with_all_that_belongs_to_them() -> None:
    labels, positions = torch.tensor([[1.0], [0], [1]]), torch.rand(3, 1, 2)
    dataset = Dataset(Vocabulary(("a",)), torch.arange(3, dtype=torch.uint8)[:, None, None, None], labels, positions)
    left = labelled(dataset)
    assert left.positions is not None
    assert (left.images[:].flatten().tolist(), left.labels.tolist()) == ([0, 2], [[1], [1]])
    assert torch.equal(left.positions, positions[[0, 2]])


def test_pictures_of_several_folders_are_read_where_they_are_when_they_are_asked_for(tmp_path: Path) -> None:
    """The joined data set learns from the same digest as if all its pictures were one tensor in memory."""
    folders = [write_data_folder(tmp_path / str(n), pictures=24 * n) for n in (1, 2)]
    parts = [load_dataset(folder, size=8) for folder in folders]
    assert data.merge(parts[:1]) is parts[0]  # nothing is copied
    both = data.merge(parts)
    assert isinstance(both.images, Joined)
    assert [own is part.images for own, part in zip(both.images.parts, parts, strict=True)] == [True, True]
    whole = torch.cat([part.images[:] for part in parts])
    assert both.digest == replace(both, images=whole).digest
    for index in (torch.tensor([71, 3, 24, 3, 23]), slice(20, 30), whole[:, 0, 0, 0] > 100):
        assert torch.equal(both.images[index], whole[index])
    assert (both.images.shape, [len(one) for one in chunks(both.images, 50)]) == (whole.shape, [50, 22])
    known = torch.arange(72) % 3 == 0
    few = labelled(replace(both, labels=both.labels * known[:, None]))
    assert torch.equal(few.images[:], whole[known])
    assert torch.equal(data.merge([few, few]).images[torch.tensor([25, 1])], whole[known][[1, 1]])


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
