"""What is written of a job and its pictures: as JSON in Redis, read by API and workers alike.

Knows no Redis, no HTTP and no torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from shared.options import LIMITS, Fraction, SamplingOptions, Strict, picture_seed

MAX_SEED = 2**53 - 1  # of a request: the largest integer that a client in JavaScript reads right
MAX_STAGES = 32  # of a strip
MAX_STAGES_PER_REQUEST = 1024  # of all strips: a stage is noise, which no PNG makes small, some 12 KB of it

JobKind = Literal["generate", "score"]
JobStatus = Literal["queued", "running", "finished", "failed", "cancelled"]
TERMINAL = frozenset({"finished", "failed", "cancelled"})
ACTIVE = frozenset(get_args(JobStatus)) - TERMINAL


WebhookEvent = Literal["running", "finished", "failed", "cancelled"]


def trace_id(parent: str) -> str:
    """The trace that a traceparent is of, as 32 hexadecimal digits; "" of none."""
    return parent.split("-")[1] if parent else ""


class Point(Strict):
    """A place in a picture: the fractions of its width and height, from the upper left corner."""

    model_config = ConfigDict(frozen=True)

    x: Fraction
    y: Fraction


# Where the centre of each label's object stands, in the order of the labels.
Layout = Annotated[list[Point], Field(max_length=LIMITS.max_labels, fail_fast=True)]
Layouts = Annotated[list[Layout | None], Field(max_length=LIMITS.max_pictures_per_request, fail_fast=True)]


class Picture(BaseModel):
    """One picture to make: all that decides its content, so that whoever makes it makes the same.

    `run_seed` and `position` are what its own `seed` was made of, for its recipe.
    """

    model_config = ConfigDict(frozen=True)

    job: str
    index: int
    labels: tuple[str, ...]
    layout: tuple[Point, ...] | None = None  # drawn by the seed if None
    seed: int
    options: SamplingOptions
    run_seed: int | None = None
    position: int = 0
    trajectory: int | None = None
    png: bytes | None = Field(default=None, exclude=True)  # of one that was sent; a worker fetches it when it begins

    @property
    def key(self) -> tuple[str, int]:
        return self.job, self.index


class JobRecord(BaseModel):
    """What was asked for and when. It is written once; the checkpoint is pinned here, whatever is promoted later."""

    model_config = ConfigDict(frozen=True)

    id: str
    owner: str = ""  # whose API key asked for it; "" where there are no keys
    kind: JobKind
    created_at: float  # seconds since 1970
    model: str
    digest: str
    labels: list[list[str]]
    layouts: Layouts | None = None  # of each label list
    seed: int
    # Position of the first picture, for its seed: more than 0 where pictures of another job are made again.
    first: int = 0
    webhook: str | None = None  # who is told, and of what
    webhook_events: tuple[WebhookEvent, ...] = ()
    request_id: str = ""  # of the request that made it, for logs
    traceparent: str = ""  # its span, where it is traced (W3C Trace Context)
    repeats: int = 1
    trajectory: int | None = None  # stages of each picture's strip, if it is to have one
    columns: int
    options: SamplingOptions
    # Its pictures were sent to be judged: `model` and `digest` are the evaluator's, seed and options say nothing.
    sent: bool = False

    @property
    def log_ids(self) -> dict[str, str]:
        """What leads through the logs to this job."""
        ids = {"job_id": self.id, "request_id": self.request_id}
        return {**ids, "trace_id": trace_id(self.traceparent)} if self.traceparent else ids

    @property
    def total(self) -> int:
        return len(self.labels) * self.repeats

    def pictures(self) -> Iterator[Picture]:
        """Repeat r of n label lists has indices r n .. r n + n - 1, and the seeds of a request with `seed` + r."""
        layouts = self.layouts or [None] * len(self.labels)
        for r in range(self.repeats):
            for i, (labels, layout) in enumerate(zip(self.labels, layouts, strict=True)):
                run_seed, position = self.seed + r, self.first + i
                yield Picture(
                    job=self.id,
                    index=r * len(self.labels) + i,
                    labels=tuple(labels),
                    layout=tuple(layout) if layout else None,
                    seed=picture_seed(run_seed, position),
                    options=self.options,
                    run_seed=None if self.sent else run_seed,
                    position=position,
                    trajectory=self.trajectory,
                )


class Verdict(BaseModel):
    """What the evaluator says of one picture: hits among the k most probable labels, k as many as were asked."""

    index: int
    labels: tuple[str, ...]
    seed: int
    accuracy: float
    f1: float
    exact: bool
    probabilities: dict[str, float]  # all of them


class Scores(BaseModel):
    accuracy: float
    exact_match: float
    f1: float


class JobResult(BaseModel):
    """Scores of each repeat; the grid shows repeat `best`."""

    repeats: list[Scores]
    best: int


@dataclass(frozen=True)
class FinishedPicture:
    """A finished picture on its way into Redis. `entry` is its stream entry's id."""

    entry: str
    picture: Picture
    verdict: Verdict
    png: bytes
    trajectory: bytes | None = None  # PNG
