"""Thresholds for scores, below which a command fails: accuracy=0.95, "recall:red cube=0.9". For scripts and CI."""

from collections.abc import Mapping, Sequence
from typing import Final

from service.contract.schemas import ScoreResult

SCORES: Final = ("accuracy", "exact_match", "f1")
RECALL: Final = "recall:"  # of the label that follows
BELOW: Final = 3  # the exit code of a score below its threshold


def parse_thresholds(texts: Sequence[str]) -> dict[str, float]:
    """Read "NAME=VALUE" texts. Raises ValueError for another form or an unknown score."""
    found: dict[str, float] = {}
    for text in texts:
        name, equals, value = text.rpartition("=")
        try:
            known = name in SCORES or (name.startswith(RECALL) and name != RECALL)
            if not known or not equals or not 0 <= float(value) <= 1:
                raise ValueError
        except ValueError:
            raise ValueError(
                f'"{text}" is not NAME=VALUE: one of {", ".join(SCORES)} or recall:LABEL, and 0 to 1'
            ) from None
        found[name] = float(value)
    return found


def below(result: ScoreResult, thresholds: Mapping[str, float]) -> str | None:
    """Return which means are below their thresholds, in words, or None. ValueError for a label without a recall."""
    missed = []
    for name, least in thresholds.items():
        value = _value(result, name)
        if value < least:
            missed.append(f"{name} {value:.4f} is below {least:g}")
    return ", ".join(missed) or None


def _value(result: ScoreResult, name: str) -> float:
    if name in SCORES:
        return float(getattr(result, name).mean)
    label = name.removeprefix(RECALL)
    for one in result.by_label:
        if one.label == label and one.recall is not None:
            return one.recall
    raise ValueError(f'no picture asked for "{label}"')
