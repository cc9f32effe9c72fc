"""The commands that train: `fit-evaluator`, `train`, `fit-layouts`, `distill` and `upsample`.

Each prepares an objective (`objectives/`), and a `Plan` trains, publishes and prints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress

from shared.checkpoint import CheckpointKind, base_of, path_of, read_info
from shared.options import WITH_POSITIONS
from shared.registry import resolve
from shared.storage import Location
from trainer.commands import options, terminal
from trainer.errors import TrainerError

if TYPE_CHECKING:  # these import torch, and make `--help` slow
    import torch

    from trainer.config import RunConfig, TrainConfig
    from trainer.data import Dataset
    from trainer.runs import Budget
    from trainer.train import Objective, Training


@dataclass
class Plan:
    """What all training commands are given: where to train and publish, for how long, and how."""

    storage: Location
    name: str  # of the checkpoint
    run: Path
    minutes: float | None
    steps: int | None
    start_from: str | None
    patience: int | None
    grad_accumulation: int
    evaluate_minutes: float

    def check(self, kind: CheckpointKind, base: str | None = None, *, has_budget: bool = False) -> None:
        """Refuse what could not be published, before the training. `base`: the checkpoint that an adapter changes."""
        if not has_budget:
            terminal.check_budget(self.minutes, self.steps)
        for name in (self.name, f"{self.name}-best"):
            terminal.check_publishes(self.storage, name, kind, base)
        terminal.check_folder(self.run, "--run")

    def train(
        self, progress: Progress, what: str, objective: Objective, network: torch.nn.Module, config: RunConfig,
        device: torch.device, budget: Budget | None = None,
    ) -> Training:  # fmt: skip
        from trainer.runs import Budget, show_progress
        from trainer.train import train

        return train(
            objective, network, config, self.run, budget or Budget(self.minutes, self.steps), device=device,
            start_from=self.start_from, on_step=show_progress(progress, what, config.batch),
            evaluate_every_s=60 * self.evaluate_minutes, patience=self.patience,
            grad_accumulation=self.grad_accumulation,
        )  # fmt: skip

    def publish(self, title: str, objective: Objective, training: Training, **details: Any) -> None:
        """Publish the averaged weights and, where they were better before, the best ones beside them; print both."""
        run, best = training.run, training.best
        paths = [path_of(self.storage, name) for name in (self.name, f"{self.name}-best")]

        def publish(name: str, step: int, figures: dict[str, float] | None) -> None:
            objective.publish(training.averaged, self.storage, name, {
                **details, "config": training.config.model_dump(mode="json"), "steps": step,
                "examples_seen": step * training.config.batch, "minutes": round(run.elapsed_s / 60, 1),
                **options.given(started_from=self.start_from, last=figures),
            })  # fmt: skip

        last = run.history[-1] if run.history else None
        rows = [*terminal.spent(run), *((key.replace("_", " "), f"{value:.5f}") for key, value in (last or {}).items())]
        rows.append(("checkpoint", str(paths[0])))
        if terminal.MAIN_PROCESS:
            publish(self.name, run.step, last)
        # one that an earlier part of the run has published must not stay behind
        if best and (best.step < run.step or paths[1].exists()) and terminal.MAIN_PROCESS:
            training.averaged.load_state_dict(best.weights)
            publish(f"{self.name}-best", best.step, best.figures)
            rows.append((f"best, at step {best.step}", str(paths[1])))
        terminal.show(title, rows)


def fit_evaluator(
    data: Annotated[list[Path], options.Existing],
    held_out: Annotated[Path, typer.Option(exists=True, help="A data set folder that is scored and not trained on.")],
    storage: options.Storage = Path("models"),
    name: options.Name = "evaluator",
    run: options.RunFolder = Path("runs/evaluator"),
    minutes: options.Minutes = None,
    steps: options.Steps = None,
    start_from: options.StartFrom = None,
    set_: options.Changes = None,
    seed: options.Seed = 0,
    evaluate_minutes: options.EvaluateMinutes = 10.0,
    patience: options.Patience = None,
    grad_accumulation: options.GradAccumulation = 1,
    device: options.DeviceName = "auto",
) -> None:
    """Fit the evaluator (ResNet-18) and publish it. Repeat --data for several folders.

    To resume, run the same command again.
    """
    from shared.evaluator import IMAGE_SIZE
    from trainer.config import with_changes
    from trainer.data import merge
    from trainer.objectives import evaluator as objectives

    plan = Plan(storage, name, run, minutes, steps, start_from, patience, grad_accumulation, evaluate_minutes)
    plan.check("evaluator")
    where = terminal.pick_device(device)
    preset = objectives.STARTED_RUN if start_from else objectives.RUN
    config = with_changes(preset, [f"seed={seed}", *(set_ or [])])
    with terminal.bar() as progress:
        dataset = merge([terminal.read_dataset(folder, progress, size=IMAGE_SIZE) for folder in data])
        unseen = terminal.read_dataset(held_out, progress, size=IMAGE_SIZE)
        terminal.note_unseen(dataset)
        objective = objectives.Recognising(dataset, unseen)
        network = objectives.make_network(dataset, config.seed)
        if start_from:
            objectives.start_from(network, storage, start_from)
        training = plan.train(progress, "fitting", objective, network, config, where)
    plan.publish("evaluator on held-out pictures", objective, training, data=_names(data), pictures=len(dataset))


def train(
    data: Annotated[list[Path], options.Existing],
    storage: options.Storage = Path("models"),
    name: options.Name = "denoiser",
    run: options.RunFolder = Path("runs/denoiser"),
    preset: Annotated[str, typer.Option(help="default, or report: the report's hyperparameters.")] = "default",
    set_: options.Changes = None,
    minutes: options.Minutes = None,
    steps: options.Steps = None,
    start_from: options.StartFrom = None,
    evaluator: options.LoggedEvaluator = None,
    tests: options.Tests = None,
    held_out: options.HeldOut = None,
    evaluate_minutes: options.EvaluateMinutes = 10.0,
    patience: options.Patience = None,
    grad_accumulation: options.GradAccumulation = 1,
    device: options.DeviceName = "auto",
) -> None:
    """Train the denoiser and publish its averaged weights. Repeat --data for several folders.

    To resume, run the same command again.
    """
    from shared.diffusion.schedules import alpha_bar
    from trainer.config import make_config
    from trainer.data import check_alike, check_labelled, in_vocabulary, settled
    from trainer.objectives import denoiser as objectives
    from trainer.objectives.layouts import fit_layouts_of
    from trainer.processes import processes
    from trainer.runs import Budget, show_progress
    from trainer.score import SAMPLING, Watcher, load_judge, tests_of

    config = make_config(preset, set_ or [])
    plan = Plan(storage, name, run, minutes, steps, start_from, patience, grad_accumulation, evaluate_minutes)
    if patience and not (held_out or evaluator):
        raise TrainerError("--patience needs --held-out or --evaluator: without them nothing says what is worse")
    plan.check("denoiser", has_budget=preset == "report" and not minutes)
    with terminal.bar() as progress:
        dataset, unseen = _read_merged(data, config, progress), None
        if held_out:
            unseen = in_vocabulary(_read_merged(held_out, config, progress), dataset.vocabulary, "the data set")
            check_alike([dataset, unseen])
        config = settled(config, dataset)
        budget = Budget(minutes, steps) if minutes or steps else _report_budget(config, dataset)
        where, vocabulary = terminal.pick_device(device), dataset.vocabulary
        judge = load_judge(resolve(storage, evaluator, "evaluator"), vocabulary, where) if evaluator else None
        lists = tests_of(data[0], tests, vocabulary)
        check_labelled(dataset, "training pictures")
        network = objectives.make_network(config, dataset)
        if start_from:
            objectives.start_from(network, storage, start_from, config, dataset)
        terminal.note_unseen(dataset)
        with processes(where):
            layouts = fit_layouts_of(dataset, config, run / "layouts", budget, show_progress(progress, "layouts"))
            compared = {"held_out_loss": unseen, "seen_loss": dataset} if unseen else {}
            watcher = Watcher(
                alpha_bar(config.schedule, config.timesteps), config.prediction, vocabulary, dataset.aspect, run, lists,
                judge, where, WITH_POSITIONS if layouts else SAMPLING, layouts,
                {key: objectives.Denoising(part, config, where) for key, part in compared.items()},
            )  # fmt: skip
            objective = objectives.Denoising(dataset, config, where, watcher, layouts)
            training = plan.train(progress, "training", objective, network, config, where, budget)
    plan.publish("trained", objective, training, data=_names(data), pictures=len(dataset))


def fit_layouts(
    name: Annotated[str, typer.Argument(help="A denoiser in storage that was trained with positions.")],
    data: Annotated[
        list[Path],
        typer.Option(exists=True, help="A folder with a train.json and a positions.json; no pictures needed."),
    ],
    storage: options.Storage = Path("models"),
    run: options.RunFolder = Path("runs/layouts"),
    minutes: options.Minutes = None,
    steps: Annotated[int, typer.Option(min=1, help="Stop after so many steps.")] = 2000,
    start_from: Annotated[
        str | None, typer.Option(help="A denoiser whose layout network the run starts from, such as NAME itself.")
    ] = None,
    set_: options.Changes = None,
    seed: options.Seed = 0,
    patience: options.Patience = None,
    grad_accumulation: options.GradAccumulation = 1,
) -> None:
    """Fit a denoiser's layout network again, to more layouts than its pictures have. Repeat --data for several folders.

    The layouts of n objects are learnt from the first folder that has pictures of n objects. Adapters of the denoiser
    get the new layouts too. To resume, run the same command again. --set width=96 changes the network's shape.
    """
    from shared.diffusion.layouts import LayoutConfig
    from trainer.config import with_changes
    from trainer.data import read_arrangements
    from trainer.objectives import layouts as objectives
    from trainer.runs import Budget, show_progress

    objectives.check_own_layouts(info := read_info(resolve(storage, name, "denoiser")))
    terminal.check_folder(run, "--run")
    # the network's own fields may be named without `network.`
    changes = [f"network.{one}" if one.split("=")[0] in LayoutConfig.model_fields else one for one in set_ or []]
    config = with_changes(objectives.LayoutsConfig(), [f"seed={seed}", *changes])
    positions = read_arrangements(data, info.labels)
    objective = objectives.Arranging(positions, info.labels, config)
    network = objectives.make_network(objective)
    if start_from:
        objectives.start_from(network, storage, start_from, info.labels)
    with terminal.bar() as progress:
        layouts, training = objectives.fit_layouts(
            objective, network, run, Budget(minutes, steps), start_from=start_from, patience=patience,
            grad_accumulation=grad_accumulation, on_step=show_progress(progress, "layouts"),
        )  # fmt: skip
    step = training.best.step if training.best else training.run.step
    details = {"data": _names(data), "pictures": len(positions), "steps": step}
    if terminal.MAIN_PROCESS:
        objective.publish(layouts, storage, name, {**details, **options.given(started_from=start_from)})
    rows = [*terminal.spent(training.run), ("published", f"step {step}"), ("checkpoint", str(path_of(storage, name)))]
    terminal.show("layouts fitted", rows)


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
    run: options.RunFolder = Path("runs/distill"),
    minutes: options.Minutes = None,
    steps: options.Steps = None,
    set_: options.Changes = None,
    evaluator: options.LoggedEvaluator = None,
    evaluate_minutes: options.EvaluateMinutes = 10.0,
    patience: options.Patience = None,
    grad_accumulation: options.GradAccumulation = 1,
    device: options.DeviceName = "auto",
) -> None:
    """Distil a denoiser into one that needs fewer network rows a picture. To resume, run the same command again."""
    import torch

    from shared.diffusion.model import load_denoiser
    from trainer.config import with_changes
    from trainer.data import check_labelled, in_vocabulary, labelled
    from trainer.objectives import distilled as objectives
    from trainer.processes import processes
    from trainer.runs import keep_setup
    from trainer.score import Watcher, load_judge, tests_of

    plan = Plan(storage, name, run, minutes, steps, start_from, patience, grad_accumulation, evaluate_minutes)
    info = read_info(taught := resolve(storage, teacher, "denoiser"))
    objectives.check_teacher(info)
    plan.check("denoiser", base=base_of(info) or info.name)
    _check_run(run)
    if patience and not evaluator:
        raise TrainerError("--patience needs --evaluator: without it nothing says what is worse")
    where = terminal.pick_device(device)
    source = load_denoiser(taught, device=where)
    sampling, path = objectives.make_samplings(source, sampling_steps, teacher_steps, guidance)
    config = with_changes(objectives.RUN, set_ or [])
    network, base = objectives.make_student(source, storage, rank, config.seed, start_from)
    judge = load_judge(resolve(storage, evaluator, "evaluator"), source.vocabulary, where) if evaluator else None
    with terminal.bar() as progress, processes(where) as group:
        fit = "squeeze" if source.aspect == 1 else "pad"
        dataset = terminal.read_dataset(data, progress, size=source.image_shape[-1], fit=fit)
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
        sets = torch.unique(labelled(dataset).labels, dim=0)
        with group.first_alone():
            pool = objectives.make_pool(
                run / "pool", source, sets, count, sampling_steps, path, lambda n: progress.advance(task, n)
            )
        watcher = Watcher(
            source.alpha_bar, source.prediction, source.vocabulary, dataset.aspect, run, lists, judge, where, sampling,
            source.layouts,
        )  # fmt: skip
        objective = objectives.Distilling(pool, source, base, sampling, where, watcher)
        training = plan.train(progress, "distilling", objective, network, config, where)
    plan.publish(
        "distilled", objective, training, method="trajectories", teacher=info.name, teacher_digest=source.info.digest,
        rank=rank, guidance=guidance,
    )  # fmt: skip


def upsample(
    data: Annotated[list[Path], options.Existing],
    name: options.Name,
    base: Annotated[str, typer.Option(help="The denoiser whose pictures are enlarged.")],
    size: Annotated[
        str | None, typer.Option(help="Of the finished pictures, as 320x240; by default that of the data set's first.")
    ] = None,
    storage: options.Storage = Path("models"),
    run: options.RunFolder = Path("runs/upsampler"),
    minutes: options.Minutes = None,
    steps: options.Steps = None,
    start_from: options.StartFrom = None,
    set_: options.Changes = None,
    evaluate_minutes: options.EvaluateMinutes = 10.0,
    patience: options.Patience = None,
    grad_accumulation: options.GradAccumulation = 1,
    device: options.DeviceName = "auto",
) -> None:
    """Train an upsampler of a denoiser's pictures, and publish the two. Repeat --data for several folders.

    To resume, run the same command again.
    """
    from shared.diffusion.model import load_denoiser
    from trainer.data import merge
    from trainer.full_size import find_pictures
    from trainer.objectives.upsampler import Upsampler
    from trainer.runs import keep_setup
    from trainer.stages import upsample as upsampling

    plan = Plan(storage, name, run, minutes, steps, start_from, patience, grad_accumulation, evaluate_minutes)
    enlarged = resolve(storage, base, "denoiser")
    upsampling.check_base(read_info(enlarged))
    plan.check("denoiser", base=base)
    _check_run(run)
    where, config = terminal.pick_device(device), upsampling.make_config(set_ or [])
    denoiser = load_denoiser(enlarged, device=where)
    pictures = find_pictures(data, size)
    network = upsampling.make_upsampler(denoiser, pictures.size, config)
    if start_from:
        network.load_state_dict(upsampling.starting_weights(storage, start_from, network.config))
    with terminal.bar() as progress:
        dataset = merge([terminal.read_dataset(one, progress, size=denoiser.image_shape[-1]) for one in data])
        examples = upsampling.Upsampling(dataset, pictures, denoiser, network.config, config)
        keep_setup(run, {"base": denoiser.info.digest, "size": pictures.size})  # after all checks, as in `distill`
        objective = Upsampler(examples, dataset.digest, network.config, denoiser.info, run, where)
        training = plan.train(progress, "upsampling", objective, network, config, where)
    plan.publish("upsampler trained", objective, training, data=_names(data))


def _read_merged(folders: list[Path], config: TrainConfig, progress: Progress) -> Dataset:
    """Read several data set folders as one."""
    from trainer.data import merge

    return merge(
        [terminal.read_dataset(folder, progress, size=config.image_size, fit=config.fit) for folder in folders]
    )


def _report_budget(config: TrainConfig, dataset: Dataset) -> Budget:
    """Return the report's number of epochs."""
    from trainer.config import REPORT_EPOCHS
    from trainer.runs import Budget

    return Budget(steps=math.ceil(REPORT_EPOCHS * len(dataset) / config.batch))


def _names(folders: list[Path]) -> str:
    return ", ".join(folder.name for folder in folders)


def _check_run(run: Path) -> None:
    """Refuse the run of another command: `distill` and `upsample` keep a setup.json as well."""
    if (run / "state.pt").exists() and not (run / "setup.json").exists():
        raise TrainerError(f"{run} holds the run of another command; choose another --run")
