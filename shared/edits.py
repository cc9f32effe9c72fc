"""Edits of a picture by label: objects that are added, removed, moved or recoloured, one after the other.

An edited picture has the noise, places and rotations of the one before, with the objects of the edits changed. Knows
neither torch nor HTTP.
"""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Final, Self

from pydantic import ConfigDict, Field, model_validator

from shared.options import Fraction, Strict

MAX_EDITS: Final = 64  # of one picture, from the first on
LabelName = Annotated[str, Field(max_length=200)]
is_none: Final = partial(operator.is_, None)


class _Part(Strict):
    model_config = ConfigDict(frozen=True)


class Named(_Part):
    """An object of the picture."""

    label: LabelName


class Placed(Named):
    """An object and its centre, as fractions of the picture's width and height from the upper left corner."""

    x: Fraction
    y: Fraction


class Relabelled(Named):
    """An object of the picture, and its new label."""

    to: LabelName


class Edit(_Part):
    """One change of a picture: one of the fields."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})

    add: Placed | None = Field(default=None, exclude_if=is_none, description="an object that the picture lacks")
    remove: Named | None = Field(default=None, exclude_if=is_none)
    move: Placed | None = Field(default=None, exclude_if=is_none)
    recolour: Relabelled | None = Field(default=None, exclude_if=is_none, description="another label for an object")

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if len([part for part in vars(self).values() if part is not None]) != 1:
            raise ValueError("an edit has one of the fields add, remove, move and recolour")
        return self

    @property
    def new_labels(self) -> list[str]:
        """The labels that the picture must not have before."""
        return [new.label] if (new := self.add) else [named.to] if (named := self.recolour) else []


Edits = Annotated[tuple[Edit, ...], Field(max_length=MAX_EDITS, strict=False)]


class EditError(ValueError):
    """An edit of an object that the picture lacks (`is_missing`), or that it has already. `index`: of the edit."""

    def __init__(self, index: int, label: str, objects: Iterable[str], *, is_missing: bool) -> None:
        has = ", ".join(objects) or "nothing"
        super().__init__(f'no object is "{label}": there are {has}' if is_missing else f'there already is "{label}"')
        self.index, self.label, self.is_missing = index, label, is_missing


@dataclass(frozen=True)
class Object:
    """An object of an edited picture. Without `place`, it is where `origin` is in the picture before all edits."""

    label: str
    origin: str | None  # its label before all edits; None if it was added
    place: tuple[float, float] | None = None


def edited(labels: Sequence[str], edits: Sequence[Edit] | None) -> list[Object]:
    """Return the objects of a picture after its edits, in the order of `labels`, then those that were added.

    Raises EditError.
    """
    objects = {label: Object(label, label) for label in labels}

    def check(index: int, label: str, *, there: bool) -> None:
        if (label in objects) != there:
            raise EditError(index, label, objects, is_missing=there)

    for i, edit in enumerate(edits or ()):
        if new := edit.add:
            check(i, new.label, there=False)
            objects[new.label] = Object(new.label, None, (new.x, new.y))
        elif old := edit.remove:
            check(i, old.label, there=True)
            del objects[old.label]
        elif moved := edit.move:
            check(i, moved.label, there=True)
            objects[moved.label] = replace(objects[moved.label], place=(moved.x, moved.y))
        elif named := edit.recolour:
            check(i, named.label, there=True)
            check(i, named.to, there=False)
            changed = [replace(one, label=named.to) if one.label == named.label else one for one in objects.values()]
            objects = {one.label: one for one in changed}
    return list(objects.values())
