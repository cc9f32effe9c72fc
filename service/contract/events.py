"""What the events of GET /jobs/{id}/events hold, as docs/jobs.md lists them; `job` and `end` hold a Job.

Knows pydantic alone, for clients read them too.
"""

from pydantic import BaseModel, Field

from service.contract.records import JobStatus


class StatusEvent(BaseModel):
    """Event `status`."""

    status: JobStatus


class PictureEvent(BaseModel):
    """Event `picture`: it is made and can be fetched."""

    index: int
    url: str


class PictureSteps(BaseModel):
    """How far a picture is: `step` of `steps` are done."""

    index: int
    step: int
    steps: int
    preview: str | None = Field(None, description="x0_hat as a data URL of a PNG, 64 pixels wide at most")


class StepsEvent(BaseModel):
    """Event `steps`, of the pictures in work."""

    pictures: list[PictureSteps]
