"""Reads Parquet files, and folders that Hugging Face's `datasets` has saved: pictures inside of tables.

Needs pyarrow, the extra `parquet`. Holds one group of rows in memory, never all pictures.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any

from trainer.errors import TrainerError

SUFFIXES = (".parquet", ".arrow")
BEGINNINGS = {b"\xff\xd8": ".jpg", b"RIFF": ".webp", b"GIF8": ".gif"}  # of a picture's bytes; PNG otherwise


def tables_in(path: Path) -> list[Path]:
    """Return the tables of a folder, also in its subfolders, or the file itself if it is one."""
    if path.is_dir():
        return sorted(one for one in path.rglob("*") if one.suffix in SUFFIXES)
    return [path] if path.suffix in SUFFIXES else []


@dataclass(frozen=True)
class Tables:
    """The rows of several tables of equal columns. `pictures`: the column with the pictures."""

    paths: Sequence[Path]
    pictures: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "_group", lru_cache(2)(self._read_group))
        object.__setattr__(self, "_lock", Lock())

    def one_of(self, names: Sequence[str]) -> str:
        """Return the first of the names that is a field, or else the first."""
        there = _open(self.paths[0]).schema.names
        return next((name for name in names if name in there), names[0])

    def rows(self, fields: Sequence[str]) -> Iterator[tuple[dict[str, Any], str, tuple[int, int, int]]]:
        """Yield each row's `fields`, the name of its picture, and where that is, for `picture`. Reads no picture.

        Class labels, which are numbers, become their names. TrainerError for a field that there is not.
        """
        number = 0
        for at, path in enumerate(self.paths):
            file = _open(path)
            if missing := [one for one in (self.pictures, *fields) if one not in file.schema.names]:
                raise TrainerError(f'{path} has no field "{missing[0]}"; it has {", ".join(file.schema.names)}')
            names = _class_names(file.schema.metadata)
            for group in range(file.groups):
                columns = [*fields, *file.parts(self.pictures)]
                for row, values in enumerate(file.read(group, columns).to_pylist()):
                    found = {key: _named(values[key], names.get(key)) for key in fields}
                    given = values[self.pictures]
                    said = given.get("path") if isinstance(given, dict) else None
                    name = f"{number:07d}" + (f"-{PurePosixPath(said).name}" if said else "")
                    number += 1
                    yield found, name, (at, group, row)

    def picture(self, where: tuple[int, int, int]) -> bytes:
        """Return the bytes of a picture's file. TrainerError if the row holds none."""
        at, group, row = where
        with self._lock:  # type: ignore[attr-defined]
            value = self._group(at, group)[row].as_py()  # type: ignore[attr-defined]
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise TrainerError(f"{self.paths[at]}: row {row} of group {group} holds no picture")
        return content

    def _read_group(self, at: int, group: int) -> Any:
        return _open(self.paths[at]).read(group, [self.pictures]).column(self.pictures)


class _Parquet:
    def __init__(self, path: Path) -> None:
        from pyarrow import parquet

        self.file = parquet.ParquetFile(path)
        self.schema, self.groups = self.file.schema_arrow, self.file.num_row_groups

    def parts(self, column: str) -> list[str]:
        """Return what to read of a column to know its pictures' paths, but not their bytes."""
        kind = self.schema.field(column).type
        names = [field.name for field in kind] if hasattr(kind, "num_fields") and kind.num_fields else []
        return [f"{column}.path"] if "path" in names else [column]

    def read(self, group: int, columns: Sequence[str]) -> Any:
        return self.file.read_row_group(group, columns=list(columns))


class _Arrow:
    """A file that `Dataset.save_to_disk` has written: a stream of batches, mapped into memory."""

    def __init__(self, path: Path) -> None:
        import pyarrow

        self.batches = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
        self.schema = self.batches.schema
        self.tables = [pyarrow.Table.from_batches([batch]) for batch in self.batches]
        self.groups = len(self.tables)

    def parts(self, column: str) -> list[str]:
        return [column]

    def read(self, group: int, columns: Sequence[str]) -> Any:
        return self.tables[group].select(list(columns))


def _open(path: Path) -> Any:
    try:
        import pyarrow
    except ModuleNotFoundError as error:
        raise TrainerError(f"{path}: reading tables needs pyarrow: pip install 'labelgrid[train,parquet]'") from error
    try:
        return _Parquet(path) if path.suffix == ".parquet" else _Arrow(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise TrainerError(f"{path}: cannot be read ({error})") from error


def _class_names(metadata: dict[bytes, bytes] | None) -> dict[str, list[str]]:
    """Return the names of the classes of each column that `datasets` calls a ClassLabel, or a list of such."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError):
        return {}
    found = {}
    for name, feature in features.items():
        inner = feature.get("feature", feature) if isinstance(feature, dict) else {}
        if isinstance(inner, dict) and isinstance(inner.get("names"), list):
            found[name] = inner["names"]
    return found


def _named(value: Any, names: list[str] | None) -> Any:
    if names is None:
        return value
    if isinstance(value, list):
        return [_named(one, names) for one in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None


def suffix_of(content: bytes) -> str:
    """Return the suffix of a picture's file from its first bytes."""
    return next((suffix for start, suffix in BEGINNINGS.items() if content.startswith(start)), ".png")
