"""The options of a job's pictures: which go together, and what is stored of them."""

import re
from typing import Any

import pytest
from pydantic import ValidationError

from service.contract.options import PictureOptions
from shared.options import SamplingOptions


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attempts": 3}, "attempts has no effect without until"),
        ({"kept": [1]}, "attempts has no effect without until"),
        ({"until": "exact"}, "until needs attempts"),
        ({"until": "exact", "attempts": 2, "kept": [1, 3]}, "kept is 3; there are 2 attempts"),
    ],
)
def test_attempts_go_with_until(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        PictureOptions.model_validate(given)


def test_without_attempts_and_edits_they_are_stored_as_the_samplings() -> None:
    assert PictureOptions().model_dump_json() == SamplingOptions().model_dump_json()
    stored = '{"until":"exact","attempts":3,"kept":[2],"edits":[{"remove":{"label":"a"}}]}'
    assert PictureOptions.model_validate_json(stored).model_dump_json(exclude_defaults=True) == stored


def test_whole_numbers_may_have_a_decimal_point_as_in_json_schema() -> None:
    given = {"steps": 4.0, "until": "exact", "attempts": 4.0, "kept": [1.0, 4]}
    assert PictureOptions.model_validate(given).model_dump(include=given.keys()) == {**given, "kept": (1, 4)}
    for kept in ([1.5], ["1"], [True]):
        with pytest.raises(ValidationError, match="valid integer"):
            PictureOptions.model_validate({**given, "kept": kept})
