"""The training loop on a straight line: it learns, resumes bit for bit, keeps the best, stops, and runs in parallel.

What it learns of each objective is tested in tests/trainer/objectives/.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared import device
from shared.diffusion.layouts import LayoutConfig, LayoutNetwork
from shared.diffusion.model import load_denoiser
from shared.evaluator import Evaluator
from shared.vocabulary import Vocabulary
from tests.paths import ROOT
from tests.trainer.test_positions import rendered
from tests.trainer_fixtures import TINY
from trainer import train as training
from trainer.config import RunConfig
from trainer.errors import StoppedError, TrainerError
from trainer.objectives.denoiser import Denoising, make_network
from trainer.processes import Processes
from trainer.runs import Budget, Every, Run, log_samples
from trainer.train import Objective, Training, batch_indices, make_optimizers, train

CPU = torch.device("cpu")
CONFIG = RunConfig(batch=4, lr=0.05, warmup_steps=0, cooldown=0.0, ema_start=2)
EVERY_STEP = CONFIG.model_copy(update={"evaluate_every": 1})


def in_precision(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype | None) -> None:
    for module in (training, device):
        monkeypatch.setattr(module, "autocast_dtype", lambda _: dtype)


@pytest.fixture(autouse=True)
def _in_float32_and_each_step_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    in_precision(monkeypatch, None)
    monkeypatch.setattr(training, "LOG_EVERY", 1)


@dataclass
class Line:
    """y = 3 x, with noise from the step's generator. Evaluations get the figures of `shown`, one after another."""

    shown: Iterator[dict[str, float]] = field(default_factory=lambda: iter(()))
    digest: str = "line"
    name: str = "line"
    scale: float = 1.0
    folder: Path | None = None  # for sample grids

    @property
    def source(self) -> dict[str, Any]:
        return {"data set": self.digest}

    def __len__(self) -> int:
        return 10

    def draw(self, index: Tensor, share: slice, generator: torch.Generator) -> list[Tensor]:
        noise = torch.randn(len(index), 1, generator=generator)
        x = index[:, None].float() / 10
        return [x[share], (3 * x + 0.01 * noise)[share]]

    def __call__(self, network: nn.Module, *inputs: Tensor) -> Tensor:
        x, y = inputs
        return self.scale * F.mse_loss(network(x), y)

    def show(self, network: nn.Module, run: Run) -> dict[str, float]:
        assert not network.training
        if self.folder:
            log_samples(self.folder, np.zeros((4, 4, 3), np.uint8), run.step)
        return next(self.shown, {})

    def publish(self, *_: Any) -> Path:
        raise AssertionError("the loop publishes nothing")


def line() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.1), nn.BatchNorm1d(8), nn.Linear(8, 1))


def fit(folder: Path, steps: int, config: RunConfig = CONFIG, shown: Any = (), **options: Any) -> Training:
    objective: Objective = Line(iter(shown), folder=folder)
    return train(objective, line(), config, folder, Budget(steps=steps), device=CPU, **options)


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(text) for text in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [one["loss"] for one in lines(folder) if "loss" in one]


class StopError(Exception):
    """Interrupts a run."""


def test_a_resumed_run_ends_bit_for_bit_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY_S", -1.0)
    whole = fit(tmp_path / "whole", 6)

    def stop(run: Run) -> None:
        if run.step == 4:  # saved last after step 3
            raise StopError

    monkeypatch.setattr(training, "LOG_EVERY", 2)
    with pytest.raises(StopError):
        fit(tmp_path / "parts", 6, on_step=stop)
    torch.manual_seed(99)
    again, finished = fit(tmp_path / "parts", 6), fit(tmp_path / "parts", 6)
    assert (again.run.step, again.run.resumed_at, finished.run.resumed_at) == (6, 3, 6)
    for kind in ("raw", "short", "long"):
        wanted, *got = (one.averages.network(kind).state_dict() for one in (whole, again, finished))
        assert all(torch.equal(wanted[key], one[key]) for one in got for key in wanted), kind
    each = losses(tmp_path / "whole")
    resumed = losses(tmp_path / "parts")[-2:]
    assert resumed[0] == pytest.approx(each[3])  # the mean over the one step since resuming
    assert resumed[1] == pytest.approx((each[4] + each[5]) / 2)


def test_time_between_two_processes_does_not_count(tmp_path: Path) -> None:
    """A run that has spent nearly all of its minute takes one more step, however long ago it stopped."""
    fit(tmp_path, 1)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    torch.save({**state, "elapsed_s": 59.9999}, tmp_path / "state.pt")
    assert train(Line(), line(), CONFIG, tmp_path, Budget(minutes=1), device=CPU).run.step == 2


def test_another_recipe_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, 1)
    for objective, changes, options, what in (
        (Line(), {"lr": 1e-4}, {}, "lr"),
        (Line(), {}, {"start_from": "first"}, "start_from"),
        (Line(digest="others"), {"lr": 1e-4}, {}, "data set"),
        (Line(name="curve", digest="others"), {}, {}, "objective"),
    ):
        config = CONFIG.model_copy(update=changes)
        with pytest.raises(TrainerError, match=rf"state\.pt was started with another {what}; choose another --run"):
            train(objective, line(), config, tmp_path, Budget(steps=2), device=CPU, **options)
    with pytest.raises(TrainerError, match="holds a network of another shape; choose another --run"):
        train(Line(), nn.Linear(1, 1), CONFIG, tmp_path, Budget(steps=2), device=CPU)
    (tmp_path / "state.pt").write_bytes(b"broken")
    with pytest.raises(TrainerError, match=r"state\.pt is not the state of a run"):
        fit(tmp_path, 2)


def test_a_run_may_be_evaluated_at_other_steps_when_it_is_resumed(tmp_path: Path) -> None:
    """How often that is does not change what is learnt."""
    seldom, often = (CONFIG.model_copy(update={"evaluate_every": every}) for every in (3, 2))
    whole = fit(tmp_path / "whole", 6, seldom)
    fit(tmp_path / "parts", 3, seldom, shown=figures(0.5))
    again = fit(tmp_path / "parts", 6, often, shown=figures(0.4, 0.3))
    assert (again.run.resumed_at, again.config.evaluate_every) == (3, 2)
    assert [one["step"] for one in lines(tmp_path / "parts") if "held_out_loss" in one] == [3, 4, 6]
    for kind in ("raw", "short", "long"):
        wanted, got = (one.averages.network(kind).state_dict() for one in (whole, again))
        assert all(torch.equal(wanted[key], got[key]) for key in wanted), kind


def test_figures_are_logged(tmp_path: Path) -> None:
    run = fit(tmp_path, 2, EVERY_STEP, shown=({"test/accuracy": 0.25}, {"test/accuracy": 0.5})).run
    assert run.history == [{"test/accuracy": 0.25}, {"test/accuracy": 0.5}]
    logged = lines(tmp_path)
    assert logged[0].keys() == {"step", "minutes", "loss", "grad_norm", "lr", "pictures"}
    assert [one["pictures"] for one in logged if "pictures" in one] == [4, 8]
    assert [one["step"] for one in logged if "test/accuracy" in one] == [1, 2]
    (events,) = (tmp_path / "tensorboard").iterdir()  # TensorBoard shows one file of a run
    content = events.read_bytes()
    assert content.count(b"samples") == 2
    assert content.rindex(b"grad_norm") > content.index(b"samples")


def test_evaluation_by_share_of_the_budget(tmp_path: Path) -> None:
    progress: list[float] = []
    shown = ({"f1": i} for i in range(9))
    fit(tmp_path, 8, shown=shown, evaluations=4, on_step=lambda run: progress.append(run.progress))
    assert [one["step"] for one in lines(tmp_path) if "f1" in one] == [2, 4, 6, 8]  # the last once, not twice
    assert progress == [step / 8 for step in range(1, 9)]


def figures(*losses: float) -> list[dict[str, float]]:
    return [{"held_out_loss": one, "test/exact_match": 1 - one} for one in losses]


def test_the_best_weights_are_kept_beside_the_last(tmp_path: Path) -> None:
    short = fit(tmp_path / "short", 2, EVERY_STEP)
    trained = fit(tmp_path / "run", 4, EVERY_STEP, shown=figures(0.5, 0.25, 0.75, 0.5))
    assert trained.best is not None
    assert (trained.best.step, trained.best.worse_since) == (2, 2)
    weights = short.averaged.state_dict()
    assert all(torch.equal(trained.best.weights[key], weights[key]) for key in weights)
    resumed = fit(tmp_path / "run", 5, EVERY_STEP, shown=figures(0.3))
    assert resumed.best is not None
    assert (resumed.best.step, resumed.best.worse_since) == (2, 3)


def test_test_files_do_not_choose_the_best_weights(tmp_path: Path) -> None:
    shown = [{"test/exact_match": one} for one in (0.2, 0.9, 0.1)]
    assert fit(tmp_path, 3, EVERY_STEP, shown=shown, patience=1).best is None


def test_a_run_that_was_interrupted_evaluates_at_the_same_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY_S", -1.0)
    config = CONFIG.model_copy(update={"evaluate_every": 2})
    for steps in (1, 2, 3, 5):  # the end of a run is evaluated too
        fit(tmp_path, steps, config, shown=figures(0.5, 0.5))
    assert [one["step"] for one in lines(tmp_path) if "held_out_loss" in one] == [1, 2, 3, 4, 5]


def test_patience_ends_a_run_and_its_progress_at_all_of_it(tmp_path: Path) -> None:
    seen: list[float] = []
    shown = figures(0.5, 0.4, 0.45, 0.5, 0.1)
    run = fit(tmp_path, 9, EVERY_STEP, shown=shown, patience=2, on_step=lambda run: seen.append(run.progress)).run
    assert (run.step, seen[-1]) == (4, 1.0)
    assert fit(tmp_path, 9, EVERY_STEP, patience=2).run.step == 4  # the same command again does not go on


class Falling(Line):
    """Diverges from step 4 on, unless the rate has fallen to a quarter."""

    run = Run()

    def __call__(self, network: nn.Module, *inputs: Tensor) -> Tensor:
        falls = self.run.step >= 3 and self.run.rate > 0.25
        return super().__call__(network, *inputs) * (torch.nan if falls else 1.0)

    def watch(self, run: Run) -> None:
        self.run = run


def test_a_diverged_run_goes_back_to_its_last_state_with_half_the_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = Falling()
    monkeypatch.setattr(training, "SAVE_EVERY_S", -1.0)
    done = train(objective, line(), CONFIG, tmp_path, Budget(steps=6), device=CPU, on_step=objective.watch)
    assert (done.run.step, done.run.rate) == (6, 0.25)
    logged = lines(tmp_path)
    assert [one for one in logged if "diverged_at" in one] == [
        {"step": 3, "minutes": pytest.approx(0, abs=1), "diverged_at": 4, "rate": rate} for rate in (0.5, 0.25)
    ]
    assert [one["step"] for one in logged if "loss" in one] == [1, 2, 3, 4, 5, 6]
    assert [one["lr"] for one in logged if "loss" in one] == pytest.approx([0.05] * 3 + [0.0125] * 3)
    assert torch.load(tmp_path / "state.pt", weights_only=True)["rate"] == 0.25  # also of a resumed run


def test_a_run_that_always_diverges_ends_and_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "LOG_EVERY", 50)
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf), also with 0\.03125 of lr=0\.05; lower lr"):
        train(Line(scale=torch.inf), line(), CONFIG, tmp_path, Budget(steps=3), device=CPU)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert (state["step"], all(value.isfinite().all() for value in state["network"].values())) == (0, True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_publishes_and_the_same_command_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    whole, before = fit(tmp_path / "whole", 6), signal.getsignal(number)
    published: list[int] = []

    def on_step(run: Run) -> None:
        if run.step == 3:
            os.kill(os.getpid(), number)

    with pytest.raises(StoppedError, match=f"stopped by {number.name} at step 3; the same command goes on from there"):
        fit(tmp_path / "run", 6, on_step=on_step, publish=lambda training: published.append(training.run.step))
    assert (published, signal.getsignal(number)) == ([3], before)
    warming_up = CONFIG.model_copy(update={"warmup_steps": 3})
    with pytest.raises(StoppedError):  # nothing that is worth a former checkpoint of its name
        fit(tmp_path / "new", 6, warming_up, on_step=on_step, publish=lambda _: published.append(0))
    assert published == [3]
    again = fit(tmp_path / "run", 6)
    assert again.run.resumed_at == 3
    weights = whole.network.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in again.network.state_dict().items())


@pytest.mark.parametrize(("every", "wanted"), [("2", [2, 4]), ("0", []), ("0.0000001m", [1, 2, 3, 4])])
def test_a_run_is_published_while_it_goes_on(tmp_path: Path, every: str, wanted: list[int]) -> None:
    published: list[int] = []
    fit(
        tmp_path, 5, publish=lambda training: published.append(training.run.step), publish_every=Every.parse(every)
    )  # fmt: skip
    assert published == wanted  # its end is the caller's to publish


@pytest.mark.parametrize("text", ["ten", "-1", "nanm", "1.5"])
def test_what_is_no_interval_is_refused(text: str) -> None:
    with pytest.raises(TrainerError, match=f'"{text}" is neither minutes, as 10m, nor steps, as 500'):
        Every.parse(text)


def test_parts_of_a_batch_add_up_to_its_gradient(tmp_path: Path) -> None:
    """Without batch norm and dropout, which see one part at a time."""
    trained = []
    for accumulation in (1, 2, 4):
        network = line()
        network[1], network[2] = nn.Identity(), nn.Identity()  # type: ignore[operator]
        run = tmp_path / str(accumulation)
        trained.append(train(Line(), network, CONFIG, run, Budget(steps=3), device=CPU, grad_accumulation=accumulation))
        assert losses(run) == pytest.approx(losses(tmp_path / "1"), rel=1e-5)
        for key, value in network.state_dict().items():
            torch.testing.assert_close(value, trained[0].network.state_dict()[key], rtol=1e-5, atol=1e-6)
    with pytest.raises(TrainerError, match="batch 4 must be a multiple of 1 processes times --grad-accumulation 3"):
        fit(tmp_path / "3", 1, grad_accumulation=3)


def test_auto_is_the_faster_optimizer_here_and_stays_that_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = CONFIG.model_copy(update={"optimizer": "auto"})
    assert fit(tmp_path / "slow", 1, auto).config.optimizer == "adamw"
    in_precision(monkeypatch, torch.bfloat16)
    assert fit(tmp_path / "slow", 2, auto).config.optimizer == "adamw"
    assert fit(tmp_path / "fast", 1, auto).config.optimizer == "muon"
    with pytest.raises(TrainerError, match="another optimizer"):
        fit(tmp_path / "slow", 3, CONFIG.model_copy(update={"optimizer": "muon"}))


def test_in_float16_steps_whose_gradients_overflow_are_left_out_and_the_scale_falls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU without bfloat16. The loss is so large that only a small scale leaves its gradients finite."""
    fit(tmp_path / "elsewhere", 1)
    in_precision(monkeypatch, torch.float16)
    assert fit(tmp_path / "elsewhere", 2).run.step == 2  # goes on with a scale, though its state has none
    auto = CONFIG.model_copy(update={"optimizer": "auto"})
    done = train(Line(scale=100.0), line(), auto, tmp_path, Budget(steps=8), device=CPU)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    scale = state["scaler"]["scale"]
    assert (done.config.optimizer, scale < 2.0**16) == ("adamw", True)
    steps_taken = {int(one["step"]) for one in state["optimizers"][0]["state"].values()}
    assert steps_taken == {8 - round(np.log2(2.0**16 / scale))}  # each overflow halves it
    assert all(one["grad_norm"] == 0 for one in lines(tmp_path)[: 8 - steps_taken.pop()])
    again = train(Line(scale=100.0), line(), auto, tmp_path, Budget(steps=9), device=CPU)
    assert again.scaler.get_scale() <= scale  # goes on from the state's, not from that of a new run


def test_in_float16_a_gradient_that_overflows_at_any_scale_is_divergence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_precision(monkeypatch, torch.float16)
    monkeypatch.setattr(training, "LOG_EVERY", 20)
    with pytest.raises(FloatingPointError, match=r"the gradient overflows at any scale, also with 0\.03125"):
        train(Overflowing(), line(), CONFIG, tmp_path, Budget(steps=40), device=CPU)


class Overflowing(Line):
    """A finite loss whose gradient is not."""

    def __call__(self, network: nn.Module, *inputs: Tensor) -> Tensor:
        (x, y), root = inputs, torch.zeros((), requires_grad=True)
        return F.mse_loss(network(x), y) * (1 + (root * network(x).sum()).abs().sqrt())


def test_examples_drawn_ahead_are_those_of_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a run has gone back, and after a resumption."""
    monkeypatch.setattr(training, "SAVE_EVERY_S", -1.0)
    found = []
    for wanted in (False, True):
        monkeypatch.setattr(training, "draws_ahead", lambda _, wanted=wanted: wanted)
        folder, falling = tmp_path / str(wanted), Falling()
        for steps in (6, 9):
            done = train(falling, line(), CONFIG, folder, Budget(steps=steps), device=CPU, on_step=falling.watch)
        found.append((losses(folder), [value.tolist() for value in done.network.state_dict().values()]))
    assert found[0] == found[1]


def test_muon_takes_the_inner_matrices_and_adamw_all_else(tmp_path: Path) -> None:
    network = make_network(TINY, rendered(tmp_path))
    names = {parameter: name for name, parameter in network.named_parameters()}
    muon, adamw = (
        {names[parameter] for group in optimizer.param_groups for parameter in group["params"]}
        for optimizer in make_optimizers(network, TINY.model_copy(update={"optimizer": "muon"}))
    )
    inside = ("encoder", "decoder", "down", "up")
    assert muon == {name for one, name in names.items() if one.ndim == 2 and name.startswith(inside)}
    assert adamw == set(names.values()) - muon


def test_muon_leaves_tables_and_last_layers_to_adamw_in_any_network() -> None:
    layouts = LayoutNetwork(LayoutConfig(num_labels=2, most=2, cells=4, width=8, heads=1))
    evaluator = Evaluator(Vocabulary(("a", "b")), locates=True)
    for network, others in ((layouts, ("label.", "count.")), (evaluator, ("resnet.fc", "locator"))):
        names = {parameter: name for name, parameter in network.named_parameters()}
        *muon, adamw = make_optimizers(network, RunConfig(optimizer="muon"))
        for_adamw = {names[one] for group in adamw.param_groups for one in group["params"]}
        assert {name for name in names.values() if name.startswith(others)} <= for_adamw
        assert len(muon) == (network is layouts)


def test_an_update_of_muon_has_the_size_of_one_of_adamw() -> None:
    config = RunConfig(optimizer="muon", lr=1e-3, weight_decay=0.0)
    network = nn.ModuleDict({"up": nn.Linear(40, 60, bias=False)})
    muon, before = make_optimizers(network, config)[0], network["up"].weight.detach().clone()
    network["up"].weight.grad = torch.randn(before.shape, generator=torch.Generator().manual_seed(0))
    muon.step()
    # AdamW's updates have a root mean square of 0.2 to 0.4 times lr (Liu et al. 2025, sec. 2.2)
    assert 0.15 < float((network["up"].weight.detach() - before).square().mean().sqrt()) / config.lr < 0.25


@pytest.mark.parametrize(("optimizer", "count"), [("adamw", 1), ("muon", 2)])
def test_a_parameter_learns_at_its_share_of_the_rate(tmp_path: Path, optimizer: str, count: int) -> None:
    """Of the middle layer Muon takes the matrix, and AdamW the vector."""
    config = CONFIG.model_copy(update={"optimizer": optimizer})
    updates = []
    for share in (1.0, 0.1):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(1, 8), nn.Linear(8, 8), nn.Linear(8, 1))
        network.edges, network.lr_shares = ("0.", "2."), {"1.": share}  # type: ignore[assignment]
        before = {name: value.detach().double().clone() for name, value in network.named_parameters()}
        trained = train(Line(), network, config, tmp_path / str(share), Budget(steps=1), device=CPU)
        assert len(trained.optimizers) == count
        updates.append({name: value.detach().double() - before[name] for name, value in network.named_parameters()})
    whole, part = updates
    for name, update in whole.items():
        assert float(update.abs().max()) > 1e-3
        wanted = update * (0.1 if name.startswith("1.") else 1.0)
        torch.testing.assert_close(part[name], wanted, rtol=0, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("n", [3, 10])
def test_epochs_see_every_example_once(n: int) -> None:
    seen = torch.cat([batch_indices(n, 4, seed=3, step=step) for step in range(n)])
    epochs = seen.view(4, n).tolist()
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_processes_that_would_resume_from_different_states_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on two hosts whose folders of one name are not shared. Each would go on with a network of its own."""
    monkeypatch.setattr(Processes, "agreed", lambda _, *values: [value + 2 for value in values])
    with pytest.raises(TrainerError, match="is at step 0 here, and at step 2 for the first process"):
        fit(tmp_path, 1)


# Trains in float32, logs each step, and checks that a wrapper whose destructor may hang is gone before the group ends.
SCRIPT = """
import gc
import sys
import torch.distributed
from torch.nn.parallel import DistributedDataParallel
import shared.device
import trainer.train
from trainer.__main__ import main
trainer.train.autocast_dtype = shared.device.autocast_dtype = lambda _: None
trainer.train.LOG_EVERY = 1
end = torch.distributed.destroy_process_group
def end_last():
    assert not any(isinstance(one, DistributedDataParallel) for one in gc.get_objects())
    end()
torch.distributed.destroy_process_group = end_last
sys.exit(main())
"""


def test_three_processes_train_the_same_networks_as_one(tmp_path: Path) -> None:
    """Both the layout network and the denoiser, and in two parts."""
    recipe = {"batch": 12, "optimizer": "adamw", "lr": 1e-3, "warmup_steps": 0, "cooldown": 0.0}
    dataset, config = rendered(tmp_path / "data"), TINY.model_copy(update=recipe)
    start, network = make_network(config, dataset).state_dict(), make_network(config, dataset)
    one = train(Denoising(dataset, config, CPU), network, config, tmp_path / "one", Budget(steps=3), device=CPU)
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3",
            "script.py", "train", "denoiser", "--device", "cpu", "--data", "data", "--run-folder", "three",
            "--storage", ".", "--name", "three", "--steps", "3", "--grad-accumulation", "2",
            *(f"--set={key}={json.dumps(value)}" for key, value in config.model_dump(mode="json").items()),
        ],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    three = torch.load(tmp_path / "three" / "state.pt", weights_only=True)
    for key, wanted in one.network.state_dict().items():
        torch.testing.assert_close(three["network"][key], wanted, rtol=0, atol=2e-4)
    moved = max(float((three["network"][key] - start[key]).abs().max()) for key in start)
    assert moved > 1e-3  # ten times the tolerance, so that the comparison can fail
    assert losses(tmp_path / "three") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)  # of the whole batch
    published = load_denoiser(tmp_path / "three.safetensors")
    assert published.info.training["steps"] == 3
    assert published.layouts is not None
    assert len(losses(tmp_path / "three" / "layouts")) == 2  # TINY's layout_steps
