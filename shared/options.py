"""The options of sampling, their limits and presets: the one place that holds these defaults.

Knows neither torch nor HTTP, so that the API can refuse a bad option without loading a network.
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
    """What one request may ask for. Bounds exist so that one caller cannot hold a worker for hours."""

    max_pictures_per_request: int = (
        256  # the course's test files hold 32 label lists; this leaves room for eight of them
    )
    max_labels: int = 8  # the data set shows at most 3 objects; more is an experiment of the caller's
    max_steps: int = 1000  # T of the schedules: there are no more timesteps to visit
    max_guidance: float = 20.0  # far beyond where pictures burn out
    max_repeats: int = 100  # of one /score request; the report uses 10
    max_columns: int = 64  # of a grid
    max_file_bytes: int = 1 << 20  # 256 lists of 8 labels are some 40 KB


LIMITS: Final = Limits()

MAX_UNKNOWN: Final = 20  # fields that an object does not have, of those that are named as errors

Fraction = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]


class NoOtherFields(BaseModel):
    """A field that it has not got is an error, which names the nearest that it has, or all of them."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="wrap")
    @classmethod
    def _say_what_is_known(cls, given: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(given)
        except ValidationError as error:
            if isinstance(given, dict) and given.keys() - cls.model_fields.keys():
                raise _with_known_fields(error, list(cls.model_fields)) from None
            raise


def _with_known_fields(error: ValidationError, known: list[str]) -> ValidationError:
    """The same error, with what pydantic does not say of unknown fields of the object itself."""
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
    """Takes values as they are: what is unknown or of another type is an error. Only 16.0 is 16, as in JSON Schema."""

    model_config = ConfigDict(strict=True)

    @model_validator(mode="before")
    @classmethod
    def _few_unknown(cls, given: Any) -> Any:
        # pydantic makes an error of each unknown field, which takes long where there are very many
        if isinstance(given, dict) and len(given) > len(cls.model_fields) + MAX_UNKNOWN:
            unknown = itertools.islice((name for name in given if name not in cls.model_fields), MAX_UNKNOWN)
            names = [*(name for name in cls.model_fields if name in given), *unknown]
            return {name: given[name] for name in names}
        return given

    @field_validator("*", mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        return int(value) if isinstance(value, float) and value.is_integer() else value


class SamplingOptions(Strict):
    """How one picture is sampled. Unknown, out-of-range and wrongly typed options raise pydantic.ValidationError."""

    model_config = ConfigDict(frozen=True)

    # sampler, steps, spacing and guidance were chosen on train.json's lists, by
    # `python -m benchmarks.choices.sampling`; ddpm has sigma^2 = beta, ddpm_small the posterior variance
    sampler: SamplerName = "sde_dpmpp_2m"
    # network calls per picture, doubled by guidance
    steps: int = Field(default=16, ge=1, le=LIMITS.max_steps)
    # uniform in t, uniform in log-SNR, or uniform in t counted back from the last timestep
    spacing: SpacingName = "uniform"
    # w of classifier-free guidance; 1 is none, 0 ignores the labels
    guidance: float = Field(default=3.0, ge=0.0, le=LIMITS.max_guidance, allow_inf_nan=False)
    # fractions of T between which guidance is on; outside, w = 1. Not strict: JSON has lists, no tuples
    guidance_interval: tuple[Fraction, Fraction] = Field(default=(0.0, 1.0), strict=False)
    # noise of DDIM: 0 is deterministic, 1 is ancestral; the other samplers fix their own
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
        """Network rows of one picture in one step within the guidance interval: two where w mixes two predictions."""
        return 1 if self.guidance in (0.0, 1.0) else 2


# report: the report's own sampling, ancestral with sigma^2 = beta, w = 3. Its loop runs t = 999..1, 999 steps.
SAMPLING_PRESETS: Final[dict[str, SamplingOptions]] = {
    "default": SamplingOptions(),
    "report": SamplingOptions(sampler="ddpm", steps=999, spacing="uniform", guidance=3.0),
}


def default_options(config: Mapping[str, Any]) -> SamplingOptions:
    """The sampling that a checkpoint's configuration names as its own (a distilled one does), or the default.

    Raises pydantic.ValidationError where it names a bad one.
    """
    return SamplingOptions.model_validate(config.get("sampling", {}))


def picture_seed(seed: int, index: int) -> int:
    """The seed of picture `index` of a request with `seed`: 63 bits, the same alone or in company, on every machine.

    A hash and not seed + index: neighbouring requests must not share pictures. Both arguments fit 64 bits with a
    sign; others raise OverflowError.
    """
    message = seed.to_bytes(8, "little", signed=True) + index.to_bytes(8, "little", signed=True)
    return int.from_bytes(blake2b(message, digest_size=8).digest(), "little") >> 1
