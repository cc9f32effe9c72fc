"""The data of the events of GET /jobs/{id}/events (docs/api.md)."""

from typing import Final

from pydantic import BaseModel, Field

from service.contract.records import JobStatus
from service.contract.schemas import Job


class StatusEvent(BaseModel):
    """Event `status`."""

    status: JobStatus


class PictureEvent(BaseModel):
    """Event `picture`: it is finished and can be fetched."""

    index: int
    url: str


class PictureSteps(BaseModel):
    """The progress of one picture: `step` of `steps` are done."""

    index: int
    step: int
    steps: int
    preview: str | None = Field(
        None, description="x0_hat as a data URL of a PNG, in the picture's proportions, at most 64 pixels a side"
    )


class StepsEvent(BaseModel):
    """Event `steps`: the progress of the pictures being sampled."""

    pictures: list[PictureSteps]


EVENTS: Final[dict[str, type[Job | StatusEvent | PictureEvent | StepsEvent]]] = {
    "job": Job,
    "status": StatusEvent,
    "picture": PictureEvent,
    "steps": StepsEvent,
    "end": Job,
}
