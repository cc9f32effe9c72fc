"""Training here against the report's loop and diffusers': `python -m benchmarks.training`.

The same network, batch and rendered pictures (320x240 PNG, as the course's) for all; loops take turns, each as a whole
with its own reading of data. Beside that: our data path alone, rendering, and fitting the evaluator.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.common import Data, figure, in_turn, main, ratios, say, seconds
from benchmarks.document import Table, number
from benchmarks.training_loops import diffusers_loop, report_loop
from shared.device import pick_device
from trainer.config import TrainConfig
from trainer.data import Dataset, load_dataset
from trainer.fit_evaluator import fit_evaluator
from trainer.loss import Denoising, DenoisingLoss
from trainer.render_folder import random_scenes, write_folder
from trainer.train import Budget, batch_indices, make_network, step_generator, train

OURS, REPORT = "ours", "the report's loop, fp32"
LIBRARY, LIBRARY_BF16 = "diffusers' loop, fp32 (its default)", "diffusers' loop, bf16"


def our_loop(dataset: Dataset, config: TrainConfig, steps: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        train(dataset, config, Path(folder), Budget(steps=steps), device=pick_device())


def loops(folder: Path, dataset: Dataset, config: TrainConfig, steps: dict[str, int]) -> dict[str, Callable[[], None]]:
    def fresh() -> torch.nn.Module:
        return make_network(config, dataset)

    return {
        OURS: lambda: our_loop(dataset, config, steps[OURS]),
        REPORT: lambda: report_loop(fresh(), folder, config, steps[REPORT]),
        LIBRARY: lambda: diffusers_loop(fresh(), folder, config, steps[LIBRARY], "no"),
        LIBRARY_BF16: lambda: diffusers_loop(fresh(), folder, config, steps[LIBRARY_BF16], "bf16"),
    }


def step_seconds(
    run: Callable[[dict[str, int]], dict[str, Callable[[], None]]], few: int, many: int, rounds: int
) -> Data:
    """Seconds of one step of each loop, from the difference between a long and a short run: set-up falls out."""
    names = list(run(dict.fromkeys((OURS, REPORT, LIBRARY, LIBRARY_BF16), few)))
    short = in_turn(run(dict.fromkeys(names, few)), rounds, warm=True)
    long = in_turn(run(dict.fromkeys(names, many)), rounds, warm=False)
    return {name: [(b - a) / (many - few) for a, b in zip(short[name], long[name], strict=True)] for name in names}


def data_path_seconds(dataset: Dataset, config: TrainConfig, steps: int) -> float:
    """Seconds of a step's drawing of pictures, noise and timesteps alone."""
    from shared.schedules import alpha_bar

    objective = Denoising(dataset, DenoisingLoss(config, alpha_bar(config.schedule, config.timesteps), pick_device()))

    def draw() -> None:
        for step in range(steps):
            index = batch_indices(len(objective), config.batch, config.seed, step)
            objective.draw(index, slice(0, config.batch), step_generator(config.seed, step))

    draw()
    return seconds(draw) / steps


def rendering(folder: Path, scenes: int) -> tuple[float, float]:
    """Pictures/s of rendering 320x240 and 64x64, after the compiler's first time."""
    write_folder(folder / "warm", random_scenes(2, 3, 0), seed=0, size=None)
    large = 3 * scenes / seconds(lambda: write_folder(folder / "data", random_scenes(scenes, 3, 1), seed=1, size=None))
    small = 3 * scenes / seconds(lambda: write_folder(folder / "s", random_scenes(scenes, 3, 1), seed=1, size=64))
    return large, small


def evaluator_fitting(dataset: Dataset, folder: Path, steps: int) -> float:
    """Pictures/s of fitting the evaluator, with its distortions."""
    from trainer.fit_evaluator import BATCH

    def fit(n: int) -> None:
        fit_evaluator([dataset], dataset, folder / "log.jsonl", steps=n, device=pick_device())

    fit(1)
    return BATCH * steps / max(seconds(lambda: fit(steps + 1)) - seconds(lambda: fit(1)), 1e-9)


def measure(quick: bool) -> Data:
    scenes, few, many, rounds, fits = (12, 1, 2, 1, 1) if quick else (80, 2, 7, 3, 8)
    config = TrainConfig()
    with tempfile.TemporaryDirectory(prefix="lg-bench-") as name:
        folder = Path(name)
        large, small = rendering(folder, scenes)
        say(f"  rendered {3 * scenes} pictures")
        data = folder / "data"
        decoding = 3 * scenes / seconds(lambda: load_dataset(data, size=config.image_size, fit=config.fit))
        dataset = load_dataset(data, size=config.image_size, fit=config.fit)
        taken = step_seconds(lambda steps: loops(data, dataset, config, steps), few, many, rounds)
        say(f"  {len(taken)} loops, {many - few} steps each, {rounds} rounds: done")
        drawn = data_path_seconds(dataset, config, 20)
        fitted = evaluator_fitting(dataset, folder, fits)
    return {
        "figures": {
            "training.speedup_vs_report": figure(ratios(taken[REPORT], taken[OURS])),
            "training.speedup_vs_library": figure(ratios(taken[LIBRARY], taken[OURS])),
            "training.speedup_vs_library_bf16": figure(ratios(taken[LIBRARY_BF16], taken[OURS])),
            "training.pictures_per_s": figure(config.batch / s for s in taken[OURS]),
            "training.data_path_share": figure(drawn / s for s in taken[OURS]),
        },
        "batch": config.batch,
        "steps": many - few,
        "pictures_per_s": {name: figure(config.batch / s for s in found) for name, found in taken.items()},
        "rendering": {"320x240, 4 rays a pixel": large, "64x64, 1 ray a pixel": small},
        "decoding": decoding,
        "fitting": fitted,
    }


def report(data: Data) -> list[str | Table]:
    table = Table(["loop", "pictures/s", "spread", "ours over it"])
    ours = data["pictures_per_s"][OURS]["median"]
    for name, rate in data["pictures_per_s"].items():
        table.add(name, number(rate["median"]), number(rate["spread"]), number(ours / rate["median"]))
    other = Table(["what", "pictures/s"])
    for name, rate in data["rendering"].items():
        other.add(f"rendering {name}", number(rate))
    other.add("decoding into the cache, once for a data set", number(data["decoding"]))
    other.add("fitting the evaluator, distortions and all", number(data["fitting"]))
    share = data["figures"]["training.data_path_share"]["median"]
    return [
        f"The same network (10 M parameters), batch {data['batch']} and rendered 320x240 PNGs for all; {data['steps']} "
        "steps a round, without set-up. The report's loop decodes with PIL in the loop, drops labels by the batch and "
        "averages by a Python loop. diffusers' is its training script: accelerate, AdamW, EMAModel, a DataLoader. Ours "
        "steps with Muon, clips, and keeps two averages.",
        table,
        f"Our data path, drawing pictures, noise and timesteps from the decoded cache, takes {share:.1%} of a step.",
        other,
    ]


if __name__ == "__main__":
    main("training", __doc__, measure)
