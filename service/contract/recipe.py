"""Recipes: JSON in every PNG with all that is needed to generate it again (docs/api.md).

Imports pydantic only: knows no Redis, no HTTP and no PNG.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, TypeAdapter, ValidationError, model_validator

from service.contract.options import PictureOptions
from service.contract.records import MAX_STAGES, JobRecord, Layouts, Picture, Point, Verdict
from shared.options import LIMITS, MAX_SEED, Strict

MAX_POSITION = 2**31  # of a picture in its request, from 0
KEYWORD = "labelgrid"  # of the PNG's text chunk
# Of scores and distances. Their last digits depend on the batch that a picture was judged in; these do not, so that the
# same picture has the same bytes.
DIGITS = 2

# The bounds are for the OpenAPI document only: the vocabulary checks them, with better error messages.
LabelLists = Annotated[
    list[Annotated[list[str], Field(fail_fast=True)]],
    Field(fail_fast=True),  # one error is enough, where a body has room for thousands
    Field(
        description=f"1 to {LIMITS.max_pictures_per_request} pictures, each a list of 1 to {LIMITS.max_labels} labels; "
        "each model has a narrower range (`support` in GET /models)",
        json_schema_extra={
            "minItems": 1,
            "maxItems": LIMITS.max_pictures_per_request,
            "items": {
                "type": "array",
                "items": {"type": "string"},
                "minItems": 1,
                "maxItems": LIMITS.max_labels,
                "uniqueItems": True,
            },
        },
    ),
]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Part(Strict):
    model_config = ConfigDict(frozen=True)


class MadeWith(_Part):
    """A checkpoint: its name, which may change later, and the digest of its tensors, which does not."""

    name: str = Field(max_length=100)
    digest: Digest


class RecipeVerdict(_Part):
    """The evaluator's verdict on one picture."""

    accuracy: float
    exact: bool
    f1: float
    scores: dict[str, float]
    distances: list[float | None] | None = None
    places: list[Point] | None = None


class Drawn(BaseModel):
    """Of a verdict, where its picture's objects are: what edits are checked with."""

    places: list[Point] | None = None


_VERDICTS = TypeAdapter(list[Drawn])


def _drawn(verdicts: Any) -> list[Drawn]:
    """Read verdicts that anybody may have written; an empty list for what cannot be read."""
    try:
        return _VERDICTS.validate_python(verdicts)
    except ValidationError:
        return []


class Recipe(_Part):
    """POST /generate with it gives the same pictures again; picture i has the seed picture_seed(seed, first + i)."""

    version: int = Field(ge=1, le=1, description="of this format")
    model: MadeWith
    labels: LabelLists
    layouts: Layouts | None = Field(
        default=None, description="for each picture a point per label, or null for random places"
    )
    seed: int = Field(ge=0, le=MAX_SEED, description="of the request; for repeat r of a score, the request's seed + r")
    first: int = Field(ge=0, le=MAX_POSITION, description="position of the first picture in its request")
    options: PictureOptions
    trajectory: int | None = Field(
        default=None, ge=2, le=MAX_STAGES, description="stages, in the recipe of a trajectory"
    )
    columns: int = Field(default=8, ge=1, le=LIMITS.max_columns, description="of the grid")
    evaluator: Annotated[Any, PlainValidator(lambda given: None)] = Field(
        default=None, description="source of the verdicts; ignored in requests"
    )
    verdicts: Annotated[Any, PlainValidator(_drawn)] = Field(
        default=[],
        description="one for each picture; in a request only their `places` count, if it has edits",
    )

    @model_validator(mode="after")
    def _check_last(self) -> Self:
        if self.first + len(self.labels) - 1 > MAX_POSITION:  # that picture's own recipe would be invalid
            raise ValueError(f"the last picture's position would exceed {MAX_POSITION}")
        if self.options.kept is not None and len(self.options.kept) != len(self.labels):
            raise ValueError(
                f"options.kept has {len(self.options.kept)} attempts; wanted {len(self.labels)}, one a picture"
            )
        return self

    def text(self) -> dict[str, str]:
        """Return it as a PNG's text chunk: keyword -> JSON."""
        return {KEYWORD: self.model_dump_json(exclude_none=True)}


class JudgedRecipe(Recipe):
    """A recipe as pictures carry it."""

    evaluator: MadeWith | None = None
    verdicts: list[RecipeVerdict] = Field(default=[])


def of_picture(picture: Picture, verdict: Verdict, model: MadeWith, evaluator: MadeWith | None) -> JudgedRecipe | None:
    """Return the recipe of one picture; None for an uploaded one."""
    if picture.run_seed is None:
        return None
    return JudgedRecipe(
        version=1,
        model=model,
        labels=[list(picture.labels)],
        layouts=[list(picture.layout)] if picture.layout else None,
        seed=picture.run_seed,
        first=picture.position,
        options=_kept(picture.options, [verdict]),
        evaluator=evaluator,
        verdicts=[RecipeVerdict(**verdict.shown(DIGITS))],
    )


def of_grid(record: JobRecord, repeat: int, verdicts: Sequence[Verdict], evaluator: MadeWith | None) -> JudgedRecipe:
    """Return the recipe of the grid that shows one repeat of a job."""
    return JudgedRecipe(
        version=1,
        model=MadeWith(name=record.model, digest=record.digest),
        labels=record.labels,
        layouts=record.layouts,
        seed=record.seed + repeat,
        first=record.first,
        options=_kept(record.options, verdicts),
        columns=record.columns,
        evaluator=evaluator,
        verdicts=[RecipeVerdict(**verdict.shown(DIGITS)) for verdict in verdicts],
    )


def _kept(options: PictureOptions, verdicts: Sequence[Verdict]) -> PictureOptions:
    """Return the options with the attempts that were kept, if pictures were drawn until exact."""
    if options.until is None:
        return options
    return options.model_copy(update={"kept": tuple(verdict.attempt for verdict in verdicts)})


def example() -> dict[str, Any]:
    """Return a recipe for the documents."""
    recipe = Recipe(
        version=1,
        model=MadeWith(name="base", digest="9f2c" * 16),
        labels=[["red cube", "blue sphere"]],
        seed=7,
        first=0,
        options=PictureOptions(),
    )
    return recipe.model_dump(mode="json", exclude_none=True)
