"""Label lists from JSON Lines."""

from pathlib import Path

import pytest

from service.client.errors import ClientError
from service.client.lines import read_lines


def test_a_line_is_a_list_or_an_object_with_fields_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('["red cube"]\n\n{"id": 7, "labels": ["gray cube", "blue sphere"]}\n')
    assert read_lines(file) == ([["red cube"], ["gray cube", "blue sphere"]], [{}, {"id": 7}])


@pytest.mark.parametrize("line", ["{", '{"id": 7}', '"red cube"', '{"labels": "red cube"}', "[1]", "7"])
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
