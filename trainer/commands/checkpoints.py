"""The commands on a finished checkpoint: `score`, `promote`, `set-sampling` and `card`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trainer.commands.terminal import (
    DeviceName,
    Grid,
    Guidance,
    Interval,
    Json,
    KeepPadding,
    Model,
    Sampler,
    SamplingSteps,
    Seed,
    Spacing,
    Storage,
    bar,
    check_file,
    given_sampling,
    show,
    show_scores,
)
from trainer.errors import TrainerError


def score(
    file: Annotated[Path, typer.Argument(help="A test file: a JSON list of label lists.")],
    repeats: Annotated[int, typer.Option(min=1, max=1000, help="Runs with different seeds.")] = 1,
    storage: Storage = Path("models"),
    model: Model = None,
    evaluator: Annotated[
        str | None, typer.Option(help="Evaluator's name, or the course's checkpoint.pth; the promoted one by default.")
    ] = None,
    preset: Annotated[
        str, typer.Option(help="Sampling: default (the checkpoint's own), or report (999 ancestral steps, w = 3).")
    ] = "default",
    sampler: Sampler = None,
    steps: SamplingSteps = None,
    spacing: Spacing = None,
    guidance: Guidance = None,
    interval: Interval = None,
    keep_padding: KeepPadding = False,
    seed: Seed = 0,
    grid: Grid = None,
    columns: Annotated[int, typer.Option(min=1, max=64, help="Pictures in a row of the grid.")] = 8,
    json_out: Json = None,
    device: DeviceName = "auto",
) -> None:
    """Sample and score a test file: each run's score, and the maximum, mean and standard deviation."""
    from shared.device import pick_device
    from shared.diffusion.model import load_denoiser
    from shared.registry import resolve
    from trainer.score import load_judge, make_options, score_file

    check_file(grid, ".png")
    check_file(json_out, ".json")
    given = given_sampling(sampler, steps, spacing, guidance, interval)
    where = pick_device(device)
    denoiser = load_denoiser(resolve(storage, model, "denoiser"), device=where)
    options = make_options(preset, given, denoiser.options)
    course = evaluator is not None and evaluator.endswith(".pth")
    judged_by = Path(evaluator) if course and evaluator else resolve(storage, evaluator, "evaluator")
    judge = load_judge(judged_by, denoiser.vocabulary, where)
    with bar() as progress:
        runs, figures = score_file(
            file, denoiser, judge, options, repeats=repeats, seed=seed, progress=progress, keep_padding=keep_padding
        )
    show_scores(file, runs, figures, json_out=json_out, grid=grid, columns=columns)


def promote(
    name: Annotated[str, typer.Argument(help="A checkpoint in storage.")], storage: Storage = Path("models")
) -> None:
    """Make a checkpoint the default of its kind."""
    from shared.registry import promote as promote_in

    promote_in(storage, name)
    show("promoted", [("checkpoint", name), ("storage", str(storage))])


def set_sampling(
    name: Annotated[str, typer.Argument(help="A denoiser in storage.")],
    storage: Storage = Path("models"),
    sampler: Sampler = None,
    steps: SamplingSteps = None,
    spacing: Spacing = None,
    guidance: Guidance = None,
    interval: Interval = None,
) -> None:
    """Set a denoiser's default sampling options, for the service and the trainer.

    Options that are not given stay the same, as do the weights and their digest.
    """
    from trainer.score import set_sampling as set_in

    changes = given_sampling(sampler, steps, spacing, guidance, interval)
    if not changes:
        raise TrainerError("say what to set: --sampler, --steps, --spacing, --guidance or --interval")
    options = set_in(storage, name, changes)
    show(f"sampling of {name}", [(key, str(value)) for key, value in options.model_dump().items()])


def card(
    name: Annotated[str, typer.Argument(help="A checkpoint in storage.")],
    log: Annotated[Path, typer.Option(exists=True, help="Its run's log.jsonl.")],
    machine: Annotated[str, typer.Option(help="The machine that it was trained on, in words.")],
    storage: Storage = Path("models"),
    scores: Annotated[
        list[Path] | None, typer.Option(exists=True, help="A file that `score --json` wrote. Repeatable.")
    ] = None,
    commands: Annotated[list[str] | None, typer.Option("--command", help="A command that made it. Repeatable.")] = None,
    notes: Annotated[list[str] | None, typer.Option("--note", help="A paragraph of Markdown. Repeatable.")] = None,
) -> None:
    """Write a checkpoint's card and loss curve beside it."""
    from trainer.studies.card import write_card

    path = write_card(
        storage, name, log=log, scores=scores or [], machine=machine, commands=commands or [], notes=notes or []
    )
    show("card", [("file", str(path))])
