"""The commands that train: `fit-evaluator`, `train`, `fit-layouts`, `distill` and `upsample`."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.progress import Progress

from shared.checkpoint import base_of, path_of, read_info
from shared.options import WITH_POSITIONS
from shared.registry import resolve
from trainer.commands import options, terminal
from trainer.errors import TrainerError

if TYPE_CHECKING:  # these import torch, and make `--help` slow
    from trainer.config import TrainConfig
    from trainer.data import Dataset
    from trainer.runs import Budget, Run


def fit_evaluator(
    data: Annotated[list[Path], options.Existing],
    held_out: Annotated[Path, typer.Option(exists=True, help="A data set folder that is scored and not trained on.")],
    storage: options.Storage = Path("models"),
    name: options.Name = "evaluator",
    run: Annotated[Path, typer.Option(help="Folder for state, log and TensorBoard events.")] = Path("runs/evaluator"),
    minutes: options.Minutes = None,
    steps: options.Steps = None,
    start_from: options.StartFrom = None,
    seed: options.Seed = 0,
    device: options.DeviceName = "auto",
) -> None:
    """Fit the evaluator (ResNet-18) and publish it. Repeat --data for several folders.

    To resume, run the same command again.
    """
    from shared.evaluator import IMAGE_SIZE, load_evaluator
    from trainer.data import merge
    from trainer.runs import Budget, show_progress
    from trainer.stages import fit_evaluator as fitting

    terminal.check_budget(minutes, steps)
    terminal.check_publishes(storage, name, "evaluator")
    terminal.check_folder(run, "--run")
    where = terminal.pick_device(device)
    start = load_evaluator(resolve(storage, start_from, "evaluator")) if start_from else None
    with terminal.bar() as progress:
        dataset = merge([terminal.read_dataset(folder, progress, size=IMAGE_SIZE) for folder in data])
        unseen = terminal.read_dataset(held_out, progress, size=IMAGE_SIZE)
        terminal.note_unseen(dataset)
        evaluator, figures, state = fitting.fit_evaluator(
            dataset, unseen, run, Budget(minutes, steps), start=start, seed=seed, device=where,
            on_step=show_progress(progress, "fitting"),
        )  # fmt: skip
    training = _training(state, start_from, pictures=len(dataset), seed=seed)
    path = fitting.publish_evaluator(evaluator, figures, storage, name, training)
    rows = [(key.replace("_", " "), f"{value:.4f}") for key, value in figures.items() if isinstance(value, float)]
    rows += [(f"exact match of {n} objects", f"{value:.4f}") for n, value in figures["exact_match_of"].items()]
    terminal.show("evaluator on held-out pictures", [*rows, *terminal.spent(state), ("checkpoint", str(path))])


def train(
    data: Annotated[list[Path], options.Existing],
    storage: options.Storage = Path("models"),
    name: options.Name = "denoiser",
    run: Annotated[
        Path,  # torchrun takes --run for itself
        typer.Option("--run", "--run-folder", help="Folder for state, log and grids. Under torchrun: --run-folder."),
    ] = Path("runs/denoiser"),
    preset: Annotated[str, typer.Option(help="default, or report: the report's hyperparameters.")] = "default",
    set_: options.Changes = None,
    minutes: options.Minutes = None,
    steps: options.Steps = None,
    start_from: options.StartFrom = None,
    evaluator: options.LoggedEvaluator = None,
    tests: options.Tests = None,
    held_out: Annotated[
        list[Path] | None,
        typer.Option(exists=True, help="A folder of unseen pictures whose loss is logged. Repeatable."),
    ] = None,
    evaluate_minutes: options.EvaluateMinutes = 10.0,
    device: options.DeviceName = "auto",
) -> None:
    """Train the denoiser and publish its averaged weights. Repeat --data for several folders.

    To resume, run the same command again.
    """
    from trainer.config import make_config
    from trainer.data import check_alike, in_vocabulary, settled
    from trainer.runs import show_progress
    from trainer.score import SAMPLING, Watcher, load_judge, tests_of
    from trainer.stages.fit_layouts import fit_layouts_of
    from trainer.train import publish_network, starting_weights
    from trainer.train import train as train_network

    config = make_config(preset, set_ or [])
    if minutes or steps or preset != "report":  # which has its own number of epochs
        terminal.check_budget(minutes, steps)
    terminal.check_publishes(storage, name, "denoiser")
    terminal.check_folder(run, "--run")
    with terminal.bar() as progress:
        dataset = _read_merged(data, config, progress)
        unseen = None
        if held_out:
            unseen = in_vocabulary(_read_merged(held_out, config, progress), dataset.vocabulary, "the data set")
            check_alike([dataset, unseen])
        config = settled(config, dataset)
        where, vocabulary = terminal.pick_device(device), dataset.vocabulary
        judge = load_judge(resolve(storage, evaluator, "evaluator"), vocabulary, where) if evaluator else None
        lists = tests_of(data[0], tests, vocabulary)
        start = starting_weights(storage, start_from, config, dataset) if start_from else None
        terminal.note_unseen(dataset)
        layouts = None
        if terminal.MAIN_PROCESS:
            layouts = fit_layouts_of(dataset, config, run / "layouts", on_step=show_progress(progress, "layouts"))
        sampling = WITH_POSITIONS if layouts else SAMPLING
        averages, state = train_network(
            dataset, config, run, _budget(minutes, steps, config, dataset), device=where, start=start,
            start_from=start_from, on_step=show_progress(progress, "training", config.batch),
            evaluate=Watcher(config, dataset, run, lists, judge, where, sampling, held_out=unseen, layouts=layouts),
            evaluate_every_s=60 * evaluate_minutes,
        )  # fmt: skip
    path = path_of(storage, name)
    if terminal.MAIN_PROCESS:
        training = _training(
            state, start_from, data=_names(data), pictures=len(dataset), pictures_seen=state.step * config.batch
        )
        path = publish_network(averages.network(config.publish), config, dataset, storage, name, training, layouts)
    last = state.history[-1] if state.history else {}
    losses = [(key.replace("_", " "), f"{value:.5f}") for key, value in last.items() if key.endswith("_loss")]
    terminal.show("trained", [*terminal.spent(state), *losses, ("checkpoint", str(path))])


def _read_merged(folders: list[Path], config: TrainConfig, progress: Progress) -> Dataset:
    """Read several data set folders as one."""
    from trainer.data import merge

    return merge(
        [terminal.read_dataset(folder, progress, size=config.image_size, fit=config.fit) for folder in folders]
    )


def _budget(minutes: float | None, steps: int | None, config: TrainConfig, dataset: Dataset) -> Budget:
    """Return the budget of a run; without minutes and steps, the report's number of epochs."""
    from trainer.config import REPORT_EPOCHS
    from trainer.runs import Budget

    if minutes or steps:
        return Budget(minutes, steps)
    return Budget(steps=math.ceil(REPORT_EPOCHS * len(dataset) / config.batch))


def fit_layouts(
    name: Annotated[str, typer.Argument(help="A denoiser in storage that was trained with positions.")],
    data: Annotated[
        list[Path],
        typer.Option(exists=True, help="A folder with a train.json and a positions.json; no pictures needed."),
    ],
    storage: options.Storage = Path("models"),
    run: Annotated[Path, typer.Option(help="Folder for state, log and TensorBoard events.")] = Path("runs/layouts"),
    steps: Annotated[int, typer.Option(min=1, help="Stop after so many steps.")] = 2000,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Change the network's shape: --set width=96. Repeatable.")
    ] = None,
    seed: options.Seed = 0,
) -> None:
    """Fit a denoiser's layout network again, to more layouts than its pictures have. Repeat --data for several folders.

    The layouts of n objects are learnt from the first folder that has pictures of n objects. Adapters of the denoiser
    get the new layouts too. To resume, run the same command again.
    """
    from shared.diffusion.layouts import LayoutConfig
    from trainer.config import with_changes
    from trainer.data import read_arrangements
    from trainer.runs import show_progress
    from trainer.stages import fit_layouts as fitting

    info = read_info(resolve(storage, name, "denoiser"))
    if "layouts" not in info.config or "base" in info.config:
        raise TrainerError(f"{name} has no layout network of its own: it takes no positions, or is an adapter")
    own = LayoutConfig.model_fields.keys() - {"num_labels", "most"}  # which follow from the data
    shape = with_changes(LayoutConfig(num_labels=1, most=1), set_ or [], only=own).model_dump(include=own)
    terminal.check_folder(run, "--run")
    vocabulary = info.labels
    positions = read_arrangements(data, vocabulary)
    with terminal.bar() as progress:
        layouts = fitting.fit_layouts(
            positions, vocabulary, run, steps=steps, seed=seed, shape=shape, on_step=show_progress(progress, "layouts")
        )
    training = {"layouts": {"data": _names(data), "pictures": len(positions), "steps": steps}}
    path = fitting.replace_layouts(storage, name, layouts, training)
    terminal.show("layouts fitted", [("steps", str(steps)), ("checkpoint", str(path))])


def distill(
    data: Annotated[Path, options.Existing],
    name: options.Name,
    teacher: options.Model = None,
    guidance: Annotated[float, typer.Option(min=1, max=20, help="The teacher's w.")] = 3.0,
    sampling_steps: Annotated[int, typer.Option(min=1, max=100, help="Sampling steps of the new checkpoint.")] = 4,
    teacher_steps: Annotated[int, typer.Option(min=1, help="The teacher's sampling steps.")] = 16,
    count: Annotated[int, typer.Option("--trajectories", min=1, help="Number of the teacher's trajectories.")] = 8192,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the changes to the network's matrices.")] = 16,
    start_from: Annotated[str | None, typer.Option(help="Adapter whose changes the run starts from.")] = None,
    storage: options.Storage = Path("models"),
    run: Annotated[Path, typer.Option(help="Folder for state, log, grids and trajectories.")] = Path("runs/distill"),
    minutes: options.Minutes = None,
    steps: options.Steps = None,
    set_: options.Changes = None,
    evaluator: options.LoggedEvaluator = None,
    evaluate_minutes: options.EvaluateMinutes = 10.0,
    device: options.DeviceName = "auto",
) -> None:
    """Distil a denoiser into one that needs fewer network rows a picture. To resume, run the same command again."""
    import torch

    from shared.diffusion.model import load_denoiser
    from trainer.data import check_labelled, in_vocabulary, labelled
    from trainer.runs import Budget, keep_setup, show_progress
    from trainer.score import Watcher, load_judge, tests_of
    from trainer.stages import distill as distillation
    from trainer.train import train as train_network

    terminal.check_budget(minutes, steps)
    info = read_info(taught := resolve(storage, teacher, "denoiser"))
    terminal.check_publishes(storage, name, "denoiser", base=base_of(info) or info.name)
    _check_run(run)
    where = terminal.pick_device(device)
    source = load_denoiser(taught, device=where)
    sampling, path = distillation.make_samplings(source, sampling_steps, teacher_steps, guidance)
    config = distillation.make_config(source.info, set_ or [])
    network, base = distillation.make_student(source, storage, rank, config.seed, start_from)
    judge = load_judge(resolve(storage, evaluator, "evaluator"), source.vocabulary, where) if evaluator else None
    with terminal.bar() as progress:
        dataset = terminal.read_dataset(data, progress, size=source.image_shape[-1], fit=config.fit)
        dataset = in_vocabulary(dataset, source.vocabulary, source.info.name)
        check_labelled(dataset, "pictures")
        lists = tests_of(data, None, dataset.vocabulary)
        # after all checks, so that the corrected command can use the folder
        keep_setup(run, {
            "teacher": source.info.digest, "data": dataset.digest, "guidance": guidance, "rank": rank,
            "sampling_steps": sampling_steps, "teacher_steps": teacher_steps,
            **options.given(start_from=start_from),
        })  # fmt: skip
        task = progress.add_task("trajectories", total=count)
        pool = distillation.make_pool(
            run / "pool", source, torch.unique(labelled(dataset).labels, dim=0), count, sampling_steps, path,
            lambda n: progress.advance(task, n),
        )  # fmt: skip
        averages, state = train_network(
            dataset, config, run, Budget(minutes, steps), device=where, network=network,
            objective=distillation.Trajectories(pool, source, where),
            on_step=show_progress(progress, "distilling"),
            evaluate=Watcher(config, dataset, run, lists, judge, where, sampling, layouts=source.layouts),
            evaluate_every_s=60 * evaluate_minutes,
        )  # fmt: skip
    if terminal.MAIN_PROCESS:
        training = _training(
            state, start_from, method="trajectories", teacher=info.name, teacher_digest=source.info.digest, rank=rank,
            guidance=guidance, examples_seen=state.step * config.batch, config=config.model_dump(mode="json"),
        )  # fmt: skip
        student = cast(distillation.AdaptedNetwork, averages.network(config.publish))
        distillation.publish_adapter(student, base, storage, name, sampling, training)
    terminal.show("distilled", [*terminal.spent(state), ("checkpoint", str(path_of(storage, name)))])


def upsample(
    data: Annotated[list[Path], options.Existing],
    name: options.Name,
    base: Annotated[str, typer.Option(help="The denoiser whose pictures are enlarged.")],
    size: Annotated[
        str | None, typer.Option(help="Of the finished pictures, as 320x240; by default that of the data set's first.")
    ] = None,
    storage: options.Storage = Path("models"),
    run: Annotated[Path, typer.Option(help="Folder for state, log and grids.")] = Path("runs/upsampler"),
    minutes: options.Minutes = None,
    steps: options.Steps = None,
    start_from: options.StartFrom = None,
    set_: options.Changes = None,
    evaluate_minutes: options.EvaluateMinutes = 10.0,
    device: options.DeviceName = "auto",
) -> None:
    """Train an upsampler of a denoiser's pictures, and publish the two. Repeat --data for several folders.

    To resume, run the same command again.
    """
    from shared.diffusion.model import load_denoiser
    from trainer.data import merge
    from trainer.full_size import find_pictures
    from trainer.runs import Budget, keep_setup, show_progress
    from trainer.stages import upsample as upsampling
    from trainer.train import train as train_network

    terminal.check_budget(minutes, steps)
    enlarged = resolve(storage, base, "denoiser")
    upsampling.check_base(read_info(enlarged))
    terminal.check_publishes(storage, name, "denoiser", base=base)
    _check_run(run)
    where, config = terminal.pick_device(device), upsampling.make_config(set_ or [])
    denoiser = load_denoiser(enlarged, device=where)
    pictures = find_pictures(data, size)
    network = upsampling.make_upsampler(denoiser, pictures.size, config)
    start = upsampling.starting_weights(storage, start_from, network.config) if start_from else None
    with terminal.bar() as progress:
        dataset = merge([terminal.read_dataset(one, progress, size=denoiser.image_shape[-1]) for one in data])
        objective = upsampling.Upsampling(dataset, pictures, denoiser, network.config, config)
        keep_setup(run, {"base": denoiser.info.digest, "size": pictures.size})  # after all checks, as in `distill`
        averages, state = train_network(
            dataset, config, run, Budget(minutes, steps), device=where, network=network, objective=objective,
            start=start, start_from=start_from,
            on_step=show_progress(progress, "upsampling", config.batch),
            evaluate=partial(upsampling.measure, objective, run, where), evaluate_every_s=60 * evaluate_minutes,
        )  # fmt: skip
    if terminal.MAIN_PROCESS:
        training = _training(
            state, start_from, data=_names(data), examples_seen=state.step * config.batch,
            config=config.model_dump(mode="json"),
        )  # fmt: skip
        upsampling.publish_upsampler(
            network.config, averages.network(config.publish).state_dict(), denoiser.info, storage, name, training
        )
    terminal.show("upsampler trained", [*terminal.spent(state), ("checkpoint", str(path_of(storage, name)))])


def _training(state: Run, start_from: str | None, **details: Any) -> dict[str, Any]:
    """Return what a checkpoint's header says of its training: `details`, and what all runs have."""
    last = state.history[-1] if state.history else None
    minutes = round(state.elapsed_s / 60, 1)
    return {**details, "steps": state.step, "minutes": minutes, **options.given(started_from=start_from, last=last)}


def _names(folders: list[Path]) -> str:
    return ", ".join(folder.name for folder in folders)


def _check_run(run: Path) -> None:
    """Refuse what is no folder, and the run of another command: `distill` and `upsample` keep a setup.json as well."""
    terminal.check_folder(run, "--run")
    if (run / "state.pt").exists() and not (run / "setup.json").exists():
        raise TrainerError(f"{run} holds the run of another command; choose another --run")
