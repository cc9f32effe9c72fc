"""Scores by label and by number of objects."""

from dataclasses import dataclass, field

from service.contract.breakdown import LabelScore, ObjectsScore, breakdown


@dataclass
class Verdict:
    labels: list[str]
    probabilities: dict[str, float] = field(default_factory=dict)


def test_counts_by_hand() -> None:
    verdicts = [
        Verdict(["red cube", "blue sphere"], {"red cube": 0.9, "blue sphere": 0.8, "gray cube": 0.5}),  # exact
        Verdict(["red cube"], {"red cube": 0.1, "red cylinder": 0.7}),  # a cylinder instead of the cube
        Verdict(["red cube"], {"red cube": 0.4}),  # nothing instead
        Verdict(["red cube", "red cube"], {"red cube": 0.6, "gray cube": 0.6}),  # asked for twice, and one too many
    ]
    found = breakdown(verdicts)
    assert found.by_label == [
        LabelScore(label="blue sphere", asked=1, found=1, extra=0, instead={}),
        LabelScore(label="gray cube", asked=0, found=0, extra=1, instead={}),
        LabelScore(label="red cube", asked=4, found=2, extra=0, instead={"red cylinder": 1}),
        LabelScore(label="red cylinder", asked=0, found=0, extra=1, instead={}),
    ]
    assert found.by_objects == [
        ObjectsScore(objects=1, pictures=3, exact=0),
        ObjectsScore(objects=2, pictures=1, exact=1),
    ]
    blue, gray, red, _ = found.by_label
    assert (red.missing, red.recall, red.precision) == (2, 0.5, 1.0)
    assert (gray.recall, gray.precision) == (None, 0.0)
    assert (blue.recall, blue.precision) == (1.0, 1.0)
