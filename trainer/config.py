"""The configuration of a training run, its presets, and changes to them. A checkpoint holds its run's whole one."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import ConfigDict, Field, model_validator

from shared.checkpoint import MAX_SIZE
from shared.diffusion.predictions import OWN_SCHEDULES, PredictionName
from shared.diffusion.schedules import ScheduleName
from shared.diffusion.unet import NetworkConfig
from shared.options import MAX_SEED, Count, Natural, NoOtherFields, SamplingOptions
from trainer.errors import TrainerError
from trainer.plugins import plugins

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Fit = Literal["squeeze", "pad"]  # to a square: by unequal scaling, or by repeating the edge first


class RunConfig(NoOtherFields):
    """What every run has, whatever it learns. Each objective adds its own fields and defaults."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    batch: Count = 64
    # muon: Muon (Jordan 2024) for inner matrices, AdamW for all else. auto: muon where the device computes in bf16,
    # adamw elsewhere, since Muon's products cost more there than they gain; a resumed run keeps its first choice
    optimizer: Literal["auto", "adamw", "muon"] = "adamw"
    lr: Positive = 2e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.99)
    warmup_steps: Natural = 300
    cooldown: Share = 0.3  # last share of the run, in which the rate falls to zero
    clip_norm: Positive | None = 1.0  # largest norm of the gradient
    ema_decay: Share = 0.995  # of the short average, which is the report's,
    ema_start: Natural = 2000  # and the step at which it starts
    ema_power: Positive = 12.0  # of the long average: decay (1 - 1/n)^(power + 1) (Karras et al. 2024, eq. 127)
    publish: Literal["long", "short", "raw"] = "long"  # which weights become the checkpoint
    evaluate_every: Count = 500  # steps; in steps, so that a run that is repeated evaluates, and ends, at the same ones
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = 0


class TrainConfig(RunConfig):
    """A run of the denoiser. `network` holds those fields of NetworkConfig that do not follow from the data.

    A field marked "from the data" follows from the pictures unless it is set (`trainer.data.settled`).
    """

    network: dict[str, Any] = Field(default_factory=dict)
    image_size: Count = 64
    fit: Fit = "squeeze"
    schedule: ScheduleName = "cosine"  # or the prediction's own (`OWN_SCHEDULES`)
    positions: bool = True  # give the network the objects' positions, where the data set has a positions.json
    rotations: bool = True  # and the objects' rotations, where it has a rotations.json too
    position_dropout: Share = 0.1  # share of pictures trained without positions and rotations, and without inputs
    layout_steps: Count = 2000  # at most, of the layout network, which draws the positions of a picture's objects
    timesteps: Annotated[int, Field(ge=SamplingOptions().steps, le=MAX_SIZE)] = 1000  # T
    prediction: PredictionName = "v"
    # Weight of the squared error of what is predicted: none, min-SNR (Hang et al. 2023), EDM's (Karras et al. 2022), or
    # the weight that amounts to sqrt(SNR) on x_0
    loss_weight: Literal["none", "min_snr", "edm", "sqrt_snr"] = "sqrt_snr"
    min_snr_gamma: Positive = 5.0
    # From the data, for EDM's weight: the pictures' standard deviation around their mean picture
    sigma_data: Positive = 0.15
    # Distribution of t: uniform, or log-SNR normally distributed around the levels that decide shape, colour and count
    noise_levels: Literal["uniform", "normal"] = "normal"
    log_snr_mean: float = -0.5  # from the data
    log_snr_std: Positive = 2.2
    # Draw one t from each of as many equal shares of the distribution as a batch has pictures; false: independently
    stratified: bool = True
    batch: Count = 64  # from the data
    optimizer: Literal["auto", "adamw", "muon"] = "auto"
    label_dropout: Share = 0.1  # share of pictures trained without labels, for guidance
    label_dropout_by: Literal["picture", "batch"] = "picture"  # drop labels picture by picture, or all of a batch's

    @model_validator(mode="before")
    @classmethod
    def _choose_schedule(cls, given: Any) -> Any:
        own = OWN_SCHEDULES.get(given.get("prediction", "v")) if isinstance(given, dict) else None
        return {"schedule": own, **given} if own else given


PRESETS: Final[dict[str, TrainConfig]] = {
    "default": TrainConfig(),
    **{name: TrainConfig.model_validate(added.recipe) for name, added in plugins().presets.items()},
}
Config = TypeVar("Config", bound=RunConfig)
# fields of NetworkConfig
FROM_DATA: Final = {
    "num_labels", "image_size", "image_channels", "positions", "rotations", "symmetric", "spread", "inputs",
}  # fmt: skip


def make_config(preset: str, changes: Sequence[str]) -> TrainConfig:
    """Return one of PRESETS with `field=value` changes. Raises as `with_changes` and `check_config` do."""
    return check_config(with_changes(PRESETS[preset], changes))


def with_changes(config: Config, changes: Sequence[str]) -> Config:
    """Return `config` with `field=value` changes. A value is JSON or else text; `network.x=...` sets `network`'s.

    Raises TrainerError for a change of another form, pydantic.ValidationError for an unknown field or a value that is
    not allowed.
    """
    values: dict[str, Any] = config.model_dump(exclude_unset=True)
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise TrainerError(f'--set "{change}" is not of the form field=value')
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        if key.startswith("network.") and isinstance(network := values.setdefault("network", {}), dict):
            network[key.removeprefix("network.")] = value
        else:
            values[key] = value
    return type(config).model_validate(values)


def check_config(config: TrainConfig) -> TrainConfig:
    """Return `config` if its network fits its pictures. Raises TrainerError or pydantic.ValidationError if not."""
    if given := FROM_DATA & set(config.network):
        raise TrainerError(f"network.{min(given)} cannot be set: it follows from the data set and image_size")
    NetworkConfig.model_validate({**config.network, "num_labels": 1, "image_size": config.image_size})
    return config
