"""The commands that measure: `score`, `evaluate` and `compare`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Literal

import typer

from shared import registry
from shared import storage as files
from shared.checkpoint import path_of
from shared.options import LIMITS
from shared.vocabulary import Vocabulary
from trainer.commands import options, terminal
from trainer.errors import TrainerError
from trainer.plugins import plugins


def score(
    file: Annotated[Path, typer.Argument(help="A test file: a JSON list of label lists.")],
    repeats: Annotated[int, typer.Option(min=1, max=1000, help="Runs with different seeds.")] = 10,
    storage: options.Storage = Path("models"),
    model: options.Model = None,
    evaluator: options.Judge = None,
    preset: options.Preset = "default",
    sampler: options.Sampler = None,
    steps: options.SamplingSteps = None,
    spacing: options.Spacing = None,
    guidance: options.Guidance = None,
    interval: options.Interval = None,
    renders: Annotated[
        bool,
        typer.Option("--renders", help="Score fresh renders of the lists instead: the practical ceiling."),
    ] = False,
    centre: options.Centre = 1.0,
    size: Annotated[int, typer.Option(min=8, max=240, help="Pixels a side of renders.")] = 64,
    fit: Annotated[Literal["squeeze", "pad"], typer.Option(help="How renders are made square.")] = "squeeze",
    keep_padding: Annotated[bool, typer.Option(help="Judge padded pictures without cropping the padding.")] = False,
    seed: options.Seed = 0,
    grid: Annotated[Path | None, typer.Option(help="Write the best run's pictures here as PNG.")] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
    device: options.DeviceName = "auto",
) -> None:
    """Sample and score a test file: each run's score, and the maximum, mean and standard deviation.

    Scores of seed 0 by the model's own evaluator also go into the model's card.
    """
    from shared.diffusion.model import load_denoiser
    from shared.evaluator import load_evaluator
    from trainer.score import best, evaluator_path, load_judge, make_options, save_grid, score_file
    from trainer.studies.card import score_of, write_card

    terminal.check_file(grid, ".png")
    terminal.check_file(json_out, ".json")
    given = options.given(sampler=sampler, steps=steps, spacing=spacing, guidance=guidance, guidance_interval=interval)
    where = terminal.pick_device(device)
    if renders:
        if not (module := plugins().renders):
            raise TrainerError("--renders: nothing here renders pictures of label lists")
        if given or model:
            raise TrainerError("--renders samples nothing; leave out --model and the sampling options")
        judging = registry.resolve(storage, evaluator, "evaluator")
        judge = load_evaluator(judging, where)
        with terminal.bar() as progress:
            runs, figures = importlib.import_module(module).render_runs(
                file, judge, repeats=repeats, seed=seed, progress=progress,
                centre=centre, size=size, fit=fit, keep_padding=keep_padding,
            )  # fmt: skip
    else:
        denoiser = load_denoiser(registry.resolve(storage, model, "denoiser"), device=where)
        sampling = make_options(preset, given, denoiser.info)
        judging = evaluator_path(storage, evaluator, denoiser.info)
        judge = load_judge(judging, denoiser.vocabulary, where)
        with terminal.bar() as progress:
            runs, figures = score_file(
                file, denoiser, judge, sampling, repeats=repeats, seed=seed, progress=progress,
                keep_padding=keep_padding,
            )  # fmt: skip
    figures["evaluator"] = evaluator or judging.stem
    terminal.show_scores(file, runs, figures)
    if grid:
        save_grid(best(runs).images, grid)
    terminal.write_json(json_out, figures)
    if not renders and not evaluator and not keep_padding and seed == 0:
        terminal.with_card(lambda: write_card(storage, figures["model"], score=score_of(figures)))


def evaluate(
    name: Annotated[str, typer.Argument(help="A checkpoint in storage.")],
    data: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            help="A data set folder, best of pictures not trained on. Repeatable.",
        ),
    ] = None,
    only: Annotated[str | None, typer.Option(help="Run only these studies: a,b.")] = None,
    trained_on: Annotated[
        list[Path] | None,
        typer.Option(exists=True, help="Coverage: a folder that it learnt from, to find copies. Repeatable."),
    ] = None,
    evaluator: options.Judge = None,
    preset: options.Preset = "default",
    count: Annotated[
        int | None, typer.Option(min=1, help="Pictures or arrangements; each study has a default.")
    ] = None,
    seed: options.Seed = 0,
    objects: Annotated[
        list[int] | None,
        typer.Option(min=1, max=10, help="Objects in random scenes, all numbers by default. Repeatable."),
    ] = None,
    noise: Annotated[
        float,
        typer.Option(min=0, help="Two-sample: deviation of noise added to all pictures, in levels of 256."),
    ] = 0.0,
    upsampler_alone: Annotated[
        bool, typer.Option("--upsampler-alone", help="Two-sample: enlarge the folder's squeezed pictures instead.")
    ] = False,
    around: Annotated[
        str | None, typer.Option(help="Two-sample: only squares around objects whose label contains this word.")
    ] = None,
    longer: Annotated[
        int, typer.Option(min=1, max=100, help="Train networks that tell pictures apart so many times as long.")
    ] = 1,
    second: Annotated[str | None, typer.Option(help="Selection: an evaluator that selects nothing.")] = None,
    attempts: Annotated[
        int, typer.Option(min=1, max=LIMITS.max_attempts, help="Selection: of a picture, until it is exact.")
    ] = 8,
    out: Annotated[
        Path | None, typer.Option(help="Folder for each study's figures and picture, STUDY.json and STUDY.png.")
    ] = None,
    storage: options.Storage = Path("models"),
    device: options.DeviceName = "auto",
) -> None:
    """Study a denoiser: coverage, spectrum, two-sample, arrangements, selection, and what its data set's package adds.

    By default all studies that the checkpoint and the options allow.
    """
    from trainer.studies.study import STUDIES, Subject, run

    if out:
        terminal.check_folder(out, "--out")
    if (kind := registry.find(storage, name).kind) != "denoiser":
        raise TrainerError(f"studies are of denoisers; {name} is of kind {kind}")
    given = options.given(
        data=data, trained_on=trained_on, evaluator=evaluator, count=count, objects=objects, second=second
    )
    possible = [one for one, study in STUDIES.items() if given.keys() >= set(study.needs)]
    chosen = [one.strip() for one in only.split(",")] if only else possible
    for study in chosen:
        if study not in STUDIES:
            raise TrainerError(f'no study "{study}"; there are {", ".join(STUDIES)}')
        if missing := [f"--{need.replace('_', '-')}" for need in STUDIES[study].needs if need not in given]:
            raise TrainerError(f"{study} needs {' and '.join(missing)}")
    with terminal.bar() as progress:
        subject = Subject(
            storage, path_of(storage, name), terminal.pick_device(device), progress, preset=preset, seed=seed,
            noise=noise, upsampler_alone=upsampler_alone, around=around, longer=longer, attempts=attempts, **given,
        )  # fmt: skip
        for study in chosen:
            try:
                report = run(study, subject)
            except TrainerError as error:
                if only:
                    raise
                terminal.note(f"{study} is left out: {error}")
                continue
            terminal.print_figures(f"{study}: {report.title}", report.rows)
            if out:
                figures = {"title": report.title, **report.summary, "rows": report.rows}
                terminal.write_json(out / f"{study}.json", figures)
                if report.png:
                    files.write(out / f"{study}.png", report.png)


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
    terminal.check_folder(out, "--out")
    terminal.check_folder(run, "--run")
    names = comparison.chosen(only, positions=(data / "positions.json").exists())
    base = with_changes(comparison.BASE, set_ or [])
    vocabulary, where = Vocabulary.from_objects_file(data / "objects.json"), terminal.pick_device(device)
    judge = load_judge(registry.resolve(storage, evaluator, "evaluator"), vocabulary, where)
    digest = judge.info.digest if judge.info else ""
    if not (lists := tests_of(data, tests, vocabulary)):
        raise TrainerError(f"{data} has neither test.json nor new_test.json: name test files with --tests")
    setup = comparison.Setup(data.name, digest, lists, minutes, steps, repeats, set_ or [])
    with terminal.bar() as progress:
        trained = comparison.run_comparison(names, base, data, run, out, setup, judge, where, progress)
    terminal.show("compared", [("trained now", ", ".join(trained) or "nothing"), ("report", str(write_report(out)))])
