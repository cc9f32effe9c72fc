"""Jobs, their ids, pictures, verdicts and results as JSON in Redis, for the API and the workers."""

import json
import re
import secrets
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from service.contract.options import PictureOptions
from shared.edits import Object, edited
from shared.options import IGNORE_UNKNOWN, LIMITS, THRESHOLD, Fraction, Strict, attempt_seed, picture_seed

MAX_STAGES = 32  # of a trajectory
MAX_STAGES_PER_REQUEST = 1024  # of all trajectories: a stage is some 16 KB of noise, which PNG cannot compress
PLACE_DIGITS = 3  # of places that are shown: a third of a pixel
SHOWN_SCORES = 5  # of the most probable labels, and of those that were found and not requested

JobKind = Literal["generate", "score"]
JobStatus = Literal["queued", "running", "finished", "failed", "cancelled"]
TERMINAL = frozenset({"finished", "failed", "cancelled"})
WebhookEvent = Literal["running", "finished", "failed", "cancelled"]

JOB_ID = re.compile(r"0[0-9a-f]{11}7[0-9a-f]{19}")  # a UUID of version 7 (RFC 9562, 5.7) from before the year 2527
HOUR = re.compile(r"\d{4}-\d\d-\d\dT\d\d")
RANDOM_BITS = 74


def new_job_id(created_at: float) -> str:
    """Return a new id, which sorts by the time of creation and tells it. `created_at`: seconds since 1970."""
    random = secrets.randbits(RANDOM_BITS)
    value = int(created_at * 1000) << 80 | 7 << 76 | (random >> 62) << 64 | 2 << 62 | random & (1 << 62) - 1
    return f"{value:032x}"


def created_at(job_id: str) -> float:
    """Return when a job was created, in seconds since 1970."""
    return int(job_id[:12], 16) / 1000


def hour_of(job_id: str) -> str:
    """Return the hour in which a job was created, such as 2026-01-31T17 in UTC, by which old files are found."""
    return datetime.fromtimestamp(created_at(job_id), UTC).strftime("%Y-%m-%dT%H")


class Stored(BaseModel):
    """A record in Redis as JSON. Its fields do not change once it is created.

    Two consecutive versions of the service run side by side during an upgrade: each writes its fields, and
    ignores those that it does not know. So a field that is added needs a default.
    """

    model_config = ConfigDict(frozen=True)


def trace_id(parent: str) -> str:
    """Return the trace id in a traceparent, 32 hexadecimal digits; "" if there is none."""
    return parent.split("-")[1] if parent else ""


class Point(Strict):
    """A place in a picture, as fractions of its width and height from the upper left corner."""

    model_config = ConfigDict(frozen=True)

    x: Fraction
    y: Fraction


# The centre of each label's object, in the order of the labels.
Layout = Annotated[list[Point], Field(max_length=LIMITS.max_labels, fail_fast=True)]
Layouts = Annotated[list[Layout | None], Field(max_length=LIMITS.max_pictures_per_request, fail_fast=True)]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture of a job, with all that decides its content, so that every worker gets the same pixels.

    Its `seed` is picture_seed(run_seed, position); both are kept for its recipe. `labels` and `layout` are those before
    its edits. If `attempt`, from 1, is not exact, the next one is drawn, up to the attempt `last`.
    """

    job: str
    index: int
    labels: tuple[str, ...]
    layout: tuple[Point, ...] | None = None  # random, by the seed, if None
    seed: int
    options: PictureOptions
    run_seed: int | None = None
    position: int = 0
    trajectory: int | None = None
    attempt: int = 1
    last: int = 1

    @property
    def key(self) -> tuple[str, int]:
        return self.job, self.index

    @property
    def noise_seed(self) -> int:
        """The seed of this attempt's noise."""
        return attempt_seed(self.seed, self.attempt)

    @cached_property
    def objects(self) -> list[Object]:
        """The objects of the finished picture, after its edits."""
        return edited(self.labels, self.options.edits)


class ModelName(Stored):
    """A checkpoint with work, as workers must know it to load it."""

    name: str
    digest: str
    is_evaluator: bool = False


class JobSummary(Stored):
    """What a list shows of a job: some hundred bytes beside its record, which may have hundreds of kilobytes."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    id: str
    kind: JobKind
    created_at: float  # seconds since 1970
    model: str
    digest: str
    seed: int
    options: PictureOptions
    # Whether the pictures were uploaded to be judged: `model` and `digest` are then the evaluator's, and seed and
    # options have no effect. In Redis its name is the one that all versions know.
    uploaded: bool = Field(default=False, validation_alias="sent", serialization_alias="sent")

    @classmethod
    def read(cls, raw: str) -> Self:
        """Parse it to show it. It may lack options of a later version, which `model_validate_json` refuses."""
        return cls.model_validate_json(raw, context=IGNORE_UNKNOWN)


_SUMMARY = TypeAdapter(JobSummary)


class JobRecord(JobSummary):
    """A job as requested. It never changes: its checkpoint stays, even if another one is promoted later.

    What decides the pixels of a picture and is added in a later version belongs into `options` or a Point: a worker
    does not sample pictures with fields of these that it does not know. Such a field is None where it is not used, and
    is then not stored, so that workers of the version before take all jobs without it.
    """

    owner: str = ""  # name of the API key; "" without keys
    labels: list[list[str]]
    layouts: list[list[Point] | None] | None = None  # of each label list; the request's bounds may have changed
    first: int = 0  # position of the first picture, for its seed; not 0 if a recipe says so
    webhook: str | None = None  # URL
    webhook_events: tuple[WebhookEvent, ...] = ()
    request_id: str = ""  # of the request that created it, for logs
    deadline_s: float | None = None  # after its creation, by which it must be finished
    traceparent: str = ""  # that request's span (W3C Trace Context), if traced
    repeats: int = 1
    trajectory: int | None = None  # stages of each picture's trajectory, if requested
    columns: int

    @property
    def summary(self) -> str:
        """Its JobSummary, as JSON."""
        return _SUMMARY.dump_json(self).decode()

    @property
    def log_ids(self) -> dict[str, str]:
        """The ids by which logs find this job."""
        ids = {"job_id": self.id, "request_id": self.request_id}
        return {**ids, "trace_id": trace_id(self.traceparent)} if self.traceparent else ids

    @property
    def total(self) -> int:
        return len(self.labels) * self.repeats

    @property
    def draws(self) -> int:
        """How many pictures may be drawn for it."""
        return self.total * (1 if self.options.kept else self.options.attempts or 1)

    @property
    def has_grid(self) -> bool:
        """Whether the job has a grid of its own; otherwise its only picture is the grid."""
        return len(self.labels) > 1 or self.uploaded

    def picture(self, index: int) -> Picture:
        """Return a picture. Repeat r of n lists has the indices r n to r n + n - 1 and the seeds of `seed` + r."""
        repeat, i = divmod(index, len(self.labels))
        run_seed, position = self.seed + repeat, self.first + i
        layout = self.layouts[i] if self.layouts else None
        attempt, last = (self.options.kept[i],) * 2 if self.options.kept else (1, self.options.attempts or 1)
        return Picture(
            job=self.id,
            index=index,
            labels=tuple(self.labels[i]),
            layout=tuple(layout) if layout else None,
            seed=picture_seed(run_seed, position),
            options=self.options,
            run_seed=None if self.uploaded else run_seed,
            position=position,
            trajectory=self.trajectory,
            attempt=attempt,
            last=last,
        )


class Verdict(Stored):
    """The evaluator's verdict on one picture. `accuracy`: share of its k labels among the k most probable ones."""

    index: int
    labels: tuple[str, ...]
    seed: int
    accuracy: float
    f1: float
    exact: bool
    probabilities: dict[str, float]  # of all labels
    places: tuple[tuple[float, float], ...] | None = None  # of the labels' objects; None if the model has no positions
    # How far each label's object is from its place in the layout, in widths of the picture; None for one not found.
    distances: tuple[float | None, ...] | None = None  # None without a layout, or if the evaluator finds no places
    attempt: int = 1  # which of the picture's attempts it judges
    attempts: tuple["Verdict", ...] = ()  # on all of them, in order, if it was drawn until exact

    def shown(self, digits: int) -> dict[str, Any]:
        """Return what recipes and answers show of it, rounded: of the probabilities, highest first, those of the
        requested labels, of the most probable ones, and of others that were found.
        """
        ranked = sorted(self.probabilities.items(), key=lambda item: -item[1])
        found = [name for name, p in ranked if p > THRESHOLD and name not in self.labels]
        shown = {*self.labels, *found[:SHOWN_SCORES], *(name for name, _ in ranked[:SHOWN_SCORES])}
        distances = self.distances and [away and round(away, digits) for away in self.distances]
        places = self.places and [Point(x=round(x, PLACE_DIGITS), y=round(y, PLACE_DIGITS)) for x, y in self.places]
        return {
            "accuracy": self.accuracy,
            "exact": self.exact,
            "f1": self.f1,
            "scores": {name: round(p, digits) for name, p in ranked if name in shown},
            "distances": distances,
            "places": places,
        }


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


class Scores(BaseModel):
    accuracy: float = Field(description="hits / requested labels, over all pictures")
    exact_match: float
    f1: float = Field(description="mean over the pictures")


class JobResult(Stored):
    """The scores of each repeat, and of all by label and by number of objects; the grid shows repeat `best`."""

    repeats: list[Scores]
    best: int
    by_label: list[LabelScore] = []  # every label that was asked for or found, in alphabetical order
    by_objects: list[ObjectsScore] = []  # ascending
    worst: list[int] = []  # indices of the pictures with the lowest scores, the worst first

    def best_indices(self, record: JobRecord) -> range:
        """Return the indices of the pictures in the grid."""
        n = len(record.labels)
        return range(self.best * n, (self.best + 1) * n)

    def fields(self, record: JobRecord) -> dict[str, str]:
        """Return what is stored at the end of the job: beside the result, what answers need without reading it.

        `shown`: the indices of the pictures whose verdicts it shows; `grid`: that of the picture that is the grid, if
        the grid has no file of its own.
        """
        best = self.best_indices(record)
        grid = {} if record.has_grid else {"grid": str(best[0])}
        return {"result": self.model_dump_json(), "shown": json.dumps([*best, *self.worst]), **grid}


def breakdown(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return the fields of a JobResult that count what was asked for and what was found."""
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
    by_label = [
        LabelScore(
            label=label,
            asked=asked[label],
            found=found[label],
            extra=extra[label],
            instead=dict(sorted(instead[label].items())),
        )
        for label in sorted(asked.keys() | extra.keys())
    ]
    by_objects = [ObjectsScore(objects=n, pictures=pictures[n], exact=exact[n]) for n in sorted(pictures)]
    return {"by_label": by_label, "by_objects": by_objects}


@dataclass(frozen=True)
class FinishedPicture:
    """A finished picture, its verdict and its PNG; that of an uploaded picture is empty, since storage has it."""

    picture: Picture
    verdict: Verdict
    png: bytes
    trajectory: bytes | None = None  # PNG of its stages, if requested
    pixels: Any = field(default=None, compare=False, repr=False)  # its (H, W, 3) uint8 array, if at hand
