"""What a training run is made of, and its presets. A run saves its whole configuration in its checkpoint."""

from typing import Annotated, Any, Final, Literal

from pydantic import ConfigDict, Field

from shared.options import NoOtherFields, PredictionName, ScheduleName

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Fit = Literal["squeeze", "pad"]  # to a square: by unequal scaling, or by repeating the edge first


class TrainConfig(NoOtherFields):
    """One training run. `network` holds NetworkConfig's fields besides the number of labels and the picture's size."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    network: dict[str, Any] = Field(default_factory=dict)
    image_size: Count = 64
    fit: Fit = "squeeze"
    schedule: ScheduleName = "cosine"
    # Tell the network where objects are, of data sets that have a positions.json, but for a share of the pictures
    positions: bool = True
    position_dropout: Share = 0.1
    timesteps: Annotated[int, Field(ge=2)] = 1000  # T
    prediction: PredictionName = "v"
    # The loss on eps or v as it is, weighed by min-SNR (Hang et al. 2023), by EDM's weight (Karras et al. 2022), or by
    # sqrt(SNR) on x_0
    loss_weight: Literal["none", "min_snr", "edm", "sqrt_snr"] = "sqrt_snr"
    min_snr_gamma: Positive = 5.0
    sigma_data: Positive = 0.15  # of the pictures, for EDM's weight: their standard deviation around the mean picture
    # Which t are trained: all alike, or log-SNR normally distributed around where shape, colour and count are decided
    noise_levels: Literal["uniform", "normal"] = "normal"
    log_snr_mean: float = -0.5
    log_snr_std: Positive = 2.2
    batch: Count = 64
    optimizer: Literal["adamw", "muon"] = "muon"  # muon: matrices by Muon (Jordan 2024), all else by AdamW
    lr: Positive = 2e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.99)
    warmup_steps: Natural = 300
    cooldown: Share = 0.3  # last share of the run in which the rate falls to zero
    clip_norm: Positive | None = 1.0  # of the gradient
    label_dropout: Share = 0.1  # share of pictures trained without labels, for guidance
    ema_decay: Share = 0.995  # the report's average,
    ema_start: Natural = 2000  # from this step on
    ema_power: Positive = 12.0  # the long average: decay (1 - 1/n)^(power + 1) (Karras et al. 2024, eq. 127)
    publish: Literal["long", "short", "raw"] = "long"  # which weights become the checkpoint
    seed: Natural = 0


REPORT: Final = TrainConfig(
    # 32x32 padded pictures, every pixel a position, sigmoid betas, simple noise prediction, AdamW 3e-4, batch 48
    network={
        "block": 1,
        "channels": (64, 128, 256),
        "encoder_blocks": (1, 1, 1),
        "decoder_blocks": (1, 1, 1),
        "attention": (False, True, True),
    },
    image_size=32,
    fit="pad",
    positions=False,
    schedule="sigmoid",
    prediction="eps",
    loss_weight="none",
    noise_levels="uniform",
    batch=48,
    optimizer="adamw",
    lr=3e-4,
    betas=(0.9, 0.999),
    warmup_steps=0,
    cooldown=0.0,
    clip_norm=None,
    publish="short",
)
PRESETS: Final[dict[str, TrainConfig]] = {"default": TrainConfig(), "report": REPORT}
REPORT_EPOCHS = 300
