"""The training loop on a tiny network: it learns, resumes bit for bit, refuses another recipe, and runs in parallel."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.diffusion.denoise import sample
from shared.diffusion.model import load_denoiser
from shared.diffusion.unet import NetworkConfig, UNet
from shared.options import SamplingOptions
from shared.vocabulary import Vocabulary
from tests.paths import ROOT
from tests.trainer_fixtures import NETWORK, TINY, write_data_folder
from trainer import train as training
from trainer.config import TrainConfig
from trainer.data import Dataset, load_dataset
from trainer.errors import TrainerError
from trainer.runs import Budget, Run
from trainer.train import batch_indices, publish_network, starting_weights, train

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "autocast_dtype", lambda _: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data_folder(tmp_path_factory.mktemp("data") / "d")


@pytest.fixture(scope="module")
def dataset(folder: Path) -> Dataset:
    return load_dataset(folder, size=16)


def _lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def _config(**changes: Any) -> TrainConfig:
    return TrainConfig.model_validate({**TINY.model_dump(), **changes})


def test_the_loss_falls(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "LOG_EVERY", 1)
    config = _config(prediction="eps", loss_weight="none", noise_levels="uniform", schedule="sigmoid", lr=5e-3)
    _, run = train(dataset, config, tmp_path, Budget(steps=80), device=CPU)
    losses = [line["loss"] for line in _lines(tmp_path)]
    assert run.step == len(losses) == 80
    assert losses[0] == pytest.approx(1, abs=0.05)  # a fresh network predicts no noise, whose variance is 1
    assert sum(losses[-20:]) / 20 < 0.75  # measured: 0.67


class StopError(Exception):
    """Interrupts a run."""


def test_a_resumed_run_ends_bit_for_bit_the_same(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(ema_start=2)
    monkeypatch.setattr(training, "SAVE_EVERY_S", -1.0)
    monkeypatch.setattr(training, "LOG_EVERY", 1)
    whole, _ = train(dataset, config, tmp_path / "whole", Budget(steps=6), device=CPU)

    def stop(run: Run) -> None:
        if run.step == 4:  # saved last after step 3
            raise StopError

    monkeypatch.setattr(training, "LOG_EVERY", 2)
    with pytest.raises(StopError):
        train(dataset, config, tmp_path / "parts", Budget(steps=6), device=CPU, on_step=stop)
    again, run = train(dataset, config, tmp_path / "parts", Budget(steps=6), device=CPU)
    assert run.step == 6
    for kind in ("raw", "short", "long"):
        wanted, got = whole.network(kind).state_dict(), again.network(kind).state_dict()
        assert all(torch.equal(wanted[key], got[key]) for key in wanted), kind
    by_step = {line["step"]: line["loss"] for line in _lines(tmp_path / "whole")}
    resumed = _lines(tmp_path / "parts")[-2:]
    assert [line["step"] for line in resumed] == [4, 6]
    assert resumed[0]["loss"] == pytest.approx(by_step[4])  # the mean over the one step since resuming
    assert resumed[1]["loss"] == pytest.approx((by_step[5] + by_step[6]) / 2)


def test_a_finished_run_is_not_trained_further(dataset: Dataset, tmp_path: Path) -> None:
    first, _ = train(dataset, TINY, tmp_path, Budget(steps=1), device=CPU)
    second, run = train(dataset, TINY, tmp_path, Budget(steps=1), device=CPU)
    assert run.step == 1
    assert torch.equal(
        first.network("raw").state_dict()["head.weight"], second.network("raw").state_dict()["head.weight"]
    )


def test_another_recipe_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    train(dataset, TINY, tmp_path, Budget(steps=1), device=CPU)
    with pytest.raises(TrainerError, match=r"state\.pt was started with another lr, seed; choose another --run"):
        train(dataset, _config(lr=1e-4, seed=3), tmp_path, Budget(steps=2), device=CPU)
    with pytest.raises(TrainerError, match=r"state\.pt was started with other data; choose another --run"):
        train(replace(dataset, images=255 - dataset.images), TINY, tmp_path, Budget(steps=2), device=CPU)
    with pytest.raises(TrainerError, match=r"state\.pt was started with another start_from; choose another --run"):
        train(dataset, TINY, tmp_path, Budget(steps=2), device=CPU, start_from="first")
    names = Vocabulary(tuple(reversed(dataset.vocabulary.names)))
    other = Dataset(names, dataset.images, dataset.labels)
    with pytest.raises(TrainerError, match=r"another objects\.json"):
        train(other, TINY, tmp_path, Budget(steps=2), device=CPU)
    (tmp_path / "state.pt").write_bytes(b"broken")
    with pytest.raises(TrainerError, match=r"state\.pt is not the state of a run"):
        train(dataset, TINY, tmp_path, Budget(steps=2), device=CPU)


def test_losses_and_evaluations_are_logged(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "LOG_EVERY", 1)
    seen = []

    def evaluate(network: torch.nn.Module, run: Run) -> dict[str, float]:
        seen.append((run.step, isinstance(network, UNet)))
        return {"test/accuracy": 0.25}

    _, run = train(dataset, TINY, tmp_path, Budget(steps=2), device=CPU, evaluate=evaluate, evaluate_every_s=-1.0)
    assert seen == [(1, True), (2, True), (2, True)]
    assert run.history == [{"test/accuracy": 0.25}] * 3
    lines = _lines(tmp_path)
    assert lines[0].keys() == {"step", "minutes", "loss", "grad_norm", "lr", "pictures"}
    assert [line["pictures"] for line in lines if "pictures" in line] == [8, 16]
    assert sum("test/accuracy" in line for line in lines) == 3
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert events.stat().st_size > 200
    assert b"test/accuracy" in events.read_bytes()


def test_evaluation_by_share_of_the_budget(dataset: Dataset, tmp_path: Path) -> None:
    seen = []

    def evaluate(_: torch.nn.Module, run: Run) -> dict[str, float]:
        seen.append(run.step)
        return {}

    train(dataset, TINY, tmp_path, Budget(steps=8), device=CPU, evaluate=evaluate, evaluate_every_share=0.25)
    assert seen == [2, 4, 6, 8]  # the last once, not twice


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_reported(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "state.tmp").symlink_to("/dev/full")
    with pytest.raises(TrainerError, match=r"state\.pt cannot be written; is the disk full\?"):
        train(dataset, TINY, tmp_path, Budget(steps=1), device=torch.device("cpu"))
    assert not (tmp_path / "state.tmp").is_symlink()


def test_a_diverged_loss_stops_the_run(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="the loss is"):
        train(dataset, _config(lr=1e30, warmup_steps=0, optimizer="adamw"), tmp_path, Budget(steps=9), device=CPU)


@pytest.mark.parametrize("conditioning", ["embedding", "channels"])
def test_a_published_denoiser_loads_and_samples(dataset: Dataset, tmp_path: Path, conditioning: str) -> None:
    config = _config(network={**NETWORK, "conditioning": conditioning}, prediction="eps", schedule="sigmoid")
    averages, _ = train(dataset, config, tmp_path / "run", Budget(steps=1), device=CPU)
    network = averages.network(config.publish)
    denoiser = load_denoiser(publish_network(network, config, dataset, tmp_path, "tiny", {"note": 1}))
    assert (denoiser.prediction, denoiser.info.name, len(denoiser.alpha_bar)) == ("eps", "tiny", 1000)
    assert denoiser.vocabulary == dataset.vocabulary
    assert denoiser.info.training["note"] == 1
    assert denoiser.info.training["config"] == config.model_dump(mode="json")
    assert TrainConfig.model_validate(denoiser.info.training["config"]) == config
    for key, value in network.state_dict().items():
        torch.testing.assert_close(denoiser.network.state_dict()[key], value, rtol=0.01, atol=1e-3)
    images = sample(denoiser.stepper(), dataset.labels[:2], SamplingOptions(steps=2), [1, 2])
    assert images.shape == (2, 3, 16, 16)
    assert images.isfinite().all()


def test_a_run_can_start_from_published_weights(dataset: Dataset, tmp_path: Path) -> None:
    config = _config(lr=1e-12, warmup_steps=0)
    published = UNet(NetworkConfig(num_labels=len(dataset.vocabulary), image_size=config.image_size, **config.network))
    publish_network(published, config, dataset, tmp_path, "first", {})
    start = starting_weights(tmp_path, "first", config, dataset)
    averages, _ = train(dataset, config, tmp_path / "run", Budget(steps=1), device=CPU, start=start)
    for key, value in averages.network("raw").state_dict().items():
        torch.testing.assert_close(value, start[key].float(), rtol=0, atol=1e-6)
    with pytest.raises(TrainerError, match="another schedule"):
        starting_weights(tmp_path, "first", _config(schedule="linear"), dataset)


def test_a_deeper_network_starts_as_the_one_that_it_starts_from(dataset: Dataset, tmp_path: Path) -> None:
    config = _config()
    published = training.make_network(config, dataset)
    for parameter in published.parameters():  # a fresh network predicts zero whatever its blocks do
        torch.nn.init.normal_(parameter, std=0.1)
    publish_network(published, config, dataset, tmp_path, "shallow", {})
    blocks = [count + 1 for count in published.config.decoder_blocks]
    deeper = _config(network={**config.network, "decoder_blocks": blocks})
    start = starting_weights(tmp_path, "shallow", deeper, dataset)
    network = training.make_network(deeper, dataset)
    network.load_state_dict({**network.state_dict(), **start})
    published.load_state_dict(start)
    x, t, keep = torch.randn(2, 3, 16, 16), torch.tensor([3, 500]), torch.tensor([True, False])
    assert len(network.state_dict()) > len(start)
    torch.testing.assert_close(network(x, t, dataset.labels[:2], keep), published(x, t, dataset.labels[:2], keep))

    publish_network(network, deeper, dataset, tmp_path, "deep", {})
    with pytest.raises(TrainerError, match="deep has another network than this run"):
        starting_weights(tmp_path, "deep", config, dataset)


def test_muon_takes_the_inner_matrices_and_adamw_all_else(dataset: Dataset) -> None:
    network = training.make_network(TINY, dataset)
    names = {parameter: name for name, parameter in network.named_parameters()}
    taken = {
        type(optimizer): [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        for optimizer in training.make_optimizers(network, TINY)
    }
    matrices = {name for parameter, name in names.items() if parameter.ndim == 2}
    inner = {name for name in matrices if name.startswith(("encoder", "decoder", "down", "up"))}
    assert {name.split(".")[0] for name in matrices - inner} == {"stem", "head", "conditioning", "time"}
    assert set(taken[torch.optim.Muon]) == inner
    assert sorted(taken[torch.optim.Muon] + taken[torch.optim.AdamW]) == sorted(names.values())
    (only,) = training.make_optimizers(network, _config(optimizer="adamw"))
    assert isinstance(only, torch.optim.AdamW)
    assert sum(len(group["params"]) for group in only.param_groups) == len(names)


def test_an_update_of_muon_has_the_size_of_one_of_adamw(dataset: Dataset) -> None:
    config = _config(lr=1e-3, weight_decay=0.0)
    network = training.make_network(config, dataset)
    muon = training.make_optimizers(network, config)[0]
    before = {weight: weight.detach().clone() for weight in muon.param_groups[0]["params"]}
    for weight in before:
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    muon.step()
    for weight, old in before.items():
        # AdamW's updates have a root mean square of 0.2 to 0.4 times lr (Liu et al. 2025, sec. 2.2)
        assert 0.15 < float((weight.detach() - old).square().mean().sqrt()) / config.lr < 0.25


def test_epochs_see_every_picture_once() -> None:
    seen = torch.cat([batch_indices(10, 4, seed=3, step=step) for step in range(5)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()


# Trains in float32, logs each step, and checks that a wrapper whose destructor may hang is gone before the group ends.
SCRIPT = """
import gc
import sys
import torch.distributed
from torch.nn.parallel import DistributedDataParallel
import trainer.train
from trainer.__main__ import main
trainer.train.autocast_dtype = lambda _: None
trainer.train.LOG_EVERY = 1
end = torch.distributed.destroy_process_group
def end_last():
    assert not any(isinstance(one, DistributedDataParallel) for one in gc.get_objects())
    end()
torch.distributed.destroy_process_group = end_last
sys.exit(main())
"""


OWN_FOLDERS = """
import os
import sys
from trainer.__main__ import main
sys.argv[-1] += "-" + os.environ["RANK"]
sys.exit(main())
"""


def two_processes(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the trainer's command line, as `script` has it, in two processes on the CPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command += [arguments[0], "--device", "cpu", *arguments[1:]]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)


def test_two_processes_train_the_same_network_as_one(
    folder: Path, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "LOG_EVERY", 1)
    config = _config(optimizer="adamw", lr=1e-3, warmup_steps=0, cooldown=0.0)
    start = training.make_network(config, dataset).state_dict()
    one, _ = train(dataset, config, tmp_path / "one", Budget(steps=3), device=CPU)
    (tmp_path / "script.py").write_text(SCRIPT)
    changes = [f"--set={key}={json.dumps(value)}" for key, value in config.model_dump(mode="json").items()]
    arguments = ["--data", str(folder), "--run-folder", str(tmp_path / "two"), "--storage", str(tmp_path)]
    done = two_processes(tmp_path / "script.py", "train", *arguments, "--name", "two", "--steps", "3", *changes)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    two = torch.load(tmp_path / "two" / "state.pt", weights_only=True)
    assert two["step"] == 3
    for key, wanted in one.network("raw").state_dict().items():
        torch.testing.assert_close(two["network"][key], wanted, rtol=0, atol=2e-4)
    moved = max(float((two["network"][key] - start[key]).abs().max()) for key in start)
    assert moved > 1e-3  # ten times the tolerance, so that the comparison can fail
    losses = [[line["loss"] for line in _lines(tmp_path / name) if "loss" in line] for name in ("one", "two")]
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)  # of the whole batch, not of the first process's share
    assert load_denoiser(tmp_path / "two.safetensors").info.training["steps"] == 3


def test_two_processes_that_would_resume_from_different_states_are_refused(
    folder: Path, dataset: Dataset, tmp_path: Path
) -> None:
    """As on two hosts whose folders of one name are not shared. Each would go on with a network of its own."""
    config = _config()
    train(dataset, config, tmp_path / "host-0", Budget(steps=2), device=CPU)
    (tmp_path / "script.py").write_text(OWN_FOLDERS)
    changes = [f"--set={key}={json.dumps(value)}" for key, value in config.model_dump(mode="json").items()]
    arguments = ["--data", str(folder), "--storage", str(tmp_path), "--name", "two", "--steps", "3", *changes]
    done = two_processes(tmp_path / "script.py", "train", *arguments, "--run-folder", str(tmp_path / "host"))
    assert done.returncode == 1
    message = f"{tmp_path / 'host-1'}: is at step 0 here, and at step 2 for the first process"
    assert message in "".join(done.stderr.split("\n"))
    assert not (tmp_path / "two.safetensors").exists()
