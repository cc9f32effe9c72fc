"""What the importer reads from image folders, CSV files and COCO annotations."""

import json
from pathlib import Path

import pytest

from trainer.errors import TrainerError
from trainer.importer.formats import Item, read_source


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
