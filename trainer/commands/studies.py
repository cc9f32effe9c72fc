"""The commands that measure: `compare`, `calibrate`, `memorisation`, `spectrum`, `two-sample` and `limit`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from shared.registry import resolve
from shared.vocabulary import Vocabulary
from trainer.commands import options, terminal
from trainer.errors import TrainerError


def compare(
    data: Annotated[Path, typer.Argument(exists=True, help="A data set folder.")],
    out: Annotated[Path, typer.Option(help="Folder for the report, its plots, grids and figures.")],
    evaluator: Annotated[str, typer.Option(help="Name of the evaluator that scores all variants.")],
    minutes: Annotated[float | None, typer.Option("--minutes-per-variant", min=0.01, help="Training time.")] = None,
    steps: Annotated[int | None, typer.Option("--steps-per-variant", min=1, help="Steps of each variant.")] = None,
    only: Annotated[str | None, typer.Option(help="Train only these variants: a,b.")] = None,
    repeats: Annotated[int, typer.Option(min=1, max=1000, help="Scored runs with different seeds.")] = 3,
    tests: options.Tests = None,
    set_: options.Changes = None,
    run: Annotated[Path, typer.Option(help="Folder for the variants' states and logs.")] = Path("runs/compare"),
    storage: options.Storage = Path("models"),
    device: options.DeviceName = "auto",
) -> None:
    """Train variants of the recipe under one equal budget and write a report. To resume, run the command again."""
    from trainer.config import with_changes
    from trainer.score import load_judge, tests_of
    from trainer.studies import compare as comparison
    from trainer.studies.compare_report import write_report

    terminal.check_budget(minutes, steps, "--minutes-per-variant or --steps-per-variant")
    for option, folder in (("--out", out), ("--run", run)):
        terminal.check_folder(folder, option)
    names = comparison.chosen(only, positions=(data / "positions.json").exists())
    base = with_changes(comparison.BASE, set_ or [])
    vocabulary, where = Vocabulary.from_objects_file(data / "objects.json"), terminal.pick_device(device)
    judge = load_judge(resolve(storage, evaluator, "evaluator"), vocabulary, where)
    digest = judge.info.digest if judge.info else ""
    if not (lists := tests_of(data, tests, vocabulary)):
        raise TrainerError(f"{data} has neither test.json nor new_test.json: name test files with --tests")
    setup = comparison.Setup(data.name, digest, lists, minutes, steps, repeats, set_ or [])
    with terminal.bar() as progress:
        load = lambda config: terminal.read_dataset(data, progress, size=config.image_size, fit=config.fit)  # noqa: E731
        trained = comparison.run_comparison(names, base, load, run, out, setup, judge, where, progress)
    terminal.show("compared", [("trained now", ", ".join(trained) or "nothing"), ("report", str(write_report(out)))])


def calibrate(
    folder: Annotated[Path, typer.Argument(exists=True, help="Sets of pictures, and sets.json with published scores.")],
    conditions: Annotated[Path, typer.Option(exists=True, help="Folder of the conditions files.")],
    storage: options.Storage = Path("models"),
    evaluator: options.Evaluator = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot here.")] = None,
    device: options.DeviceName = "auto",
) -> None:
    """Compare an evaluator's scores with the scores published for the same pictures."""
    from shared.evaluator import load_evaluator
    from trainer.studies import calibrate as calibration

    if plot and plot.suffix not in (".png", ".pdf", ".svg"):
        raise TrainerError(f"{plot} must end in .png, .pdf or .svg")
    if plot:
        terminal.check_file(plot)
    judge = load_evaluator(resolve(storage, evaluator, "evaluator"), terminal.pick_device(device))
    with terminal.bar() as progress:
        task = progress.add_task("scoring sets", total=None)
        agreement = calibration.calibrate(folder, conditions, judge, lambda: progress.advance(task))
    rows = [
        [one.folder, f"{one.published:.3f}", f"{one.accuracy:.3f}", f"{one.accuracy - one.published:+.3f}"]
        for one in agreement.sets
    ]
    terminal.print_table(f"{len(rows)} published sets", ["set", "published", "this evaluator's", "difference"], rows)
    print(
        f"correlation {agreement.correlation:.4f}, mean absolute error {agreement.mean_absolute_error:.4f}, "
        f"bias {agreement.bias:+.4f}"
    )
    if plot:
        calibration.plot(agreement, plot)


def memorisation(
    data: Annotated[Path, typer.Argument(exists=True, help="The data set folder that the denoiser was trained on.")],
    held_out: Annotated[Path, typer.Option(exists=True, help="A folder of pictures that it was not trained on.")],
    storage: options.Storage = Path("models"),
    model: options.Model = None,
    evaluator: options.JudgeOfModel = None,
    preset: options.Preset = "default",
    pictures: Annotated[int, typer.Option(min=2, help="Sampled pictures, compared with as many unseen ones.")] = 500,
    label_sets: Annotated[int, typer.Option(min=0, help="Label sets for the diversity, 8 pictures each.")] = 32,
    seed: options.Seed = 0,
    grid: Annotated[
        Path | None, typer.Option(help="PNG of the 8 pictures nearest to the training set, with their neighbours.")
    ] = None,
    json_out: options.Json = None,
    device: options.DeviceName = "auto",
) -> None:
    """Measure memorisation: nearest training pictures, diversity, and the Frechet distance to unseen pictures."""
    from shared.diffusion.model import load_denoiser
    from shared.evaluator import load_evaluator
    from trainer.score import make_options, save_grid
    from trainer.studies import memorisation as study

    terminal.check_files(png=grid, json=json_out)
    where = terminal.pick_device(device)
    denoiser = load_denoiser(resolve(storage, model, "denoiser"), device=where)
    judge = load_evaluator(terminal.evaluator_path(storage, evaluator, denoiser.info), where)
    fit = denoiser.info.training.get("config", {}).get("fit", "squeeze")
    with terminal.bar() as progress:
        training, unseen = (
            terminal.read_dataset(folder, progress, size=denoiser.image_shape[-1], fit=fit)
            for folder in (data, held_out)
        )
        task = progress.add_task("sampling (pictures x steps)", total=None)
        report, images = study.examine(
            denoiser, judge, training, unseen, make_options(preset, {}, denoiser.info),
            pictures=pictures, label_sets=label_sets, seed=seed, advance=lambda n: progress.advance(task, n),
        )  # fmt: skip
    head = ["", "generated", "to compare with"]
    terminal.print_table(f"{report.pictures} pictures", head, study.rows_of(report))
    if grid:
        save_grid(images, grid, columns=3)
    terminal.write_json(json_out, asdict(report))


def spectrum(
    data: Annotated[Path, typer.Argument(exists=True, help="A data set folder that the model was not trained on.")],
    storage: options.Storage = Path("models"),
    model: options.Model = None,
    preset: options.Preset = "default",
    count: Annotated[int, typer.Option(min=1, help="Pictures to generate.")] = 256,
    seed: options.Seed = 0,
    grid: Annotated[Path | None, typer.Option(help="PNG of some pictures beside the folder's.")] = None,
    json_out: options.Json = None,
    device: options.DeviceName = "auto",
) -> None:
    """Measure sharpness: the power of generated pictures in each octave, relative to a folder's of the same labels."""
    from shared.diffusion.model import load_denoiser
    from trainer.full_size import find_pictures
    from trainer.score import make_options, save_grid
    from trainer.studies import spectrum as study

    terminal.check_files(png=grid, json=json_out)
    denoiser = load_denoiser(resolve(storage, model, "denoiser"), device=terminal.pick_device(device))
    _, height, width = denoiser.picture_shape
    with terminal.bar() as progress:
        dataset = terminal.read_dataset(data, progress, size=denoiser.image_shape[-1])
        task = progress.add_task("sampling", total=min(count, len(dataset)))
        report, images = study.examine(
            denoiser, dataset, find_pictures([data], f"{width}x{height}"), make_options(preset, {}, denoiser.info),
            count=count, seed=seed, advance=lambda n: progress.advance(task, n),
        )  # fmt: skip
    head = ["period, pixels", "generated / folder's", "both without single dots", "interpolated / folder's"]
    terminal.print_table(f"{report.pictures} pictures of {report.model}", head, study.rows_of(report))
    if grid:
        save_grid(images, grid, columns=2)
    terminal.write_json(json_out, asdict(report))


def two_sample(
    data: Annotated[Path, typer.Argument(exists=True, help="A data set folder that the model was not trained on.")],
    storage: options.Storage = Path("models"),
    model: options.Model = None,
    preset: options.Preset = "default",
    count: Annotated[int, typer.Option(min=8, help="Generated pictures; the folder needs twice as many.")] = 640,
    upsampler_alone: Annotated[
        bool, typer.Option("--upsampler-alone", help="Enlarge the folder's squeezed pictures instead of sampled ones.")
    ] = False,
    noise: Annotated[
        float, typer.Option(min=0, help="Deviation of noise added to all, in levels of 256: it hides what is weaker.")
    ] = 0.0,
    seed: options.Seed = 0,
    grid: Annotated[
        Path | None, typer.Option(help="PNG of the crops that gave most away, each beside one of the folder's.")
    ] = None,
    json_out: options.Json = None,
    device: options.DeviceName = "auto",
) -> None:
    """Test whether a small network can tell generated pictures from a folder's: accuracy, where 0.5 is best."""
    from shared.diffusion.model import load_denoiser
    from trainer.full_size import find_pictures
    from trainer.score import make_options, save_grid
    from trainer.studies import two_sample as study

    terminal.check_files(png=grid, json=json_out)
    denoiser = load_denoiser(resolve(storage, model, "denoiser"), device=terminal.pick_device(device))
    _, height, width = denoiser.picture_shape
    with terminal.bar() as progress:
        dataset = terminal.read_dataset(data, progress, size=denoiser.image_shape[-1])
        task = progress.add_task("sampling", total=count)
        found, shown = study.examine(
            denoiser, dataset, find_pictures([data], f"{width}x{height}"), make_options(preset, {}, denoiser.info),
            count=count, seed=seed, noise=noise, upsampler_alone=upsampler_alone,
            advance=lambda n: progress.advance(task, n),
        )  # fmt: skip
    head = ["size", "told from the folder's", "accuracy"]
    terminal.print_table(f"{count} pictures of {denoiser.info.name}", head, study.rows_of(found))
    if grid:
        save_grid(shown, grid, columns=8)
    terminal.write_json(json_out, [asdict(one) for one in found])


def limit(
    file: Annotated[Path, typer.Argument(help="A test file of i-CLEVR labels.")],
    repeats: Annotated[int, typer.Option(min=1, max=1000, help="Runs with different placements.")] = 10,
    centre: options.Centre = 1.0,
    storage: options.Storage = Path("models"),
    evaluator: options.Evaluator = None,
    seed: options.Seed = 0,
    size: Annotated[int, typer.Option(min=8, max=240, help="Pixels a side of the pictures.")] = 64,
    fit: Annotated[Literal["squeeze", "pad"], typer.Option(help="How pictures are made square.")] = "squeeze",
    keep_padding: options.KeepPadding = False,
    grid: options.Grid = None,
    json_out: options.Json = None,
    device: options.DeviceName = "auto",
) -> None:
    """Score fresh renders of a test file's label lists: the practical ceiling of a denoiser's score."""
    from shared.evaluator import load_evaluator
    from trainer.studies.limit import render_runs

    terminal.check_files(png=grid, json=json_out)
    judging = resolve(storage, evaluator, "evaluator")
    judge = load_evaluator(judging, terminal.pick_device(device))
    with terminal.bar() as progress:
        runs, figures = render_runs(
            file, judge, repeats=repeats, seed=seed, progress=progress,
            centre=centre, size=size, fit=fit, keep_padding=keep_padding,
        )  # fmt: skip
    figures["evaluator"] = judging.stem
    terminal.show_scores(file, runs, figures, json_out=json_out, grid=grid)
