"""Label names and label files: valid files are read, and an invalid one is refused by entry and value."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iclevr.labels import ICLEVR
from shared.vocabulary import LabelError, Vocabulary, parse_label_lists, read_test_file, read_train_file
from tests.paths import TASK_FILES

COURSE = TASK_FILES / "iclevr"
with_course_files = pytest.mark.skipif(not COURSE.is_dir(), reason=f"the course's label files are not at {COURSE}")


# --- the vocabulary ---


@with_course_files
def test_iclevr_equals_the_courses_objects_file() -> None:
    assert Vocabulary.from_objects_file(COURSE / "objects.json") == ICLEVR
    raw = json.loads((COURSE / "objects.json").read_text())
    assert {name: ICLEVR.index(name) for name in ICLEVR.names} == raw


def test_labels_are_encoded_as_indices_and_as_multi_hot_rows() -> None:
    vocabulary = Vocabulary(("a", "b", "c"))
    assert vocabulary.encode(["c", "a"]) == [2, 0]
    assert vocabulary.multi_hot(["c", "a"]) == [1.0, 0.0, 1.0]
    assert vocabulary.multi_hot([]) == [0.0, 0.0, 0.0]
    assert "b" in vocabulary
    assert "d" not in vocabulary
    assert ["a"] not in vocabulary  # unhashable, yet only absent
    with pytest.raises(LabelError, match=r'^unknown label "d"; known are "a", "b, c"$'):
        Vocabulary(("a", "b, c")).encode(["a", "d"])


@pytest.mark.parametrize("names", [(), ("a", "a"), ("a", " "), ("a", 1)])
def test_a_vocabulary_refuses_no_names_and_blank_duplicate_or_wrongly_typed_ones(names: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="vocabulary"):
        Vocabulary(names)


def test_an_objects_file_orders_names_by_index(tmp_path: Path) -> None:
    path = tmp_path / "objects.json"
    path.write_text('{"b": 1, "c": 2, "a": 0}')
    assert Vocabulary.from_objects_file(path).names == ("a", "b", "c")


def read_pictures(path: Path) -> object:
    return read_train_file(path, ICLEVR)


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (Vocabulary.from_objects_file, "{}", "expected an object of name -> index, got an empty object"),
        (Vocabulary.from_objects_file, '{"a": 0, "b": 2}', 'entry "b": index 2 is not one of 0..1'),
        (Vocabulary.from_objects_file, '{"a": 0, "b": true}', 'entry "b": index True is not one of 0..1'),
        (Vocabulary.from_objects_file, '{"a": 0, "b": "1"}', 'entry "b": index "1" is not one of 0..1'),
        (Vocabulary.from_objects_file, '{"a": 0, "b": 0}', 'entry "a": index 0 also belongs to "b"'),
        (Vocabulary.from_objects_file, '{"a": 0, "a": 1}', 'entry "a": duplicate key in one object'),
        (read_pictures, '[["red cube"]]', "expected an object of file name -> labels, got a list"),
        (read_pictures, '{"a.png": "red cube"}', 'entry "a.png": expected a list of labels, got the string "red cube"'),
        (
            read_pictures,
            '{"a.png": ["red cubes"]}',
            'entry "a.png": unknown label "red cubes"; did you mean "red cube"?',
        ),
    ],
)
def test_an_invalid_objects_or_training_file_is_refused(
    read: Callable[[Path], object], text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(LabelError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: {message}")


# --- the nearest known name ---


@pytest.mark.parametrize(
    ("label", "near"),
    [
        ("red cubes", "red cube"),
        (" red  cube ", "red cube"),
        ("cube red", "red cube"),
        ("grey sphere", "gray sphere"),
        ("yelow cilinder", "yellow cylinder"),
        ("zzz", None),
        ("red cube" + " " * 100, None),  # too long to be a slip; longer ones would cost seconds to compare
    ],
)
def test_the_most_similar_known_name_is_suggested(label: str, near: str | None) -> None:
    assert ICLEVR.nearest(label) == near


# --- bad label lists ---

BAD_LISTS: list[tuple[Any, str]] = [
    ([["red cube"]] * 3 + [["red cubes"]], 'entry 3: unknown label "red cubes"; did you mean "red cube"?'),
    ([["red cube"], ["zzz"]], 'entry 1: unknown label "zzz"; known are "gray cube", "red cube", '),
    ([["red cube"], []], "entry 1: empty list; expected at least one label"),
    ([["red cube", "gray cube", "red cube"]], 'entry 0: duplicate label "red cube"'),
    ([["red cube"], list(ICLEVR.names[:17])], "entry 1: 17 labels; at most 16 are allowed"),
    ([["red cube"]] * 6, "6 label lists; at most 5 are allowed"),
    ([], "expected at least one label list, got an empty list"),
    ({}, "expected a list of label lists, got an empty object"),
    ("red cube", 'expected a list of label lists, got the string "red cube"'),
    (["red cube"], 'entry 0: expected a list of labels, got the string "red cube"'),
    ([["red cube", 1]], "entry 0: expected a label's name, got the number 1"),
    ([[["red cube"]]], "entry 0: expected a label's name, got a list"),
]


@pytest.mark.parametrize(("lists", "message"), BAD_LISTS)
def test_invalid_lists_are_refused_by_entry_and_value(lists: Any, message: str, tmp_path: Path) -> None:
    def refusal(read: Callable[[], object]) -> str:
        with pytest.raises(LabelError) as caught:
            read()
        return str(caught.value)

    text = json.dumps(lists)
    assert refusal(lambda: ICLEVR.check(lists, max_lists=5)).startswith(message)
    assert refusal(lambda: ICLEVR.check(parse_label_lists(text, max_lists=5))).startswith(message)
    if not (isinstance(lists, list) and len(lists) > 5):  # a file may have any number of lists
        path = tmp_path / "test.json"
        path.write_text(text)
        assert refusal(lambda: read_test_file(path, ICLEVR)).startswith(f"{path}: {message}")


def test_a_label_in_another_unicode_normal_form_is_explained() -> None:
    vocabulary = Vocabulary(("gr\N{LATIN SMALL LETTER U WITH DIAERESIS}n", "red"))
    for label, alike in (("gru\N{COMBINING DIAERESIS}n", True), ("grun", False)):
        with pytest.raises(LabelError) as caught:
            vocabulary.check([[label]])
        assert ("another Unicode normal form" in str(caught.value)) == alike


def test_a_hostile_label_gives_a_short_printable_message() -> None:
    for label in ("x" * 100_000, "\x1b[31mred\n\x00", "\ud800"):
        with pytest.raises(LabelError) as caught:
            ICLEVR.check([[label]])
        message = str(caught.value)
        assert len(message) < 700
        assert message.isprintable()
        assert message.encode()  # a lone surrogate would raise
        assert caught.value.label is not None
        assert caught.value.label.encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON: Expecting value at line 1, column 1"),
        (b'[["red cube"],\n ["gray cube"', "not JSON: Expecting ',' delimiter at line 2, column 14"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", "not JSON: not utf-8 text at byte 0"),
        (b"[" * 200_000, "not JSON: nested too deeply"),
        (b"[[" + b"9" * 5000 + b"]]", "not JSON: a number with too many digits"),
    ],
)
def test_text_that_is_not_json_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(LabelError) as caught:
        read_test_file(path, ICLEVR)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert caught.value.entry is None


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.json", tmp_path):
        for read in (read_test_file, read_train_file):
            with pytest.raises(LabelError, match="cannot be read: ") as caught:
                read(path, ICLEVR)
            assert str(caught.value).startswith(str(path))


def test_a_byte_order_mark_is_accepted() -> None:
    assert parse_label_lists(b'\xef\xbb\xbf[["red cube"]]') == [["red cube"]]


# --- training files ---


def test_a_training_file_keeps_its_order(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    pictures = {"b.png": ["red cube"], "a.png": ["blue cube", "gray sphere"]}
    path.write_text(json.dumps(pictures))
    assert list(read_train_file(path, ICLEVR).items()) == list(pictures.items())


@with_course_files
def test_the_courses_label_files_can_be_read() -> None:
    for name, count in (("test", 32), ("new_test", 32), ("novel", 136)):
        lists = read_test_file(COURSE / f"{name}.json", ICLEVR)
        assert lists == json.loads((COURSE / f"{name}.json").read_text())
        assert len(lists) == count
    pictures = read_train_file(COURSE / "train.json", ICLEVR)
    assert pictures == json.loads((COURSE / "train.json").read_text())
    assert len(pictures) == 18_009


# --- random label files ---

good_lists = st.lists(
    st.lists(st.sampled_from(ICLEVR.names), min_size=1, max_size=8, unique=True), min_size=1, max_size=20
)
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(ICLEVR.names),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=20,
)


@given(
    good_lists,
    st.lists(st.tuples(st.integers(0, 400), st.sampled_from([*'[]{}",:0 \\eénull']) | st.characters()), max_size=4),
)
def test_damaged_test_files_are_accepted_or_refused(lists: list[list[str]], changes: list[tuple[int, str]]) -> None:
    content = json.dumps(lists)
    for at, character in changes:
        content = content[:at] + character + content[at + 1 :]
    data = content.encode("utf-8", "surrogatepass")
    with contextlib.suppress(LabelError):
        assert ICLEVR.check(parse_label_lists(data)) == json.loads(data)
