"""Our training loop compared with the course report's and diffusers': `python -m benchmarks.sections.training`.

All train the same network with the same batch size on the same rendered pictures (320x240 PNG, like the course's). The
loops take turns; each includes its own data loading. Also measured: the network alone, our data path alone, rendering,
and fitting the evaluator.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.baselines.training_loops import diffusers_loop, report_loop
from benchmarks.document import Piece, Table, number
from benchmarks.results import Data, main, say
from benchmarks.timing import Deadline, figure, paired, seconds
from iclevr.scenes.render_folder import random_scenes, write_folder
from shared.device import fast, kept_memory, pick_device
from trainer.config import TrainConfig
from trainer.data import Dataset, load_dataset
from trainer.objectives import evaluator
from trainer.objectives.denoiser import Denoising, make_network
from trainer.runs import Budget
from trainer.train import batch_indices, train

OURS, REPORT = "ours", "the course report's loop, fp32"
LIBRARY, LIBRARY_BF16 = "diffusers' loop, fp32 (its default)", "diffusers' loop, bf16"
ALONE = "the network's forward and backward alone, in our precision"
OBJECTS = 3  # in a rendered scene, which gives as many pictures
LIMIT_S = 170.0  # of the section

Loop = Callable[[Callable[[], None]], None]  # trains some steps and calls its argument after each


def our_loop(dataset: Dataset, config: TrainConfig, steps: int, on_step: Callable[[], None]) -> None:
    device, budget = pick_device(), Budget(steps=steps)
    objective, network = Denoising(dataset, config, device), make_network(config, dataset)
    with tempfile.TemporaryDirectory() as folder:
        train(objective, network, config, Path(folder), budget, device=device, on_step=lambda _: on_step())


def network_alone(dataset: Dataset, config: TrainConfig, steps: int, on_step: Callable[[], None]) -> None:
    """Run forward and backward of one batch repeatedly: the upper limit of any loop with this network."""
    device, network, objective = pick_device(), make_network(config, dataset), Denoising(dataset, config, pick_device())
    index = batch_indices(len(objective), config.batch, config.seed, 0)
    inputs = objective.draw(index, slice(0, config.batch), torch.Generator())
    with kept_memory():
        for _ in range(steps):
            with fast(device):
                loss = objective(network.to(device), *(value.to(device) for value in inputs))
            loss.backward()  # type: ignore[no-untyped-call]
            network.zero_grad(set_to_none=True)
            on_step()


def loops(folder: Path, dataset: Dataset, config: TrainConfig, steps: int) -> dict[str, Loop]:
    def fresh() -> torch.nn.Module:
        return make_network(config, dataset)

    return {
        OURS: lambda on_step: our_loop(dataset, config, steps, on_step),
        REPORT: lambda on_step: report_loop(fresh(), folder, config, steps, on_step),
        LIBRARY: lambda on_step: diffusers_loop(fresh(), folder, config, steps, "no", on_step),
        LIBRARY_BF16: lambda on_step: diffusers_loop(fresh(), folder, config, steps, "bf16", on_step),
        ALONE: lambda on_step: network_alone(dataset, config, steps, on_step),
    }


def step_seconds(loop: Loop) -> float:
    """Return the mean seconds of a step, from the end of the first to the end of the last: without set-up."""
    ended: list[float] = []
    loop(lambda: ended.append(time.perf_counter()))
    return (ended[-1] - ended[0]) / (len(ended) - 1)


def taken_in_turn(works: dict[str, Loop], rounds: int, deadline: Deadline) -> dict[str, list[float]]:
    """Return the seconds of a step of each loop in each round; fewer rounds if time runs out."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in deadline.rounds(rounds):
        for name, loop in works.items():
            taken[name].append(step_seconds(loop))
    return taken


def data_path_seconds(dataset: Dataset, config: TrainConfig, steps: int) -> float:
    """Return the seconds per step of drawing pictures, noise and timesteps alone."""
    objective = Denoising(dataset, config, pick_device())

    def draw() -> None:
        for step in range(steps):
            index = batch_indices(len(objective), config.batch, config.seed, step)
            objective.draw(index, slice(0, config.batch), torch.Generator().manual_seed(step))

    draw()
    return seconds(draw) / steps


def rendering(folder: Path, scenes: int) -> tuple[float, float]:
    """Return the pictures/s of rendering at 320x240 and 64x64, compiled."""
    write_folder(folder / "warm", random_scenes(2, OBJECTS, 0), seed=0, size=None)
    large = seconds(lambda: write_folder(folder / "data", random_scenes(scenes, OBJECTS, 1), seed=1, size=None))
    small = seconds(lambda: write_folder(folder / "small", random_scenes(scenes, OBJECTS, 1), seed=1, size=64))
    return OBJECTS * scenes / large, OBJECTS * scenes / small


def evaluator_fitting(dataset: Dataset, folder: Path, steps: int) -> float:
    """Return the pictures/s of fitting the evaluator, with its augmentations."""

    def fit(on_step: Callable[[], None]) -> None:
        device, budget = pick_device(), Budget(steps=steps)
        network = evaluator.make_network(dataset, config.seed, "resnet18")
        train(objective, network, config, folder / "fit", budget, device=device, on_step=lambda _: on_step())

    config, objective = evaluator.RUN, evaluator.Recognising(dataset, dataset)
    return config.batch / step_seconds(fit)


def measure(quick: bool) -> Data:
    scenes, steps, rounds, fits = (6, 2, 1, 2) if quick else (60, 5, 4, 8)
    # without positions, which the other loops cannot provide
    config, deadline = TrainConfig(positions=False, batch=8 if quick else 64), Deadline(LIMIT_S)
    with tempfile.TemporaryDirectory(prefix="lg-bench-") as name:
        folder = Path(name)
        large, small = rendering(folder, scenes)
        data = folder / "data"
        decoding = seconds(lambda: load_dataset(data, size=config.image_size, fit=config.fit))
        dataset = load_dataset(data, size=config.image_size, fit=config.fit)
        say(f"  {len(dataset)} pictures rendered and decoded, {deadline.spent:.0f} s")
        drawn = data_path_seconds(dataset, config, 5 if quick else 20)
        fitted = evaluator_fitting(dataset, folder, fits)
        say(f"  data path and evaluator, {deadline.spent:.0f} s")
        taken = taken_in_turn(loops(data, dataset, config, steps), rounds, deadline)
        say(f"  {len(taken)} loops, {len(taken[OURS])} rounds, {deadline.spent:.0f} s")
    return {
        "figures": {
            "training.speedup_vs_report": paired(taken[REPORT], taken[OURS]),
            "training.speedup_vs_library": paired(taken[LIBRARY], taken[OURS]),
            "training.speedup_vs_library_bf16": paired(taken[LIBRARY_BF16], taken[OURS]),
            "training.pictures_per_s": figure(config.batch / s for s in taken[OURS]),
            "training.network_share": paired(taken[ALONE], taken[OURS]),
            "training.highest_speedup_vs_report": paired(taken[REPORT], taken[ALONE]),
            "training.data_path_share": figure(drawn / s for s in taken[OURS]),
        },
        "batch": config.batch,
        "steps": steps - 1,
        "pictures_per_s": {name: figure(config.batch / s for s in found) for name, found in taken.items()},
        "rendering": {"320x240, 4 rays a pixel": large, "64x64, 1 ray a pixel": small},
        "decoding": len(dataset) / decoding,
        "fitting": fitted,
    }


def report(data: Data) -> list[Piece]:
    table = Table(["loop", "pictures/s", "our speed-up"])
    figures = data["figures"]
    over = {REPORT: "speedup_vs_report", LIBRARY: "speedup_vs_library", LIBRARY_BF16: "speedup_vs_library_bf16"}
    over |= {ALONE: "network_share"}
    for name, rate in data["pictures_per_s"].items():
        ratio = number(figures[f"training.{over[name]}"]["median"]) if name in over else ""
        table.add(name, number(rate["median"]), ratio)
    rendering = ", ".join(f"{number(rate)} at {name}" for name, rate in data["rendering"].items())
    share, drawn, highest = (
        figures[f"training.{key}"]["median"]
        for key in ("network_share", "data_path_share", "highest_speedup_vs_report")
    )
    return [
        f"The same network (10 M parameters, labels without positions), batches of {data['batch']} rendered 320x240 "
        f"PNGs, {data['steps']} steps a round after a first one. The report decodes with PIL and averages the weights "
        "in its loop. diffusers' loop is its training script: accelerate, AdamW, EMAModel and a DataLoader. Ours uses "
        "Muon, clips gradients and keeps two averages.",
        table,
        f"The network's forward and backward take {share:.0%} of our step, drawing the batch {drawn:.1%}. On this "
        f"machine no loop can be more than {number(highest)} times faster than the report's.",
        f"Also in pictures/s: rendering {rendering}; decoding into the cache, once per data set, "
        f"{number(data['decoding'])}; fitting the evaluator {number(data['fitting'])}.",
    ]


if __name__ == "__main__":
    main("training", __doc__, measure)
