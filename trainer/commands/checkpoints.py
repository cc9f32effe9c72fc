"""The commands on a finished checkpoint: `score`, `promote`, `card`, and those that change or move parts of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shared import registry
from shared.checkpoint import path_of, read_info, reconfigure
from shared.options import LIMITS
from shared.support import Support
from shared.vocabulary import ICLEVR
from trainer.commands import options, terminal
from trainer.errors import TrainerError


def score(
    file: Annotated[Path, typer.Argument(help="A test file: a JSON list of label lists.")],
    repeats: Annotated[int, typer.Option(min=1, max=1000, help="Runs with different seeds.")] = 1,
    storage: options.Storage = Path("models"),
    model: options.Model = None,
    evaluator: options.JudgeOfModel = None,
    preset: options.Preset = "default",
    sampler: options.Sampler = None,
    steps: options.SamplingSteps = None,
    spacing: options.Spacing = None,
    guidance: options.Guidance = None,
    interval: options.Interval = None,
    candidates: Annotated[
        int, typer.Option(min=1, max=64, help="Pictures drawn for each one; the denoiser keeps the best by itself.")
    ] = 1,
    keep_padding: options.KeepPadding = False,
    seed: options.Seed = 0,
    grid: options.Grid = None,
    columns: Annotated[int, typer.Option(min=1, max=64, help="Pictures in a row of the grid.")] = 8,
    json_out: options.Json = None,
    device: options.DeviceName = "auto",
) -> None:
    """Sample and score a test file: each run's score, and the maximum, mean and standard deviation."""
    from shared.diffusion.model import load_denoiser
    from trainer.score import load_judge, make_options, score_file

    terminal.check_files(png=grid, json=json_out)
    given = options.given(sampler=sampler, steps=steps, spacing=spacing, guidance=guidance, guidance_interval=interval)
    where = terminal.pick_device(device)
    denoiser = load_denoiser(registry.resolve(storage, model, "denoiser"), device=where)
    sampling = make_options(preset, given, denoiser.info)
    judging = terminal.evaluator_path(storage, evaluator, denoiser.info)
    judge = load_judge(judging, denoiser.vocabulary, where)
    with terminal.bar() as progress:
        runs, figures = score_file(
            file, denoiser, judge, sampling, repeats=repeats, seed=seed, progress=progress, keep_padding=keep_padding,
            candidates=candidates,
        )  # fmt: skip
    figures["evaluator"] = evaluator or judging.stem
    terminal.show_scores(file, runs, figures, json_out=json_out, grid=grid, columns=columns)


def promote(
    name: Annotated[str, typer.Argument(help="A checkpoint in storage.")], storage: options.Storage = Path("models")
) -> None:
    """Make a checkpoint the default of its kind."""
    registry.promote(storage, name)
    terminal.show("promoted", [("checkpoint", name), ("storage", str(storage))])


def set_sampling(
    name: Annotated[str, typer.Argument(help="A denoiser in storage.")],
    storage: options.Storage = Path("models"),
    sampler: options.Sampler = None,
    steps: options.SamplingSteps = None,
    spacing: options.Spacing = None,
    guidance: options.Guidance = None,
    interval: options.Interval = None,
) -> None:
    """Set a denoiser's default sampling options, for the service and the trainer.

    Options that are not given stay the same, as do the weights and their digest.
    """
    from trainer import score as scoring

    chosen = options.given(sampler=sampler, steps=steps, spacing=spacing, guidance=guidance, guidance_interval=interval)
    if not chosen:
        raise TrainerError("say what to set: --sampler, --steps, --spacing, --guidance or --interval")
    sampling = scoring.set_sampling(storage, name, chosen)
    terminal.show(f"sampling of {name}", [(key, str(value)) for key, value in sampling.model_dump().items()])


def set_support(
    name: Annotated[str, typer.Argument(help="A denoiser in storage.")],
    objects: Annotated[tuple[int, int], typer.Option(help="Fewest and most objects in a training picture.")],
    proportions: Annotated[
        tuple[int, int] | None,
        typer.Option(help="Width and height at which the page shows pictures that were squeezed to squares, as 4 3."),
    ] = None,
    storage: options.Storage = Path("models"),
) -> None:
    """Write into a denoiser how many objects it has learnt to draw; the service refuses other numbers.

    For checkpoints that do not say it: a newly trained one does. The weights and their digest stay the same.
    """
    if proportions and min(proportions) < 1:
        raise TrainerError(f"--proportions {proportions[0]} {proportions[1]}: both must be at least 1")
    path = registry.resolve(storage, name, "denoiser")
    info = read_info(path)
    known, most = info.config.get("support", {}), min(len(info.vocabulary), LIMITS.max_labels)
    support = Support.model_validate({**known, "objects": objects})
    if objects[1] > most:
        why = f"{name} knows {most} labels" if most < LIMITS.max_labels else f"a request names at most {most} labels"
        raise TrainerError(f"--objects {objects[0]} {objects[1]}: {why}")
    shown = {"proportions": proportions} if proportions else {}
    reconfigure(path, lambda _: {"support": support.model_dump(mode="json"), **shown})
    terminal.show(f"support of {name}", [(key, str(value)) for key, value in support.model_dump().items()])


def export(
    name: Annotated[str, typer.Argument(help="A checkpoint in storage.")],
    file: Annotated[Path, typer.Argument(help="The file to write: NAME.onnx, or checkpoint.pth.")],
    storage: options.Storage = Path("models"),
) -> None:
    """Write a checkpoint as ONNX, or an evaluator as the checkpoint.pth that the course's evaluator.py loads.

    The suffix of the file decides. Upsampler and layout network go to NAME-upsampler.onnx and NAME-layouts.onnx; those
    of an earlier export to the same NAME are removed.
    """
    if file.suffix not in (".onnx", ".pth"):
        raise TrainerError(f"{file} must end in .onnx or .pth")
    terminal.check_file(file)
    if file.suffix == ".pth":
        _export_for_the_course(storage, name, file)
        written = [file]
    else:
        from trainer.export import parts_of, write_onnx

        for part in parts_of(file).values():
            terminal.check_file(part)
        written = write_onnx(path_of(storage, name), file)
    terminal.show("exported", [("checkpoint", name), *(("file", str(one)) for one in written)])


def _export_for_the_course(storage: Path, name: str, file: Path) -> None:
    from shared.evaluator import load_evaluator, write_course_checkpoint

    loaded = load_evaluator(registry.resolve(storage, name, "evaluator"))
    if loaded.vocabulary != ICLEVR:
        raise TrainerError(f"{name} has other labels than i-CLEVR's, which the course's evaluator.py is made for")
    write_course_checkpoint(loaded, file)


def move_upsampler(
    source: Annotated[str, typer.Argument(help="A checkpoint in storage that has an upsampler.")],
    base: Annotated[str, typer.Option(help="The denoiser that the upsampler is added to.")],
    name: Annotated[str | None, typer.Option(help="Name of the result; that of the source by default.")] = None,
    storage: options.Storage = Path("models"),
) -> None:
    """Publish a checkpoint's upsampler as that of another denoiser, or of its own after that was trained again."""
    from trainer.stages import upsample

    terminal.check_publishes(storage, name or source, "denoiser", base=base)
    path = upsample.move_upsampler(storage, source, base, name or source)
    terminal.show("upsampler moved", [("base", base), ("checkpoint", str(path))])


def card(
    name: Annotated[str, typer.Argument(help="A checkpoint in storage.")],
    log: Annotated[Path, typer.Option(exists=True, help="Its run's log.jsonl.")],
    machine: Annotated[str, typer.Option(help="The machine that it was trained on, in words.")],
    storage: options.Storage = Path("models"),
    scores: Annotated[
        list[Path] | None, typer.Option(exists=True, help="A file that `score --json` wrote. Repeatable.")
    ] = None,
    commands: Annotated[list[str] | None, typer.Option("--command", help="A command that made it. Repeatable.")] = None,
    notes: Annotated[list[str] | None, typer.Option("--note", help="A paragraph of Markdown. Repeatable.")] = None,
    licence: Annotated[
        str | None,
        typer.Option("--license", help="The weights' licence, as the Hugging Face Hub names it, such as mit."),
    ] = None,
) -> None:
    """Write a checkpoint's card and loss curve beside it. It begins with the Hugging Face Hub's metadata."""
    from trainer.studies.card import write_card

    path = write_card(
        storage, name, log=log, scores=scores or [], machine=machine, commands=commands or [], notes=notes or [],
        licence=licence,
    )  # fmt: skip
    terminal.show("card", [("file", str(path))])
