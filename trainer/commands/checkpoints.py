"""The commands on a finished checkpoint: `promote`, `configure`, `export` and `card`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from shared import registry
from shared.checkpoint import CheckpointInfo, path_of, read_info, reconfigure
from shared.options import LIMITS
from shared.support import Support
from trainer.commands import options, terminal
from trainer.errors import TrainerError
from trainer.plugins import plugins


def promote(
    name: Annotated[str, typer.Argument(help="A checkpoint in storage.")], storage: options.Storage = Path("models")
) -> None:
    """Make a checkpoint the default of its kind."""
    registry.promote(storage, name)
    terminal.show("promoted", [("checkpoint", name), ("storage", str(storage))])


def configure(
    name: Annotated[str, typer.Argument(help="A denoiser in storage.")],
    storage: options.Storage = Path("models"),
    sampler: options.Sampler = None,
    steps: options.SamplingSteps = None,
    spacing: options.Spacing = None,
    guidance: options.Guidance = None,
    interval: options.Interval = None,
    objects: Annotated[
        tuple[int, int] | None, typer.Option(help="Fewest and most objects that it has learnt to draw.")
    ] = None,
    proportions: Annotated[
        tuple[int, int] | None,
        typer.Option(help="Width and height at which the page shows pictures that were squeezed to squares, as 4 3."),
    ] = None,
) -> None:
    """Change parts of a denoiser without training: its default sampling, what it says it has learnt.

    What is not given stays the same, as do the weights and their digest.
    """
    from trainer.score import make_options

    sampling = options.given(
        sampler=sampler, steps=steps, spacing=spacing, guidance=guidance, guidance_interval=interval
    )
    if not (sampling or objects or proportions):
        raise TrainerError("say what to change: a sampling option such as --steps, --objects or --proportions")
    if proportions and min(proportions) < 1:
        raise TrainerError(f"--proportions {proportions[0]} {proportions[1]}: both must be at least 1")

    def change(info: CheckpointInfo) -> Mapping[str, Any]:
        changed: dict[str, Any] = {"proportions": proportions} if proportions else {}
        if sampling:
            changed["sampling"] = make_options("default", sampling, info).model_dump(mode="json")
        if objects:
            changed["support"] = _support(info, objects).model_dump(mode="json")
        return changed

    path = registry.resolve(storage, name, "denoiser")
    reconfigure(path, change)
    info = read_info(path)
    rows = [(key, str(value)) for key, value in info.sampling.model_dump().items()]
    rows += [(key, str(value)) for key, value in info.support.model_dump().items()]
    rows += [(key, str(info.config[key])) for key in ("proportions", "base") if key in info.config]
    terminal.show(name, rows)


def _support(info: CheckpointInfo, objects: tuple[int, int]) -> Support:
    """Return a denoiser's support with other numbers of objects. The service refuses requests for others."""
    support = Support.model_validate({**info.config.get("support", {}), "objects": objects})
    known, most = len(info.vocabulary), LIMITS.max_labels
    if objects[1] > min(known, most):
        why = f"{info.name} knows {known} labels" if known < most else f"a request names at most {most} labels"
        raise TrainerError(f"--objects {objects[0]} {objects[1]}: {why}")
    return support


def export(
    name: Annotated[str, typer.Argument(help="A checkpoint in storage.")],
    file: Annotated[Path, typer.Argument(help="The file to write: NAME.onnx, or of an evaluator checkpoint.pth.")],
    storage: options.Storage = Path("models"),
) -> None:
    """Write a checkpoint as ONNX, or an evaluator in another form that its data set's package knows.

    The suffix of the file decides. Upsampler and layout network go to NAME-upsampler.onnx and NAME-layouts.onnx.
    """
    if file.suffix not in (suffixes := (".onnx", *plugins().evaluators)):
        raise TrainerError(f"{file} must end in {' or '.join(suffixes)}")
    terminal.check_file(file)
    if module := plugins().evaluators.get(file.suffix):
        from shared.evaluator import load_evaluator

        evaluator = load_evaluator(registry.resolve(storage, name, "evaluator"))
        importlib.import_module(module).write(evaluator, file)
        written = [file]
    else:
        from trainer.export import parts_of, write_onnx

        for part in parts_of(file):
            terminal.check_file(part)
        written = write_onnx(path_of(storage, name), file)
    terminal.show("exported", [("checkpoint", name), *(("file", str(one)) for one in written)])


def card(
    name: Annotated[str, typer.Argument(help="A checkpoint in storage.")],
    storage: options.Storage = Path("models"),
    licence: Annotated[
        str | None,
        typer.Option("--license", help="The weights' licence, as the Hugging Face Hub names it, such as mit."),
    ] = None,
) -> None:
    """Write a checkpoint's card again, as `train` and `score` do, after it was configured or to name its licence.

    What you wrote outside of the marks around generated parts stays. The card begins with the Hugging Face Hub's
    metadata.
    """
    from trainer.studies.card import write_card

    terminal.show("card", [("file", str(write_card(storage, name, licence=licence)))])
