"""Sampling options, their defaults, limits and presets: the only place that holds them.

Knows neither torch nor HTTP, so that the API can refuse an invalid option without loading a network.
"""

import difflib
import itertools
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
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

ScheduleName = Literal["linear", "quadratic", "cosine", "sigmoid"]
SamplerName = Literal["ddpm", "ddpm_small", "ddim", "euler", "dpmpp_1", "dpmpp_2m", "sde_dpmpp_2m"]
SpacingName = Literal["uniform", "logsnr", "trailing"]
ConditioningName = Literal["embedding", "channels"]
PredictionName = Literal["eps", "v"]


@dataclass(frozen=True)
class Limits:
    """The limits of one request, so that no caller can occupy a worker for hours."""

    max_pictures_per_request: int = 256  # eight of the course's test files, which have 32 label lists each
    max_labels: int = 8  # the training pictures show at most 3 objects; more is the caller's experiment
    max_steps: int = 1000  # T of the schedules, the number of timesteps
    max_guidance: float = 20.0  # far above where pictures saturate
    max_repeats: int = 100  # of one /score request; the report uses 10
    max_columns: int = 64  # of a grid
    max_file_bytes: int = 1 << 20  # 256 lists of 8 labels are about 40 KB


LIMITS: Final = Limits()

MAX_UNKNOWN: Final = 20  # unknown fields of one object that are reported

Fraction = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]


class NoOtherFields(BaseModel):
    """Refuses unknown fields. The error suggests the most similar known field, or lists all of them."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="wrap")
    @classmethod
    def _suggest_known_fields(cls, given: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(given)
        except ValidationError as error:
            if isinstance(given, dict) and given.keys() - cls.model_fields.keys():
                raise _with_known_fields(error, list(cls.model_fields)) from None
            raise


def _with_known_fields(error: ValidationError, known: list[str]) -> ValidationError:
    """Return the same error with a suggestion for each unknown field of the object itself."""
    details = []
    for one in error.errors(include_url=False):
        message = one["msg"]
        if one["type"] == "extra_forbidden" and len(one["loc"]) == 1:
            near = difflib.get_close_matches(str(one["loc"][0])[:100], known, 1)
            message = f"unknown; did you mean {near[0]}?" if near else f"unknown; known are {', '.join(known)}"
        kind = PydanticCustomError(one["type"], message)
        details.append(InitErrorDetails(type=kind, loc=one["loc"], input=one["input"]))
    return ValidationError.from_exception_data(error.title, details)


class Strict(NoOtherFields):
    """Refuses unknown fields and converts no types, except that 16.0 is the integer 16, as in JSON Schema."""

    model_config = ConfigDict(strict=True)

    @model_validator(mode="before")
    @classmethod
    def _limit_unknown(cls, given: Any) -> Any:
        # pydantic reports every unknown field, which takes long if there are very many
        if isinstance(given, dict) and len(given) > len(cls.model_fields) + MAX_UNKNOWN:
            unknown = itertools.islice((name for name in given if name not in cls.model_fields), MAX_UNKNOWN)
            names = [*(name for name in cls.model_fields if name in given), *unknown]
            return {name: given[name] for name in names}
        return given

    @field_validator("*", mode="before")
    @classmethod
    def _whole_number_as_int(cls, value: Any) -> Any:
        return int(value) if isinstance(value, float) and value.is_integer() else value


class SamplingOptions(Strict):
    """How one picture is sampled. An unknown, out-of-range or wrongly typed option raises pydantic.ValidationError."""

    model_config = ConfigDict(frozen=True)

    # sampler, steps, spacing and guidance were chosen on train.json's lists, by
    # `python -m benchmarks.choices.sampling`; ddpm has sigma^2 = beta, ddpm_small the posterior variance
    sampler: SamplerName = "sde_dpmpp_2m"
    # steps per picture; each needs one network row, or two with guidance
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

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        low, high = self.guidance_interval
        if low > high:
            raise ValueError(f"guidance_interval is [{low}, {high}]; the first fraction must not exceed the second")
        if self.eta > 0 and self.sampler != "ddim":
            raise ValueError(f"eta is {self.eta} with sampler {self.sampler}; only ddim takes an eta other than 0")
        return self

    @property
    def rows_per_step(self) -> int:
        """Network rows of one picture in one step of the guidance interval: two if w mixes two predictions."""
        return 1 if self.guidance in (0.0, 1.0) else 2


# report: the course report's sampling, ancestral with sigma^2 = beta and w = 3; its loop runs t = 999..1, 999 steps
SAMPLING_PRESETS: Final[dict[str, SamplingOptions]] = {
    "default": SamplingOptions(),
    "report": SamplingOptions(sampler="ddpm", steps=999, spacing="uniform", guidance=3.0),
}


def default_options(config: Mapping[str, Any]) -> SamplingOptions:
    """Return the sampling options that a checkpoint's configuration sets (a distilled one does), or the default ones.

    Raises pydantic.ValidationError if they are invalid.
    """
    return SamplingOptions.model_validate(config.get("sampling", {}))


def picture_seed(seed: int, index: int) -> int:
    """Return the 63-bit seed of picture `index` in a request with `seed`. It depends on nothing else.

    A hash rather than seed + index, so that requests with neighbouring seeds share no pictures. Raises OverflowError
    for an argument outside 64 bits with sign.
    """
    message = seed.to_bytes(8, "little", signed=True) + index.to_bytes(8, "little", signed=True)
    return int.from_bytes(blake2b(message, digest_size=8).digest(), "little") >> 1
