"""The commands that measure a denoiser against the scenes it learnt from: `arrangements`, `places` and `coverage`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from shared.registry import resolve
from trainer.commands import options, terminal
from trainer.errors import TrainerError


def arrangements(
    data: Annotated[
        list[Path], typer.Argument(exists=True, help="Data set folders with positions.json, best held-out ones.")
    ],
    storage: options.Storage = Path("models"),
    model: options.Model = None,
    count: Annotated[int, typer.Option(min=50, help="Arrangements drawn for each number of objects.")] = 1000,
    seed: options.Seed = 0,
    json_out: options.Json = None,
) -> None:
    """Test whether a classifier can tell a denoiser's arrangements of objects from the data's: 0.5 is chance.

    Of several folders, the first that shows a number of objects is compared with, as in training.
    """
    from shared.diffusion.model import load_denoiser
    from shared.vocabulary import ICLEVR
    from trainer.data import read_arrangements
    from trainer.studies.arrangements import FEWEST, compare_arrangements

    terminal.check_files(json=json_out)
    denoiser = load_denoiser(resolve(storage, model, "denoiser"))
    if denoiser.layouts is None:
        raise TrainerError(f"{denoiser.info.name} takes no positions, so it draws no arrangements")
    positions = read_arrangements(data, denoiser.vocabulary)
    with terminal.bar() as progress:
        task = progress.add_task("drawing arrangements", total=None)
        found = compare_arrangements(
            denoiser.layouts, positions, count=count, seed=seed, advance=lambda n: progress.advance(task, n),
            ruled=all(name in ICLEVR for name in denoiser.vocabulary.names),
        )  # fmt: skip
    if not found:
        problem = f"no number of objects that {denoiser.info.name} draws has {FEWEST} pictures"
        raise TrainerError(f"there is nothing to test: {problem}")
    rows = [
        [str(one.objects), str(one.tested), f"{one.accuracy:.3f}", f"{0.5 / one.tested**0.5:.3f}",
         "-" if one.misplaced is None else f"{one.misplaced:.3f}"]
        for one in found
    ]  # fmt: skip
    head = ["objects", "tested", "classifier right", "standard error of chance", "break the renderer's rules"]
    terminal.print_table(f"arrangements of {denoiser.info.name} and of the data", head, rows)
    terminal.write_json(json_out, [asdict(one) for one in found])


def places(
    objects: Annotated[
        list[int], typer.Option(min=1, max=10, help="Objects in a scene. Repeatable: a row for each number.")
    ],
    count: Annotated[int, typer.Option(min=1, help="Scenes with each number of objects.")] = 64,
    centre: Annotated[float, typer.Option(min=0, max=1, help="Share of scenes with an object in the centre.")] = 0.0,
    storage: options.Storage = Path("models"),
    model: options.Model = None,
    evaluator: options.JudgeOfModel = None,
    preset: options.Preset = "default",
    seed: options.Seed = 0,
    grid: Annotated[Path | None, typer.Option(help="Write the last row's pictures here as PNG.")] = None,
    json_out: options.Json = None,
    device: options.DeviceName = "auto",
) -> None:
    """Score pictures at the places of random scenes, and at places of the model's own, beside renders of the scenes."""
    from shared.diffusion.model import load_denoiser
    from shared.evaluator import load_evaluator
    from trainer.score import make_options, save_grid
    from trainer.studies.places import measure

    terminal.check_files(png=grid, json=json_out)
    where = terminal.pick_device(device)
    denoiser = load_denoiser(resolve(storage, model, "denoiser"), device=where)
    judge = load_evaluator(terminal.evaluator_path(storage, evaluator, denoiser.info), where)
    sampling, placed = make_options(preset, {}, denoiser.info), []
    with terminal.bar() as progress:
        task = progress.add_task("sampling (pictures x steps)", total=2 * len(objects) * count * sampling.steps)
        for n in objects:
            measured, images = measure(
                denoiser, judge, sampling, objects=n, count=count, seed=seed, centre=centre,
                on_step=lambda rows: progress.advance(task, len(rows)),
            )  # fmt: skip
            placed += measured
    rows = [
        [str(one.objects), one.pictures, f"{one.accuracy:.4f}", f"{one.exact_match:.4f}",
         "not known" if one.distance is None else f"{one.distance:.4f}"]
        for one in placed
    ]  # fmt: skip
    head = ["objects", "pictures", "accuracy", "exact match", "distance, widths"]
    terminal.print_table(f"{count} scenes with each number of objects", head, rows)
    if grid:
        save_grid(images, grid)
    terminal.write_json(json_out, [asdict(one) for one in placed])


def coverage(
    data: Annotated[Path, typer.Argument(exists=True, help="A data set folder, best of pictures not trained on.")],
    storage: options.Storage = Path("models"),
    model: options.Model = None,
    evaluator: Annotated[
        list[str] | None,
        typer.Option(
            help="Evaluator whose features compare pictures, or the course's checkpoint.pth; by default the one that "
            "judges the model. Repeatable."
        ),
    ] = None,
    preset: options.Preset = "default",
    count: Annotated[int, typer.Option(min=6, help="Pictures to generate, and to compare them with.")] = 1000,
    seed: options.Seed = 0,
    json_out: options.Json = None,
    device: options.DeviceName = "auto",
) -> None:
    """Measure fidelity (precision, density) and coverage (recall, coverage) of generated pictures against the data."""
    from shared.diffusion.model import load_denoiser
    from shared.evaluator import load_evaluator
    from trainer.score import make_options
    from trainer.studies import coverage as study

    terminal.check_files(json=json_out)
    where = terminal.pick_device(device)
    denoiser = load_denoiser(resolve(storage, model, "denoiser"), device=where)
    names: list[str | None] = [*evaluator] if evaluator else [None]
    paths = {name: terminal.evaluator_path(storage, name, denoiser.info) for name in names}
    evaluators = {name or path.stem: load_evaluator(path, where) for name, path in paths.items()}
    sampling = make_options(preset, {}, denoiser.info)
    fit = denoiser.info.training.get("config", {}).get("fit", "squeeze")
    with terminal.bar() as progress:
        dataset = terminal.read_dataset(data, progress, size=denoiser.image_shape[-1], fit=fit)
        task = progress.add_task("sampling (pictures x steps)", total=count * sampling.steps)
        compared = study.examine(
            denoiser, evaluators, dataset, sampling, count=count, seed=seed,
            on_step=lambda rows: progress.advance(task, len(rows)),
        )  # fmt: skip
    head = ["evaluator", "pictures", "precision", "recall", "density", "coverage"]
    terminal.print_table(f"{count} pictures of {denoiser.info.name} and of {data}", head, study.rows_of(compared))
    terminal.write_json(json_out, [asdict(one) for one in compared])
