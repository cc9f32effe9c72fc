"""Label lists from JSON Lines."""

import json
from pathlib import Path

import pytest

from service.client.errors import ClientError
from service.client.lines import OUTPUT_FIELDS, lines_of, read_lines
from service.contract.schemas import Job
from tests.service.api.answers import JOB_EXAMPLE


def test_a_line_is_a_list_or_an_object_with_fields_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('["red cube"]\n\n{"id": 7, "labels": ["gray cube", "blue sphere"]}\n')
    assert read_lines(file) == ([["red cube"], ["gray cube", "blue sphere"]], [{}, {"id": 7}])


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes('\ufeff["a\u2028b"]\r\n["c\x85d"]\r\n\r\n["e"]'.encode())  # begins with a byte order mark
    assert read_lines(file)[0] == [["a\u2028b"], ["c\x85d"], ["e"]]


def test_a_field_that_the_output_would_replace_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    (output,) = map(json.loads, lines_of(Job.model_validate(JOB_EXAMPLE)))
    assert {"index", "seed", "url", "job"} < output.keys() - {"labels"}
    for name in output.keys() - {"labels"}:
        file.write_text(json.dumps(["red cube"]) + "\n" + json.dumps({"labels": ["red cube"], name: 1}))
        with pytest.raises(ClientError, match=rf"x\.jsonl: line 2: .* '{name}'"):
            read_lines(file, OUTPUT_FIELDS)
        assert read_lines(file)[1] == [{}, {name: 1}]


@pytest.mark.parametrize("line", ["[" * 5000, "{", '{"id": 7}', '"red cube"', '{"labels": "red cube"}', "[1]", "7"])
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(f'["red cube"]\n{line}\n')
    with pytest.raises(ClientError, match=r"x\.jsonl: line 2: wanted"):
        read_lines(file)


def test_a_file_without_lines_or_that_is_missing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("\n")
    with pytest.raises(ClientError, match="has no lines"):
        read_lines(tmp_path / "x.jsonl")
    with pytest.raises(ClientError, match="No such file"):
        read_lines(tmp_path / "y.jsonl")
