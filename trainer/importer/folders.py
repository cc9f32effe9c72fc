"""Splits a data set's pictures into training and held-out ones, and writes a folder of each that the trainer reads.

A picture that cannot be used is left out and listed with the reason.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from PIL import Image, ImageOps

from shared import storage as files
from shared.options import LIMITS
from trainer.data_folder import read_picture, write_label_file
from trainer.errors import TrainerError
from trainer.importer.formats import Box, Item, Source
from trainer.importer.tables import suffix_of

TRAIN, HELD_OUT, PICTURES, SKIPPED, MIRRORED = "train", "held-out", "images", "skipped.txt", "mirrored"
SHOWN_SETS = 32  # label lists in test.json where nothing is held out
Pair = tuple[float, float]


@dataclass(frozen=True)
class Written:
    """A picture in its folder. `places` and `sizes` of its objects, in fractions of the picture, where it has boxes."""

    name: str
    labels: tuple[str, ...]
    places: tuple[Pair, ...] | None
    sizes: tuple[Pair, ...] | None


@dataclass
class Report:
    """What an import did. `skipped`: (file, reason)."""

    train: list[Written] = field(default_factory=list)
    held_out: list[Written] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    @property
    def vocabulary(self) -> list[str]:
        return sorted(label_counts([*self.train, *self.held_out]))


def label_counts(pictures: Sequence[Written]) -> Counter[str]:
    """Return how many of the pictures show each label."""
    return Counter(label for one in pictures for label in one.labels)


def split(items: Sequence[Item], share: float, names: Collection[str] | None, seed: int) -> set[str]:
    """Return the files to hold out: those in `names`, or whole random groups up to `share`.

    Pictures without labels are never held out: no score can be taken of them. Raises TrainerError for unknown names.
    """
    labelled = [item for item in items if item.labels]
    held = set[str]()
    if names is not None:
        held.update(str(PurePosixPath(name)) for name in names)
        if unknown := sorted(held - {item.file for item in labelled}):
            raise TrainerError(f'"{unknown[0]}" is to be held out, but no labelled picture has that name')
        return held
    groups: dict[str, list[str]] = {}
    for item in labelled:
        groups.setdefault(item.group, []).append(item.file)
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    for group in order:
        if len(held) + len(groups[group]) <= share * len(labelled):
            held.update(groups[group])
    return held


def usable(
    items: Sequence[Item], *, keep_unlabelled: bool, crop: bool, mirror: bool
) -> tuple[list[Item], list[tuple[str, str]]]:  # fmt: skip
    """Return the items whose description can be used, and the others with the reason."""
    good, bad = dict[PurePosixPath, Item](), list[tuple[str, str]]()  # good: by the name that they are written under
    for item in items:
        path = PurePosixPath(item.file)
        written = _written_as(path, crop)
        file = str(path)  # so that a picture has one name: ./a.png is a.png
        if path.is_absolute() or ".." in path.parts:
            bad.append((file, "is not inside the folder"))
        elif (first := good.get(written)) and first.file == file:
            bad.append((file, "is listed twice; the first counts"))
        elif first:
            bad.append((file, f"becomes one file with {first.file}"))
        elif mirror and MIRRORED in path.parts[:1]:
            bad.append((file, "is where --mirror writes the mirrored pictures"))
        elif not item.labels and not keep_unlabelled:
            bad.append((file, "has no labels (--unlabelled keeps it)"))
        else:
            good[written] = replace(item, file=file)
    return list(good.values()), bad


def write_folders(
    source: Source, out: Path, *, share: float, held_out: Collection[str] | None = None, seed: int = 0,
    crop: bool = False, mirror: bool = False, unlabelled: bool = False, advance: Callable[[int], None] = lambda _: None,
) -> Report:  # fmt: skip
    """Write out/train, out/held-out and out/skipped.txt, and report what is in them.

    `crop`: cut the middle square out of each picture; objects whose centre is outside are left out with their label.
    `mirror`: also train on every training picture mirrored left to right. Positions and sizes are written if every
    labelled picture has boxes. Raises TrainerError if nothing is left to train on, OSError if `out` cannot be written.
    """
    items, skipped = usable(source.items, keep_unlabelled=unlabelled, crop=crop, mirror=mirror)
    held = split(items, share, held_out, seed)
    report = Report(skipped=skipped)

    def one(item: Item) -> list[Written] | tuple[str, str]:
        part, path = HELD_OUT if item.file in held else TRAIN, source.pictures / item.file
        try:
            content = item.content and item.content()
            picture = read_picture(path, content)
        except TrainerError as error:
            return item.file, str(error)
        left, top, width, height = area = _area(picture, crop)
        seen = Written(item.file, *_placed(item.labels, item.boxes, area))
        if not seen.labels and (part == HELD_OUT or not unlabelled):
            return item.file, f"has no object whose centre is in the {'middle square' if crop else 'picture'}"
        if crop:
            picture = picture.crop((left, top, left + width, top + height))
        original = None if crop else content or path
        return _write(seen, picture, original, out / part / PICTURES, mirror and part == TRAIN)

    with ThreadPoolExecutor() as pool:
        for item, result in zip(items, pool.map(one, items), strict=True):
            advance(1)
            if isinstance(result, tuple):
                report.skipped.append(result)
            else:
                (report.held_out if item.file in held else report.train).extend(result)
    _write_lists(report, out)
    return report


def _write(
    one: Written, picture: Image.Image, original: Path | bytes | None, folder: Path, mirror: bool
) -> list[Written]:  # fmt: skip
    """Copy the picture's `original` file, or save the picture where it has none, and save the mirrored copy."""
    name = PurePosixPath(one.name)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    if isinstance(original, bytes):
        name = name if name.suffix else PurePosixPath(f"{name}{suffix_of(original)}")
        (folder / name).write_bytes(original)
    elif original:
        shutil.copyfile(original, folder / name)
    else:
        name = _written_as(name, crop=True)
        picture.save(folder / name)
    written = [replace(one, name=str(name))]
    if mirror:
        copy = MIRRORED / name.with_name(f"{name.name}.png")
        (folder / copy).parent.mkdir(parents=True, exist_ok=True)
        ImageOps.mirror(picture).save(folder / copy)
        flipped = one.places and tuple((round(1 - x, 4), y) for x, y in one.places)
        written.append(replace(one, name=str(copy), places=flipped))
    return written


def _written_as(name: PurePosixPath, crop: bool) -> PurePosixPath:
    """Return the name of a picture's file: one that is cropped is saved as PNG."""
    return PurePosixPath(f"{name}.png") if crop and name.suffix.lower() != ".png" else name


def _area(picture: Image.Image, crop: bool) -> tuple[int, int, int, int]:
    """Return left, top, width and height of the part to keep: the whole picture, or its middle square."""
    side = min(picture.size)
    whole = (0, 0, picture.width, picture.height)
    return ((picture.width - side) // 2, (picture.height - side) // 2, side, side) if crop else whole


def _placed(
    labels: tuple[str, ...], boxes: tuple[Box, ...] | None, area: tuple[float, float, float, float]
) -> tuple[tuple[str, ...], tuple[Pair, ...] | None, tuple[Pair, ...] | None]:
    """Return labels, centres and sizes of the objects whose centre is in the area, in fractions of it."""
    if boxes is None:
        return labels, None, None
    left, top, width, height = area
    kept, places, sizes = [], [], []
    for label, (x, y, w, h) in zip(labels, boxes, strict=True):
        at = ((x + w / 2 - left) / width, (y + h / 2 - top) / height)
        if all(0 <= value <= 1 for value in at):
            kept.append(label)
            places.append((round(at[0], 4), round(at[1], 4)))
            sizes.append((round(w / width, 4), round(h / height, 4)))
    return tuple(kept), tuple(places), tuple(sizes)


def _write_lists(report: Report, out: Path) -> None:
    """Write which pictures were left out and why, then the label files."""
    if report.skipped:
        text = "".join(f"{file}: {reason}\n" for file, reason in report.skipped)
        files.write(out / SKIPPED, text.encode(errors="backslashreplace"))  # a name in JSON may hold half a character
    if not label_counts(report.train):
        where = [f"{len(report.held_out)} are held out"] * bool(report.held_out)
        where += [f"{len(report.train)} have no labels"] * bool(report.train)
        where += [f"{len(report.skipped)} were skipped ({out / SKIPPED})"] * bool(report.skipped)
        raise TrainerError(f"no labelled picture is left to train on: {', '.join(where)}")
    vocabulary = {name: index for index, name in enumerate(report.vocabulary)}
    parts = [(out / TRAIN, report.train), (out / HELD_OUT, report.held_out)]
    placed = all(one.places is not None for _, part in parts for one in part if one.labels)
    for folder, part in parts:
        if not part:
            continue
        write_label_file(folder / "objects.json", vocabulary)
        if placed:
            write_label_file(folder / "positions.json", {one.name: one.places or () for one in part})
            write_label_file(folder / "sizes.json", {one.name: one.sizes or () for one in part})
        if folder.name == TRAIN:
            shown = [one.labels for one in report.held_out or report.train]
            asked = [list(labels) for labels in shown if 0 < len(labels) <= LIMITS.max_labels]  # what requests may ask
            distinct = list({tuple(sorted(labels)): labels for labels in asked}.values())
            if distinct:
                write_label_file(folder / "test.json", distinct if report.held_out else distinct[:SHOWN_SETS])
        write_label_file(folder / "train.json", {one.name: one.labels for one in part})  # last, as it marks the end
