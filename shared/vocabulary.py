"""Label names and their indices, and label files. An error names the file, the entry and the label.

Must not know torch, HTTP or the network: the API checks labels with it, the trainer reads its data with it.
"""

import contextlib
import difflib
import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Self

from shared.options import LIMITS

SHOWN_CHARACTERS: Final = 60  # of a foreign value in a message: a name fits, a pasted file does not
SHOWN_NAMES: Final = 32  # of a vocabulary in a message
MIN_SIMILARITY: Final = 0.6  # difflib's own default; below it a suggestion is a guess


class LabelError(ValueError):
    """Labels that cannot be used. The message names the file, the entry and the value.

    entry: position in the list, counted from 0, or the key in an object; None if the whole text is wrong.
    label: the offending label, shortened and printable, or None. problem: the message without file and entry.
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
    """The label names, in the order of their indices. LabelError if there are none, or blank or duplicate ones."""

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.names:
            raise LabelError("a vocabulary needs at least one name")
        if not all(isinstance(name, str) and name.strip() for name in self.names):
            raise LabelError(f"names of a vocabulary must be non-blank strings, got {self.names!r}")
        if len(set(self.names)) != len(self.names):
            raise LabelError(f"names of a vocabulary must be distinct, got {self.names!r}")

    @classmethod
    def from_objects_file(cls, path: Path | str) -> Self:
        """Read `objects.json`: an object of name -> index with the indices 0..n-1 in any order. Raises LabelError."""
        with _content_of(path) as file:
            content = _object(file, "an object of name -> index")
            for name, index in content.items():
                if type(index) is not int or not 0 <= index < len(content):
                    raise LabelError(f"index {_shown(index)} is not one of 0..{len(content) - 1}", entry=name)
            by_index = {index: name for name, index in content.items()}
            for name, index in content.items():
                if by_index[index] != name:
                    raise LabelError(f"index {index} also belongs to {_quoted(by_index[index])}", entry=name)
            return cls(tuple(sorted(content, key=content.__getitem__)))

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._indices

    def index(self, name: str) -> int:
        """Return the index of a name. LabelError, which suggests the nearest known name, for an unknown one."""
        return self.encode([name])[0]

    @cached_property
    def _indices(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.names)}

    def encode(self, labels: Sequence[str]) -> list[int]:
        """Return the labels' indices, in the order given. LabelError for an unknown label."""
        try:
            return [self._indices[label] for label in labels]
        except KeyError as error:
            raise self._unknown(error.args[0]) from None

    def multi_hot(self, labels: Sequence[str]) -> list[float]:
        """Return one float per name: 1.0 at each label's index, 0.0 elsewhere. LabelError for an unknown label."""
        row = [0.0] * len(self.names)
        for index in self.encode(labels):
            row[index] = 1.0
        return row

    def nearest(self, label: str) -> str | None:
        """Return the known name most similar to `label`, in any order of its words, or None if none is similar."""
        if len(label) > SHOWN_CHARACTERS:  # difflib takes quadratic time, and the label comes from outside
            return None

        def similarity(name: str) -> float:
            pairs = ((_words(label), _words(name)), (sorted(_words(label)), sorted(_words(name))))
            return max(difflib.SequenceMatcher(None, " ".join(a), " ".join(b)).ratio() for a, b in pairs)

        best = max(self.names, key=similarity)
        return best if similarity(best) >= MIN_SIMILARITY else None

    def check(self, lists: object, *, max_lists: int | None = None) -> list[list[str]]:
        """Return the label lists as given: at least one and at most `max_lists`, each as `check_entry` requires.

        Raises LabelError for the first list that cannot be drawn.
        """
        return [self.check_entry(labels, entry=entry) for entry, labels in enumerate(_entries(lists, max_lists))]

    def check_entry(
        self, labels: object, *, entry: int | str | None = None, most: int = LIMITS.max_labels
    ) -> list[str]:  # fmt: skip
        """Return one entry's labels as given: 1 to `most` distinct known names. Else LabelError."""
        checked: dict[str, None] = {}
        for label in _names(labels, entry, most):
            if label not in self._indices:
                raise self._unknown(label, entry)
            if label in checked:
                raise LabelError(f"duplicate label {_quoted(label)}", entry=entry, label=label)
            checked[label] = None
        return list(checked)

    def _unknown(self, label: str, entry: int | str | None = None) -> LabelError:
        near = self.nearest(label)
        if near is not None:
            hint = f"did you mean {_quoted(near)}?"
            if unicodedata.normalize("NFC", near) == unicodedata.normalize("NFC", label):
                hint += " It looks the same, but has another Unicode normal form (NFC or NFD)"
        else:
            more = len(self) - SHOWN_NAMES
            known = ", ".join(map(_quoted, self.names[:SHOWN_NAMES]))
            hint = f"known are {known}" + (f" and {more} more" if more > 0 else "")
        return LabelError(f"unknown label {_quoted(label)}; {hint}", entry=entry, label=_printable(label))


def parse_label_lists(text: str | bytes, *, max_lists: int | None = None) -> list[list[str]]:
    """Parse a test file's JSON text, `[["red cube", "blue sphere"], ["gray cylinder"]]`, without a vocabulary.

    Checks the form and the sizes only; `Vocabulary.check` checks the names. Raises LabelError.
    """
    return [_names(labels, entry) for entry, labels in enumerate(_entries(_parse_json(text), max_lists))]


def read_test_file(path: Path | str, vocabulary: Vocabulary) -> list[list[str]]:
    """Return the label lists of a test file. LabelError if it cannot be read or a list cannot be drawn."""
    with _content_of(path) as lists:
        return vocabulary.check(lists)


def read_train_file(path: Path | str, vocabulary: Vocabulary) -> dict[str, list[str]]:
    """Return a training file's pictures, file name -> labels, in the file's order. LabelError if it cannot be used.

    An empty list stands for a picture whose labels are unknown. A picture may have more labels than a request.
    """
    with _content_of(path) as content:
        pictures, most = _object(content, "an object of file name -> labels"), max(LIMITS.max_labels, len(vocabulary))
        return {
            name: [] if labels == [] else vocabulary.check_entry(labels, entry=name, most=most)
            for name, labels in pictures.items()
        }


def _entries(lists: object, most: int | None) -> Sequence[object]:
    """Return the entries of a list that must have 1 to `most` of them. LabelError."""
    if not isinstance(lists, list | tuple):
        raise LabelError(f"expected a list of label lists, got {_kind(lists)}")
    if not lists:
        raise LabelError("expected at least one label list, got an empty list")
    if most is not None and len(lists) > most:
        raise LabelError(f"{len(lists)} label lists; at most {most} are allowed")
    return lists


def _names(labels: object, entry: int | str | None, most: int = LIMITS.max_labels) -> list[str]:
    """Return the labels of a list that must have 1 to `most` strings. LabelError."""
    if not isinstance(labels, list | tuple):
        raise LabelError(f"expected a list of labels, got {_kind(labels)}", entry=entry)
    if not labels:
        raise LabelError("empty list; expected at least one label", entry=entry)
    if len(labels) > most:
        raise LabelError(f"{len(labels)} labels; at most {most} are allowed", entry=entry)
    for label in labels:
        if not isinstance(label, str):
            raise LabelError(f"expected a label's name, got {_kind(label)}", entry=entry)
    return list(labels)


@contextlib.contextmanager
def _content_of(path: Path | str) -> Iterator[Any]:
    """Yield a file's JSON content. A LabelError, here or in the caller's block, gets the file's name."""
    try:
        yield _parse_json(Path(path).read_bytes())
    except OSError as error:
        raise LabelError(f"cannot be read: {error.strerror}", source=str(path)) from error
    except LabelError as error:
        raise LabelError(error.problem, entry=error.entry, label=error.label, source=str(path)) from error.__cause__


def _object(content: Any, what: str) -> dict[str, Any]:
    if not isinstance(content, dict) or not content:
        raise LabelError(f"expected {what}, got {_kind(content)}")
    return content


def _parse_json(text: str | bytes) -> Any:
    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for key, value in pairs:
            if key in content:  # json silently keeps the last one
                raise LabelError("duplicate key in one object", entry=key)
            content[key] = value
        return content

    try:
        return json.loads(text, object_pairs_hook=distinct)
    except LabelError:
        raise
    except json.JSONDecodeError as error:
        raise LabelError(f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise LabelError(f"not JSON: {json_fault(error)}") from error


def json_fault(error: ValueError | RecursionError) -> str:
    """Return why Python's JSON parser failed, in words that do not need Python."""
    match error:
        case json.JSONDecodeError():
            return f"{error.msg} at character {error.pos}"
        case UnicodeDecodeError():
            return f"not {error.encoding} text at byte {error.start}"
        case RecursionError():
            return "nested too deeply"
    return "a number with too many digits"  # more than the 4,300 that Python parses


def _words(text: str) -> list[str]:
    return text.casefold().split()


def _printable(text: str) -> str:
    """Shorten a text and escape control characters and lone surrogates: safe on a terminal and in UTF-8."""
    short = text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in short)


def _quoted(text: str) -> str:
    return f'"{_printable(text)}"'


def _shown(value: object) -> str:
    return _quoted(value) if isinstance(value, str) else _printable(repr(value))


def _kind(value: object) -> str:
    """Describe a JSON value: its type, and the value itself if it is a string, a number or a boolean."""
    match value:
        case None | bool():
            return json.dumps(value)
        case dict():
            return "an object" if value else "an empty object"
        case list() | tuple():
            return "a list" if value else "an empty list"
        case str():
            return f"the string {_quoted(value)}"
        case int() | float():
            return f"the number {_printable(repr(value))}"
        case _:
            return f"a {type(value).__name__}"
