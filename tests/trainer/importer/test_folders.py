"""What an import writes: the folders that the trainer reads, and a list of what it left out."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shared.vocabulary import Vocabulary
from tests.trainer.command_line import Command, refused, succeeded
from trainer.data import load_dataset
from trainer.errors import TrainerError
from trainer.importer.folders import split, write_folders
from trainer.importer.formats import Item, Source


def picture(folder: Path, name: str, size: tuple[int, int] = (8, 8), seed: int = 0) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(folder / name)


def image_folder(folder: Path, rows: list[dict[str, object]]) -> Path:
    for i, row in enumerate(rows):
        picture(folder, str(row["file_name"]), seed=i)
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_the_trainer_reads_what_was_imported(tmp_path: Path, command: Command) -> None:
    rows: list[dict[str, object]] = [{"file_name": f"in/{i}.png", "labels": ["a", "bc"[i % 2]]} for i in range(10)]
    source = image_folder(tmp_path / "source", rows)
    picture(source, "plain.png")
    with (source / "metadata.jsonl").open("a") as file:
        for row in (
            {"file_name": "plain.png", "labels": []}, {"file_name": "gone.png", "labels": ["a"]},
            {"file_name": "text.png", "labels": ["a"]}, {"file_name": "../x.png", "labels": ["a"]},
            {"file_name": "in/0.png", "labels": ["c"]},
        ):  # fmt: skip
            file.write("\n" + json.dumps(row))
    (source / "text.png").write_text("no picture")
    out = succeeded(command("import", source, "data", "--held-out", "0.2", "--unlabelled"))
    assert "note: 3 labels have fewer than 10 training pictures" in out
    train, held_out = (load_dataset(tmp_path / "data" / part, size=8) for part in ("train", "held-out"))
    assert train.vocabulary == held_out.vocabulary == Vocabulary(("a", "b", "c"))
    assert (len(train), len(held_out)) == (9, 2)  # eight and the one without labels
    assert int(train.labels.any(1).sum()) == 8
    *listed, gone, text = (tmp_path / "data/skipped.txt").read_text().splitlines()
    assert listed == [
        "../x.png: is not inside the folder",
        "in/0.png: is listed twice; the first counts",
    ]
    assert [line.partition(" (")[0] for line in (gone, text)] == [
        f"{name}: {source / name}: cannot be read as a picture" for name in ("gone.png", "text.png")
    ]
    names = json.loads((tmp_path / "data/train/train.json").read_text())
    with (
        Image.open(tmp_path / "data/train/images" / next(iter(names))) as copy,
        Image.open(source / next(iter(names))) as original,
    ):
        assert copy.tobytes() == original.tobytes()
    refused(command("import", source, "data"), "data already holds a data set")


def test_one_split_of_a_source_is_imported(tmp_path: Path, command: Command) -> None:
    for name in ("train/cat/0.png", "train/dog/0.png", "test/dog/1.png"):
        picture(tmp_path / "source", name)
    refused(command("import", "source", "data"), "source has the splits test, train; import one at a time: --split tr")
    succeeded(command("import", "source", "data", "--split", "train", "--held-out", 0))
    assert json.loads(Path("data/train/train.json").read_text()) == {
        "train/cat/0.png": ["cat"], "train/dog/0.png": ["dog"]
    }  # fmt: skip


def test_a_picture_has_one_name(tmp_path: Path) -> None:
    picture(tmp_path, "in/a.png")
    picture(tmp_path, "b.png")
    items = [Item(name, ("x",), name) for name in ("./in/a.png", "in//a.png", "b.png")]
    report = write_folders(Source(items, tmp_path, []), tmp_path / "out", share=0, held_out=["./b.png"])
    assert ([one.name for one in report.train], [one.name for one in report.held_out]) == (["in/a.png"], ["b.png"])


def test_an_import_without_training_pictures_says_why(tmp_path: Path) -> None:
    picture(tmp_path, "a.png")
    source = Source([Item("a.png", ("x",), "a"), Item("\ud800.png", ("x",), "b")], tmp_path, [])
    with pytest.raises(TrainerError, match=r"left to train on: 1 are held out, 1 were skipped \(.*skipped\.txt\)"):
        write_folders(source, tmp_path / "out", share=0, held_out=["a.png"])
    assert r"\ud800.png: " in (tmp_path / "out/skipped.txt").read_text()
    with pytest.raises(TrainerError, match=r"left to train on: 1 have no labels$"):
        write_folders(Source([Item("a.png", (), "a")], tmp_path, []), tmp_path / "no", share=0, unlabelled=True)


def test_bad_arguments_of_import_are_refused(tmp_path: Path, command: Command) -> None:
    image_folder(tmp_path / "source", [{"file_name": "a.png", "labels": "x;y"}])
    refused(command("import", "source", "out", "--separator", ""), "the separator must not be empty")
    unread = command("import", "source", "out", "--held-out-files", "source/a.png")
    refused(unread, r"source/a\.png: cannot be read \(.*utf-8")
    Path("file").touch()
    refused(command("import", "source", "file"), r"'file' is a file", 2)


def test_a_picture_whose_objects_are_outside_is_kept_only_as_one_without_labels(tmp_path: Path) -> None:
    """The middle square of 20 x 10 begins at x = 5; the boxes of b and c end before it."""
    items = []
    for name, x in (("a", 8.0), ("b", 0.0), ("c", 0.0)):
        picture(tmp_path, f"{name}.png", (20, 10))
        items.append(Item(f"{name}.png", ("x",), name, ((x, 0.0, 4.0, 4.0),)))
    source = Source(items, tmp_path, [])
    reason = "has no object whose centre is in the middle square"
    report = write_folders(source, tmp_path / "out", share=0, held_out=["c.png"], crop=True)
    assert ([one.name for one in report.train], report.held_out) == (["a.png"], [])
    assert report.skipped == [("b.png", reason), ("c.png", reason)]
    report = write_folders(source, tmp_path / "kept", share=0, held_out=["c.png"], crop=True, unlabelled=True)
    assert json.loads((tmp_path / "kept/train/train.json").read_text()) == {"a.png": ["x"], "b.png": []}
    assert report.skipped == [("c.png", reason)]


def test_whole_label_sets_are_held_out() -> None:
    items = [Item(f"{i}", (f"s{i % 7}",), f"group {i % 7}") for i in range(70)]
    held = split(items, 0.3, None, seed=1)
    assert len(held) == 20  # two groups of ten; a third would be more than the share
    assert all((item.file in held) == (items[int(item.group[-1])].file in held) for item in items)
    assert split(items, 0.3, None, seed=2) != held
    assert split(items, 0.3, ["3", "5"], seed=1) == {"3", "5"}
    with pytest.raises(TrainerError, match='"70" is to be held out, but no labelled picture has that name'):
        split(items, 0, ["70"], seed=1)


def test_no_two_pictures_are_written_into_one_file(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.jpg.png", "mirrored/a.jpg.png.png"):
        picture(tmp_path, name)
    source = Source([Item(name, (name,), name) for name in ("a.jpg.png", "a.jpg", ".")], tmp_path, [])
    assert len(write_folders(source, tmp_path / "whole", share=0).train) == 2
    report = write_folders(source, tmp_path / "out", share=0, crop=True)
    assert json.loads((tmp_path / "out/train/train.json").read_text()) == {"a.jpg.png": ["a.jpg.png"]}
    assert report.skipped[0] == ("a.jpg", "becomes one file with a.jpg.png")
    assert "cannot be read" in report.skipped[1][1]
    source = Source([Item(name, (name,), name) for name in ("a.jpg.png", "mirrored/a.jpg.png.png")], tmp_path, [])
    report = write_folders(source, tmp_path / "both", share=0, mirror=True)
    assert [(one.name, one.labels) for one in report.train] == [
        ("a.jpg.png", ("a.jpg.png",)), ("mirrored/a.jpg.png.png", ("a.jpg.png",)),
    ]  # fmt: skip


def test_boxes_become_positions_and_sizes_and_follow_a_crop(tmp_path: Path) -> None:
    """The middle square of 20 x 10 begins at x = 5. The second object's centre is outside of it."""
    picture(tmp_path, "wide.png", (20, 10))
    boxes = ((6.0, 2.0, 2.0, 4.0), (0.0, 0.0, 4.0, 4.0))
    source = Source([Item("wide.png", ("in", "out"), "wide.png", boxes)], tmp_path, [])
    whole = write_folders(source, tmp_path / "whole", share=0).train[0]
    assert whole.places == ((0.35, 0.4), (0.1, 0.2))
    assert whole.sizes == ((0.1, 0.4), (0.2, 0.4))
    report = write_folders(source, tmp_path / "crop", share=0, crop=True, mirror=True)
    cut, mirrored = report.train
    assert (cut.labels, cut.places, cut.sizes) == (("in",), ((0.2, 0.4),), ((0.2, 0.4),))
    assert (mirrored.name, mirrored.places) == ("mirrored/wide.png.png", ((0.8, 0.4),))
    dataset = load_dataset(tmp_path / "crop/train", size=10)
    assert torch.equal(dataset.images[0], dataset.images[1].flip(-1))
    with Image.open(tmp_path / "wide.png") as original:
        assert np.array_equal(dataset.images[0].permute(1, 2, 0), np.asarray(original)[:, 5:15])
    assert dataset.object_size == pytest.approx((0.2 * 0.4) ** 0.5)
