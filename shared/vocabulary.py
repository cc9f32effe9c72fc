"""Label names <-> indices, and reading label files with errors that name the entry.

Must not know torch, HTTP or the network: the API checks labels with it, the trainer reads its data with it.
"""

import difflib
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Self

from shared.options import LIMITS

SHOWN_CHARACTERS: Final = 60  # of a foreign value in a message: a name fits, a pasted file does not
SHOWN_NAMES: Final = 32  # of a vocabulary in a message
NEAR_ENOUGH: Final = 0.6  # difflib's own default; below it a suggestion is a guess


class LabelError(ValueError):
    """Labels that cannot be used. The message names the file, the entry and the value.

    entry: position in the list counted from 0, as pictures are, or the file name or label that is the key; None if
    the whole text is wrong. label: the offending label as the message shows it (shortened, printable), or None.
    problem: the message without file and entry.
    """

    def __init__(
        self, problem: str, *, entry: int | str | None = None, label: str | None = None, source: str | None = None
    ) -> None:
        where = "" if source is None else f"{source}: "
        if entry is not None:
            where += f"entry {entry if isinstance(entry, int) else _quoted(entry)}: "
        super().__init__(where + problem)
        self.problem = problem
        self.entry = entry
        self.label = label


@dataclass(frozen=True)
class Vocabulary:
    """The label names, in the order of their indices. ValueError if they are none, blank, or not distinct."""

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("a vocabulary needs at least one name")
        if not all(isinstance(name, str) and name.strip() for name in self.names):
            raise ValueError(f"names of a vocabulary must be strings that are not blank, got {self.names!r}")
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"names of a vocabulary must be distinct, got {self.names!r}")

    @classmethod
    def from_objects_file(cls, path: Path | str) -> Self:
        """Read `objects.json`, an object of name -> index with the indices 0..n-1 in any order. LabelError if not."""
        content = _parse_json(_read(path), source=str(path))
        if not isinstance(content, dict) or not content:
            raise LabelError(f"wanted an object of name -> index, got {_kind(content)}", source=str(path))
        for name, index in content.items():
            if type(index) is not int or not 0 <= index < len(content):
                problem = f"index {_shown(index)} is not one of 0..{len(content) - 1}"
                raise LabelError(problem, entry=name, source=str(path))
        by_index = {index: name for name, index in content.items()}
        if len(by_index) != len(content):
            twice = next(name for name, index in content.items() if by_index[index] != name)
            problem = f"index {content[twice]} is also that of {_quoted(by_index[content[twice]])}"
            raise LabelError(problem, entry=twice, source=str(path))
        try:
            return cls(tuple(by_index[index] for index in range(len(content))))
        except ValueError as error:
            raise LabelError(str(error), source=str(path)) from error

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    @cached_property
    def _index_of(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.names)}

    def index(self, name: str) -> int:
        """The index of a name; LabelError, with the nearest known name, if there is none."""
        if name not in self._index_of:
            raise self._unknown(name, entry=None)
        return self._index_of[name]

    def encode(self, labels: Sequence[str]) -> list[int]:
        """The labels' indices, in the order given. LabelError on an unknown one."""
        return [self.index(label) for label in labels]

    def multi_hot(self, labels: Sequence[str]) -> list[float]:
        """1.0 at each label's index, 0.0 elsewhere: one float per name. LabelError on an unknown label."""
        row = [0.0] * len(self)
        for index in self.encode(labels):
            row[index] = 1.0
        return row

    def nearest(self, label: str) -> str | None:
        """The known name most like `label`, in its own or in another order of words; None if none is like it."""
        if len(label) > SHOWN_CHARACTERS:  # difflib takes quadratic time, and the label comes from outside
            return None

        def likeness(name: str) -> float:
            as_written = difflib.SequenceMatcher(None, _folded(label), _folded(name)).ratio()
            by_words = difflib.SequenceMatcher(None, _sorted_words(label), _sorted_words(name)).ratio()
            return max(as_written, by_words)

        best = max(self.names, key=likeness)
        return best if likeness(best) >= NEAR_ENOUGH else None

    def check(
        self, lists: object, *, max_labels: int = LIMITS.max_labels, max_lists: int | None = None
    ) -> list[list[str]]:
        """The label lists, as given, if every one can be drawn; else LabelError on the first that cannot.

        Wanted is a list of at least one (at most `max_lists`) lists of 1..`max_labels` distinct known names.
        """
        entries = enumerate(_entries(lists, max_lists))
        return [self.check_entry(labels, entry=entry, max_labels=max_labels) for entry, labels in entries]

    def check_entry(
        self, labels: object, *, entry: int | str | None = None, max_labels: int = LIMITS.max_labels
    ) -> list[str]:
        """One entry's labels, as given, if they are 1..`max_labels` distinct known names; else LabelError."""
        checked: list[str] = []
        for label in _names(labels, entry, max_labels):
            if label not in self._index_of:
                raise self._unknown(label, entry=entry)
            if label in checked:
                raise LabelError(f"label {_quoted(label)} twice", entry=entry, label=label)
            checked.append(label)
        return checked

    def _unknown(self, label: str, *, entry: int | str | None) -> LabelError:
        near = self.nearest(label)
        if near is not None:
            hint = f"did you mean {_quoted(near)}?"
            if unicodedata.normalize("NFC", near) == unicodedata.normalize("NFC", label):
                hint += " It looks alike, but its letters have another Unicode form (NFC or NFD)"
        else:
            more = len(self) - SHOWN_NAMES
            hint = "known are " + ", ".join(self.names[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
        return LabelError(f"unknown label {_quoted(label)}; {hint}", entry=entry, label=_printable(label))


# i-CLEVR's 24 objects in the course's order, as in its objects.json
ICLEVR: Final = Vocabulary(
    tuple(
        f"{color} {shape}"
        for shape in ("cube", "sphere", "cylinder")
        for color in ("gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow")
    )
)


def parse_any_lists(text: str | bytes, *, max_lists: int | None = None) -> list[list[str]]:
    """A test file's lists as `Vocabulary.check` wants them, but of whatever names. LabelError."""
    entries = enumerate(_entries(_parse_json(text, source=None), max_lists))
    return [_names(labels, entry, LIMITS.max_labels) for entry, labels in entries]


def parse_label_lists(
    text: str | bytes,
    vocabulary: Vocabulary,
    *,
    max_labels: int = LIMITS.max_labels,
    max_lists: int | None = None,
    source: str | None = None,
) -> list[list[str]]:
    """Parse a test file's JSON text, `[["red cube", "blue sphere"], ["gray cylinder"]]`, into its checked lists.

    LabelError if it is not JSON or `Vocabulary.check` refuses it; `source` is the file's name for the message.
    """
    content = _parse_json(text, source=source)
    try:
        return vocabulary.check(content, max_labels=max_labels, max_lists=max_lists)
    except LabelError as error:
        raise _in_file(error, source) from None


def read_test_file(
    path_or_bytes: Path | str | bytes,
    vocabulary: Vocabulary,
    *,
    max_labels: int = LIMITS.max_labels,
    max_lists: int | None = None,
) -> list[list[str]]:
    """The label lists of a test file, given its path or its bytes. LabelError if it cannot be read or used."""
    if isinstance(path_or_bytes, bytes):
        return parse_label_lists(path_or_bytes, vocabulary, max_labels=max_labels, max_lists=max_lists)
    text = _read(path_or_bytes)
    return parse_label_lists(text, vocabulary, max_labels=max_labels, max_lists=max_lists, source=str(path_or_bytes))


def read_train_file(
    path: Path | str, vocabulary: Vocabulary, *, max_labels: int = LIMITS.max_labels
) -> dict[str, list[str]]:
    """A training file's pictures, file name -> labels, in the file's order. LabelError if it cannot be used."""
    content = _parse_json(_read(path), source=str(path))
    if not isinstance(content, dict) or not content:
        raise LabelError(f"wanted an object of file name -> labels, got {_kind(content)}", source=str(path))
    try:
        return {
            name: vocabulary.check_entry(labels, entry=name, max_labels=max_labels) for name, labels in content.items()
        }
    except LabelError as error:
        raise _in_file(error, str(path)) from None


def _entries(lists: object, most: int | None) -> Sequence[object]:
    """The entries of what is to be a list of at least one, at most `most`. LabelError."""
    if not isinstance(lists, list | tuple):
        raise LabelError(f"wanted a list of label lists, got {_kind(lists)}")
    if not lists:
        raise LabelError("wanted at least one label list, got an empty list")
    if most is not None and len(lists) > most:
        raise LabelError(f"{len(lists)} label lists; at most {most} are allowed")
    return lists


def _names(labels: object, entry: int | str | None, most: int) -> list[str]:
    """The labels of what is to be a list of 1..`most` texts. LabelError."""
    if not isinstance(labels, list | tuple):
        raise LabelError(f"wanted a list of labels, got {_kind(labels)}", entry=entry)
    if not labels:
        raise LabelError("empty list; wanted at least one label", entry=entry)
    if len(labels) > most:
        raise LabelError(f"{len(labels)} labels; at most {most} are allowed", entry=entry)
    for label in labels:
        if not isinstance(label, str):
            raise LabelError(f"wanted a label's name, got {_kind(label)}", entry=entry)
    return list(labels)


def _in_file(error: LabelError, source: str | None) -> LabelError:
    return LabelError(error.problem, entry=error.entry, label=error.label, source=source)


def _read(path: Path | str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise LabelError(f"cannot be read: {error.strerror}", source=str(path)) from error


def _parse_json(text: str | bytes, *, source: str | None) -> Any:
    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for key, value in pairs:
            if key in content:  # json keeps the last one silently
                raise LabelError("the same key twice in one object", entry=key, source=source)
            content[key] = value
        return content

    try:
        return json.loads(text, object_pairs_hook=distinct)
    except LabelError:
        raise
    except json.JSONDecodeError as error:
        problem = f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        raise LabelError(problem, source=source) from error
    except UnicodeDecodeError as error:
        raise LabelError(f"not JSON: not {error.encoding} text at byte {error.start}", source=source) from error
    except RecursionError as error:
        raise LabelError("not a label file: nested too deeply", source=source) from error
    except ValueError as error:  # a number of more than 4300 digits
        raise LabelError(f"not a label file: {error}", source=source) from error


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _sorted_words(text: str) -> str:
    return " ".join(sorted(text.casefold().split()))


def _printable(text: str) -> str:
    """Shortened, with control characters and lone surrogates escaped: safe on a terminal and in UTF-8."""
    short = text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in short)


def _quoted(text: str) -> str:
    return f'"{_printable(text)}"'


def _shown(value: object) -> str:
    return _quoted(value) if isinstance(value, str) else _printable(repr(value))


def _kind(value: object) -> str:
    """What a JSON value is, with the value where it is short enough to help."""
    match value:
        case None:
            return "null"
        case dict():
            return "an object" if value else "an empty object"
        case list() | tuple():
            return "a list" if value else "an empty list"
        case str():
            return f"the string {_quoted(value)}"
        case bool():
            return str(value).lower()
        case int() | float():
            return f"the number {_printable(repr(value))}"
        case _:
            return f"a {type(value).__name__}"
