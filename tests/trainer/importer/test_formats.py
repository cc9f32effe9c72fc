"""What the importer reads from folders of pictures, captions, tables, CSV files and COCO annotations."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet as pq

from shared.options import LIMITS
from trainer.data import load_dataset
from trainer.errors import TrainerError
from trainer.importer.folders import write_folders
from trainer.importer.formats import Item, Source, read_source
from trainer.score import some_lists


def coco(images: list[int], categories: list[int]) -> str:
    """COCO annotations with these ids, and one annotation of category 2 in image 1."""
    content = {
        "images": [{"id": one, "file_name": f"{i}.jpg"} for i, one in enumerate(images)],
        "categories": [{"id": one, "name": f"name {i}"} for i, one in enumerate(categories)],
        "annotations": [{"image_id": 1, "category_id": 2}],
    }
    return json.dumps(content)


def test_an_image_folder(tmp_path: Path) -> None:
    rows = [
        {"file_name": "pictures/a.png", "labels": ["tall", "red"], "person": 7},
        {"file_name": "b.png", "labels": "red; short ;", "person": 8},
        {"file_name": "c.png", "labels": [], "person": 7},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    source = read_source(tmp_path, group="person")
    assert source.pictures == tmp_path
    assert source.items == [
        Item("pictures/a.png", ("tall", "red"), "7"), Item("b.png", ("red", "short"), "8"), Item("c.png", (), "7"),
    ]  # fmt: skip


def test_a_csv_file_whose_columns_are_labels(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text('\ufefffile_name,tone,who\n"a, b.png",dark,woman\nc.png,,man\n')
    source = read_source(
        tmp_path / "table.csv", pictures=tmp_path / "elsewhere", labels=["tone", "who"], group="labels"
    )
    assert source.pictures == tmp_path / "elsewhere"
    assert source.items == [
        Item("a, b.png", ("dark", "woman"), '["dark", "woman"]'), Item("c.png", ("man",), '["man"]'),
    ]  # fmt: skip


def test_labels_that_look_the_same_are_one(tmp_path: Path) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    (tmp_path / "table.csv").write_text(f"file_name,labels\na.png,{composed};{decomposed}\nb.png,{decomposed}\n")
    content = json.loads(coco([1], [1, 2]).replace("name 1", decomposed))
    (tmp_path / "coco.json").write_text(json.dumps(content))
    found = [read_source(tmp_path / name).items for name in ("table.csv", "coco.json")]
    assert [[item.labels for item in items] for items in found] == [[(composed,), (composed,)], [(composed,)]]


def test_coco_annotations(tmp_path: Path) -> None:
    """The largest of several objects with one label counts; crowds do not; boxes come with the labels.

    Blanks around a category's name do not belong to it.
    """
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 9}, {"id": 2, "file_name": "b.jpg"}],
        "categories": [{"id": 10, "name": "cat"}, {"id": 20, "name": "  dog "}],
        "annotations": [
            {"image_id": 1, "category_id": 20, "bbox": [0, 0, 2, 2], "segmentation": []},
            {"image_id": 1, "category_id": 10, "bbox": [4, 4, 1, 1]},
            {"image_id": 1, "category_id": 20, "bbox": [1, 1, 3, 3]},
            {"image_id": 1, "category_id": 10, "bbox": [0, 0, 9, 9], "iscrowd": 1},
        ],
    }
    (tmp_path / "coco.json").write_text(json.dumps(content))
    source = read_source(tmp_path / "coco.json")
    assert source.items == [
        Item("a.jpg", ("dog", "cat"), "a.jpg", ((1, 1, 3, 3), (4, 4, 1, 1))), Item("b.jpg", (), "b.jpg", ()),
    ]  # fmt: skip
    assert source.notes == [
        "1 crowds do not count", "1 further objects of a label in its picture do not count: the largest does",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.csv", "", "names no pictures"),
        ("x.csv", "file_name,label\na.png,red\n", 'row 1 has no field "labels"; it has file_name, label'),
        ("x.jsonl", "5", "row 1 is not an object with fields"),
        ("x.jsonl", '{"file_name": ', "cannot be read"),
        ("x.jsonl", "[" * 99999, "cannot be read"),
        (
            "x.json",
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": " "}]}',
            r"categories\.0\.name: String should have at least 1 character",
        ),
        ("x.json", coco([3], [2]), "an annotation names image 1 and category 2; one is missing"),
        ("x.json", coco([], [2]), "it names no pictures"),
        ("x.json", coco([1, 3, 1], [2]), "2 images have the id 1, so annotations do not tell"),
        ("x.csv", "file_name,labels\na.png,red,,\nb.png,red,tall\n", 'row 2 has more fields .* such as "tall"'),
        ("x.csv", "file_name,labels,labels,x,x\na.png,red,tall,1,2\n", 'the first row names "labels" more than once'),
        ("x.jsonl", '{"file_name": "a.png", "labels": [["red"]]}', r'row 1: "labels" holds \["red"\], which is not a'),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(TrainerError, match=message) as refused:
        read_source(tmp_path / name)
    assert str(refused.value).startswith(str(tmp_path / name))


def test_a_folder_without_metadata_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match=r"no metadata.jsonl or metadata.csv"):
        read_source(tmp_path)


def picture(path: Path, shade: int = 0, size: int = 8) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (shade, 0, 0)).save(path)
    return path.read_bytes()


def labels_of(source: Source) -> dict[str, tuple[str, ...]]:
    return {item.file: item.labels for item in source.items}


def test_a_folder_for_each_class(tmp_path: Path) -> None:
    for name in ("train/cat/0.png", "train/dog/0.JPG", "train/dog/1.webp"):
        picture(tmp_path / name)
    (tmp_path / "train/cat/readme.md").write_text("not a picture")
    assert labels_of(read_source(tmp_path)) == {
        "train/cat/0.png": ("cat",), "train/dog/0.JPG": ("dog",), "train/dog/1.webp": ("dog",)
    }  # fmt: skip
    with pytest.raises(TrainerError, match=r"no such file that could have the field .tone.; it has no metadata"):
        read_source(tmp_path, labels=["tone"])
    picture(tmp_path / "lost.png")
    with pytest.raises(TrainerError, match=r"lost\.png has no caption beside it and is in no folder of a class"):
        read_source(tmp_path)


SEVERAL = "has the splits test, train; import one at a time: --split train$"


def test_splits_of_a_folder_are_not_merged(tmp_path: Path) -> None:
    """Pictures of the official test set would else be trained on."""
    for name in ("train/cat/0.png", "train/dog/0.png", "test/cat/1.png"):
        picture(tmp_path / name)
    with pytest.raises(TrainerError, match=SEVERAL) as refused:
        read_source(tmp_path)
    assert "\n" not in str(refused.value)
    assert labels_of(read_source(tmp_path, split="test")) == {"test/cat/1.png": ("cat",)}
    assert labels_of(read_source(tmp_path / "train")) == {"cat/0.png": ("cat",), "dog/0.png": ("dog",)}
    with pytest.raises(TrainerError, match=r'has no split "val"; it has test, train$'):
        read_source(tmp_path, split="val")
    picture(tmp_path / "test/2.png")
    with pytest.raises(TrainerError, match=r"2\.png has no caption beside it and is in no folder of a class"):
        read_source(tmp_path, split="test")


def test_a_class_may_have_the_name_of_a_split(tmp_path: Path) -> None:
    for name in ("bus/0.png", "train/0.png"):
        picture(tmp_path / name)
    assert labels_of(read_source(tmp_path)) == {"bus/0.png": ("bus",), "train/0.png": ("train",)}


def test_a_metadata_file_in_a_splits_folder_names_its_labels(tmp_path: Path) -> None:
    for split in ("train", "test"):
        picture(tmp_path / split / "0.png")
        rows = [{"file_name": "0.png", "labels": [split, "red"]}]
        (tmp_path / split / "metadata.jsonl").write_text(json.dumps(rows[0]))
        if split == "train":
            read = read_source(tmp_path)  # the only one
            assert (read.pictures, labels_of(read)) == (tmp_path / "train", {"0.png": ("train", "red")})
    with pytest.raises(TrainerError, match=SEVERAL):
        read_source(tmp_path)
    read = read_source(tmp_path, split="test")
    assert (read.pictures, labels_of(read)) == (tmp_path / "test", {"0.png": ("test", "red")})


def test_splits_in_a_file_are_told_by_its_pictures_folders(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("file_name,labels\ntrain/a.png,red\ntest/a.png,blue\n")
    with pytest.raises(TrainerError, match=SEVERAL):
        read_source(tmp_path / "table.csv")
    assert labels_of(read_source(tmp_path / "table.csv", split="train")) == {"train/a.png": ("red",)}


@pytest.mark.parametrize("saved", ["DatasetDict", "parquet"])
def test_splits_of_tables_are_not_merged(tmp_path: Path, saved: str) -> None:
    """As `DatasetDict.save_to_disk` writes them, and as Hugging Face's hub has them."""
    named = {"fit": "cat", "unseen": "dog"} if saved == "DatasetDict" else {"train": "cat", "test": "dog"}
    content = picture(tmp_path / "0.png")
    folder = tmp_path / "set"
    for split, label in named.items():
        table = pa.table({"image": [{"bytes": content, "path": None}], "label": [label]})
        if saved == "parquet":
            (folder / "data").mkdir(parents=True, exist_ok=True)
            pq.write_table(table, folder / f"data/{split}-00000-of-00001.parquet")
            continue
        (folder / split).mkdir(parents=True)
        (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(named)}))
        path = folder / split / "data-00000-of-00001.arrow"
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    with pytest.raises(TrainerError, match=f"has the splits {', '.join(sorted(named))}; import one at a time"):
        read_source(folder)
    for split, label in named.items():
        read = read_source(folder, split=split)
        assert labels_of(read) == {"0000000": (label,)}
        assert [item.content and item.content() for item in read.items] == [content]


def test_captions_are_label_sets(tmp_path: Path) -> None:
    for name, caption in (("0", "a cat, on grass,  a cat"), ("1", "dog\non grass\n"), ("2", None)):
        picture(tmp_path / f"{name}.png")
        if caption:
            (tmp_path / f"{name}.txt").write_text(caption)
    read = read_source(tmp_path)
    assert labels_of(read) == {"0.png": ("a cat", "on grass"), "1.png": ("dog", "on grass"), "2.png": ()}
    assert read.notes == ["1 pictures have no caption"]
    assert labels_of(read_source(tmp_path, separator=";"))["0.png"] == ("a cat, on grass,  a cat",)


@pytest.mark.parametrize("saved", ["parquet", "arrow"])
def test_pictures_in_tables(tmp_path: Path, saved: str) -> None:
    """As Hugging Face's datasets write them: pictures with a path, and class labels as numbers."""
    content = [picture(tmp_path / f"{i}.png", 40 * i) for i in range(4)]
    images = [{"bytes": one, "path": f"{i}.png" if i else None} for i, one in enumerate(content)]
    kinds = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    table = pa.table({"image": images, "label": [0, 1, -1, 1], "scene": ["a", "a", "b", "b"]})
    table = table.replace_schema_metadata({"huggingface": json.dumps(kinds)})
    folder = tmp_path / "set"
    folder.mkdir()
    if saved == "parquet":
        pq.write_table(table, folder / "0.parquet", row_group_size=3)
    else:
        with pa.OSFile(str(folder / "data-0.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=3)
    read = read_source(folder, group="scene")
    names = ["0000000", "0000001-1.png", "0000002-2.png", "0000003-3.png"]
    assert labels_of(read) == dict(zip(names, [("cat",), ("dog",), (), ("dog",)], strict=True))
    assert [item.group for item in read.items] == ["a", "a", "b", "b"]
    assert [item.content and item.content() for item in read.items] == content
    report = write_folders(read, tmp_path / "out", share=0.0, unlabelled=True)
    assert [one.name for one in report.train] == ["0000000.png", "0000001-1.png", "0000002-2.png", "0000003-3.png"]
    assert [(tmp_path / "out/train/images" / one.name).read_bytes() for one in report.train] == content
    with pytest.raises(TrainerError, match='has no field "tone"; it has image, label, scene'):
        read_source(folder, labels=["tone"])
    (folder / f"broken.{saved}").write_bytes(b"PAR1")
    with pytest.raises(TrainerError, match=f"broken.{saved}: cannot be read"):
        read_source(folder)


def test_a_picture_may_have_more_labels_than_a_request(tmp_path: Path) -> None:
    picture(tmp_path / "0.png")
    tags = [f"tag {i}" for i in range(LIMITS.max_labels + 4)]
    (tmp_path / "0.txt").write_text(", ".join(tags))
    report = write_folders(read_source(tmp_path), tmp_path / "out", share=0.0)
    assert not report.skipped
    assert not (tmp_path / "out/train/test.json").exists()  # no list that a request could name
    dataset = load_dataset(tmp_path / "out/train", size=8)
    assert float(dataset.labels.sum()) == len(tags)
    assert some_lists(dataset) == [sorted(tags)]  # of the grid
