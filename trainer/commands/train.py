"""The `train` command's parts: preset and changes, budget, the grid and score taken meanwhile, publishing."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, Final, cast

import torch
from PIL import Image
from rich.progress import Progress
from torch import nn

from shared.checkpoint import NAME, load
from shared.device import autocast_dtype, pick_device
from shared.diffusion.denoise import Network, Stepper, sample
from shared.diffusion.layouts import Layouts
from shared.diffusion.schedules import alpha_bar
from shared.diffusion.unet import NetworkConfig
from shared.evaluator import Evaluator, judge_of, load_evaluator
from shared.options import SAMPLING_PRESETS, SamplingOptions, picture_seed
from shared.pictures import grid
from shared.registry import resolve
from shared.storage import Location
from shared.vocabulary import Vocabulary, read_test_file
from trainer.commands.terminal import note_unseen
from trainer.config import PRESETS, REPORT_EPOCHS, TrainConfig
from trainer.data import Dataset, positions_told
from trainer.errors import TrainerError
from trainer.score import check_vocabularies, score_run, targets_of
from trainer.train import Budget, Run, checkpoint_config, make_network, publish_network, train

FROM_DATA: Final = {"num_labels", "image_size", "image_channels", "positions"}
GRID_PICTURES: Final = 32
SAMPLING: Final = SAMPLING_PRESETS["default"]  # few steps, since grids and scores are taken while a run waits


def make_config(preset: str, changes: list[str]) -> TrainConfig:
    """The preset with `field=value` changes; a value is JSON or, failing that, text. `network.x=...` reaches inside."""
    if preset not in PRESETS:
        raise TrainerError(f'no preset "{preset}"; there are {", ".join(PRESETS)}')
    return check_config(changed(PRESETS[preset], changes))


def changed(config: TrainConfig, changes: list[str]) -> TrainConfig:
    """`config` with `field=value` changes, as `make_config` reads them; pydantic's ValidationError for a bad one."""
    values: dict[str, Any] = config.model_dump()
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise TrainerError(f'--set "{change}" is not of the form field=value')
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        if key.startswith("network.") and isinstance(values["network"], dict):
            values["network"][key.removeprefix("network.")] = value
        else:
            values[key] = value
    return TrainConfig.model_validate(values)


def check_config(config: TrainConfig) -> TrainConfig:
    """The same, once its network fits its pictures and sets nothing that follows from the data."""
    if given := FROM_DATA & set(config.network):
        raise TrainerError(f"network.{min(given)} cannot be set: it follows from the data set and image_size")
    NetworkConfig.model_validate({**config.network, "num_labels": 1, "image_size": config.image_size})
    return config


def check_name(name: str) -> None:
    """Refuses a checkpoint's name before the training, not after it."""
    if not NAME.fullmatch(name):
        raise TrainerError(f'"{name}" is no checkpoint name: letters, digits, ".", "_" and "-"')


def make_budget(preset: str, minutes: float | None, steps: int | None) -> Budget:
    if minutes is not None and not math.isfinite(minutes):
        raise TrainerError(f"--minutes {minutes} is not a length of time")
    if not minutes and not steps and preset != "report":
        raise TrainerError("say how long: --minutes or --steps")
    return Budget(minutes, steps)


class Watcher:
    """Looks at the averaged network while it trains: a grid of the first test file, and each file's score."""

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        folder: Path,
        tests: dict[str, list[list[str]]],
        evaluator: Evaluator | None,
        device: torch.device,
        options: SamplingOptions = SAMPLING,
    ) -> None:
        self.options = options
        self.config, self.vocabulary, self.folder = config, dataset.vocabulary, folder
        self.judge = judge_of(evaluator, dataset.aspect) if evaluator else None
        self.tests, self.device = tests, device
        positions = positions_told(config, dataset)
        self.layouts = None if positions is None else Layouts.of(positions)

    def stepper(self, network: nn.Module) -> Stepper:
        """The loop that samples of `network`, which it puts into evaluation mode."""
        return Stepper(
            cast(Network, network.eval()), alpha_bar(self.config.schedule, self.config.timesteps),
            self.config.prediction, device=self.device, dtype=autocast_dtype(self.device), layouts=self.layouts,
        )  # fmt: skip

    def __call__(self, network: nn.Module, run: Run) -> dict[str, float]:
        was_training = network.training
        stepper = self.stepper(network)
        figures: dict[str, float] = {}
        for i, (name, lists) in enumerate(self.tests.items()):
            if self.judge:
                scored = score_run(stepper, self.judge, lists, self.options, seed=0)
                images, found = scored.images, scored.score
                figures |= {
                    f"{name}/accuracy": found.accuracy,
                    f"{name}/exact_match": found.exact_match,
                    f"{name}/f1": found.f1,
                }
            elif i == 0:
                lists = lists[:GRID_PICTURES]
                images = sample(
                    stepper,
                    targets_of(lists, self.vocabulary),
                    self.options,
                    [picture_seed(0, i) for i in range(len(lists))],
                )
            if i == 0:
                Image.fromarray(grid(images[:GRID_PICTURES])).save(self.folder / f"samples-{run.step:07d}.png")
        network.train(was_training)
        return figures


def tests_of(data: Path, files: list[Path] | None, vocabulary: Vocabulary) -> dict[str, list[list[str]]]:
    """Name -> label lists of the given test files, or of those that lie in the data set's folder."""
    if files is None:
        files = [path for path in (data / "test.json", data / "new_test.json") if path.exists()]
    return {path.stem: read_test_file(path, vocabulary) for path in files}


def starting_weights(storage: Location, name: str, config: TrainConfig, dataset: Dataset) -> dict[str, torch.Tensor]:
    """The weights of a published denoiser. TrainerError where they are of another network, schedule or vocabulary.

    One that knew no positions may be started from by a run that tells them.
    """
    info, weights = load(resolve(storage, name, "denoiser"))
    if base := info.config.get("base"):
        raise TrainerError(f"{name} is an adapter; start from what it changes, {base['name']}")
    if info.vocabulary != dataset.vocabulary.names:
        raise TrainerError(f"{name} has another vocabulary than the data set; it cannot be started from")
    wanted = checkpoint_config(config, make_network(config, dataset), dataset.aspect)
    found = {"aspect": dataset.aspect, **info.config, "network": {"positions": False, **info.config["network"]}}
    if wanted["network"]["positions"]:
        found["network"]["positions"] = True
    if different := [key for key in wanted if wanted[key] != found.get(key)]:
        raise TrainerError(f"{name} has another {', '.join(different)} than this run; it cannot be started from")
    weights.pop("layouts", None)  # the run publishes those of its own data
    return weights


def run_training(
    dataset: Dataset,
    data: list[Path],
    config: TrainConfig,
    folder: Path,
    budget: Budget,
    *,
    storage: Location,
    name: str,
    start_from: str | None,
    evaluator: str | None,
    tests: list[Path] | None,
    device: str,
    evaluate_every_s: float,
    progress: Progress,
) -> tuple[Location, Run]:
    """Trains and publishes; the checkpoint carries the recipe, the budget spent and the last figures."""
    where = pick_device(device)
    judge = load_evaluator(resolve(storage, evaluator, "evaluator"), where) if evaluator else None
    if judge:
        check_vocabularies(dataset.vocabulary, judge.vocabulary)
    if budget.minutes is None and budget.steps is None:
        budget = Budget(steps=math.ceil(REPORT_EPOCHS * len(dataset) / config.batch))
    start = starting_weights(storage, start_from, config, dataset) if start_from else None
    folder.mkdir(parents=True, exist_ok=True)
    task = progress.add_task("training (per mille)", total=1000)

    def on_step(run: Run) -> None:
        rate = run.step * config.batch / max(run.elapsed_s, 1e-9)
        status = f"step {run.step}  loss {run.loss:.4f}  {rate:.0f} pictures/s"
        progress.update(task, completed=min(1000, int(1000 * run.progress)), status=status)

    watcher = Watcher(config, dataset, folder, tests_of(data[0], tests, dataset.vocabulary), judge, where)
    note_unseen(dataset)
    averages, run = train(
        dataset,
        config,
        folder,
        budget,
        device=where,
        start=start,
        start_from=start_from,
        on_step=on_step,
        evaluate=watcher,
        evaluate_every_s=evaluate_every_s,
    )
    training = {
        "data": ", ".join(one.name for one in data),
        "pictures": len(dataset),
        "steps": run.step,
        "minutes": round(run.elapsed_s / 60, 1),
    }
    training |= {"pictures_seen": run.step * config.batch, "last": run.history[-1] if run.history else {}}
    training |= {"started_from": start_from} if start_from else {}
    network = averages.network(config.publish)
    if int(os.environ.get("RANK", "0")):
        return storage / f"{name}.safetensors", run
    return publish_network(network, config, dataset, storage, name, training), run
