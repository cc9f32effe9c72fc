"""Edits by label: what is left of a picture's objects after them."""

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from shared.diffusion.edits import places_of, with_objects
from shared.diffusion.layouts import OUTSIDE
from shared.edits import EditError, Edits, Object, edited
from shared.vocabulary import Vocabulary

EDITS: TypeAdapter[Any] = TypeAdapter(Edits)


def after(*edits: dict[str, Any], of: str = "ab") -> list[Object]:
    return edited(list(of), EDITS.validate_python(edits))


def test_a_chain_keeps_the_places_of_all_objects_that_it_does_not_name() -> None:
    assert after() == [Object("a", "a"), Object("b", "b")]
    chain = after(
        {"add": {"label": "c", "x": 0.5, "y": 0.25}},
        {"recolour": {"label": "a", "to": "d"}},
        {"move": {"label": "c", "x": 0.25, "y": 0.25}},
        {"remove": {"label": "b"}},
        {"recolour": {"label": "c", "to": "a"}},
    )
    assert chain == [Object("d", "a"), Object("a", None, (0.25, 0.25))]
    back = after({"remove": {"label": "a"}}, {"add": {"label": "a", "x": 0.5, "y": 0.5}})
    assert back == [Object("b", "b"), Object("a", None, (0.5, 0.5))]


@pytest.mark.parametrize(
    ("edit", "is_missing", "message"),
    [
        ({"remove": {"label": "c"}}, True, 'no object is "c": there are a, b'),
        ({"move": {"label": "c", "x": 0, "y": 0}}, True, 'no object is "c": there are a, b'),
        ({"recolour": {"label": "c", "to": "d"}}, True, 'no object is "c": there are a, b'),
        ({"add": {"label": "b", "x": 0, "y": 0}}, False, 'there already is "b"'),
        ({"recolour": {"label": "a", "to": "b"}}, False, 'there already is "b"'),
    ],
)
def test_an_edit_that_does_not_fit_is_named(edit: dict[str, Any], is_missing: bool, message: str) -> None:
    with pytest.raises(EditError) as raised:
        after({"move": {"label": "a", "x": 1, "y": 1}}, edit)
    assert (raised.value.index, raised.value.is_missing, str(raised.value)) == (1, is_missing, message)


@pytest.mark.parametrize(
    "edit", [{}, {"paint": {"label": "a"}}, {"remove": {"label": "a"}, "move": {"label": "a", "x": 0, "y": 0}}, "a"]
)
def test_an_edit_is_one_of_four_changes(edit: object) -> None:
    with pytest.raises(ValidationError):
        EDITS.validate_python([edit])


def test_the_network_is_given_the_same_rotations_and_places_for_what_stays() -> None:
    vocabulary = Vocabulary(tuple("abcd"))
    drawn = torch.tensor([[1, 0.1, 0.2, 0.3, 0.4], [1, 0.5, 0.6, 0.7, 0.8], [0, OUTSIDE, OUTSIDE, 0.9, 0.8]])
    drawn = torch.cat([drawn, torch.tensor([[0, OUTSIDE, OUTSIDE, 0.7, 0.6]])])
    objects = after({"recolour": {"label": "a", "to": "d"}}, {"add": {"label": "c", "x": 0.25, "y": 0.75}})
    new = with_objects(drawn, objects, vocabulary)
    assert torch.equal(new[1], drawn[1])
    assert torch.equal(new[3], drawn[0])  # the place and rotation of a
    assert new[2].tolist() == pytest.approx([1, 0.25, 0.75, 0.9, 0.8])  # the rotation that the seed drew for c
    assert new[0, :3].tolist() == [0, OUTSIDE, OUTSIDE]
    drawn[2, 3:] = 0  # c has no rotation
    recoloured = (
        after({"recolour": {"label": "a", "to": "c"}}),
        after({"remove": {"label": "a"}}, {"recolour": {"label": "b", "to": "a"}}),
        edited(["c"], EDITS.validate_python([{"recolour": {"label": "c", "to": "d"}}])),
    )
    rotations = [with_objects(drawn, objects, vocabulary)[:, 3:] for objects in recoloured]
    assert rotations[0][2].tolist() == [0, 0]  # not that of a
    assert torch.equal(rotations[1][0], drawn[1, 3:])  # that of b
    assert torch.equal(rotations[2][3], drawn[3, 3:])  # d's own, since c had none
    assert places_of(new, ["c", "b"], vocabulary) == ((0.25, 0.75), tuple(drawn[1, 1:3].tolist()))
    assert places_of(drawn, ["a", "c"], vocabulary) is None
