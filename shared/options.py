"""Sampling options, their defaults and limits: the only place that holds them.

Knows neither torch nor HTTP, so that the API can refuse an invalid option without loading a network.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

SamplerName = Literal["ddpm", "ddpm_small", "ddim", "euler", "dpmpp_1", "dpmpp_2m", "sde_dpmpp_2m", "heun"]
SpacingName = Literal["uniform", "logsnr", "trailing"]
ConditioningName = Literal["embedding", "channels"]
EngineName = Literal["auto", "openvino", "torch"]  # what computes the networks on a CPU


@dataclass(frozen=True)
class Limits:
    """The limits of one request, so that no caller can occupy a worker for hours."""

    max_pictures_per_request: int = 256  # eight of the course's test files, which have 32 label lists each
    max_labels: int = 16  # of one picture; each model has a narrower range of its own (`support.py`)
    max_steps: int = 1000  # T of the schedules, the number of timesteps
    max_guidance: float = 20.0  # far above where pictures saturate
    max_attempts: int = 16  # of one picture that is drawn until it is exact
    max_repeats: int = 100  # of one /score request; the report uses 10
    max_columns: int = 64  # of a grid
    max_file_bytes: int = 1 << 20  # 256 lists of 16 labels are about 80 KB
    max_parts: int = 10_000  # lists and objects in JSON; a recipe of 256 pictures with layouts has some 6,000


LIMITS: Final = Limits()

MAX_SEED: Final = 2**53 - 1  # the largest integer that JavaScript reads exactly
THRESHOLD: Final = 0.5  # a label counts as found above this probability
MAX_UNKNOWN: Final = 20  # unknown fields of one object that are reported
IGNORE_UNKNOWN: Final = {"unknown": "ignore"}  # pydantic's context for what another version has written

Fraction = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]


class NoOtherFields(BaseModel):
    """Refuses unknown fields. The error suggests the most similar known field, or lists all of them.

    Validated with the context IGNORE_UNKNOWN, it ignores them instead.
    """

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="wrap")
    @classmethod
    def _suggest_known_fields(cls, given: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        known = cls.model_fields
        unknown = [name for name in given if name not in known] if isinstance(given, dict) else []
        if unknown and info.context is IGNORE_UNKNOWN:
            given, unknown = {name: value for name, value in given.items() if name in known}, []
        if len(unknown) > MAX_UNKNOWN:  # pydantic reports every one, which takes long if there are very many
            kept = {*known, *unknown[:MAX_UNKNOWN]}
            given = {name: value for name, value in given.items() if name in kept}
        try:
            return handler(given)
        except ValidationError as error:
            if not unknown:
                raise
            raise ValidationError.from_exception_data(
                error.title, [_with_suggestion(one, list(known)) for one in error.errors(include_url=False)]
            ) from None


def _with_suggestion(error: ErrorDetails, known: list[str]) -> InitErrorDetails:
    message = error["msg"]
    if error["type"] == "extra_forbidden" and len(error["loc"]) == 1:  # a field of the object itself
        near = difflib.get_close_matches(str(error["loc"][0])[:100], known, 1)
        message = f"unknown; did you mean {near[0]}?" if near else f"unknown; known are {', '.join(known)}"
    kind = PydanticCustomError(error["type"], message)
    return InitErrorDetails(type=kind, loc=error["loc"], input=error["input"])


class Strict(NoOtherFields):
    """Refuses unknown fields and converts no types, except that 16.0 is the integer 16, as in JSON Schema."""

    model_config = ConfigDict(strict=True)

    @field_validator("*", mode="before")
    @classmethod
    def _whole_number_as_int(cls, value: Any) -> Any:
        if isinstance(value, list):
            return [cls._whole_number_as_int(one) for one in value]
        return int(value) if isinstance(value, float) and value.is_integer() else value


class SamplingOptions(Strict):
    """How one picture is sampled. An unknown, out-of-range or wrongly typed option raises pydantic.ValidationError."""

    model_config = ConfigDict(frozen=True)

    # sampler, steps, spacing and guidance were chosen on train.json's lists, by
    # `python -m benchmarks.sampling_choices`; ddpm has sigma^2 = beta, ddpm_small the posterior variance
    sampler: SamplerName = "sde_dpmpp_2m"
    # steps per picture, each a call of the network: one row of it, or two with guidance
    steps: int = Field(default=16, ge=1, le=LIMITS.max_steps)
    # of the timesteps: uniform in t, uniform in log-SNR, or uniform in t counted back from the last one
    spacing: SpacingName = "uniform"
    # w of classifier-free guidance; 1 turns it off, 0 ignores the labels
    guidance: float = Field(default=3.0, ge=0.0, le=LIMITS.max_guidance, allow_inf_nan=False)
    # the fractions of T between which guidance is on; outside, w = 1. Not strict, since JSON has lists, not tuples
    guidance_interval: tuple[Fraction, Fraction] = Field(default=(0.0, 1.0), strict=False)
    # noise of DDIM: 0 is deterministic, 1 is ancestral; the other samplers have a fixed amount
    eta: Fraction = 0.0
    # clip x0_hat to [-1, 1] at every step
    clip_x0: bool = False

    @property
    def cost(self) -> float:
        """About how long a picture takes, in network rows; to enlarge, judge and encode it takes as long as two."""
        low, high = self.guidance_interval
        return 2.0 + self.steps * (1 + (network_rows(self.guidance) - 1) * (high - low))

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        low, high = self.guidance_interval
        if low > high:
            raise ValueError(f"guidance_interval is [{low}, {high}]; the first fraction must not exceed the second")
        if self.eta > 0 and self.sampler != "ddim":
            raise ValueError(f"eta is {self.eta} with sampler {self.sampler}; only ddim takes an eta other than 0")
        return self


def network_rows(w: float) -> int:
    """Return the network rows of a picture's step with guidance scale w: two if it mixes two predictions."""
    return 1 if w in (0.0, 1.0) else 2


# of a newly trained network that takes positions, to which guidance does harm (docs/dev/decisions.md)
WITH_POSITIONS: Final = SamplingOptions(sampler="dpmpp_2m", steps=8, guidance=1.0)


def default_options(config: Mapping[str, Any]) -> SamplingOptions:
    """Return the sampling options that a checkpoint's configuration sets (a distilled one does), or the default ones.

    Raises pydantic.ValidationError if they are invalid.
    """
    return SamplingOptions.model_validate(config.get("sampling", {}))


def picture_seed(seed: int, index: int) -> int:
    """Return the 63-bit seed of picture `index` in a request with `seed`. It depends on nothing else.

    A hash rather than seed + index, so that requests with neighbouring seeds share no pictures. But torch's generator
    on a CPU takes the low 32 bits only: two of n pictures have the same noise with a probability of about n^2 / 2^33.
    Raises OverflowError for an argument outside 64 bits with sign.
    """
    message = seed.to_bytes(8, "little", signed=True) + index.to_bytes(8, "little", signed=True)
    return int.from_bytes(blake2b(message, digest_size=8).digest(), "little") >> 1


def attempt_seed(seed: int, attempt: int) -> int:
    """Return the seed of an attempt, from 1, at the picture with `seed` (`picture_seed`). The first is its own."""
    return seed if attempt == 1 else picture_seed(seed, attempt - 1)
