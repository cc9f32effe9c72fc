"""The options of a job's pictures: how each is sampled, selected and edited."""

from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from shared.edits import Edits, is_none
from shared.options import LIMITS, SamplingOptions

ATTEMPTS: Final = 4  # at a picture that is drawn until it is exact, unless a request says otherwise
Attempt = Annotated[int, Field(ge=1, le=LIMITS.max_attempts)]


class PictureOptions(SamplingOptions):
    """How a job's pictures are sampled, selected by the evaluator and edited.

    A worker that does not know a field of the options does not sample the pictures, so an older one never draws a
    picture without its edits.
    """

    # A new field is written only if it has a value, or workers of the former version would leave every job
    until: Literal["exact"] | None = Field(default=None, exclude_if=is_none)
    attempts: Attempt | None = Field(default=None, exclude_if=is_none)  # at each picture, at most; with `until` only
    # in recipes, the one attempt of each picture to draw again
    kept: tuple[Attempt, ...] | None = Field(
        default=None, strict=False, max_length=LIMITS.max_pictures_per_request, exclude_if=is_none
    )
    edits: Edits | None = Field(default=None, exclude_if=is_none, description="changes to each picture, in this order")

    @model_validator(mode="after")
    def _check_attempts(self) -> Self:
        if self.until is None and (self.attempts, self.kept) != (None, None):
            raise ValueError("attempts has no effect without until; leave it out")
        if self.until is not None and self.attempts is None:
            raise ValueError("until needs attempts")
        if max(self.kept or (1,)) > (self.attempts or 1):
            raise ValueError(f"kept is {max(self.kept or ())}; there are {self.attempts} attempts")
        return self
