"""`python -m trainer COMMAND`: arguments, progress and errors; the work is elsewhere."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console

from shared.checkpoint import CheckpointError
from shared.device import DeviceError
from shared.vocabulary import LabelError
from trainer.commands import distill as distill_command
from trainer.commands import studies as study
from trainer.commands.terminal import (
    DeviceName,
    Existing,
    Guidance,
    Interval,
    KeepPadding,
    Minutes,
    Sampler,
    SamplingSteps,
    Seed,
    Spacing,
    Steps,
    Storage,
    bar,
    check_file,
    console,
    done,
    given_sampling,
    note_unseen,
    read_dataset,
    show,
)
from trainer.errors import TrainerError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
INTERRUPTED = 130  # what Typer makes of Ctrl-C
UsageError: type[Any] = typer.BadParameter.__bases__[0]  # Typer does not export it


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
    from trainer.scenes import render_folder as folder

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


@app.command()
def locate(
    data: Annotated[Path, typer.Argument(exists=True, help="A data set folder without a positions.json.")],
) -> None:
    """Find where objects stand and write positions.json, which the network is then told.

    For the real i-CLEVR and what is built up like it: a scene's pictures show one object more each.
    """
    from shared.vocabulary import read_train_file
    from trainer.scenes import locate as finder
    from trainer.scenes.render_folder import write_label_file

    if (out := data / "positions.json").exists():
        raise TrainerError(f"{out} is there already; remove it to have it written anew")
    with bar() as progress:
        dataset = read_dataset(data, progress, size=finder.SIZE)
    positions = finder.locate(read_train_file(data / "train.json", dataset.vocabulary), dataset.images)
    write_label_file(out, positions)
    show("located", [("pictures", str(len(positions))), ("file", str(out))])


@app.command()
def fit_evaluator(
    data: Annotated[list[Path], Existing],
    held_out: Annotated[
        Path, typer.Option(exists=True, help="A folder that is not trained on: the score is read there.")
    ],
    storage: Storage = Path("models"),
    name: Annotated[str, typer.Option(help="The checkpoint's name.")] = "evaluator",
    run: Annotated[Path, typer.Option(help="Folder for state, log and TensorBoard events.")] = Path("runs/evaluator"),
    minutes: Minutes = None,
    steps: Steps = None,
    start_from: Annotated[
        str | None, typer.Option(help="Name of an evaluator in storage whose weights the run starts from.")
    ] = None,
    course_file: Annotated[Path | None, typer.Option(help="Also write the course's checkpoint.pth here.")] = None,
    seed: Seed = 0,
    device: DeviceName = "auto",
) -> None:
    """Fit the evaluator (ResNet-18) and publish it. Give --data once for each folder.

    To resume, run the same command again.
    """
    from shared.device import pick_device
    from shared.evaluator import IMAGE_SIZE, load_evaluator, write_course_checkpoint
    from shared.registry import resolve
    from trainer import fit_evaluator as fit
    from trainer.commands.train import check_name, make_budget
    from trainer.data import merge
    from trainer.train import Run

    budget = make_budget("", minutes, steps)
    check_name(name)
    check_file(course_file, ".pth")
    where = pick_device(device)
    start = load_evaluator(resolve(storage, start_from, "evaluator")) if start_from else None
    with bar() as progress:
        dataset = merge([read_dataset(folder, progress, size=IMAGE_SIZE) for folder in data])
        unseen = read_dataset(held_out, progress, size=IMAGE_SIZE)
        note_unseen(dataset)
        task = progress.add_task("fitting (per mille)", total=1000)

        def on_step(now: Run) -> None:
            progress.update(task, completed=int(1000 * now.progress), status=f"step {now.step} loss {now.loss:.4f}")

        evaluator, score, state = fit.fit_evaluator(
            dataset, unseen, run, budget, start=start, seed=seed, device=where, on_step=on_step
        )
    training: dict[str, Any] = {"pictures": len(dataset), "steps": state.step, "seed": seed}
    training |= {"minutes": round(state.elapsed_s / 60, 1)}
    training |= {"started_from": start_from} if start_from else {}
    path = fit.publish_evaluator(evaluator, score, storage, name, training)
    if course_file:
        write_course_checkpoint(evaluator, course_file)
    rows = [("accuracy", f"{score.accuracy:.4f}"), ("exact match", f"{score.exact_match:.4f}")]
    show("evaluator on held-out pictures", [*rows, *done(state), ("checkpoint", str(path))])


@app.command()
def train(
    data: Annotated[list[Path], Existing],
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
    """Train the denoiser and publish its averaged weights. Give --data once for each folder.

    To resume, run the same command again.
    """
    from trainer.commands import train as train_command
    from trainer.data import merge

    config = train_command.make_config(preset, set_ or [])
    budget = train_command.make_budget(preset, minutes, steps)
    train_command.check_name(name)
    with bar() as progress:
        dataset = merge([read_dataset(one, progress, size=config.image_size, fit=config.fit) for one in data])
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
    show("trained", [*done(run_state), ("checkpoint", str(path))])


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
        str, typer.Option(help="Sampling: default (the checkpoint's own), or report (999 ancestral steps, w = 3).")
    ] = "default",
    sampler: Sampler = None,
    steps: SamplingSteps = None,
    spacing: Spacing = None,
    guidance: Guidance = None,
    interval: Interval = None,
    keep_padding: KeepPadding = False,
    seed: Seed = 0,
    grid: Annotated[Path | None, typer.Option(help="Write the best run's pictures here as PNG.")] = None,
    columns: Annotated[int, typer.Option(min=1, max=64, help="Pictures in a row of the grid.")] = 8,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
    device: DeviceName = "auto",
) -> None:
    """Generate and score a test file: each run's score, maximum, mean and standard deviation."""
    from trainer.commands import score as score_command

    check_file(grid, ".png")
    check_file(json_out, ".json")
    given = given_sampling(sampler, steps, spacing, guidance, interval)
    with bar() as progress:
        runs, figures = score_command.run_score(
            file, repeats, preset, given, storage, model, evaluator, seed, device, progress, keep_padding=keep_padding
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
    from shared.registry import promote as promote_in

    promote_in(storage, name)
    show("promoted", [("checkpoint", name), ("storage", str(storage))])


@app.command()
def set_sampling(
    name: Annotated[str, typer.Argument(help="A denoiser in storage.")],
    storage: Storage = Path("models"),
    sampler: Sampler = None,
    steps: SamplingSteps = None,
    spacing: Spacing = None,
    guidance: Guidance = None,
    interval: Interval = None,
) -> None:
    """Set what a denoiser is sampled with where nothing else is asked, by service and trainer.

    What is not given stays. The weights and their digest stay, too.
    """
    from trainer.sampling import set_sampling as set_in

    changes = given_sampling(sampler, steps, spacing, guidance, interval)
    if not changes:
        raise TrainerError("say what to set: --sampler, --steps, --spacing, --guidance or --interval")
    options = set_in(storage, name, changes)
    show(f"sampling of {name}", [(key, str(value)) for key, value in options.model_dump().items()])


for command in (distill_command.distill, study.compare, study.calibrate, study.memorisation, study.limit, study.card):
    app.command()(command)


def main() -> int:
    """Runs a command; what went wrong is one line on stderr and exit code 1, or 2 for wrong usage."""
    try:
        code = int(app(standalone_mode=False) or 0)
        if code == INTERRUPTED:
            _complain("interrupted")
        return code
    except UsageError as error:
        _complain(f"{error.format_message()} --help says more.")
        return 2
    except ValidationError as error:
        first = error.errors()[0]
        field, message = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        _complain(f"{field}: {message}, got {first['input']!r}" if field else message)
    except (TrainerError, LabelError, CheckpointError, DeviceError, OSError, FloatingPointError) as error:
        _complain(str(error))
    return 1


def _complain(message: str) -> None:
    console.print(f"error: {' '.join(message.split())}", style="red", markup=False, soft_wrap=True, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
