"""Writes the label files of a data set folder, and reads those that `shared/vocabulary.py` does not: positions.json,
rotations.json and sizes.json.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError
from torch import Tensor

from shared import storage as files
from shared.diffusion.layouts import OUTSIDE, as_rotations
from shared.vocabulary import Vocabulary, read_train_file
from trainer.errors import TrainerError

Pair = tuple[FiniteFloat, FiniteFloat]
Rotation = Annotated[float, Field(ge=0, le=1)] | None


def write_label_file(path: Path, content: object) -> None:
    files.write(path, json.dumps(content).encode())


def read_positions(path: Path, train: Mapping[str, Sequence[str]], vocabulary: Vocabulary) -> Tensor | None:
    """Read positions.json, which maps each picture to the [x, y] of its labels in train.json's order.

    Returns (N, K, 2) float32 with `OUTSIDE` for absent labels, or None where there is no such file. TrainerError for
    one that cannot be used.
    """
    if not path.exists():
        return None
    content = _read_lists(path, Pair, "[x, y] pairs")
    positions = torch.full((len(train), len(vocabulary), 2), OUTSIDE)
    for i, (name, labels) in enumerate(train.items()):
        _check_length(path, content, name, labels, "[x, y]")
        if outside := [point for point in content[name] if not (0 <= point[0] <= 1 and 0 <= point[1] <= 1)]:
            at = f'{path}: picture "{name}" has {list(outside[0])}'
            raise TrainerError(f"{at}; positions are fractions of width and height, 0 to 1")
        for label, point in zip(labels, content[name], strict=True):
            positions[i, vocabulary.index(label)] = torch.tensor(point)
    return positions


def read_rotations(path: Path, train: Mapping[str, Sequence[str]], vocabulary: Vocabulary) -> Tensor | None:
    """Read rotations.json, which maps each picture to the rotations of its labels' objects in train.json's order.

    A rotation is a fraction of the smallest turn after which the object looks the same, 0 to 1, or null where none is
    to be seen. Returns (N, K, 2) float32, see `as_rotations`, or None where there is no such file. TrainerError for one
    that cannot be used.
    """
    if not path.exists():
        return None
    content = _read_lists(path, Rotation, "objects' rotations, 0 to 1 or null")
    turns = torch.full((len(train), len(vocabulary)), math.nan)
    for i, (name, labels) in enumerate(train.items()):
        _check_length(path, content, name, labels, "rotation")
        for label, turn in zip(labels, content[name], strict=True):
            if turn is not None:
                turns[i, vocabulary.index(label)] = turn
    return as_rotations(turns)


def _read_lists(path: Path, entry: Any, what: str) -> dict[str, list[Any]]:
    """Read a file that maps each picture to a list; `entry` is the type of what the list holds, `what` its name."""
    try:
        return TypeAdapter(dict[str, list[entry]]).validate_json(path.read_bytes())
    except ValidationError as error:
        raise TrainerError(f"{path}: {error.errors()[0]['msg']}; it maps each picture to its {what}") from error


def _check_length(
    path: Path, content: Mapping[str, Sequence[Any]], name: str, labels: Sequence[str], what: str
) -> None:  # fmt: skip
    if len(content.get(name, ())) != len(labels):
        raise TrainerError(f'{path}: picture "{name}" needs one {what} for each of its {len(labels)} labels')


def read_object_size(folder: Path) -> float | None:
    """Return the median of sqrt(width x height) in sizes.json, which `trainer import` writes; None without the file."""
    path = folder / "sizes.json"
    if not path.exists():
        return None
    sizes = _read_lists(path, Pair, "[width, height] pairs")
    sides = [math.sqrt(max(0.0, width * height)) for pairs in sizes.values() for width, height in pairs]
    return statistics.median(sides) if sides else None


def read_arrangements(folders: Sequence[Path], vocabulary: Vocabulary) -> Tensor:
    """Read the positions (N, K, 2) of the pictures whose number of objects no earlier folder has.

    The folders need a train.json and a positions.json, and no pictures.
    """
    found, seen = list[Tensor](), torch.empty(0)
    for folder in folders:
        train = read_train_file(folder / "train.json", vocabulary)
        if (positions := read_positions(folder / "positions.json", train, vocabulary)) is None:
            raise TrainerError(f"{folder} has no positions.json")
        numbers = (positions[..., 0] != OUTSIDE).sum(1)
        found.append(positions[~torch.isin(numbers, seen)])
        seen = torch.cat([seen, numbers])
    return torch.cat(found)
