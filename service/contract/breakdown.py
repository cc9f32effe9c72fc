"""What goes right and wrong in scored pictures, by label and by number of objects."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pydantic import BaseModel, Field

from shared.options import THRESHOLD


class Judged(Protocol):
    """A picture's verdict."""

    @property
    def labels(self) -> Sequence[str]: ...
    @property
    def probabilities(self) -> Mapping[str, float]: ...


class LabelScore(BaseModel):
    """How often one label was found (probability over 0.5), over the pictures of all repeats."""

    label: str
    asked: int = Field(description="pictures that asked for it")
    found: int = Field(description="those of them in which it was found")
    extra: int = Field(description="pictures in which it was found though they did not ask for it")
    instead: dict[str, int] = Field(
        description="label -> pictures that miss this one, and have that one without asking for it"
    )

    @property
    def missing(self) -> int:
        return self.asked - self.found

    @property
    def recall(self) -> float | None:
        """found / asked; None if it was never asked for."""
        return self.found / self.asked if self.asked else None

    @property
    def precision(self) -> float | None:
        """found / all pictures in which it was found; None if it was found in none."""
        return self.found / (self.found + self.extra) if self.found + self.extra else None


class ObjectsScore(BaseModel):
    """How many pictures of so many objects are exactly as asked, over all repeats."""

    objects: int
    pictures: int
    exact: int


@dataclass(frozen=True)
class Breakdown:
    by_label: list[LabelScore]  # every label that was asked for or found, in alphabetical order
    by_objects: list[ObjectsScore]  # ascending


def breakdown(verdicts: Sequence[Judged]) -> Breakdown:
    """Count what was asked for and what was found."""
    asked = Counter[str]()
    found = Counter[str]()
    extra = Counter[str]()
    pictures = Counter[int]()
    exact = Counter[int]()
    instead = defaultdict[str, Counter[str]](Counter)
    for verdict in verdicts:
        wanted = set(verdict.labels)
        present = {label for label, probability in verdict.probabilities.items() if probability > THRESHOLD}
        asked.update(wanted)
        found.update(wanted & present)
        extra.update(present - wanted)
        pictures[len(wanted)] += 1
        exact[len(wanted)] += wanted == present
        for label in wanted - present:
            instead[label].update(present - wanted)
    return Breakdown(
        [
            LabelScore(
                label=label,
                asked=asked[label],
                found=found[label],
                extra=extra[label],
                instead=dict(sorted(instead[label].items())),
            )
            for label in sorted(asked.keys() | extra.keys())
        ],
        [ObjectsScore(objects=n, pictures=pictures[n], exact=exact[n]) for n in sorted(pictures)],
    )
