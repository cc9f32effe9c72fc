"""Option types that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from shared import storage as files
from shared.options import MAX_SEED, SamplerName
from trainer.errors import TrainerError
from trainer.plugins import plugins


def open_storage(address: str) -> files.Location:
    """Return the storage at an address. Raises TrainerError for an address that no installed driver can open."""
    try:
        return files.open_storage(address)
    except ValueError as error:
        raise TrainerError(str(error)) from error


def preset(name: str) -> str:
    """Return the name of a preset. Wrong usage if there is none."""
    if name not in (known := ("default", *plugins().presets)):
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(map(repr, known))}.")
    return name


Storage = Annotated[
    Path,  # for an address a UPath, which has the same methods
    typer.Option(
        envvar="LABELGRID_STORAGE",
        parser=open_storage,
        help="Where checkpoints are published to and read from: a folder, or an address such as s3://bucket/path.",
    ),
]
DeviceName = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", help="Change one field of the run: --set batch=64. Repeatable.")
]
LoggedEvaluator = Annotated[str | None, typer.Option(help="Name of an evaluator whose scores are only logged.")]
Tests = Annotated[list[Path] | None, typer.Option(exists=True, help="Test files; the data set's own by default.")]
Judge = Annotated[
    str | None,
    typer.Option(help="Evaluator's name, or a file such as checkpoint.pth; by default the one that judges the model."),
]
Model = Annotated[str | None, typer.Option(help="Denoiser's name; the promoted one by default.")]
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of all randomness.")]
Preset = Annotated[
    str,
    typer.Option(parser=preset, metavar="NAME", help="Sampling: default, the checkpoint's own, or another recipe's."),
]
Sampler = Annotated[str | None, typer.Option(help=f"{', '.join(get_args(SamplerName))}.")]
SamplingSteps = Annotated[int | None, typer.Option("--steps", help="Sampling steps.")]
Spacing = Annotated[str | None, typer.Option(help="uniform, logsnr or trailing.")]
Guidance = Annotated[float | None, typer.Option(help="w of classifier-free guidance; 1 is none.")]
Interval = Annotated[tuple[float, float] | None, typer.Option(help="Noise levels (fractions of T) with guidance on.")]
Centre = Annotated[float, typer.Option(min=0, max=1, help="Share of scenes with their first object in the centre.")]
Existing = typer.Option(exists=True, help="A data set folder: objects.json, train.json and the pictures it names.")

# of `train`, whatever is learnt
Data = Annotated[list[Path], Existing]
Name = Annotated[str, typer.Option(help="The checkpoint's name.")]
RunFolder = Annotated[
    Path,  # torchrun takes --run for itself
    typer.Option("--run", "--run-folder", help="Folder for state, log and grids. Under torchrun: --run-folder."),
]
Minutes = Annotated[float | None, typer.Option(min=0.01, help="Stop after so many minutes of training.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Stop after so many steps.")]
StartFrom = Annotated[str | None, typer.Option(help="A checkpoint whose weights the run starts from.")]
Patience = Annotated[
    int | None, typer.Option(min=1, help="Stop after so many evaluations in a row that are worse than the best.")
]
PublishEvery = Annotated[
    str, typer.Option(help="Publish it while it trains: every 10m, minutes, or 500, steps. 0: only at the end.")
]
Promote = Annotated[
    bool, typer.Option("--promote", help="Make it the default when it is published; its best, with --held-out.")
]
GradAccumulation = Annotated[
    int, typer.Option(min=1, help="Backward passes in a step, each of a part of the batch, to save memory.")
]


def given(**options: Any) -> dict[str, Any]:
    """Return the options that the user gave."""
    return {key: value for key, value in options.items() if value is not None}
