"""The bodies of requests and responses, with the examples that the OpenAPI document shows.

Knows pydantic alone, for clients read them too. Labels are checked against a model's vocabulary in the routes.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from service.contract.recipe import LabelLists, Recipe, example
from service.contract.records import MAX_SEED, MAX_STAGES, JobKind, JobStatus, Layouts, WebhookEvent
from shared.options import LIMITS, Fraction, SamplerName, SamplingOptions, SpacingName, Strict

EXAMPLE_ID = "5f0c9e1a7d3b4c2e8a6f1b0d9c8e7f6a"
DIGEST = "9f2c" * 16

Seed = Annotated[
    int | None, Field(ge=0, le=MAX_SEED, description="the same seed gives the same pictures; drawn if not given")
]


def shown(*examples: dict[str, Any]) -> ConfigDict:
    """A model's configuration with examples for the document."""
    return ConfigDict(json_schema_extra={"examples": [*examples]})


BESIDE_RECIPE = {"recipe", "trajectory", "webhook", "webhook_events"}


class SamplingFields(Strict):
    """The options of sampling, all of them optional, as they lie flat in a request."""

    seed: Seed = None
    steps: int | None = Field(None, ge=1, le=LIMITS.max_steps, description="steps of the sampler")
    guidance: float | None = Field(
        None, ge=0, le=LIMITS.max_guidance, allow_inf_nan=False, description="w of classifier-free guidance; 1 is none"
    )
    sampler: SamplerName | None = None
    spacing: SpacingName | None = Field(None, description="how the timesteps are spread")
    guidance_interval: Annotated[list[Fraction], Field(min_length=2, max_length=2)] | None = Field(
        None, description="fractions of T between which guidance is on, the lower one first"
    )
    eta: float | None = Field(
        None,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="noise of ddim, 0 to 1; the other samplers have none to choose",
    )
    clip_x0: bool | None = Field(None, description="clip the predicted picture to [-1, 1] at every step")
    model: str | None = Field(None, max_length=100, description="name of a model of GET /models; the default if null")
    webhook: str | None = Field(
        None, max_length=2000, description="address that is told of the job by a signed POST (docs/webhooks.md)"
    )
    webhook_events: list[WebhookEvent] | None = Field(
        None, min_length=1, max_length=len(get_args(WebhookEvent)), description="of what; its end if not given"
    )
    columns: int = Field(8, ge=1, le=LIMITS.max_columns, description="columns of the grid")

    def sampling(self, own: SamplingOptions) -> SamplingOptions:
        """The sampling options, the model's `own` for those not given. ValidationError if some do not go together."""
        names = SamplingOptions.model_fields.keys()
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return SamplingOptions.model_validate({**own.model_dump(), **given})


class GenerateRequest(SamplingFields):
    """One picture for each list of labels, or those of a recipe."""

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
                {"labels": [["red cube", "blue sphere"], ["gray cylinder"]]},
                {
                    "labels": [["red cube", "blue sphere"], ["gray cylinder"]],
                    "seed": 7,
                    "steps": 20,
                    "guidance": 2.0,
                    "sampler": "dpmpp_2m",
                    "model": None,
                    "columns": 8,
                },
                {
                    "labels": [["red cube", "blue sphere"], ["gray cylinder"]],
                    "layouts": [[{"x": 0.5, "y": 0.43}, {"x": 0.7, "y": 0.6}], None],
                },
                {"recipe": example()},
            ],
        }
    )

    labels: LabelLists = Field(default_factory=list)
    layouts: Layouts | None = Field(
        None,
        description="where objects stand, for each picture: a point for each of its labels, or null to have it drawn; "
        "for models with `positions`",
    )
    recipe: Recipe | None = Field(
        None, description="of pictures to be made again; only trajectory and webhook may be beside it"
    )

    trajectory: int | None = Field(
        None, ge=2, le=MAX_STAGES, description="stages of a strip from noise to picture, for each picture"
    )

    @model_validator(mode="before")
    @classmethod
    def _one_of_both(cls, given: Any) -> Any:
        if isinstance(given, dict):
            if given.get("recipe") is None and "labels" not in given:
                raise PydanticCustomError("missing", "wanted labels, or a recipe")
            if given.get("recipe") is not None and (more := sorted(given.keys() - BESIDE_RECIPE)):
                raise PydanticCustomError("recipe_alone", f"a recipe stands alone, without {more[0]}")
        return given


class ScoreFields(SamplingFields):
    repeats: int = Field(10, ge=1, le=LIMITS.max_repeats, description="runs over the whole file, with different seeds")


class ScoreRequest(ScoreFields):
    """A test file's content as JSON."""

    model_config = shown({"conditions": [["gray cube"], ["red cube", "blue sphere"]], "repeats": 10, "seed": 0})

    conditions: LabelLists


class Progress(BaseModel):
    done: int
    total: int


class PictureResult(BaseModel):
    labels: list[str]
    seed: int | None = Field(description="seed of this picture's own noise; null if it was sent")
    accuracy: float = Field(description="share of the asked labels among the k most probable, k as many as were asked")
    exact: bool = Field(description="the labels found (probability over 0.5) are exactly those asked")
    f1: float
    scores: dict[str, float] = Field(description="label -> probability: those asked, and the five most probable")
    url: str
    trajectory_url: str | None = Field(None, description="its strip from noise to picture, if asked for")


class GenerateResult(BaseModel):
    accuracy: float = Field(description="sum of hits / sum of asked labels, as the course counts")
    exact_match: float
    f1: float = Field(description="mean of the pictures")
    grid_url: str
    pictures: list[PictureResult]


class Repeat(BaseModel):
    seed: int | None = Field(description="null where pictures were sent")
    accuracy: float
    exact_match: float
    f1: float


class Summary(BaseModel):
    max: float
    mean: float
    std: float = Field(description="of the repeats, with divisor n")


class ScoreResult(BaseModel):
    repeats: list[Repeat]
    accuracy: Summary
    exact_match: Summary
    f1: Summary
    best: int = Field(description="index of the repeat of the highest accuracy, which the grid and the pictures show")
    grid_url: str
    pictures: list[PictureResult]


class JobHead(BaseModel):
    """A job without its result, as lists of jobs show it."""

    id: str
    kind: JobKind
    status: JobStatus
    created_at: str
    started_at: str | None
    finished_at: str | None
    model: str = Field(description="who made the pictures; where they were sent, the evaluator that judged them")
    digest: str
    seed: int | None = Field(description="null where pictures were sent")
    options: SamplingOptions | None = Field(description="null where pictures were sent")
    progress: Progress
    error: str | None


HEAD_EXAMPLE: dict[str, Any] = {
    "id": EXAMPLE_ID,
    "kind": "generate",
    "status": "finished",
    "created_at": "2026-01-01T12:00:00.000+00:00",
    "started_at": "2026-01-01T12:00:00.125+00:00",
    "finished_at": "2026-01-01T12:00:01.250+00:00",
    "model": "base",
    "digest": DIGEST,
    "seed": 7,
    "options": SamplingOptions().model_dump(mode="json"),
    "progress": {"done": 1, "total": 1},
    "error": None,
}
JOB_EXAMPLE = {
    **HEAD_EXAMPLE,
    "labels": [["gray cylinder"]],
    "first": 0,
    "trajectory": None,
    "columns": 8,
    "result": {
        "accuracy": 1.0,
        "exact_match": 1.0,
        "f1": 1.0,
        "grid_url": f"/jobs/{EXAMPLE_ID}/grid.png",
        "pictures": [
            {
                "labels": ["gray cylinder"],
                "seed": 4203129384,
                "accuracy": 1.0,
                "exact": True,
                "f1": 1.0,
                "scores": {"gray cylinder": 0.99, "gray cube": 0.01},
                "url": f"/jobs/{EXAMPLE_ID}/images/0.png",
                "trajectory_url": None,
            }
        ],
    },
}


class JobPage(BaseModel):
    model_config = shown({"jobs": [HEAD_EXAMPLE], "next": f"1767268800000-{EXAMPLE_ID}"})

    jobs: list[JobHead]
    next: str | None = Field(description="`cursor` of the next page; null on the last one")


class Job(JobHead):
    """A job: `result` is there once `status` is finished, `error` once it is failed; docs/jobs.md draws the states."""

    model_config = shown(JOB_EXAMPLE)

    labels: list[list[str]] = Field(description="what was asked, a list for each picture of one repeat")
    layouts: Layouts | None = Field(None, description="where the objects of each were asked to stand")
    first: int = Field(0, description="position of its first picture, for the seeds; not 0 where a recipe's was not")
    trajectory: int | None = Field(None, description="stages of each picture's strip; null where none was asked for")
    columns: int = Field(8, description="of the grid, as asked")
    result: GenerateResult | ScoreResult | None


class Labels(BaseModel):
    model_config = shown({"model": "base", "labels": ["gray cube", "red cube"]})

    model: str
    labels: list[str]


class Model(BaseModel):
    name: str
    digest: str
    promoted: bool
    created_at: str
    labels: int
    positions: bool = Field(description="it can be told where objects stand")
    sampling: SamplingOptions = Field(description="what a request gets that leaves it out")
    config: dict[str, Any]
    training: dict[str, Any] = Field(description="how it came about")
    card: str | None = Field(description="Markdown; how it was made and how good it is, where somebody wrote that down")


class ModelList(BaseModel):
    model_config = shown(
        {
            "models": [
                {
                    "name": "base",
                    "digest": DIGEST,
                    "promoted": True,
                    "created_at": "2026-01-01T12:00:00+00:00",
                    "labels": 24,
                    "positions": False,
                    "sampling": SamplingOptions().model_dump(mode="json"),
                    "config": {"schedule": "cosine", "timesteps": 1000, "prediction": "v"},
                    "training": {"pictures": 218000},
                    "card": "# base\n",
                }
            ],
            "problems": {"broken.safetensors": "not a safetensors file"},
        }
    )

    models: list[Model]
    problems: dict[str, str] = Field(description="files in storage that cannot be used, and why")


class Health(BaseModel):
    model_config = shown({"status": "ok"})

    status: Literal["ok"] = "ok"


class Ready(BaseModel):
    model_config = shown({"status": "ready", "model": "base", "workers": 2})

    status: Literal["ready"] = "ready"
    model: str
    workers: int
