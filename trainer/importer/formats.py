"""Reads which labels a data set's pictures have: Hugging Face image folders, CSV files, COCO annotations.

Opens no picture.
"""

from __future__ import annotations

import csv
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TextIO

from pydantic import BaseModel, StringConstraints, TypeAdapter, ValidationError

from trainer.errors import TrainerError

METADATA = ("metadata.jsonl", "metadata.csv")  # of a Hugging Face image folder
FILE_FIELD, LABELS_FIELD = "file_name", "labels"
WHOLE_SET = "labels"  # as a group: pictures with the same label set

Box = tuple[float, float, float, float]  # x and y of the upper left corner, width, height, in pixels


@dataclass(frozen=True)
class Item:
    """A picture as the data set describes it. `boxes`: one for each label, or None where it has no boxes."""

    file: str  # path in the folder of pictures
    labels: tuple[str, ...]
    group: str  # pictures of one group are all trained on, or all held out
    boxes: tuple[Box, ...] | None = None


@dataclass(frozen=True)
class Source:
    items: list[Item]
    pictures: Path  # the folder that `Item.file` is in
    notes: list[str]  # what was left out, in words


def read_source(
    path: Path, *, pictures: Path | None = None, labels: Sequence[str] = (), group: str | None = None,
    separator: str = ";",
) -> Source:  # fmt: skip
    """Read an image folder with a metadata file, a .csv file, or a .json file of COCO annotations.

    `pictures`: the folder that the files are in; by default that of the file. `labels`: the fields that name labels,
    "labels" by default. `group`: the field whose value makes a group, or WHOLE_SET; by default each picture is its
    own. Raises TrainerError for what it cannot read.
    """
    if not separator:
        raise TrainerError("the separator must not be empty")
    if path.is_dir():
        found = [path / name for name in METADATA if (path / name).is_file()]
        if not found:
            raise TrainerError(f"{path} has no {' or '.join(METADATA)}; give a .csv file or COCO's .json file itself")
        path = found[0]
    folder = pictures or path.parent
    try:
        if path.suffix == ".json":
            return _coco(path, folder, group)
        with path.open(encoding="utf-8-sig", newline="") as file:
            fields = labels or [LABELS_FIELD]
            rows: Iterable[Any] = (
                map(json.loads, filter(str.strip, file))
                if path.suffix == ".jsonl"
                else _csv_rows(file, [FILE_FIELD, *fields, group])
            )
            items = [_item(row, i, fields, group, separator) for i, row in enumerate(rows, 1)]
    except (OSError, ValueError, RecursionError, csv.Error) as error:  # ValueError: not UTF-8, or not JSON
        raise TrainerError(f"{path}: cannot be read ({error})") from error
    except TrainerError as error:
        raise TrainerError(f"{path}: {error}") from error
    if not items:
        raise TrainerError(f"{path} names no pictures")
    return Source(items, folder, [])


def read_names(path: Path) -> list[str]:
    """Read a text file that names a picture in each line. Raises TrainerError if it is not text."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise TrainerError(f"{path}: cannot be read ({error})") from error
    return [line.strip() for line in lines if line.strip()]


def _csv_rows(file: TextIO, wanted: Sequence[str | None]) -> Iterable[dict[str, Any]]:
    """Return the rows of a CSV file. TrainerError for two `wanted` fields of one name, since csv keeps the last."""
    rows = csv.DictReader(file)
    if repeated := [name for name, times in Counter(rows.fieldnames or ()).items() if times > 1 and name in wanted]:
        raise TrainerError(f'the first row names "{repeated[0]}" more than once')
    return rows


def _item(row: Any, line: int, fields: Sequence[str], group: str | None, separator: str) -> Item:
    if not isinstance(row, dict):
        raise TrainerError(f"row {line} is not an object with fields")
    wanted = [FILE_FIELD, *fields, *([group] if group and group != WHOLE_SET else [])]
    if missing := [field for field in wanted if field not in row]:
        names = ", ".join(str(name) for name in row)
        raise TrainerError(f'row {line} has no field "{missing[0]}"; it has {names}')
    if further := next(filter(None, row.get(None, ())), None):  # where the csv module puts fields without a name
        raise TrainerError(f'row {line} has more fields than the first row names, such as "{further}"')
    found: list[str] = []
    for field in fields:
        value = row[field]
        parts = value if isinstance(value, list) else value.split(separator) if isinstance(value, str) else [value]
        if nested := [part for part in parts if isinstance(part, dict | list)]:
            raise TrainerError(f'row {line}: "{field}" holds {json.dumps(nested[0])[:40]}, which is not a label')
        found += [_label(str(part)) for part in parts if part is not None and str(part).strip()]
    labels = tuple(dict.fromkeys(found))
    return Item(str(row[FILE_FIELD]), labels, _group(labels, str(row[FILE_FIELD]), group, row))


def _label(text: str) -> str:
    """Return the label in one normal form: files of macOS and Windows may write the same letters differently."""
    return unicodedata.normalize("NFC", text.strip())


def _group(labels: Iterable[str], file: str, field: str | None, row: Mapping[str, Any]) -> str:
    if field is None:
        return file
    return json.dumps(sorted(labels)) if field == WHOLE_SET else str(row[field])


class _Image(BaseModel):
    id: int | str
    file_name: str


class _Category(BaseModel):
    id: int | str
    name: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class _Annotation(BaseModel):
    image_id: int | str
    category_id: int | str
    bbox: Box | None = None
    iscrowd: int = 0


class _Coco(BaseModel):
    """The parts of COCO's format (Lin et al. 2014) that are used."""

    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


def _coco(path: Path, folder: Path, group: str | None) -> Source:
    """Read COCO annotations. Of several objects with one label the largest counts, and crowds do not."""
    try:
        content = TypeAdapter(_Coco).validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        raise TrainerError(f"not COCO annotations: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if group not in (None, WHOLE_SET):
        raise TrainerError(f'COCO annotations have no field "{group}"; the only group is "{WHOLE_SET}"')
    if not content.images:
        raise TrainerError("it names no pictures")
    for kind, entries in (("images", content.images), ("categories", content.categories)):
        [(most, times)] = Counter(one.id for one in entries).most_common(1) or [(0, 0)]
        if times > 1:
            raise TrainerError(f"{times} {kind} have the id {most}, so annotations do not tell which they are of")
    names = {category.id: _label(category.name) for category in content.categories}
    objects: dict[int | str, dict[str, Box | None]] = {image.id: {} for image in content.images}
    crowds = repeated = 0
    for one in content.annotations:
        if one.image_id not in objects or one.category_id not in names:
            raise TrainerError(
                f"an annotation names image {one.image_id} and category {one.category_id}; one is missing"
            )
        there, name = objects[one.image_id], names[one.category_id]
        if one.iscrowd:
            crowds += 1
            continue
        if name in there:
            repeated += 1
        if name not in there or _area(one.bbox) > _area(there[name]):
            there[name] = one.bbox
    items = []
    for image in content.images:
        boxes = tuple(box for box in objects[image.id].values() if box is not None)
        labels = tuple(objects[image.id])
        complete = boxes if len(boxes) == len(labels) else None
        items.append(Item(image.file_name, labels, _group(labels, image.file_name, group, {}), complete))
    notes = [f"{crowds} crowds do not count"] * bool(crowds)
    notes += [f"{repeated} further objects of a label in its picture do not count: the largest does"] * bool(repeated)
    return Source(items, folder, notes)


def _area(box: Box | None) -> float:
    return box[2] * box[3] if box else 0.0
