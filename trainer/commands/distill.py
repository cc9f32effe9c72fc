"""`python -m trainer distill`: which teacher, which of the two methods, the budget, publishing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from trainer.commands.terminal import DeviceName, Existing, Minutes, Steps, Storage, bar, done, read_dataset, show
from trainer.errors import TrainerError

Method = Literal["guidance", "trajectories"]


def distill(
    data: Annotated[Path, Existing],
    name: Annotated[str, typer.Option(help="The new checkpoint's name.")],
    method: Annotated[
        Method,
        typer.Option(
            help="guidance: into the network, one row a step. trajectories: several steps of the teacher's in one."
        ),
    ],
    teacher: Annotated[
        str | None, typer.Option(help="Name of the denoiser to distil; the promoted one by default.")
    ] = None,
    guidance: Annotated[float, typer.Option(min=1, max=20, help="The teacher's w.")] = 3.0,
    sampling_steps: Annotated[
        int | None, typer.Option(min=1, max=100, help="Steps of the new checkpoint: 8, or 4 for trajectories.")
    ] = None,
    teacher_steps: Annotated[int, typer.Option(min=1, help="The teacher's steps, for trajectories.")] = 16,
    count: Annotated[int, typer.Option("--trajectories", min=1, help="How many of the teacher's are made.")] = 8192,
    rank: Annotated[int, typer.Option(min=1, help="Of the changes to the network's matrices.")] = 16,
    storage: Storage = Path("models"),
    run: Annotated[Path, typer.Option(help="Folder for state, log, grids and trajectories.")] = Path("runs/distill"),
    minutes: Minutes = None,
    steps: Steps = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Change a field of the training: --set lr=0.0005. Repeatable.")
    ] = None,
    evaluator: Annotated[
        str | None, typer.Option(help="Name of the evaluator whose score is logged (not trained on).")
    ] = None,
    evaluate_minutes: Annotated[float, typer.Option(min=0.1, help="Minutes between sample grids and scores.")] = 10.0,
    device: DeviceName = "auto",
) -> None:
    """Distil a denoiser into one of fewer network rows a picture. To resume, run the same command again."""
    import torch

    from shared.checkpoint import load
    from shared.device import pick_device
    from shared.diffusion.model import load_denoiser
    from shared.evaluator import load_evaluator
    from shared.options import SamplingOptions
    from shared.registry import resolve
    from trainer import distill as distillation
    from trainer.commands.train import Watcher, check_name, make_budget, tests_of
    from trainer.loss import Objective
    from trainer.run_log import keep_setup
    from trainer.score import check_vocabularies
    from trainer.train import train

    budget = make_budget("", minutes, steps)
    check_name(name)
    student_steps = sampling_steps or (8 if method == "guidance" else 4)
    if method == "trajectories" and teacher_steps % student_steps:
        raise TrainerError(f"--teacher-steps {teacher_steps} must be a multiple of --sampling-steps {student_steps}")
    where = pick_device(device)
    source = load_denoiser(resolve(storage, teacher, "denoiser"), device=where)
    adapter = source.info.config.get("base")
    base = load_denoiser(resolve(storage, adapter["name"], "denoiser"), device=where) if adapter else source
    start = load(resolve(storage, source.info.name, "denoiser"))[1] if adapter else None
    config = distillation.make_config(source.info, set_ or [])
    if adapter and rank != (had := source.info.training.get("rank")):
        raise TrainerError(f"{source.info.name} has changes of rank {had}; they go on with --rank {had}")
    torch.manual_seed(config.seed)
    network = distillation.AdaptedNetwork(base.network, rank, start)
    judge = load_evaluator(resolve(storage, evaluator, "evaluator"), where) if evaluator else None
    if judge:
        check_vocabularies(source.vocabulary, judge.vocabulary)
    keep_setup(run, {
        "teacher": source.info.digest, "method": method, "guidance": guidance, "rank": rank,
        "sampling_steps": student_steps, "teacher_steps": teacher_steps,
    })  # fmt: skip
    with bar() as progress:
        dataset = read_dataset(data, progress, size=source.image_shape[-1], fit=config.fit)
        if dataset.vocabulary != source.vocabulary:
            raise TrainerError(f"{data} has another vocabulary than {source.info.name}")
        objective: Objective
        if method == "guidance":
            options = SamplingOptions(steps=student_steps, guidance=1.0)
            objective = distillation.guided(dataset, config, source, guidance, where)
        else:
            options = SamplingOptions(sampler="ddim", steps=student_steps, guidance=1.0)
            w = 1.0 if adapter else guidance
            path = SamplingOptions(sampler="dpmpp_2m", steps=teacher_steps, guidance=w)
            pool_task = progress.add_task("trajectories", total=count)
            lists = torch.unique(dataset.labels, dim=0)
            pool = distillation.make_pool(
                run / "pool", source, lists, count, student_steps, path, lambda n: progress.advance(pool_task, n)
            )
            objective = distillation.Trajectories(pool, source, where)
        task = progress.add_task("distilling (per mille)", total=1000)
        averages, state = train(
            dataset, config, run, budget, device=where, network=network, objective=objective,
            on_step=lambda now: progress.update(
                task, completed=min(1000, int(1000 * now.progress)), status=f"step {now.step} loss {now.loss:.4f}"
            ),
            evaluate=Watcher(config, dataset, run, tests_of(data, None, dataset.vocabulary), judge, where, options),
            evaluate_every_s=60 * evaluate_minutes,
        )  # fmt: skip
    training = {"method": method, "teacher": source.info.name, "teacher_digest": source.info.digest, "rank": rank}
    training |= {"guidance": guidance, "steps": state.step, "minutes": round(state.elapsed_s / 60, 1)}
    training |= {"examples_seen": state.step * config.batch, "config": config.model_dump(mode="json")}
    training |= {"last": state.history[-1]} if state.history else {}
    published = distillation.publish_adapter(
        cast(distillation.AdaptedNetwork, averages.network(config.publish)), base.info, storage, name, options, training
    )
    show("distilled", [*done(state), ("checkpoint", str(published))])
