"""Recognises splits of a data set, such as train and test. Merged in silence, test pictures would be trained on.

A split is a folder with a split's name, or a table whose name begins with one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path, PurePath
from typing import TypeVar

from trainer.errors import TrainerError

# those that Hugging Face's `datasets` knows (data_files.py)
SPLITS = frozenset(
    ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")
)  # fmt: skip
File = TypeVar("File")


def is_split(name: str) -> bool:
    return name.lower() in SPLITS


def split_of(file: PurePath, further: Collection[str] = ()) -> str | None:
    """Return the first folder on a file's path that has the name of a split, one of SPLITS or `further`."""
    return next((part for part in file.parts[:-1] if is_split(part) or part in further), None)


def splits_of_tables(tables: Sequence[Path], path: Path) -> list[str | None]:
    """Return the split of each table of a folder: train/data-0.arrow, train-00000-of-00001.parquet.

    A saved `DatasetDict` lists its splits in dataset_dict.json, whatever their names.
    """
    try:
        saved = [str(name) for name in json.loads((path / "dataset_dict.json").read_text())["splits"]]
    except (OSError, ValueError, LookupError, TypeError):  # there is none
        saved = []
    found = list[str | None]()
    for table in tables:
        file = table.relative_to(path if path.is_dir() else path.parent)
        begins = re.split(r"[-_.]", file.name)[0]
        found.append(split_of(file, saved) or (begins if is_split(begins) else None))
    return found


def chosen(path: Path, files: Sequence[File], splits: Sequence[str | None], split: str | None) -> list[File]:
    """Return the files of `path` that are of this split, given the split of each; without `split`, all.

    TrainerError if there is no such split, and for several if none is chosen.
    """
    names = sorted({name for name in splits if name})
    if split is not None and split not in names:
        raise TrainerError(f'{path} has no split "{split}"; it has {", ".join(names) or "none"}')
    if split is None and len(names) > 1:
        first = next((name for name in names if name.lower().startswith("train")), names[0])
        raise TrainerError(f"{path} has the splits {', '.join(names)}; import one at a time: --split {first}")
    return [file for file, its in zip(files, splits, strict=True) if split in (None, its)]
