"""Reading labels from prompts: however they are joined, labels are found; any other word is an error."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iclevr.labels import ICLEVR
from service.openai.prompt import ARTICLES, SEPARATORS, parse_prompt
from shared.options import LIMITS
from shared.vocabulary import LabelError, Vocabulary

OWN = Vocabulary(("black and white cat", "cat", "white cat", "white", "Dr. No", "the end"))


@pytest.mark.parametrize(
    ("prompt", "labels"),
    [
        ("A red cube, the Blue  Sphere; one gray cylinder.", ["red cube", "blue sphere", "gray cylinder"]),
        ("red cube & blue sphere\nwith a cyan cube", ["red cube", "blue sphere", "cyan cube"]),
        ("a black and white cat and a white cat", ["black and white cat", "white cat"]),
        ("dr. no and the end", ["Dr. No", "the end"]),
    ],
)
def test_labels_are_read_from_a_prompt(prompt: str, labels: list[str]) -> None:
    assert parse_prompt(prompt, OWN if "cube" not in prompt else ICLEVR) == labels


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("red kube and blue sphere", 'unknown label "red kube"; did you mean "red cube"?'),
        ("two red cubes", '"two red cubes": a picture shows an object of each kind at most once; ask for "red cube"'),
        ("2 spheres, blue", '"2 spheres": a picture shows'),
        ("infrared cube", 'unknown label "infrared cube"; did you mean "red cube"?'),
        ("red the cube", 'unknown label "red the cube"; did you mean "red cube"?'),
        ("a photo of a red cube", 'unknown label "photo of a"; known are "gray cube"'),
        ("red cube, red cube", 'duplicate label "red cube"'),
        ("and, the", "names no label"),
        (" and ".join(ICLEVR.names), f"at most {LIMITS.max_labels}"),
    ],
)
def test_other_prompts_are_errors(prompt: str, words: str) -> None:
    with pytest.raises(LabelError, match=words.replace("?", r"\?")):
        parse_prompt(prompt, ICLEVR)


@given(st.lists(st.sampled_from(ICLEVR.names), min_size=1, max_size=8, unique=True), st.data())
def test_labels_are_found_however_they_are_joined(labels: list[str], data: st.DataObject) -> None:
    joints = st.lists(st.sampled_from(sorted(SEPARATORS | ARTICLES)), max_size=3).map(" ".join)
    prompt = "".join(f" {data.draw(joints)} {label}" for label in labels)
    assert parse_prompt(prompt, ICLEVR) == labels


@given(st.text() | st.lists(st.sampled_from(["red", "cube", "and", "a", "ball", ","])).map(" ".join))
def test_no_word_is_ignored(prompt: str) -> None:
    try:
        labels = parse_prompt(prompt, ICLEVR)
    except LabelError:
        return
    left = prompt.casefold()
    for label in labels:
        left = " ".join(left.split()).replace(label, " ", 1)
    assert {word.strip(".!?\"'()") for word in left.replace(",", " ").replace(";", " ").split()} <= (
        SEPARATORS | ARTICLES | {""}
    )
