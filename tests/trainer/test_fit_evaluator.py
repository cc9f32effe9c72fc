"""Fitting the evaluator: it resumes bit for bit, refuses other data, and does not continue a finished run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from shared.evaluator import Evaluator
from shared.vocabulary import Vocabulary
from tests.trainer_fixtures import write_data_folder
from trainer import fit_evaluator as fitting
from trainer.data import Dataset, load_dataset
from trainer.errors import TrainerError
from trainer.fit_evaluator import fit_evaluator
from trainer.runs import Budget, Run

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small_and_saved_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "BATCH", 4)
    monkeypatch.setattr(fitting, "GROUPS", 1)
    monkeypatch.setattr(fitting, "LOG_EVERY", 1)
    monkeypatch.setattr(fitting, "SAVE_EVERY_S", -1.0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return load_dataset(write_data_folder(tmp_path_factory.mktemp("data") / "d", pictures=12), size=64)


def _fit(dataset: Dataset, folder: Path, steps: int, stop_at: int = 0, seed: int = 0) -> tuple[Evaluator, Run]:
    def on_step(run: Run) -> None:
        if run.step == stop_at:
            raise KeyboardInterrupt

    budget = Budget(steps=steps)
    evaluator, _, run = fit_evaluator(dataset, dataset, folder, budget, seed=seed, device=CPU, on_step=on_step)
    return evaluator, run


def test_a_resumed_run_ends_bit_for_bit_the_same(dataset: Dataset, tmp_path: Path) -> None:
    whole, run = _fit(dataset, tmp_path / "whole", 5)
    assert (run.step, run.resumed_at) == (5, 0)
    with pytest.raises(KeyboardInterrupt):
        _fit(dataset, tmp_path / "parts", 5, stop_at=3)  # saved last after step 2
    torch.manual_seed(99)
    again, run = _fit(dataset, tmp_path / "parts", 5)
    assert (run.step, run.resumed_at) == (5, 2)
    wanted, got = whole.state_dict(), again.state_dict()
    assert all(torch.equal(wanted[key], got[key]) for key in wanted)
    lines = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 3, 4, 5, 5]
    assert lines[2]["loss"] == lines[3]["loss"]
    assert lines[-1].keys() == {"step", "minutes", "accuracy", "exact_match"}


def test_the_average_of_a_short_run_forgets_the_random_weights() -> None:
    network = torch.nn.Linear(1, 1, bias=False)
    average = AveragedModel(network, multi_avg_fn=fitting.update_average)
    for weight in [0.0] + [1.0] * 50:
        torch.nn.init.constant_(network.weight, weight)
        average.update_parameters(network)
    assert average.module.weight.item() > 0.999


def test_time_between_two_processes_does_not_count(dataset: Dataset, tmp_path: Path) -> None:
    """A run that has spent nearly all of its minute takes one more step, however long ago it stopped."""
    _fit(dataset, tmp_path, 1)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    state["elapsed_s"] = 59.9999
    torch.save(state, tmp_path / "state.pt")
    *_, run = fit_evaluator(dataset, dataset, tmp_path, Budget(minutes=1), device=CPU)
    assert (run.resumed_at, run.step) == (1, 2)


def test_a_finished_run_is_not_trained_further(dataset: Dataset, tmp_path: Path) -> None:
    first, _ = _fit(dataset, tmp_path, 1)
    second, run = _fit(dataset, tmp_path, 1)
    assert run.step == run.resumed_at == 1
    assert torch.equal(first.resnet.conv1.weight, second.resnet.conv1.weight)


def test_other_data_or_another_seed_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    _fit(dataset, tmp_path, 1)
    fewer = replace(dataset, images=dataset.images[:6], labels=dataset.labels[:6])
    with pytest.raises(TrainerError, match=r"state\.pt was started with another data, seed; choose another --run"):
        _fit(fewer, tmp_path, 2, seed=1)


def test_held_out_pictures_with_other_labels_are_refused_before_training(dataset: Dataset, tmp_path: Path) -> None:
    held_out = replace(dataset, vocabulary=Vocabulary(tuple(reversed(dataset.vocabulary.names))))
    with pytest.raises(TrainerError, match="the held-out pictures have another vocabulary"):
        fit_evaluator(dataset, held_out, tmp_path / "run", Budget(steps=1), device=CPU)
    assert not (tmp_path / "run").exists()
