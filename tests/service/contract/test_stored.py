"""Two versions of the service side by side: a newer one is made here by adding fields to the classes of this one."""

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from service.contract import records, schemas
from service.contract.recipe import Recipe, example
from service.contract.records import JobRecord, JobResult, Picture, Point, Verdict
from service.contract.schemas import GenerateRequest, ScoreFields
from service.contract.stored import FIRST_FIELDS, Stored, fingerprint
from shared.options import SamplingOptions
from tests.service.store.helpers import record

# Written by 4478179, the first version with this rule.
FIRST: dict[type[Stored], str] = {
    JobRecord: '{"id":"a","owner":"","kind":"generate","created_at":1.0,"model":"toy","digest":"d","labels":'
    '[["red cube"]],"layouts":[[{"x":0.5,"y":0.25}]],"seed":7,"first":0,"webhook":null,"webhook_events":[],'
    '"request_id":"","traceparent":"","repeats":1,"trajectory":null,"columns":8,"options":{"sampler":"sde_dpmpp_2m","steps":4,'
    '"spacing":"uniform","guidance":3.0,"guidance_interval":[0.0,1.0],"eta":0.0,"clip_x0":false},"sent":false}',
    Picture: '{"job":"a","index":0,"labels":["red cube"],"layout":[{"x":0.5,"y":0.25}],"seed":9,"options":{"sampler":'
    '"sde_dpmpp_2m","steps":4,"spacing":"uniform","guidance":3.0,"guidance_interval":[0.0,1.0],"eta":0.0,'
    '"clip_x0":false},"run_seed":7,"position":0,"trajectory":null}',
    Verdict: '{"index":0,"labels":["red cube"],"seed":9,"accuracy":1.0,"f1":1.0,"exact":true,"probabilities":'
    '{"red cube":0.5}}',
    JobResult: '{"repeats":[{"accuracy":1.0,"exact_match":1.0,"f1":1.0}],"best":0}',
}


class NewOptions(SamplingOptions):
    glow: float = 0.0


class NewPoint(Point):
    z: float = 0.0


class NewPicture(Picture):
    options: NewOptions
    layout: tuple[NewPoint, ...] | None = None
    tint: str | None = None


class NewRecord(JobRecord):
    options: NewOptions
    layouts: list[list[NewPoint] | None] | None = None
    tint: str | None = None


def new_picture(**changes: Any) -> NewPicture:
    return NewPicture.model_validate({**Picture.read(FIRST[Picture]).model_dump(), **changes})


def new_record(**changes: Any) -> NewRecord:
    return NewRecord.model_validate({**JobRecord.read(FIRST[JobRecord]).model_dump(), **changes})


@pytest.mark.parametrize("kind", FIRST)
def test_records_of_the_first_version_are_read_and_written_alike(kind: type[Stored]) -> None:
    assert kind.read(FIRST[kind]).write() == FIRST[kind]


def test_later_fields_have_defaults() -> None:
    kinds = {one for module in (records, schemas) for one in vars(module).values() if isinstance(one, type)}
    stored = {kind for kind in kinds if issubclass(kind, Stored)} | {SamplingOptions, Point, Recipe, GenerateRequest}
    for kind in stored - {Stored}:
        required = {name for name, field in kind.model_fields.items() if field.is_required()}
        assert required <= FIRST_FIELDS, f"an older version does not write these fields of {kind.__name__}"


def test_a_new_picture_without_new_options_is_read_by_an_old_worker() -> None:
    assert Picture.read(new_picture().write()) == Picture.read(FIRST[Picture])
    assert NewPicture.read(FIRST[Picture]) == new_picture()


@pytest.mark.parametrize(
    "changes",
    [{"options": {"glow": 0.5}}, {"tint": "sepia"}, {"layout": [{"x": 0.5, "y": 0.25, "z": 1.0}]}],
    ids=["option", "field", "nested"],
)
def test_a_picture_that_an_old_worker_would_draw_differently_is_not_read(changes: dict[str, Any]) -> None:
    written = new_picture(**changes).write()
    assert NewPicture.read(written) == new_picture(**changes)
    with pytest.raises(ValidationError):
        Picture.read(written)


def test_an_old_api_reads_a_new_record_whatever_it_has() -> None:
    old = JobRecord.read(FIRST[JobRecord])
    assert JobRecord.read(new_record().write()) == old
    options = {**old.options.model_dump(), "glow": 0.5}
    changed = new_record(tint="sepia", options=options, layouts=[[{"x": 0.5, "y": 0.25, "z": 1.0}]])
    assert JobRecord.read(changed.write()) == old
    assert NewRecord.read(changed.write()) == changed


def test_a_default_that_changes_does_not_change_stored_records() -> None:
    assert '"steps":16' in record().model_copy(update={"options": SamplingOptions()}).write()


class NewRecipe(Recipe):
    options: NewOptions


def test_a_recipe_without_new_options_is_taken_by_an_old_api() -> None:
    plain = NewRecipe.model_validate(example())
    assert Recipe.model_validate_json(plain.text()["labelgrid"]) == Recipe.model_validate(example())
    glowing = NewRecipe.model_validate({**example(), "options": {"glow": 0.5}})
    with pytest.raises(ValidationError):
        Recipe.model_validate_json(glowing.text()["labelgrid"])


class NewRequest(GenerateRequest):
    glow: float | None = None


class NewScore(ScoreFields):
    judges: int = 1


@pytest.mark.parametrize(
    ("old", "new", "body"),
    [
        (GenerateRequest, NewRequest, {"labels": [["red cube"]], "steps": 5, "columns": 8}),
        (GenerateRequest, NewRequest, {"recipe": example()}),
        (ScoreFields, NewScore, {"repeats": 10}),
    ],
)
def test_a_retry_at_an_api_of_another_version_is_the_same_request(
    old: type[BaseModel], new: type[BaseModel], body: dict[str, Any]
) -> None:
    at_old = fingerprint(old.model_validate(body), without={"labels"})
    at_new = fingerprint(new.model_validate(body), without={"labels"})
    assert at_old == at_new
    # As in the first version, so that a key that it stored still counts.
    assert at_old == old.model_validate(body).model_dump(mode="json", exclude={"labels"})


def test_a_new_field_that_is_set_makes_another_request() -> None:
    body = {"labels": [["red cube"]]}
    plain, glowing = NewRequest.model_validate(body), NewRequest.model_validate({**body, "glow": 0.5})
    assert fingerprint(plain, without=set()) != fingerprint(glowing, without=set())
