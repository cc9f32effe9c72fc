"""Label lists from JSON Lines."""

import json
from pathlib import Path

import pytest

from service.client.errors import ClientError
from service.client.lines import OUTPUT_FIELDS, lines_of, read_lines
from service.contract.schemas import Job
from tests.service.api.answers import JOB_EXAMPLE


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "x.jsonl"


def test_a_line_is_a_list_or_an_object_with_fields_of_its_own(file: Path) -> None:
    file.write_text('["red cube"]\n\n{"id": 7, "labels": ["gray cube", "blue sphere"]}\n')
    assert read_lines(file) == ([["red cube"], ["gray cube", "blue sphere"]], [{}, {"id": 7}])


def test_only_a_line_feed_ends_a_line(file: Path) -> None:
    file.write_bytes('\ufeff["a\u2028b"]\r\n["c\x85d"]'.encode())  # begins with a byte order mark
    assert read_lines(file)[0] == [["a\u2028b"], ["c\x85d"]]


def test_a_field_that_the_output_would_replace_is_refused(file: Path) -> None:
    (output,) = map(json.loads, lines_of(Job.model_validate(JOB_EXAMPLE)))
    assert {"index", "seed", "url", "job"} < output.keys() == OUTPUT_FIELDS
    file.write_text('["red cube"]\n{"labels": ["red cube"], "seed": 1}')
    with pytest.raises(ClientError, match=r"x\.jsonl: line 2: .* 'seed'"):
        read_lines(file, OUTPUT_FIELDS)
    assert read_lines(file)[1] == [{}, {"seed": 1}]


@pytest.mark.parametrize("line", ["[" * 5000, "{", '{"id": 7}', '"red cube"', '{"labels": "red cube"}', "[1]"])
def test_a_bad_line_is_named(file: Path, line: str) -> None:
    file.write_text(f'["red cube"]\n{line}\n')
    with pytest.raises(ClientError, match=r"x\.jsonl: line 2: wanted"):
        read_lines(file)


def test_a_file_without_lines_is_refused(file: Path) -> None:
    file.write_text("\n")
    with pytest.raises(ClientError, match="has no lines"):
        read_lines(file)
