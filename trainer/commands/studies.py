"""The commands that study what was trained: compare, calibrate, memorisation, card. `__main__.py` registers them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Console
from rich.table import Table

from trainer.commands.terminal import DeviceName, KeepPadding, Seed, Storage, bar, check_file, read_dataset, show
from trainer.config import Fit
from trainer.errors import TrainerError


def compare(
    data: Annotated[Path, typer.Argument(exists=True, help="A data set folder.")],
    out: Annotated[Path, typer.Option(help="Folder of the report, its plots, grids and figures.")],
    evaluator: Annotated[str, typer.Option(help="Name of the evaluator that scores all variants.")],
    minutes: Annotated[
        float | None, typer.Option("--minutes-per-variant", min=0.01, help="Training time of each variant.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps-per-variant", min=1, help="Steps of each variant.")] = None,
    only: Annotated[str | None, typer.Option(help="Train just these variants: a,b.")] = None,
    repeats: Annotated[int, typer.Option(min=1, max=1000, help="Runs with different seeds that are scored.")] = 3,
    tests: Annotated[
        list[Path] | None, typer.Option(exists=True, help="Test files; the data set's own by default.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Change one field of all variants: --set batch=64. Repeatable.")
    ] = None,
    run: Annotated[Path, typer.Option(help="Folder for the variants' states and logs.")] = Path("runs/compare"),
    storage: Storage = Path("models"),
    device: DeviceName = "auto",
) -> None:
    """Train variants of the recipe under one equal budget and write a report. To resume, run the command again."""
    from shared.device import pick_device
    from shared.evaluator import load_evaluator
    from shared.registry import resolve
    from shared.vocabulary import Vocabulary
    from trainer.commands.train import changed, make_budget, tests_of
    from trainer.score import check_vocabularies
    from trainer.studies import compare as comparison
    from trainer.studies.compare_report import write_report

    if not minutes and not steps:
        raise TrainerError("say how long: --minutes-per-variant or --steps-per-variant")
    make_budget("", minutes, steps)
    names = comparison.chosen(only, positions=(data / "positions.json").exists())
    base = changed(comparison.BASE, set_ or [])
    judge = load_evaluator(resolve(storage, evaluator, "evaluator"), pick_device(device))
    vocabulary = Vocabulary.from_objects_file(data / "objects.json")
    check_vocabularies(vocabulary, judge.vocabulary)
    digest = judge.info.digest if judge.info else ""
    if not (lists := tests_of(data, tests, vocabulary)):
        raise TrainerError(f"{data} has neither test.json nor new_test.json: name test files with --tests")
    setup = comparison.Setup(data.name, digest, lists, minutes, steps, repeats, set_ or [])
    with bar() as progress:
        done = comparison.run_comparison(
            names,
            base,
            lambda config: read_dataset(data, progress, size=config.image_size, fit=config.fit),
            run,
            out,
            setup,
            judge,
            pick_device(device),
            progress,
        )
    show("compared", [("trained now", ", ".join(done) or "nothing"), ("report", str(write_report(out)))])


def calibrate(
    folder: Annotated[Path, typer.Argument(exists=True, help="Sets of pictures and sets.json with published scores.")],
    conditions: Annotated[Path, typer.Option(exists=True, help="The folder of the conditions files.")],
    storage: Storage = Path("models"),
    evaluator: Annotated[str | None, typer.Option(help="Evaluator's name; the promoted one by default.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot here.")] = None,
    device: DeviceName = "auto",
) -> None:
    """Compare an evaluator's scores of published pictures with the scores published for them."""
    from shared.device import pick_device
    from shared.evaluator import load_evaluator
    from shared.registry import resolve
    from trainer.studies import calibrate as calibration

    judge = load_evaluator(resolve(storage, evaluator, "evaluator"), pick_device(device))
    with bar() as progress:
        task = progress.add_task("scoring sets", total=None)
        agreement = calibration.calibrate(folder, conditions, judge, lambda: progress.advance(task))
    table = Table("set", "published", "this evaluator's", "difference", title=f"{len(agreement.sets)} published sets")
    for one in agreement.sets:
        table.add_row(one.folder, f"{one.published:.3f}", f"{one.accuracy:.3f}", f"{one.accuracy - one.published:+.3f}")
    out = Console()
    out.print(table)
    out.print(
        f"correlation {agreement.correlation:.4f}, mean absolute error {agreement.mean_absolute_error:.4f}, "
        f"bias {agreement.bias:+.4f}"
    )
    if plot:
        calibration.plot(agreement, plot)


def memorisation(
    data: Annotated[Path, typer.Argument(exists=True, help="The data set folder that the denoiser was trained on.")],
    held_out: Annotated[Path, typer.Option(exists=True, help="A folder of pictures that it has not seen.")],
    storage: Storage = Path("models"),
    model: Annotated[str | None, typer.Option(help="Denoiser's name; the promoted one by default.")] = None,
    evaluator: Annotated[str | None, typer.Option(help="Evaluator's name; the promoted one by default.")] = None,
    preset: Annotated[str, typer.Option(help="Sampling preset: default or report.")] = "default",
    pictures: Annotated[int, typer.Option(min=2, help="Generated, and compared with as many unseen ones.")] = 500,
    label_sets: Annotated[
        int, typer.Option(min=0, help="Label sets whose diversity is measured, 8 pictures each.")
    ] = 32,
    seed: Seed = 0,
    grid: Annotated[
        Path | None, typer.Option(help="Write the 8 nearest as PNG: generated, nearest by pixels, by features.")
    ] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
    device: DeviceName = "auto",
) -> None:
    """Does it only remember? Nearest training pictures, diversity, and the Frechet distance to unseen pictures."""
    from trainer.studies import memorisation as memory

    check_file(grid, ".png")
    check_file(json_out, ".json")
    with bar() as progress:
        report, images = memory.run_examination(
            lambda folder, size, fit: read_dataset(folder, progress, size=size, fit=fit),
            (data, held_out),
            (storage, model, evaluator),
            preset,
            device,
            progress,
            pictures=pictures,
            label_sets=label_sets,
            seed=seed,
        )
    table = Table("", "generated", "to compare with", title=f"{report.pictures} pictures")
    for row in memory.rows_of(report):
        table.add_row(*row)
    Console().print(table)
    if grid:
        memory.write_grid(images, grid)
    if json_out:
        json_out.write_text(json.dumps(report.as_dict(), indent=1) + "\n")


def limit(
    file: Annotated[Path, typer.Argument(help="A test file of i-CLEVR labels.")],
    repeats: Annotated[int, typer.Option(min=1, max=1000, help="Runs with different placements.")] = 10,
    storage: Storage = Path("models"),
    evaluator: Annotated[str | None, typer.Option(help="Evaluator's name; the promoted one by default.")] = None,
    seed: Seed = 0,
    size: Annotated[int, typer.Option(min=8, max=240, help="Pixels a side of the pictures.")] = 64,
    fit: Annotated[str, typer.Option(help="Made square how: squeeze or pad.")] = "squeeze",
    keep_padding: KeepPadding = False,
    placed_as: Annotated[
        str | None, typer.Option(help="Name of a denoiser: objects keep as far apart as in its arrangements.")
    ] = None,
    grid: Annotated[Path | None, typer.Option(help="Write the best run's pictures here as PNG.")] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
    device: DeviceName = "auto",
) -> None:
    """Score fresh renders of a test file's lists: the limit of the data, for the evaluator's word on it."""
    from trainer.commands import score as score_command
    from trainer.studies.limit import render_runs

    if fit not in ("squeeze", "pad"):
        raise TrainerError(f'no --fit "{fit}"; there are squeeze and pad')
    check_file(grid, ".png")
    check_file(json_out, ".json")
    with bar() as progress:
        runs, figures = render_runs(
            file, repeats, storage, evaluator, seed, device, progress,
            size=size, fit=cast(Fit, fit), keep_padding=keep_padding, placed_as=placed_as,
        )  # fmt: skip
    score_command.print_runs(file, runs, figures, console=Console())
    if grid:
        score_command.write_grid(runs, grid, 8)
    if json_out:
        json_out.write_text(json.dumps(figures, indent=1) + "\n")


def card(
    name: Annotated[str, typer.Argument(help="A checkpoint in storage.")],
    log: Annotated[Path, typer.Option(exists=True, help="Its run's log.jsonl.")],
    machine: Annotated[str, typer.Option(help="What it was trained on, in words.")],
    storage: Storage = Path("models"),
    scores: Annotated[
        list[Path] | None, typer.Option(exists=True, help="What `score --json` wrote. Repeatable.")
    ] = None,
    commands: Annotated[list[str] | None, typer.Option("--command", help="How it was made. Repeatable.")] = None,
    notes: Annotated[list[str] | None, typer.Option("--note", help="A paragraph of Markdown. Repeatable.")] = None,
) -> None:
    """Write a checkpoint's card and loss curve beside it."""
    from trainer.studies.card import write_card

    path = write_card(
        storage, name, log=log, scores=scores or [], machine=machine, commands=commands or [], notes=notes or []
    )
    show("card", [("file", str(path))])
