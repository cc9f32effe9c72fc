"""The bodies of requests and responses.

Imports pydantic only, because clients read them too. The routes check labels against a model's vocabulary.
"""

from functools import lru_cache
from typing import Annotated, Any, Final, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from service.contract.options import ATTEMPTS, Attempt, PictureOptions
from service.contract.recipe import LabelLists, Recipe, example
from service.contract.records import (
    MAX_STAGES,
    JobKind,
    JobStatus,
    LabelScore,
    Layouts,
    ObjectsScore,
    Point,
    Scores,
    WebhookEvent,
)
from shared.edits import Edits
from shared.options import (
    LIMITS,
    MAX_SEED,
    THRESHOLD,
    Fraction,
    NoOtherFields,
    SamplerName,
    SamplingOptions,
    SpacingName,
    Strict,
)
from shared.support import Support

MAX_DEADLINE_S = 86_400.0
LONGEST_PAGE = 100  # jobs that GET /jobs lists at once
EXAMPLE_ID = "5f0c9e1a7d3b4c2e8a6f1b0d9c8e7f6a"
LABELS_EXAMPLE: Any = [["red cube", "blue sphere"], ["gray cylinder"]]
EDITS_EXAMPLE: Any = [
    {"add": {"label": "green cylinder", "x": 0.3, "y": 0.45}},
    {"recolour": {"label": "red cube", "to": "cyan cube"}},
]


def with_examples(*examples: dict[str, Any]) -> ConfigDict:
    """Return a model's configuration with examples for the document."""
    return ConfigDict(json_schema_extra={"examples": [*examples]})


Stages = Annotated[int | None, Field(ge=2, le=MAX_STAGES, description="stages of a trajectory for each picture")]


class JobFields(NoOtherFields):
    """The fields of every request that creates a job, none of which changes a picture."""

    deadline_s: float | None = Field(
        None,
        gt=0,
        le=MAX_DEADLINE_S,
        allow_inf_nan=False,
        description="seconds within which the job must be finished: refused, or given up, once that is impossible",
    )
    webhook: str | None = Field(None, max_length=2000, description="URL for signed POSTs (docs/api.md)")
    webhook_events: list[WebhookEvent] | None = Field(
        None, min_length=1, max_length=len(get_args(WebhookEvent)), description="which events; by default the end"
    )


OPTIONS = tuple(PictureOptions.model_fields)
BESIDE_RECIPE = {"recipe", "edits", "trajectory", *JobFields.model_fields}  # fields of a request with a recipe


class SamplingFields(Strict, JobFields):
    """The fields that requests for pictures share, all of them optional."""

    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description="the same seed gives the same pictures; random if not given"
    )
    steps: int | None = Field(None, ge=1, le=LIMITS.max_steps, description="number of sampling steps")
    guidance: float | None = Field(
        None, ge=0, le=LIMITS.max_guidance, allow_inf_nan=False, description="weight w of guidance; 1 is none"
    )
    sampler: SamplerName | None = None
    spacing: SpacingName | None = Field(None, description="how the timesteps are spaced")
    guidance_interval: Annotated[list[Fraction], Field(min_length=2, max_length=2)] | None = Field(
        None, description="fractions of T between which guidance is on, lower one first"
    )
    eta: Fraction | None = Field(None, description="noise of ddim; for other samplers it is fixed")
    clip_x0: bool | None = Field(None, description="clip the predicted picture to [-1, 1] at each step")
    until: Literal["exact"] | None = Field(
        None, description="draw each picture again until the evaluator finds exactly its labels; not with /score"
    )
    attempts: Attempt | None = Field(
        None, description=f"with `until`: how often a picture is drawn at most; {ATTEMPTS} if not given"
    )
    model: str | None = Field(None, max_length=100, description="a name from GET /models; null for the default")
    columns: int = Field(8, ge=1, le=LIMITS.max_columns, description="columns of the grid")

    def sampling(self, own: SamplingOptions) -> PictureOptions:
        """Return the sampling options, the model's `own` where none is given. ValidationError if they conflict."""
        given = [(name, value) for name in OPTIONS if (value := getattr(self, name, None)) is not None]
        if self.until is not None and self.attempts is None:
            given.append(("attempts", ATTEMPTS))
        return _options(own, *((name, tuple(value) if isinstance(value, list) else value) for name, value in given))


@lru_cache(64)  # most requests have the same ones
def _options(own: SamplingOptions, *given: tuple[str, Any]) -> PictureOptions:
    return PictureOptions.model_validate({**vars(own), **dict(given)})


class GenerateRequest(SamplingFields):
    """One picture for each list of labels, or the pictures of a recipe."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": ["labels"], "properties": {"recipe": {"type": "null"}}},
                {
                    "required": ["recipe"],
                    "properties": {"recipe": {"type": "object"}},
                    "propertyNames": {"enum": [*sorted(BESIDE_RECIPE)]},
                },
            ],
            "examples": [
                {"labels": LABELS_EXAMPLE},
                {"labels": LABELS_EXAMPLE, "seed": 7, "steps": 20, "guidance": 2.0, "sampler": "dpmpp_2m"},
                {"labels": LABELS_EXAMPLE, "layouts": [[{"x": 0.5, "y": 0.43}, {"x": 0.7, "y": 0.6}], None]},
                {"recipe": example()},
                {"recipe": example(), "edits": EDITS_EXAMPLE},
            ],
        }
    )

    labels: LabelLists = Field(default_factory=list)
    layouts: Layouts | None = Field(
        None, description="for each picture a point per label, or null for random places; for models with `positions`"
    )
    recipe: Recipe | None = Field(
        None, description="repeats pictures; goes with edits, trajectory and webhook fields only"
    )
    edits: Edits | None = Field(
        None, description="changes to each picture, in this order; all else stays. For models with `positions`"
    )
    trajectory: Stages = None

    @model_validator(mode="before")
    @classmethod
    def _labels_or_recipe(cls, given: Any) -> Any:
        if isinstance(given, dict):
            fields = given.keys() & cls.model_fields.keys()  # unknown ones get errors of their own
            if given.get("recipe") is None and "labels" not in given and len(fields) == len(given):
                raise PydanticCustomError("missing", "give labels or a recipe")
            if given.get("recipe") is not None and (more := sorted(fields - BESIDE_RECIPE)):
                raise PydanticCustomError("recipe_alone", f"a recipe must be sent without {more[0]}")
        return given


class EditRequest(Strict, JobFields):
    """The edits of a picture of a job."""

    model_config = with_examples({"edits": EDITS_EXAMPLE})

    edits: Annotated[Edits, Field(min_length=1, description="changes to the picture, in this order; all else stays")]
    trajectory: Stages = None


class ScoreFields(SamplingFields):
    repeats: int = Field(10, ge=1, le=LIMITS.max_repeats, description="runs over the whole file, each with a new seed")


Count = Annotated[int, Field(ge=0, le=2**53)]  # which every reader of JSON has exactly


class Progress(BaseModel):
    done: Count
    total: Count


class AttemptResult(BaseModel):
    """The evaluator's verdict on one attempt at a picture, with fields as in PictureResult."""

    seed: int
    accuracy: float
    exact: bool
    f1: float
    scores: dict[str, float]
    distances: list[float | None] | None = None


class PictureResult(BaseModel):
    labels: list[str]
    seed: int | None = Field(description="seed of this picture's own noise; null if it was uploaded")
    accuracy: float = Field(description="share of the k requested labels that are among the k most probable")
    exact: bool = Field(description="whether the labels found (probability over 0.5) are exactly those requested")
    f1: float
    scores: dict[str, float] = Field(description="label -> probability: requested, others found, five most probable")
    distances: list[float | None] | None = Field(
        None,
        description="how far each label's object is from its place in the layout, in widths of the picture, in the "
        "order of `labels`; null for an object that was not found. Null without a layout, or if the evaluator finds "
        "no places",
    )
    places: list[Point] | None = Field(
        None, description="where the picture has each label's object; null if the model knows no positions"
    )
    url: str = Field(pattern=r"^/jobs/[^/]+/images/[0-9]{1,10}\.png$")
    trajectory_url: str | None = Field(None, description="its trajectory from noise to picture, if requested")
    kept: int | None = Field(
        None,
        description="which attempt it is, from 1, if it was selected with `until`: the first exact one or, if none is, "
        "the one with the highest F1",
    )
    attempts: list[AttemptResult] | None = Field(
        None, description="the verdicts on all attempts, in order; null unless the request has `until`"
    )

    @model_validator(mode="after")
    def _check_distances(self) -> Self:
        if self.distances is not None and len(self.distances) != len(self.labels):
            raise ValueError("wanted a distance, or null, for each label")
        return self

    @property
    def extra(self) -> dict[str, float]:
        """The labels that were found and not asked for, with their probabilities."""
        return {label: p for label, p in self.scores.items() if p > THRESHOLD and label not in self.labels}


class GenerateResult(Scores):
    selected: bool = Field(
        False, description="the pictures were selected with `until`: the scores are those of a choice, not of the model"
    )
    grid_url: str
    pictures: list[PictureResult]


class Repeat(Scores):
    seed: int | None = Field(description="null if the pictures were uploaded")


class Summary(BaseModel):
    max: float
    mean: float
    std: float = Field(description="standard deviation over the repeats, with divisor n")


class ScoreResult(BaseModel):
    repeats: list[Repeat] = Field(min_length=1)
    accuracy: Summary
    exact_match: Summary
    f1: Summary
    best: int = Field(description="index of the repeat with the highest accuracy; `pictures` and the grid show it")
    by_label: list[LabelScore] = Field(
        [],
        description="what was found of each label that was asked for or found, over all repeats, in alphabetical order",
    )
    by_objects: list[ObjectsScore] = Field([], description="exact pictures by number of objects, over all repeats")
    worst: list[PictureResult] = Field(
        [], description="the pictures of all repeats that are not exactly as asked, the lowest F1 first, at most 20"
    )
    grid_url: str
    pictures: list[PictureResult]


class JobHead(BaseModel):
    """A job without its result, as in lists of jobs."""

    id: str
    kind: JobKind
    status: JobStatus
    created_at: str
    started_at: str | None
    finished_at: str | None
    model: str = Field(description="the model that sampled the pictures, or the evaluator that judged uploaded ones")
    digest: str
    seed: int | None = Field(description="null if the pictures were uploaded")
    options: PictureOptions | None = Field(description="null if the pictures were uploaded")
    progress: Progress
    error: str | None
    reason: Literal["deadline"] | None = Field(
        None, description="why it failed, for programs: it could not be finished by its deadline"
    )


class JobPage(BaseModel):
    jobs: list[JobHead]
    next: str | None = Field(description="`cursor` for the next page; null on the last page")


class Job(JobHead):
    """A job. `result` is set once `status` is finished, `error` once it is failed; docs/api.md has the states."""

    labels: list[list[str]] = Field(description="as requested: a list for each picture of one repeat")
    layouts: Layouts | None = Field(None, description="as requested: where the objects of each picture stand")
    first: int = Field(0, description="position of its first picture, for the seeds; 0 unless a recipe set it")
    trajectory: int | None = Field(None, description="stages of each picture's trajectory; null if not requested")
    columns: int = Field(8, description="columns of the grid, as requested")
    delay: str | None = Field(None, description="why an open job does not move on: workers cannot store pictures")
    ahead: int | None = Field(
        None, description="of an open job: pictures of other jobs whose turn comes before its last one"
    )
    eta: str | None = Field(None, description="when an open job will be done; null until a worker has worked")
    result: GenerateResult | ScoreResult | None


class EtaEvent(BaseModel):
    """Event `eta` of GET /jobs/{id}/events: the forecast has changed."""

    ahead: Count
    eta: str


class StatusEvent(BaseModel):
    """Event `status` of GET /jobs/{id}/events (docs/api.md)."""

    status: JobStatus


class PictureEvent(BaseModel):
    """Event `picture`: it is finished and can be fetched."""

    index: Count
    url: str


class PictureSteps(BaseModel):
    """The progress of one picture: `step` of `steps` are done."""

    index: Count
    step: Count
    steps: Annotated[int, Field(ge=1, le=2**53)]
    attempt: Annotated[int, Field(ge=1)] = Field(1, description="with `until`, which attempt this is")
    preview: str | None = Field(
        None, description="x0_hat as a data URL of a PNG, in the picture's proportions, at most 64 pixels a side"
    )


class StepsEvent(BaseModel):
    """Event `steps`: the progress of the pictures being sampled."""

    pictures: list[PictureSteps]


EVENTS: Final[dict[str, type[Job | EtaEvent | StatusEvent | PictureEvent | StepsEvent]]] = {
    "job": Job,
    "eta": EtaEvent,
    "status": StatusEvent,
    "picture": PictureEvent,
    "steps": StepsEvent,
    "end": Job,
}


class WhatItDraws(BaseModel):
    """What a model has learnt to draw. None only in answers of services older than these fields."""

    support: Support | None = Field(
        None,
        description="fewest and most objects in a picture; the area of their places and their smallest distance, null "
        "if the model has no such limit. A request outside is refused",
    )
    picture: tuple[int, int] | None = Field(None, description="width and height of its pictures, in pixels")


class Labels(WhatItDraws):
    model: str
    labels: list[str]


class Model(WhatItDraws):
    name: str
    digest: str
    promoted: bool
    created_at: str
    labels: int
    positions: bool = Field(description="whether requests may say where objects stand")
    sampling: SamplingOptions = Field(description="sampling options of a request that gives none")
    config: dict[str, Any]
    training: dict[str, Any] = Field(description="how it was trained")
    card: str | None = Field(description="Markdown that describes the model and its results, if it has any")


class ModelList(BaseModel):
    models: list[Model]
    problems: dict[str, str] = Field(description="files in storage that cannot be used -> reason")


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class WorkerDevice(BaseModel):
    name: str = Field(description="such as cpu or cuda:0")
    models: list[str] = Field(description="models that the worker has loaded")


class Ready(BaseModel):
    status: Literal["ready"] = "ready"
    model: str
    workers: int
    storing: int = Field(0, description="workers that can store pictures; the others leave all work to these")
    devices: list[WorkerDevice] = Field([], description="the device of each worker")
