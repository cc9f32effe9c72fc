"""Thresholds below which a command fails."""

import pytest

from service.client.thresholds import below, parse_thresholds


def test_only_scores_below_their_threshold_are_named() -> None:
    thresholds = parse_thresholds(["accuracy=0.95", "f1=0.5"])
    assert below({"accuracy": 0.95, "f1": 0.6}, thresholds) is None
    assert (
        below({"accuracy": 0.94999, "f1": 0.25}, thresholds) == "accuracy 0.9500 is below 0.95, f1 0.2500 is below 0.5"
    )


@pytest.mark.parametrize("text", ["accuracy", "accuracy=", "accuracy=1.5", "precision=0.5", "accuracy=nan", ""])
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not NAME=VALUE"):
        parse_thresholds([text])
