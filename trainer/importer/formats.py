"""Reads which labels a data set's pictures have: image folders, captions, CSV files, COCO annotations, tables.

Opens no picture.
"""

from __future__ import annotations

import csv
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, TextIO

from pydantic import BaseModel, StringConstraints, TypeAdapter, ValidationError

from trainer.errors import TrainerError
from trainer.importer import splits
from trainer.importer.tables import Tables, tables_in

METADATA = ("metadata.jsonl", "metadata.csv")  # of a Hugging Face image folder
FILE_FIELD, LABELS_FIELD, IMAGE_FIELD = "file_name", "labels", "image"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
WHOLE_SET = "labels"  # as a group: pictures with the same label set

Box = tuple[float, float, float, float]  # x and y of the upper left corner, width, height, in pixels


@dataclass(frozen=True)
class Item:
    """A picture as the data set describes it. `boxes`: one for each label, or None where it has no boxes."""

    file: str  # path in the folder of pictures
    labels: tuple[str, ...]
    group: str  # pictures of one group are all trained on, or all held out
    boxes: tuple[Box, ...] | None = None
    content: Callable[[], bytes] | None = None  # of the picture's file, where there is no such file


@dataclass(frozen=True)
class Source:
    items: list[Item]
    pictures: Path  # the folder that `Item.file` is in
    notes: list[str]  # what was left out, in words


def read_source(
    path: Path, *, pictures: Path | None = None, labels: Sequence[str] = (), group: str | None = None,
    separator: str | None = None, split: str | None = None,
) -> Source:  # fmt: skip
    """Read an image folder, a folder of tables, a table, a .csv file, or a .json file of COCO annotations.

    An image folder has a metadata file, captions (a .txt file beside each picture), or a folder for each class.
    `pictures`: the folder that the files are in; by default that of the file, and of a table its column `image`.
    `labels`: the fields that name labels, "labels" by default, and of a table also "label". `group`: the field whose
    value makes a group, or WHOLE_SET; by default each picture is its own. `separator` of labels in one text: by default
    a comma in captions, else a semicolon. `split`: read this one alone (`splits.py`). Raises TrainerError for what it
    cannot read, and for several splits if none is chosen.
    """
    if separator == "":
        raise TrainerError("the separator must not be empty")
    if tables := tables_in(path):
        tables = splits.chosen(path, tables, splits.splits_of_tables(tables, path), split)
        return _tables(tables, path, labels, group, separator or ";")
    if path.is_dir():
        if not (found := _metadata(path)):
            parts = [one for one in path.iterdir() if splits.is_split(one.name) and one.is_dir()]
            if any(map(_metadata, parts)):
                [part] = splits.chosen(path, parts, [one.name for one in parts], split)
                return read_source(part, pictures=pictures, labels=labels, group=group, separator=separator)
            return _folder(path, labels, group, separator or ",", split)
        path = found[0]
    folder = pictures or path.parent
    try:
        if path.suffix == ".json":
            source = _coco(path, folder, group)
        else:
            with path.open(encoding="utf-8-sig", newline="") as file:
                fields = labels or [LABELS_FIELD]
                rows: Iterable[Any] = (
                    map(json.loads, filter(str.strip, file))
                    if path.suffix == ".jsonl"
                    else _csv_rows(file, [FILE_FIELD, *fields, group])
                )
                items = [_item(row, i, fields, group, separator or ";") for i, row in enumerate(rows, 1)]
            source = Source(items, folder, [])
    except (OSError, ValueError, RecursionError, csv.Error) as error:  # ValueError: not UTF-8, or not JSON
        raise TrainerError(f"{path}: cannot be read ({error})") from error
    except TrainerError as error:
        raise TrainerError(f"{path}: {error}") from error
    if not source.items:
        raise TrainerError(f"{path} names no pictures")
    its_splits = [splits.split_of(PurePosixPath(item.file)) for item in source.items]
    return replace(source, items=splits.chosen(path, source.items, its_splits, split))


def _metadata(folder: Path) -> list[Path]:
    return [folder / name for name in METADATA if (folder / name).is_file()]


def _folder(path: Path, fields: Sequence[str], group: str | None, separator: str, split: str | None) -> Source:
    """Read pictures whose labels are in a .txt file of the same name, or else are the name of the folder they are in.

    The caption's parts between separators are labels, each once. A picture without a caption has none.
    """
    if fields or group not in (None, WHOLE_SET):
        problem = f'the field "{(*fields, group)[0]}"; it has no {" or ".join(METADATA)}'
        raise TrainerError(f"{path} has no such file that could have {problem}")
    found = sorted(one for one in path.rglob("*") if one.suffix.lower() in PICTURES and one.is_file())
    if not found:
        raise TrainerError(f"{path} has no pictures and no {' or '.join(METADATA)}")
    its_splits = [splits.split_of(one.relative_to(path)) for one in found]
    found = splits.chosen(path, found, its_splits, split)
    divided = split is not None or None not in its_splits  # else a folder "train" is a class, beside others
    captions = [one.with_suffix(".txt") for one in found]
    captioned = any(caption.is_file() for caption in captions)
    items, without = [], 0
    for picture, caption in zip(found, captions, strict=True):
        if captioned:
            parts = _read_text(caption).replace("\n", separator).split(separator) if caption.is_file() else []
            without += not caption.is_file()
        elif picture.parent == path or (divided and splits.is_split(picture.parent.name)):
            raise TrainerError(f"{picture} has no caption beside it and is in no folder of a class")
        else:
            parts = [picture.parent.name]
        labels, file = tuple(dict.fromkeys(filter(None, map(_label, parts)))), picture.relative_to(path).as_posix()
        items.append(Item(file, labels, _group(labels, file, group, {})))
    notes = [f"{without} pictures have no caption"] * bool(without)
    return Source(items, path, notes)


def _tables(tables: Sequence[Path], path: Path, fields: Sequence[str], group: str | None, separator: str) -> Source:
    """Read tables, whose pictures are the bytes in the column IMAGE_FIELD."""
    read = Tables(tables, IMAGE_FIELD)
    chosen = list(fields) or [read.one_of((LABELS_FIELD, "label"))]
    extra = [group] if group and group != WHOLE_SET else []
    items = []
    for number, (row, name, where) in enumerate(read.rows([*chosen, *extra]), 1):
        item = _item({FILE_FIELD: name, **row}, number, chosen, group, separator)
        items.append(replace(item, content=partial(read.picture, where)))
    if not items:
        raise TrainerError(f"{path} holds no pictures")
    return Source(items, path, [])


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TrainerError(f"{path}: cannot be read ({error})") from error


def read_names(path: Path) -> list[str]:
    """Read a text file that names a picture in each line. Raises TrainerError if it is not text."""
    return [line.strip() for line in _read_text(path).splitlines() if line.strip()]


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
