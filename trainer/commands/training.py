"""`train OBJECTIVE`: `denoiser`, `evaluator`, `layouts`, `distilled`, `upsampler` and `one-step`.

Each prepares an objective (`objectives/`), and a `Plan` trains, publishes and prints.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.progress import Progress

from shared import registry
from shared.checkpoint import SUFFIX, CheckpointError, CheckpointKind, path_of, read_info
from shared.options import WITH_POSITIONS
from shared.registry import resolve
from trainer.commands import options, terminal
from trainer.errors import TrainerError
from trainer.made_by import Stage, joined, stages_of, this_stage
from trainer.plugins import plugins

if TYPE_CHECKING:  # these import torch, and make `--help` slow
    import torch

    from trainer.config import RunConfig
    from trainer.data import Dataset
    from trainer.runs import Run
    from trainer.train import Objective, Training

HeldOut = Annotated[
    list[Path] | None,
    typer.Option(exists=True, help="A folder of unseen pictures that are measured and not trained on. Repeatable."),
]
Size = Annotated[
    str | None, typer.Option(help="Of the finished pictures, as 320x240; by default that of the data set's first.")
]

app = typer.Typer(help="Train a network and publish it. To resume, run the same command again.", no_args_is_help=False)


@dataclass(kw_only=True)
class Plan:
    """The options of any objective: what to learn from, where to train and publish, for how long, and how."""

    data: list[Path]
    storage: Path
    name: str
    run: Path
    minutes: float | None
    steps: int | None
    start_from: str | None
    set_: list[str] | None
    patience: int | None
    publish_every: str
    promote: bool
    grad_accumulation: int
    device: str
    made_by: list[Stage] = field(default_factory=list, init=False)  # set by `check`

    @property
    def folders(self) -> str:
        """The names of the data set folders, for the checkpoint's header."""
        return ", ".join(folder.name for folder in self.data)

    def read_held_out(self, folders: list[Path], read: Callable[[list[Path]], Dataset]) -> Dataset:
        """Read pictures that are not trained on. TrainerError for a folder that is."""
        if same := {folder.resolve() for folder in folders} & {folder.resolve() for folder in self.data}:
            raise TrainerError(
                f"{min(same)} is given as --data and as --held-out; pictures that are learnt test nothing"
            )
        return read(folders)

    def check(self, kind: CheckpointKind, base: str | None = None, source: str | None = None) -> None:
        """Before the training, refuse what could not be published, and find out how its sources were made.

        `base`: the checkpoint that it is made from, which it must not replace. `source`: another one that the run
        learns from.
        """
        for name in (self.name, f"{self.name}-best"):
            terminal.check_publishes(self.storage, name, kind, base)
        terminal.check_folder(self.run, "--run")
        before = [read_info(resolve(self.storage, one, kind)) for one in (base, source, self.start_from) if one]
        self.made_by = joined(*map(stages_of, before), [this_stage()])

    def train(
        self, progress: Progress, what: str, objective: Objective, network: torch.nn.Module, config: RunConfig,
        device: torch.device, **details: Any,
    ) -> Training:  # fmt: skip
        """Train as the options say, and publish while it goes on. `details`: see `publish`."""
        from trainer.runs import Budget, Every, say_when, show_progress
        from trainer.train import train

        show, say = show_progress(progress, what, config.batch), say_when(objective.name, terminal.note)

        def on_step(run: Run) -> None:
            show(run)
            if terminal.MAIN_PROCESS:
                say(run)

        def publish(training: Training) -> None:
            try:
                self._publish(objective, training, **details)
            except (OSError, CheckpointError) as error:  # storage that is away for a while ends no run
                terminal.note(f"not published at step {training.run.step} ({error})")

        return train(
            objective, network, config, self.run, Budget(self.minutes, self.steps), device=device,
            start_from=self.start_from, on_step=on_step, patience=self.patience,
            grad_accumulation=self.grad_accumulation, publish=publish, publish_every=Every.parse(self.publish_every),
            made_by=self.made_by,
        )  # fmt: skip

    def publish(self, title: str, objective: Objective, training: Training, **details: Any) -> None:
        """Publish a finished run, and print what it has spent. `details`: for the checkpoint's header."""
        run, best = training.run, training.best
        last = run.history[-1] if run.history else {}
        rows = [*terminal.spent(run), *((key.replace("_", " "), f"{value:.5f}") for key, value in last.items())]
        rows.append(("checkpoint", str(path_of(self.storage, self.name))))
        if terminal.MAIN_PROCESS:
            names = self._publish(objective, training, **details)
            rows += [(f"best, at step {best.step}", str(path_of(self.storage, one))) for one in names[1:] if best]
        terminal.show(title, rows)

    def _publish(self, objective: Objective, training: Training, **details: Any) -> list[str]:
        """Publish the averaged weights and, where they were better before, the best ones beside them, with cards.

        Return the names of what is published. The run itself does not change.
        """
        from trainer.studies.card import DATA, write_card

        run, best = training.run, training.best
        network, name = copy.deepcopy(training.averaged).eval(), f"{self.name}-best"

        def publish(name: str, step: int, figures: dict[str, float] | None) -> str:
            objective.publish(network, self.storage, name, {
                **details, "config": training.config.model_dump(mode="json"), "steps": step,
                "examples_seen": step * training.config.batch, "minutes": round(run.elapsed_s / 60, 1),
                "made_by": training.made_by, **options.given(started_from=self.start_from, last=figures),
            })  # fmt: skip
            log, machine = self.run / "log.jsonl", terminal.machine(self.device)
            terminal.with_card(lambda: write_card(self.storage, name, log=log, machine=machine))
            return name

        names = [publish(self.name, run.step, run.history[-1] if run.history else None)]
        if best and best.step < run.step:
            network.load_state_dict(best.weights)
            names.append(publish(name, best.step, best.figures))
        elif path_of(self.storage, name).exists():  # that of a former run, or of an earlier part of this one
            if name in registry.promoted_names(self.storage).values():
                registry.promote(self.storage, self.name)
            for suffix in (SUFFIX, ".md", DATA, "-log.png", "-log.jsonl"):
                (self.storage / f"{name}{suffix}").unlink(missing_ok=True)
        if self.promote:
            registry.promote(self.storage, names[-1])
        return names


@app.command()
def evaluator(
    *,
    data: options.Data,
    storage: options.Storage = Path("models"),
    name: options.Name = "evaluator",
    run: options.RunFolder = Path("runs/evaluator"),
    minutes: options.Minutes = None,
    steps: options.Steps = None,
    start_from: options.StartFrom = None,
    set_: options.Changes = None,
    patience: options.Patience = None,
    publish_every: options.PublishEvery = "10m",
    promote: options.Promote = False,
    grad_accumulation: options.GradAccumulation = 1,
    device: options.DeviceName = "auto",
    held_out: Annotated[Path, typer.Option(exists=True, help="A data set folder that is scored and not trained on.")],
    architecture: Annotated[
        Literal["resnet10", "resnet18"], typer.Option(help="resnet10 has half as many blocks, for a second opinion.")
    ] = "resnet18",
) -> None:
    """Fit the evaluator, a ResNet-18. Repeat --data for several folders."""
    from shared.evaluator import IMAGE_SIZE
    from trainer.config import with_changes
    from trainer.data import read_folders
    from trainer.objectives import evaluator as objectives

    plan = Plan(
        data=data, storage=storage, name=name, run=run, minutes=minutes, steps=steps, start_from=start_from, set_=set_,
        patience=patience, publish_every=publish_every, promote=promote, grad_accumulation=grad_accumulation,
        device=device,
    )  # fmt: skip
    terminal.check_budget(plan.minutes, plan.steps)
    plan.check("evaluator")
    where = terminal.pick_device(plan.device)
    config = with_changes(objectives.STARTED_RUN if plan.start_from else objectives.RUN, plan.set_ or [])
    with terminal.bar() as progress:
        dataset = read_folders(plan.data, progress, size=IMAGE_SIZE)
        unseen = plan.read_held_out([held_out], partial(read_folders, progress=progress, size=IMAGE_SIZE))
        terminal.note_unseen(dataset)
        objective = objectives.Recognising(dataset, unseen)
        network = objectives.make_network(dataset, config.seed, architecture)
        if plan.start_from:
            objectives.start_from(network, plan.storage, plan.start_from)
        details = {"data": plan.folders, "pictures": len(dataset)}
        training = plan.train(progress, "fitting", objective, network, config, where, **details)
    plan.publish("evaluator on held-out pictures", objective, training, **details)


@app.command()
def denoiser(
    *,
    data: options.Data,
    storage: options.Storage = Path("models"),
    name: options.Name = "denoiser",
    run: options.RunFolder = Path("runs/denoiser"),
    minutes: options.Minutes = None,
    steps: options.Steps = None,
    start_from: options.StartFrom = None,
    set_: options.Changes = None,
    patience: options.Patience = None,
    publish_every: options.PublishEvery = "10m",
    promote: options.Promote = False,
    grad_accumulation: options.GradAccumulation = 1,
    device: options.DeviceName = "auto",
    preset: Annotated[
        str, typer.Option(parser=options.preset, metavar="NAME", help="The recipe whose fields --set changes.")
    ] = "default",
    evaluator: options.LoggedEvaluator = None,
    tests: options.Tests = None,
    held_out: HeldOut = None,
) -> None:
    """Train the denoiser and publish its averaged weights. Repeat --data for several folders."""
    from trainer.config import make_config
    from trainer.data import check_alike, check_labelled, in_vocabulary, read_folders, settled
    from trainer.objectives import denoiser as objectives
    from trainer.objectives.layouts import fit_layouts_of
    from trainer.processes import processes
    from trainer.runs import Budget, show_progress
    from trainer.score import SAMPLING, Watcher, load_judge, some_lists, tests_of

    plan = Plan(
        data=data, storage=storage, name=name, run=run, minutes=minutes, steps=steps, start_from=start_from, set_=set_,
        patience=patience, publish_every=publish_every, promote=promote, grad_accumulation=grad_accumulation,
        device=device,
    )  # fmt: skip
    config = make_config(preset, plan.set_ or [])
    if plan.patience and not held_out:
        raise TrainerError("--patience needs --held-out: without such pictures nothing says what is worse")
    added = plugins().presets.get(preset)
    if added is None:
        terminal.check_budget(plan.minutes, plan.steps)
    plan.check("denoiser")
    with terminal.bar() as progress:
        read = partial(read_folders, progress=progress, size=config.image_size, fit=config.fit)
        dataset, unseen = read(plan.data), None
        if held_out:
            unseen = in_vocabulary(plan.read_held_out(held_out, read), dataset.vocabulary, "the data set")
            check_alike([dataset, unseen])
        config = settled(config, dataset)
        if added and not (plan.minutes or plan.steps):
            plan.steps = math.ceil(added.epochs * len(dataset) / config.batch)
        where, vocabulary = terminal.pick_device(plan.device), dataset.vocabulary
        judge = load_judge(resolve(plan.storage, evaluator, "evaluator"), vocabulary, where) if evaluator else None
        lists = tests_of(plan.data[0], tests, vocabulary)
        check_labelled(dataset, "training pictures")
        network = objectives.make_network(config, dataset)
        if plan.start_from:
            objectives.start_from(network, plan.storage, plan.start_from, config, dataset)
        terminal.note_unseen(dataset)
        with processes(where):
            layouts = fit_layouts_of(
                dataset, config, plan.run / "layouts", Budget(plan.minutes, plan.steps),
                show_progress(progress, "layouts"),
            )  # fmt: skip
            compared = {"held_out_loss": unseen, "seen_loss": dataset} if unseen else {}
            watcher = Watcher(
                objectives.path_of(config), vocabulary, dataset.aspect, plan.run,
                lists, judge, where, WITH_POSITIONS if layouts else SAMPLING, layouts,
                {key: objectives.Denoising(part, config, where) for key, part in compared.items()},
                some_lists(dataset),
            )  # fmt: skip
            objective = objectives.Denoising(dataset, config, where, watcher, layouts)
            objective.source["held out"] = unseen and unseen.digest  # by which the best weights are chosen
            details = {"data": plan.folders, "pictures": len(dataset)}
            training = plan.train(progress, "training", objective, network, config, where, **details)
    plan.publish("trained", objective, training, **details)


@app.command()
def layouts(
    *,
    data: options.Data,
    storage: options.Storage = Path("models"),
    name: Annotated[str, typer.Option(help="The denoiser, trained with positions, that gets new layouts.")],
    run: options.RunFolder = Path("runs/layouts"),
    minutes: options.Minutes = None,
    steps: options.Steps = None,
    start_from: options.StartFrom = None,
    set_: options.Changes = None,
    patience: options.Patience = None,
    publish_every: options.PublishEvery = "10m",
    promote: options.Promote = False,
    grad_accumulation: options.GradAccumulation = 1,
    device: options.DeviceName = "auto",
) -> None:
    """Fit a denoiser's layout network again, to more layouts than its pictures have. Repeat --data for several folders.

    The folders need a train.json and a positions.json, and no pictures. The layouts of n objects are learnt from the
    first folder that has pictures of n objects. Adapters of the denoiser get the new layouts too. It takes 2,000 steps
    unless you say otherwise, on the CPU. --set network.width=96 changes the network's shape.
    """
    from trainer.config import with_changes
    from trainer.data import read_arrangements
    from trainer.objectives import layouts as objectives
    from trainer.runs import Budget, show_progress
    from trainer.studies.card import write_card

    plan = Plan(
        data=data, storage=storage, name=name, run=run, minutes=minutes, steps=steps, start_from=start_from, set_=set_,
        patience=patience, publish_every=publish_every, promote=promote, grad_accumulation=grad_accumulation,
        device=device,
    )  # fmt: skip
    objectives.check_own_layouts(info := read_info(resolve(plan.storage, name, "denoiser")))
    plan.check("denoiser")
    config = with_changes(objectives.LayoutsConfig(), plan.set_ or [])
    positions = read_arrangements(plan.data, info.labels)
    objective = objectives.Arranging(positions, info.labels, config)
    network = objectives.make_network(objective)
    if plan.start_from:
        objectives.start_from(network, plan.storage, plan.start_from, info.labels)
    budget = Budget(plan.minutes, plan.steps or (None if plan.minutes else 2000))
    with terminal.bar() as progress:
        fitted, done, step = objectives.fit_layouts(
            objective, network, plan.run, budget, start_from=plan.start_from, patience=plan.patience,
            grad_accumulation=plan.grad_accumulation, on_step=show_progress(progress, "layouts"),
        )  # fmt: skip
    details = {"data": plan.folders, "pictures": len(positions), "steps": step, "made_by": plan.made_by}
    if terminal.MAIN_PROCESS:
        objective.publish(fitted, plan.storage, name, {**details, **options.given(started_from=plan.start_from)})
        terminal.with_card(lambda: write_card(plan.storage, name))
    path = path_of(plan.storage, name)
    terminal.show("layouts fitted", [*terminal.spent(done), ("published", f"step {step}"), ("checkpoint", str(path))])


@app.command()
def distilled(
    *,
    data: options.Data,
    storage: options.Storage = Path("models"),
    name: options.Name = "distilled",
    run: options.RunFolder = Path("runs/distilled"),
    minutes: options.Minutes = None,
    steps: options.Steps = None,
    start_from: options.StartFrom = None,
    set_: options.Changes = None,
    patience: options.Patience = None,
    publish_every: options.PublishEvery = "10m",
    promote: options.Promote = False,
    grad_accumulation: options.GradAccumulation = 1,
    device: options.DeviceName = "auto",
    teacher: options.Model = None,
    guidance: Annotated[float, typer.Option(min=1, max=20, help="The teacher's w.")] = 3.0,
    sampling_steps: Annotated[int, typer.Option(min=1, max=100, help="Sampling steps of the new checkpoint.")] = 4,
    teacher_steps: Annotated[int, typer.Option(min=1, help="The teacher's sampling steps.")] = 16,
    count: Annotated[int, typer.Option("--trajectories", min=1, help="Number of the teacher's trajectories.")] = 8192,
    evaluator: options.LoggedEvaluator = None,
) -> None:
    """Distil a denoiser into one that needs fewer network rows a picture."""
    import torch

    from shared.diffusion.model import load_denoiser
    from trainer.config import with_changes
    from trainer.data import check_labelled, in_vocabulary, labelled, read_folders
    from trainer.objectives import distilled as objectives
    from trainer.processes import processes
    from trainer.runs import keep_setup
    from trainer.score import Watcher, load_judge, tests_of

    plan = Plan(
        data=data, storage=storage, name=name, run=run, minutes=minutes, steps=steps, start_from=start_from, set_=set_,
        patience=patience, publish_every=publish_every, promote=promote, grad_accumulation=grad_accumulation,
        device=device,
    )  # fmt: skip
    terminal.check_budget(plan.minutes, plan.steps)
    info = read_info(taught := resolve(plan.storage, teacher, "denoiser"))
    plan.check("denoiser", base=info.name)
    if (plan.run / "state.pt").exists() and not (plan.run / "setup.json").exists():  # before trajectories are sampled
        raise TrainerError(f"{plan.run} holds the run of another objective; choose another --run")
    if plan.patience:
        raise TrainerError("--patience is for objectives with a held-out loss, which distillation has not")
    where = terminal.pick_device(plan.device)
    source = load_denoiser(taught, device=where)
    sampling, path = objectives.make_samplings(source, sampling_steps, teacher_steps, guidance)
    config = with_changes(objectives.RUN, plan.set_ or [])
    network = objectives.make_student(source, plan.storage, plan.start_from)
    judge = load_judge(resolve(plan.storage, evaluator, "evaluator"), source.vocabulary, where) if evaluator else None
    with terminal.bar() as progress, processes(where) as group:
        dataset = read_folders(plan.data, progress, size=source.image_shape[-1], fit=source.fit)
        dataset = in_vocabulary(dataset, source.vocabulary, source.info.name)
        check_labelled(dataset, "pictures")
        lists = tests_of(plan.data[0], None, dataset.vocabulary)
        # after all checks, so that the corrected command can use the folder
        keep_setup(plan.run, {
            "teacher": source.info.digest, "data": dataset.digest, "guidance": guidance,
            "sampling_steps": sampling_steps, "teacher_steps": teacher_steps,
            **options.given(start_from=plan.start_from),
        })  # fmt: skip
        task = progress.add_task("trajectories", total=count)
        sets = torch.unique(labelled(dataset).labels, dim=0)
        with group.first_alone():
            pool = objectives.make_pool(
                plan.run / "pool", source, sets, count, sampling_steps, path, lambda n: progress.advance(task, n)
            )
        watcher = Watcher(
            source.path, source.vocabulary, dataset.aspect, plan.run, lists, judge, where,
            sampling, source.layouts,
        )  # fmt: skip
        objective = objectives.Distilling(pool, source, sampling, where, watcher)
        details = {
            "method": "trajectories", "teacher": info.name, "teacher_digest": source.info.digest, "guidance": guidance,
        }  # fmt: skip
        training = plan.train(progress, "distilling", objective, network, config, where, **details)
    plan.publish("distilled", objective, training, **details)


@app.command()
def upsampler(
    *,
    data: options.Data,
    storage: options.Storage = Path("models"),
    name: options.Name = "upsampler",
    run: options.RunFolder = Path("runs/upsampler"),
    minutes: options.Minutes = None,
    steps: options.Steps = None,
    start_from: options.StartFrom = None,
    set_: options.Changes = None,
    patience: options.Patience = None,
    publish_every: options.PublishEvery = "10m",
    promote: options.Promote = False,
    grad_accumulation: options.GradAccumulation = 1,
    device: options.DeviceName = "auto",
    base: Annotated[str, typer.Option(help="The denoiser whose pictures are enlarged.")],
    size: Size = None,
    held_out: HeldOut = None,
) -> None:
    """Train an upsampler of a denoiser's pictures, and publish the two. Repeat --data for several folders."""
    from shared.diffusion.model import load_denoiser
    from trainer.config import with_changes
    from trainer.data import read_folders
    from trainer.data_folder import find_pictures
    from trainer.objectives import upsampler as objectives

    plan = Plan(
        data=data, storage=storage, name=name, run=run, minutes=minutes, steps=steps, start_from=start_from, set_=set_,
        patience=patience, publish_every=publish_every, promote=promote, grad_accumulation=grad_accumulation,
        device=device,
    )  # fmt: skip
    terminal.check_budget(plan.minutes, plan.steps)
    enlarged = resolve(plan.storage, base, "denoiser")
    plan.check("denoiser", base=base)
    where, config = terminal.pick_device(plan.device), with_changes(objectives.UpsampleConfig(), plan.set_ or [])
    denoiser = load_denoiser(enlarged, device=where)
    pictures = find_pictures([*plan.data, *(held_out or ())], size)
    network = objectives.make_upsampler(denoiser, pictures.size, config)
    if plan.start_from:
        network.load_state_dict(objectives.starting_weights(plan.storage, plan.start_from, network.config))
    with terminal.bar() as progress:
        read = partial(read_folders, progress=progress, size=denoiser.image_shape[-1])
        dataset, unseen = read(plan.data), plan.read_held_out(held_out, read) if held_out else None
        objective = objectives.Upsampling(dataset, pictures, denoiser, network.config, config, plan.run, unseen)
        training = plan.train(progress, "upsampling", objective, network, config, where, data=plan.folders)
    plan.publish("upsampler trained", objective, training, data=plan.folders)


@app.command()
def one_step(
    *,
    data: options.Data,
    storage: options.Storage = Path("models"),
    name: options.Name = "one-step",
    run: options.RunFolder = Path("runs/one-step"),
    minutes: options.Minutes = None,
    steps: options.Steps = None,
    start_from: options.StartFrom = None,
    set_: options.Changes = None,
    patience: options.Patience = None,
    publish_every: options.PublishEvery = "10m",
    promote: options.Promote = False,
    grad_accumulation: options.GradAccumulation = 1,
    device: options.DeviceName = "auto",
    base: Annotated[str, typer.Option(help="A denoiser that samples in one step, whose pictures' light is kept.")],
    size: Size = None,
    held_out: HeldOut = None,
) -> None:
    """Train a denoiser and an upsampler together, to draw a picture in one network call, on renders with places."""
    from shared.diffusion.model import load_denoiser
    from trainer.config import with_changes
    from trainer.data import read_folders
    from trainer.data_folder import find_pictures
    from trainer.objectives import one_step as objectives
    from trainer.objectives.windows import WindowsAlone

    plan = Plan(
        data=data, storage=storage, name=name, run=run, minutes=minutes, steps=steps, start_from=start_from, set_=set_,
        patience=patience, publish_every=publish_every, promote=promote, grad_accumulation=grad_accumulation,
        device=device,
    )  # fmt: skip
    terminal.check_budget(plan.minutes, plan.steps)
    plan.check("denoiser", source=base)
    where, config = terminal.pick_device(plan.device), with_changes(objectives.OneStepConfig(), plan.set_ or [])
    source = load_denoiser(resolve(plan.storage, base, "denoiser"), device=where)
    start = load_denoiser(resolve(plan.storage, plan.start_from, "denoiser")) if plan.start_from else source
    pictures = find_pictures([*plan.data, *(held_out or ())], size)
    network = objectives.make_networks(source, start, pictures.size, config)
    with terminal.bar() as progress:
        read = partial(read_folders, progress=progress, size=source.image_shape[-1])
        dataset, unseen = read(plan.data), plan.read_held_out(held_out, read) if held_out else None
        upsampler = network.drawing.upsampler.config
        kind = WindowsAlone if config.windows_alone else objectives.OneStep
        objective = kind(dataset, pictures, source, upsampler, config, plan.run, unseen)
        training = plan.train(progress, "training one step", objective, network, config, where)
    plan.publish("one step trained", objective, training, data=plan.folders)
