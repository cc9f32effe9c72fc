"""`python -m trainer render | fit-evaluator | train | score`: arguments, progress and errors; the work is elsewhere."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from shared.checkpoint import CheckpointError
from shared.device import DeviceError
from shared.vocabulary import LabelError
from trainer.errors import TrainerError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
console = Console(stderr=True)
UsageError: type[Any] = typer.BadParameter.__bases__[0]  # Typer does not export it
MAIN_PROCESS = os.environ.get("RANK", "0") == "0"  # of those that torchrun starts, the one that speaks

Storage = Annotated[
    Path, typer.Option(envvar="LABELGRID_STORAGE", help="Folder that checkpoints are published to and read from.")
]
DeviceName = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Minutes = Annotated[float | None, typer.Option(min=0.01, help="Stop after so many minutes of training.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Stop after so many steps.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of all randomness.")]
Existing = typer.Option(exists=True, help="A data set folder: objects.json, train.json and the pictures it names.")


class StatusColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields.get("status", ""))


def bar() -> Progress:
    """Progress on stderr, where that is a terminal; a task may say more in its field `status`."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        StatusColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not (console.is_terminal and MAIN_PROCESS),
    )


def show(title: str, rows: list[tuple[str, str]]) -> None:
    table = Table(title=title, show_header=False)
    for row in rows:
        table.add_row(*row)
    if MAIN_PROCESS:
        console.print(table)


def _check_file(path: Path | None, suffix: str) -> None:
    """Refuses a file that could not be written, before the work rather than after it."""
    if path and path.suffix != suffix:
        raise TrainerError(f"{path} must end in {suffix}")
    if path and not path.parent.is_dir():
        raise TrainerError(f"{path}: there is no folder {path.parent}")


@app.command()
def render(
    out: Annotated[Path, typer.Argument(help="Folder to write; made where it is missing.")],
    train: Annotated[Path | None, typer.Option(exists=True, help="A train.json whose label sets are rendered.")] = None,
    scenes: Annotated[
        int | None, typer.Option(min=1, help="Random scenes to render where no train.json is given (6003).")
    ] = None,
    objects: Annotated[int, typer.Option(min=1, max=5, help="Objects in a random scene's last picture.")] = 3,
    size: Annotated[
        int | None, typer.Option(min=8, max=512, help="Write squares of this side instead of 320x240; faster.")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Render stand-in pictures in the data set's own layout. The same seed gives the same bytes."""
    from shared.vocabulary import ICLEVR, read_train_file
    from trainer import render_folder as folder

    if train and scenes:
        raise TrainerError("--scenes and --train exclude one another: a train.json says itself which scenes there are")
    if (out / "train.json").exists():
        raise TrainerError(f"{out} already holds a data set; choose another folder or remove it")
    lists = (
        folder.scenes_of(read_train_file(train, ICLEVR))
        if train
        else folder.random_scenes(scenes or 6003, objects, seed)
    )
    with bar() as progress:
        count = folder.write_folder(out, lists, seed=seed, size=size, progress=progress)
    show("rendered", [("pictures", str(count)), ("scenes", str(len(lists))), ("folder", str(out))])


def _load(folder: Path, progress: Progress, **how: Any) -> Any:
    from trainer.data import load_dataset

    task = progress.add_task(f"reading {folder}", total=None)
    dataset = load_dataset(folder, advance=lambda n: progress.advance(task, n), **how)
    progress.update(task, total=len(dataset), completed=len(dataset))
    return dataset


@app.command()
def fit_evaluator(
    data: Annotated[list[Path], Existing],
    held_out: Annotated[
        Path, typer.Option(exists=True, help="A folder that is not trained on: the score is read there.")
    ],
    storage: Storage = Path("models"),
    name: Annotated[str, typer.Option(help="The checkpoint's name.")] = "evaluator",
    run: Annotated[Path, typer.Option(help="Folder for the log.")] = Path("runs/evaluator"),
    minutes: Minutes = None,
    steps: Steps = None,
    course_file: Annotated[Path | None, typer.Option(help="Also write the course's checkpoint.pth here.")] = None,
    seed: Seed = 0,
    device: DeviceName = "auto",
) -> None:
    """Fit the evaluator (ResNet-18) and publish it. Give --data once for each folder."""
    from shared.device import pick_device
    from shared.evaluator import IMAGE_SIZE, write_course_checkpoint
    from trainer import fit_evaluator as fit
    from trainer.train_command import check_name, make_budget

    make_budget("", minutes, steps)
    check_name(name)
    _check_file(course_file, ".pth")
    where = pick_device(device)
    with bar() as progress:
        datasets = [_load(folder, progress, size=IMAGE_SIZE) for folder in data]
        unseen = _load(held_out, progress, size=IMAGE_SIZE)
        task = progress.add_task("fitting (per mille)", total=1000)

        def on_step(step: int, share: float, loss: float) -> None:
            progress.update(task, completed=int(1000 * share), status=f"step {step} loss {loss:.4f}")

        evaluator, score = fit.fit_evaluator(
            datasets, unseen, run / "log.jsonl", minutes=minutes, steps=steps, seed=seed, device=where, on_step=on_step
        )
    training = {"pictures": sum(map(len, datasets)), "minutes": minutes, "steps": steps, "seed": seed}
    path = fit.publish_evaluator(evaluator, score, storage, name, training)
    if course_file:
        write_course_checkpoint(evaluator, course_file)
    show(
        "evaluator on held-out pictures",
        [("accuracy", f"{score.accuracy:.4f}"), ("exact match", f"{score.exact_match:.4f}"), ("checkpoint", str(path))],
    )


@app.command()
def train(
    data: Annotated[Path, Existing],
    storage: Storage = Path("models"),
    name: Annotated[str, typer.Option(help="The checkpoint's name.")] = "denoiser",
    run: Annotated[
        Path,
        typer.Option(
            "--run",
            "--run-folder",
            help="Folder for state, log, TensorBoard events and sample grids. "
            "Under torchrun say --run-folder: it takes --run for an option of its own.",
        ),
    ] = Path("runs/denoiser"),
    preset: Annotated[
        str, typer.Option(help="default, or report: the report's hyperparameters in every detail.")
    ] = "default",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Change one field of the preset: --set batch=64. Repeatable.")
    ] = None,
    minutes: Minutes = None,
    steps: Steps = None,
    start_from: Annotated[
        str | None, typer.Option(help="Name of a denoiser in storage whose weights the run starts from.")
    ] = None,
    evaluator: Annotated[
        str | None, typer.Option(help="Name of the evaluator whose score is logged (not trained on).")
    ] = None,
    tests: Annotated[
        list[Path] | None, typer.Option(exists=True, help="Test files scored meanwhile; the data set's own by default.")
    ] = None,
    evaluate_minutes: Annotated[float, typer.Option(min=0.1, help="Minutes between sample grids and scores.")] = 10.0,
    device: DeviceName = "auto",
) -> None:
    """Train the denoiser and publish its averaged weights. To resume, run the same command again."""
    from trainer import train_command

    config = train_command.make_config(preset, set_ or [])
    budget = train_command.make_budget(preset, minutes, steps)
    train_command.check_name(name)
    with bar() as progress:
        dataset = _load(data, progress, size=config.image_size, fit=config.fit)
        path, run_state = train_command.run_training(
            dataset,
            data,
            config,
            run,
            budget,
            storage=storage,
            name=name,
            start_from=start_from,
            evaluator=evaluator,
            tests=tests,
            device=device,
            evaluate_every_s=60 * evaluate_minutes,
            progress=progress,
        )
    show(
        "trained",
        [("steps", str(run_state.step)), ("minutes", f"{run_state.elapsed_s / 60:.1f}"), ("checkpoint", str(path))],
    )


@app.command()
def score(
    file: Annotated[Path, typer.Argument(help="A test file: a JSON list of label lists.")],
    repeats: Annotated[int, typer.Option(min=1, max=1000, help="Runs with different seeds.")] = 1,
    storage: Storage = Path("models"),
    model: Annotated[str | None, typer.Option(help="Denoiser's name; the promoted one by default.")] = None,
    evaluator: Annotated[
        str | None, typer.Option(help="Evaluator's name, or the course's checkpoint.pth; the promoted one by default.")
    ] = None,
    preset: Annotated[
        str, typer.Option(help="Sampling preset: default, or report (999 ancestral steps, w = 3).")
    ] = "default",
    sampler: Annotated[
        str | None, typer.Option(help="ddpm, ddpm_small, ddim, euler, dpmpp_1, dpmpp_2m or sde_dpmpp_2m.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps.")] = None,
    spacing: Annotated[str | None, typer.Option(help="uniform, logsnr or trailing.")] = None,
    guidance: Annotated[float | None, typer.Option(help="w of classifier-free guidance; 1 is none.")] = None,
    interval: Annotated[
        tuple[float, float] | None, typer.Option(help="Noise levels (fractions of T) with guidance on.")
    ] = None,
    seed: Seed = 0,
    grid: Annotated[Path | None, typer.Option(help="Write the best run's pictures here as PNG.")] = None,
    columns: Annotated[int, typer.Option(min=1, max=64, help="Pictures in a row of the grid.")] = 8,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
    device: DeviceName = "auto",
) -> None:
    """Generate and score a test file: each run's score, maximum, mean and standard deviation."""
    from trainer import score_command

    changes = {
        "sampler": sampler,
        "steps": steps,
        "spacing": spacing,
        "guidance": guidance,
        "guidance_interval": interval,
    }
    _check_file(grid, ".png")
    _check_file(json_out, ".json")
    options = score_command.make_options(preset, {key: value for key, value in changes.items() if value is not None})
    with bar() as progress:
        runs, figures = score_command.run_score(
            file, repeats, options, storage, model, evaluator, seed, device, progress
        )
    score_command.print_runs(file, runs, figures, console=Console())
    if grid:
        score_command.write_grid(runs, grid, columns)
    if json_out:
        json_out.write_text(json.dumps(figures, indent=1) + "\n")


@app.command()
def promote(
    name: Annotated[str, typer.Argument(help="A checkpoint in storage.")], storage: Storage = Path("models")
) -> None:
    """Make a checkpoint the default of its kind."""
    from shared.checkpoint import promote as promote_in

    promote_in(storage, name)
    show("promoted", [("checkpoint", name), ("storage", str(storage))])


@app.command()
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
    from shared.checkpoint import resolve
    from shared.device import pick_device
    from shared.evaluator import load_evaluator
    from shared.vocabulary import Vocabulary
    from trainer import compare as comparison
    from trainer.compare_report import write_report
    from trainer.score import check_vocabularies
    from trainer.train_command import changed, make_budget, tests_of

    if not minutes and not steps:
        raise TrainerError("say how long: --minutes-per-variant or --steps-per-variant")
    make_budget("", minutes, steps)
    names, base = comparison.chosen(only), changed(comparison.BASE, set_ or [])
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
            lambda config: _load(data, progress, size=config.image_size, fit=config.fit),
            run,
            out,
            setup,
            judge,
            pick_device(device),
            progress,
        )
    show("compared", [("trained now", ", ".join(done) or "nothing"), ("report", str(write_report(out)))])


@app.command()
def calibrate(
    folder: Annotated[Path, typer.Argument(exists=True, help="Sets of pictures and sets.json with published scores.")],
    conditions: Annotated[Path, typer.Option(exists=True, help="The folder of the conditions files.")],
    storage: Storage = Path("models"),
    evaluator: Annotated[str | None, typer.Option(help="Evaluator's name; the promoted one by default.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot here.")] = None,
    device: DeviceName = "auto",
) -> None:
    """Compare an evaluator's scores of published pictures with the scores published for them."""
    from shared.checkpoint import resolve
    from shared.device import pick_device
    from shared.evaluator import load_evaluator
    from trainer import calibrate as calibration

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


@app.command()
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
    from trainer import memorisation as memory
    from trainer import score_command

    _check_file(grid, ".png")
    _check_file(json_out, ".json")
    options = score_command.make_options(preset, {})
    with bar() as progress:
        report, images = memory.run_examination(
            lambda folder, size, fit: _load(folder, progress, size=size, fit=fit),
            (data, held_out),
            (storage, model, evaluator),
            options,
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


@app.command()
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
    from trainer.card import write_card

    path = write_card(
        storage, name, log=log, scores=scores or [], machine=machine, commands=commands or [], notes=notes or []
    )
    show("card", [("file", str(path))])


def main() -> int:
    """Runs a command; what went wrong is one line on stderr and exit code 1, or 2 for wrong usage."""
    try:
        return int(app(standalone_mode=False) or 0)
    except UsageError as error:
        _complain(f"{error.format_message()} --help says more.")
        return 2
    except ValidationError as error:
        first = error.errors()[0]
        field, message = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        _complain(f"{field}: {message}, got {first['input']!r}" if field else message)
    except (typer.Abort, KeyboardInterrupt):
        _complain("interrupted")
        return 130
    except (TrainerError, LabelError, CheckpointError, DeviceError, OSError, FloatingPointError) as error:
        _complain(str(error))
    return 1


def _complain(message: str) -> None:
    console.print(f"error: {' '.join(message.split())}", style="red", markup=False, soft_wrap=True, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
