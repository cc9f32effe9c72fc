"""Thresholds for scores, such as accuracy=0.95, below which a command fails. For scripts and CI."""

from collections.abc import Mapping, Sequence
from typing import Final

SCORES: Final = ("accuracy", "exact_match", "f1")
BELOW: Final = 3  # the exit code of a score below its threshold


def parse_thresholds(texts: Sequence[str]) -> dict[str, float]:
    """Read "NAME=VALUE" texts. Raises ValueError for another form or an unknown score."""
    found: dict[str, float] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        try:
            if name not in SCORES or not equals or not 0 <= float(value) <= 1:
                raise ValueError
        except ValueError:
            raise ValueError(f'"{text}" is not NAME=VALUE: one of {", ".join(SCORES)}, and 0 to 1') from None
        found[name] = float(value)
    return found


def below(means: Mapping[str, float], thresholds: Mapping[str, float]) -> str | None:
    """Return which mean scores are below their thresholds, in words, or None."""
    missed = [
        f"{name} {means[name]:.4f} is below {least:g}" for name, least in thresholds.items() if means[name] < least
    ]
    return ", ".join(missed) or None
