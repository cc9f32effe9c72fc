"""Thresholds below which a command fails."""

import pytest

from service.client.thresholds import below, parse_thresholds
from tests.service.client.test_report import RESULT


def test_only_scores_below_their_threshold_are_named() -> None:
    assert below(RESULT, parse_thresholds(["accuracy=0.75", "f1=0.5", "recall:blue sphere=1"])) is None
    missed = below(RESULT, parse_thresholds(["accuracy=0.95", "f1=0.85", "recall:red cube=0.9"]))
    assert missed == "accuracy 0.7500 is below 0.95, f1 0.8000 is below 0.85, recall:red cube 0.5000 is below 0.9"


def test_a_label_that_no_picture_asked_for_has_no_recall() -> None:
    with pytest.raises(ValueError, match='no picture asked for "red cylinder"'):
        below(RESULT, parse_thresholds(["recall:red cylinder=0.5"]))


@pytest.mark.parametrize(
    "text", ["accuracy", "accuracy=1.5", "precision=0.5", "accuracy=nan", "", "recall:=1", "recall=1"]
)
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not NAME=VALUE"):
        parse_thresholds([text])
