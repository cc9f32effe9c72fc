"""JSON Lines for scripts: label lists in, a line for each picture or run out. Knows no HTTP."""

import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from service.client.errors import ClientError
from service.contract.schemas import GenerateResult, Job, PictureResult, ScoreResult

STDIN = Path("-")
OUTPUT_FIELDS: Final = frozenset({"index", "job", *PictureResult.model_fields})  # of a picture's line of output


class Line(BaseModel):
    model_config = ConfigDict(extra="allow")

    labels: list[str]


LINE: Final = TypeAdapter[list[str] | Line](list[str] | Line)


def is_lines(path: Path) -> bool:
    """Whether a file is read as JSON Lines: standard input and files named .jsonl."""
    return path == STDIN or path.suffix == ".jsonl"


def read_lines(path: Path, reserved: Collection[str] = ()) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """Return the label list of each line, and its other fields, such as an id.

    A line is a list of labels, or an object whose `labels` is one. Empty lines are skipped. Raises ClientError,
    also for other fields that have one of the `reserved` names.
    """
    try:
        text = (sys.stdin.buffer.read() if path == STDIN else path.read_bytes()).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ClientError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    lists, others = [], []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would also split at U+2028 within a string
        if not line.strip():
            continue
        try:
            entry = LINE.validate_json(line)
        except ValidationError as error:
            wanted = 'wanted ["LABEL", ...] or {"labels": ["LABEL", ...]}'
            raise ClientError(f"{path}: line {number}: {wanted}") from error
        labels, fields = (entry, {}) if isinstance(entry, list) else (entry.labels, entry.model_extra or {})
        if taken := sorted(fields.keys() & set(reserved)):
            raise ClientError(f"{path}: line {number}: the output has a field {taken[0]!r} of its own; rename yours")
        lists.append(labels)
        others.append(fields)
    if not lists:
        raise ClientError(f"{path} has no lines")
    return lists, others


def lines_of(job: Job, others: Sequence[Mapping[str, Any]] = ()) -> Iterator[str]:
    """Yield a line for each picture of `generate`, with the fields of its line of input, or for each run of `score`."""
    if isinstance(job.result, ScoreResult):
        for i, repeat in enumerate(job.result.repeats):
            yield json.dumps({"run": i, **repeat.model_dump(mode="json"), "job": job.id})
    elif isinstance(job.result, GenerateResult):
        for i, picture in enumerate(job.result.pictures):
            own = others[i] if i < len(others) else {}
            yield json.dumps({**own, "index": i, **picture.model_dump(mode="json"), "job": job.id})
