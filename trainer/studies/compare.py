"""Compares variants of one recipe, as the report did: each is trained under the same budget and scored the same way.

A variant is an entry of VARIANTS: what it changes in BASE. Writes figures and sample grids; `compare_report.py` writes
the report from them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from rich.progress import Progress

from shared import storage as files
from shared.evaluator import Evaluator, cropping_judge
from shared.options import SamplingOptions
from trainer.config import TrainConfig, check_config
from trainer.data import Dataset, read_folders, settled
from trainer.errors import TrainerError
from trainer.objectives.denoiser import Denoising, make_network, path_of
from trainer.objectives.layouts import fit_layouts_of
from trainer.plugins import plugins
from trainer.runs import Budget, keep_setup, read_log, show_progress
from trainer.score import Watcher, save_grid, score_runs
from trainer.train import train

# The shipped network and optimizer with the report's objective. Loss weights and log-normal levels hide most of the
# schedule's influence, so the base has neither. It has no positions, since the report's pictures have none. The short
# average starts early, because the runs are short.
BASE: Final = TrainConfig(
    schedule="sigmoid", prediction="eps", loss_weight="none", noise_levels="uniform", positions=False, batch=32,
    warmup_steps=100, ema_start=200, evaluate_every=10**9,  # but by shares of the budget
)  # fmt: skip
RECIPE: Final = {"schedule": "cosine", "prediction": "v", "loss_weight": "sqrt_snr", "noise_levels": "normal"}
# Name -> what it changes; `network` is merged, all else replaced.
VARIANTS: Final[dict[str, dict[str, Any]]] = {
    "sigmoid": {},
    "linear": {"schedule": "linear"},
    "quadratic": {"schedule": "quadratic"},
    "cosine": {"schedule": "cosine"},
    "channels": {"network": {"conditioning": "channels"}},
    "v": {"prediction": "v"},
    "flow": {"prediction": "flow", "schedule": "flow"},
    "flow-weighted": {**RECIPE, "prediction": "flow", "schedule": "flow"},
    "v-min-snr": {"prediction": "v", "loss_weight": "min_snr"},
    "labels-only": RECIPE,
    "shipped": {**RECIPE, "positions": True},
    "pad-32": {"image_size": 32, "fit": "pad", "network": {"block": 1}},
    **{name: dict(added.recipe) for name, added in plugins().presets.items()},
}
# Title -> the variants in one table and one plot. The first is the one that the others change.
COMPARISONS: Final[dict[str, tuple[str, ...]]] = {
    "Noise schedules, eps": ("sigmoid", "linear", "quadratic", "cosine"),
    "Labels: embedding in every block, or input channels": ("sigmoid", "channels"),
    "What is predicted": ("sigmoid", "v", "flow", "v-min-snr", "labels-only", "flow-weighted"),
    "Positions: unknown, or given": ("labels-only", "shipped"),
    "64x64 squeezed, or 32x32 padded": ("sigmoid", "pad-32", *plugins().presets),
}
DEFAULT: Final = SamplingOptions()
# Other ways to sample the same run, without training again. `ancestral`: in a tenth of all steps.
SAMPLINGS: Final[dict[str, SamplingOptions]] = {
    "default": DEFAULT,
    **{f"w = {w}": DEFAULT.model_copy(update={"guidance": float(w)}) for w in range(1, 7)},
    "w = 3 in [0.2, 0.8]": DEFAULT.model_copy(update={"guidance": 3.0, "guidance_interval": (0.2, 0.8)}),
    "ancestral": SamplingOptions(sampler="ddpm", steps=100, spacing="uniform", guidance=3.0),
}
SWEPT: Final = ("sigmoid", "shipped")  # variants that are sampled in every way and scored with every average
ANCESTRAL: Final = ("linear", "quadratic", "cosine", "pad-32", *plugins().presets)
WEIGHTS: Final = ("long", "short", "raw")
CURVE_POINTS = 8  # scores over a run
GRID_PICTURES = 16


@dataclass(frozen=True)
class Setup:
    """What all variants of a comparison share.

    setup.json keeps it beside the report and beside the runs' states, so that no variant is trained with another.
    """

    data: str
    evaluator: str  # its digest
    tests: dict[str, list[list[str]]]
    minutes: float | None
    steps: int | None
    repeats: int
    changes: list[str] = field(default_factory=list)  # of BASE, in the form of --set


def chosen(only: str | None, *, positions: bool = True) -> list[str]:
    """Return the variants named in `a,b`, or for None all that the data set, with positions or without, allows."""
    allowed = [name for name, changes in VARIANTS.items() if positions or not changes.get("positions")]
    names = [name.strip() for name in only.split(",")] if only else allowed
    if unknown := [name for name in names if name not in VARIANTS]:
        raise TrainerError(f'no variant "{unknown[0]}"; there are {", ".join(VARIANTS)}')
    if impossible := [name for name in names if name not in allowed]:
        raise TrainerError(f'variant "{impossible[0]}" needs positions, and the data set has no positions.json')
    return names


def config_of(name: str, base: TrainConfig = BASE) -> TrainConfig:
    changes = VARIANTS[name]
    network = {**base.network, **changes.get("network", {})}
    return check_config(
        TrainConfig.model_validate({**base.model_dump(exclude_unset=True), **changes, "network": network})
    )


def ways_to_score(name: str, publish: str) -> list[tuple[str, str]]:
    """Return the (weights, sampling) pairs that a trained variant is scored with, (`publish`, "default") first."""
    if name in SWEPT:
        others = [(weights, "default") for weights in WEIGHTS if weights != publish]
        return [(publish, sampling) for sampling in SAMPLINGS] + others
    return [(publish, "default")] + [(publish, "ancestral")] * (name in ANCESTRAL)


def run_variant(
    name: str, config: TrainConfig, dataset: Dataset, folder: Path, out: Path, setup: Setup, evaluator: Evaluator,
    device: torch.device, progress: Progress,
) -> None:  # fmt: skip
    """Train a variant, or resume it in `folder`, and score it in all of its ways with seeds from 0.

    Writes `out`/NAME.json, its log NAME.jsonl, and the sample grid NAME.png of the first way.
    """
    config = settled(config, dataset)
    budget = Budget(setup.minutes, setup.steps)
    layouts = fit_layouts_of(dataset, config, folder / "layouts", budget, show_progress(progress, f"{name}, layouts"))
    watcher = Watcher(
        path_of(config), dataset.vocabulary, dataset.aspect, folder, setup.tests, evaluator, device,
        layouts=layouts,
    )  # fmt: skip
    training = train(
        Denoising(dataset, config, device, watcher), make_network(config, dataset), config, folder, budget,
        device=device, on_step=show_progress(progress, name), evaluations=CURVE_POINTS,
    )  # fmt: skip
    curve = read_log(folder / "log.jsonl")
    (out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in curve))
    judge, scores = cropping_judge(evaluator, dataset.aspect), list[dict[str, Any]]()
    for weights, sampling in progress.track(ways_to_score(name, config.publish), description=f"{name}, scoring"):
        stepper = watcher.stepper(training.averages.network(weights))
        for file, lists in setup.tests.items():
            runs, figures = score_runs(
                stepper, judge, lists, SAMPLINGS[sampling], repeats=setup.repeats, vocabulary=dataset.vocabulary
            )
            if not scores:
                save_grid(runs[0].images[:GRID_PICTURES], out / f"{name}.png")
            del figures["runs"]
            scores.append({"weights": weights, "sampling": sampling, "file": file, **figures})
    result = {
        "variant": name,
        "changes": VARIANTS[name],
        "steps": training.run.step,
        "minutes": round(training.run.elapsed_s / 60, 2),
        "parameters": sum(p.numel() for p in training.network.parameters()),
        "device": str(device),
        "config": training.config.model_dump(mode="json"),
        "scores": scores,
    }
    text = json.dumps(result, indent=1) + "\n"
    files.write(out / f"{name}.json", text.encode())  # last and atomically: it marks a finished variant


def run_comparison(
    names: Sequence[str], base: TrainConfig, data: Path, run: Path, out: Path, setup: Setup, evaluator: Evaluator,
    device: torch.device, progress: Progress,
) -> list[str]:  # fmt: skip
    """Train and score the variants that `out` lacks, one after another; return their names.

    `data`: a data set folder. The states of the runs go to `run`, one folder a variant.
    """
    configs = {name: config_of(name, base) for name in names}  # check all before the first is trained
    for folder in (run, out):
        keep_setup(folder, asdict(setup))
    missing = [name for name in names if not (out / f"{name}.json").exists()]
    for name in missing:
        config = configs[name]
        dataset = read_folders([data], progress, size=config.image_size, fit=config.fit)
        run_variant(name, config, dataset, run / name, out, setup, evaluator, device, progress)
    return missing
