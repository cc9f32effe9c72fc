"""The training loop. Read `Loop.run` from top to bottom; to resume, run the same command again.

What is learnt is an `Objective` (`objectives/`). Under torchrun each process takes its share of the same global batch,
so the result does not depend on their number.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shared.device import autocast_dtype, draws_ahead, fast, kept_memory, loss_scaler, to_device
from shared.storage import Location
from trainer.averages import Averages
from trainer.config import RunConfig
from trainer.errors import StoppedError, TrainerError
from trainer.made_by import Stage, joined
from trainer.processes import Processes, processes
from trainer.runs import (
    LOG_EVERY,
    NEVER,
    SAVE_EVERY_S,
    Budget,
    Every,
    Log,
    Run,
    load_state,
    rate_share,
    run_log,
    save_state,
    step_seed,
    stop_signals,
)

STATE: Final = "state.pt"  # in a run's folder
MOST_FALLS: Final = 5  # of the learning rate, each to half of it, before a run that diverges is given up


class Objective(Protocol):
    """What a run learns: its examples, their loss, and what becomes of the averaged network."""

    name: str
    source: dict[str, Any]  # what is learnt from, by digests: a run is not resumed with another one

    def __len__(self) -> int:
        """Return the number of examples in an epoch."""

    def draw(self, index: Tensor, share: slice, generator: torch.Generator) -> list[Tensor]:
        """Return the `share` of the examples `index`, a whole batch, as tensors on the CPU or already on the device.

        All randomness comes from `generator`, so that the shares are those of one batch.
        """

    def __call__(self, network: nn.Module, *inputs: Tensor) -> Tensor:
        """Return the mean loss of drawn examples, on the device, without waiting for it (as `float(loss)` would)."""

    def show(self, network: nn.Module, run: Run) -> dict[str, float]:
        """Return figures of the averaged network, in evaluation mode, for the log; may write sample grids."""

    def publish(self, network: nn.Module, storage: Location, name: str, training: dict[str, Any]) -> Location:
        """Write the averaged network as a checkpoint. `training`: what its header says of the run."""


@dataclass
class Best:
    """The averaged weights at the best evaluation so far."""

    badness: float
    step: int
    figures: dict[str, float]
    weights: dict[str, Tensor]  # on the CPU
    worse_since: int = 0  # evaluations after it


class Training:
    """What changes in a run: the network, its averages and optimizers, where it stands, and its best evaluation.

    `config` has all choices made: an `auto` optimizer is the one that the run had before or, at its start, the one that
    is faster on the device. `made_by`: the stages up to this one; a run that was resumed knows those of before, too.
    """

    def __init__(
        self, network: nn.Module, config: RunConfig, device: torch.device, state: dict[str, Any] | None,
        made_by: Sequence[Stage] = (),
    ) -> None:  # fmt: skip
        if config.optimizer == "auto":
            here = "muon" if autocast_dtype(device) is torch.bfloat16 else "adamw"
            config = config.model_copy(update={"optimizer": state["recipe"]["optimizer"] if state else here})
        self.network, self.config, self.run = network, config, Run()
        self.averages, self.optimizers = Averages(network, config), make_optimizers(network, config)
        self.scaler = loss_scaler(device)
        self.best: Best | None = None
        self.evaluated_at = -1  # the step of the last evaluation
        self.is_new, self.made_by = state is None, list(made_by)
        if state is not None:
            self.load_state_dict(state)
            self.run.resumed_at = self.run.step

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.run.step, self.run.elapsed_s, self.run.rate = state["step"], state["elapsed_s"], state.get("rate", 1.0)
        self.network.load_state_dict(state["network"])
        self.averages.load_state_dict(state["averages"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if scaling := state.get("scaler"):  # not of a run that began on another kind of device
            self.scaler.load_state_dict(scaling)
        self.best = Best(**state["best"]) if state.get("best") else None
        self.made_by = joined(state.get("made_by", []), self.made_by)
        self.evaluated_at = state.get("evaluated_at", -1)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.run.step,
            "elapsed_s": self.run.elapsed_s,
            "rate": self.run.rate,
            "network": self.network.state_dict(),
            "averages": self.averages.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "best": self.best and vars(self.best),
            "made_by": self.made_by,
            "evaluated_at": self.evaluated_at,
        }

    @property
    def averaged(self) -> nn.Module:
        """The network with the averaged weights that are published."""
        return self.averages.network(self.config.publish)

    def evaluate(self, objective: Objective) -> dict[str, float]:
        """Return what the objective shows of the averaged network, and keep its weights if they are the best so far.

        The best are those of the lowest held-out loss; without held-out pictures there are none. Scores of test files
        do not count: who chooses by them no longer tests.
        """
        network, was_training = self.averaged, self.averaged.training
        figures = objective.show(network.eval(), self.run)
        network.train(was_training)
        self.run.history.append(figures)
        now = figures.get("held_out_loss")
        if now is not None and (self.best is None or now <= self.best.badness):
            weights = {key: value.detach().to("cpu", copy=True) for key, value in network.state_dict().items()}
            self.best = Best(now, self.run.step, figures, weights)
        elif self.best and self.run.step > self.run.resumed_at:  # a finished run is evaluated again, too
            self.best.worse_since += 1
        return figures


def make_optimizers(network: nn.Module, config: RunConfig) -> list[torch.optim.Optimizer]:
    """Return AdamW for all parameters, or Muon for the inner matrices and AdamW for all else.

    All else is the network's first and last layers, which its `edges` name, embeddings and vectors. `match_rms_adamw`
    gives Muon's update the size of AdamW's (Liu et al. 2025, sec. 2.2), so both share one learning rate. Each has a
    group of parameters for every value of the network's `lr_shares`: of parameters whose names begin so, the `share` of
    the rate at which they learn.
    """
    shares: dict[str, float] = getattr(network, "lr_shares", {})
    inner = inner_matrices(network) if config.optimizer == "muon" else set[nn.Parameter]()
    for_muon, for_adamw = (defaultdict[float, list[nn.Parameter]](list) for _ in range(2))
    for name, parameter in network.named_parameters():
        (for_muon if parameter in inner else for_adamw)[share_of(name, shares)].append(parameter)
    muon, adamw = (
        [{"params": parameters, "share": share} for share, parameters in groups.items()]
        for groups in (for_muon, for_adamw)
    )
    optimizers = list[torch.optim.Optimizer]()  # torch takes none without parameters
    if muon:
        optimizers.append(torch.optim.Muon(muon, config.lr, config.weight_decay, adjust_lr_fn="match_rms_adamw"))
    if adamw:
        decay = 0.0 if config.optimizer == "muon" else config.weight_decay
        optimizers.append(torch.optim.AdamW(adamw, config.lr, config.betas, weight_decay=decay, fused=True))
    return optimizers


def inner_matrices(network: nn.Module) -> set[nn.Parameter]:
    """Return a network's matrices, but for those of the layers that its `edges` name and for embeddings."""
    edges: tuple[str, ...] = getattr(network, "edges", ())
    tables = {one.weight for one in network.modules() if isinstance(one, nn.Embedding)}
    matrices = {one for name, one in network.named_parameters() if one.ndim == 2 and not name.startswith(edges)}
    return matrices - tables


def share_of(name: str, shares: dict[str, float]) -> float:
    """Return the share of the learning rate at which a parameter learns: that of the first start of its name, or 1."""
    return next((share for start, share in shares.items() if name.startswith(start)), 1.0)


def batch_indices(n: int, batch: int, seed: int, step: int) -> Tensor:
    """Return the indices of a step's examples. Each epoch shows all `n` examples once, in its own order."""
    first, last = step * batch // n, ((step + 1) * batch - 1) // n  # epochs
    orders = [torch.randperm(n, generator=torch.Generator().manual_seed(seed + e)) for e in range(first, last + 1)]
    return torch.cat(orders)[step * batch - first * n :][:batch]


@contextmanager
def ahead(draw: Callable[[int], Any], wanted: bool) -> Iterator[Callable[[int], Any]]:
    """Yield `draw`, which if `wanted` draws the next step's examples in a thread while a step is taken.

    What is drawn follows from the step alone, so that it makes no difference who asks for it, and when.
    """
    if not wanted:
        yield draw
        return
    with ThreadPoolExecutor(1) as beside:
        drawn = dict[int, Future[Any]]()

        def examples(step: int) -> Any:
            now = drawn.pop(step, None) or beside.submit(draw, step)
            drawn.clear()  # of a run that has gone back
            drawn[step + 1] = beside.submit(draw, step + 1)
            return now.result()

        yield examples


class DivergedError(FloatingPointError):
    """Loss or gradient is no longer a number, in every process alike."""


def check_finite(sums: Tensor, scaler: torch.amp.GradScaler) -> None:
    """Raise DivergedError unless the loss and its gradient (the first two) are finite. Waits for the device.

    With a `scaler`, gradients that overflow are no sign; that they do so at any scale is.
    """
    if scaler.is_enabled() and scaler.get_scale() < 1:
        raise DivergedError("the gradient overflows at any scale")
    for what, value in zip(("loss", "gradient"), sums.tolist(), strict=False):
        if not math.isfinite(value):
            raise DivergedError(f"the {what} is {value}")


class Due(NamedTuple):
    """What is due before the next step. All processes agree on it."""

    progress: float  # share of the budget that is spent
    shares: int  # equal shares of the budget that are spent, of which `evaluations` make the whole
    stop: int  # the signal that asks the run to stop, or 0
    save: bool  # first, since an evaluation may take long
    evaluate: bool
    publish: bool

    @property
    def ends(self) -> bool:
        return self.progress >= 1


@dataclass
class Loop:
    """One run: what it was given, and when it last saved, published and evaluated. Start reading at `run`."""

    objective: Objective
    training: Training
    recipe: dict[str, Any]  # saved with the state
    folder: Path
    budget: Budget
    device: torch.device
    group: Processes
    parts: list[slice]  # of a batch, one for each backward pass of this process
    stopped_by: Callable[[], int]
    on_step: Callable[[Run], None]
    evaluations: int
    patience: int | None
    publisher: Callable[[Training], None]
    publish_every: Every

    wrapper: DistributedDataParallel | None = field(init=False)  # of the network, where there are several processes
    log: Log = field(init=False)
    examples: Callable[[int], list[list[Tensor]]] = field(init=False)  # of a step, for each part
    sums: Tensor = field(init=False)  # of loss, gradient norm and steps since the last line of the log
    last: float = 0.0  # the end of the training time counted so far, in monotonic seconds
    saved_at: float = 0.0
    published_at: float = 0.0
    saved_step: int = -1
    published_step: int = -1
    shown_step: int = -1  # of this process's last evaluation
    shares_shown: int = 0

    def run(self) -> int:
        """Take steps until the budget is spent or a signal asks the run to stop. Return that signal, or 0."""
        run = self.training.run
        self.wrapper = DistributedDataParallel(self.training.network) if self.group.size > 1 else None
        self.sums = torch.zeros(3, device=self.device)
        self.published_step, self.shares_shown = run.step, self.shares(self.progress())
        with (
            run_log(self.folder if self.is_first else None, run.step) as self.log,
            ahead(self.draw, draws_ahead(self.device)) as self.examples,
        ):
            self.last = self.saved_at = self.published_at = time.monotonic()
            if self.training.is_new:
                self.save()  # to go back to
            while True:
                due = self.due()
                try:
                    if due.save:
                        self.save()
                    if due.evaluate:
                        self.evaluate(due.shares)
                        continue
                    if due.publish:
                        self.publish()
                    if due.ends or due.stop:
                        break
                    self.step(due.progress)
                except DivergedError as problem:
                    self.go_back(problem)
            if due.ends and run.progress < 1 and run.step > run.resumed_at:  # patience has ended
                run.progress = 1.0
                self.on_step(run)
        return 0 if due.ends else due.stop

    @property
    def is_first(self) -> bool:
        return self.group.rank == 0

    def progress(self) -> float:
        """Return the share of the budget that is spent; 1 where patience has ended."""
        run, best = self.training.run, self.training.best
        if self.patience and best and best.worse_since >= self.patience:
            return 1.0
        return min(1.0, self.budget.progress(run.elapsed_s, run.step))

    def shares(self, progress: float) -> int:
        return int(progress * self.evaluations + 1e-9)

    def due(self) -> Due:
        """Return what is due, by the clock of the first process."""
        training, run, now = self.training, self.training.run, time.monotonic()
        progress, stop, late, unpublished = self.group.agreed(
            self.progress(), self.stopped_by(), now - self.saved_at > SAVE_EVERY_S,
            self.publish_every.is_due(now - self.published_at, run.step - self.published_step),
        )  # fmt: skip
        ends, shares = progress >= 1, self.shares(progress)
        regular = run.step > 0 and (run.step % training.config.evaluate_every == 0 or shares > self.shares_shown)
        evaluate = (regular and run.step != training.evaluated_at) or (ends and run.step != self.shown_step)
        # a stopped run that has only begun must not replace a good checkpoint of its name
        worth_it = run.step > max(run.resumed_at, training.config.warmup_steps)
        publish = bool(unpublished or (stop and worth_it)) and not ends
        save = bool(late or evaluate or publish or ends or stop) and run.step != self.saved_step
        return Due(progress, shares, int(stop), save, evaluate and (ends or not stop), publish)

    def draw(self, step: int) -> list[list[Tensor]]:
        """Return the examples of a step, on the device, for each of its parts."""
        config = self.training.config
        generator = torch.Generator().manual_seed(step_seed(config.seed, step))
        index = batch_indices(len(self.objective), config.batch, config.seed, step)
        drawn = [self.objective.draw(index, part, generator.clone_state()) for part in self.parts]
        return [[to_device(value, self.device) for value in one] for one in drawn]

    def save(self) -> None:
        """Save the state, unless it has diverged. All processes do so at the same step."""
        check_finite(self.group.added(self.sums), self.training.scaler)
        if self.is_first:
            save_state(self.folder / STATE, {"recipe": self.recipe, **self.training.state_dict()})
        self.saved_at, self.saved_step = time.monotonic(), self.training.run.step

    def evaluate(self, shares: int) -> None:
        """Evaluate the averaged network in the first process, and save. This is not training time."""
        run = self.training.run
        if self.is_first:
            self.log.record(run, self.training.evaluate(self.objective))
            self.log.show_samples(run)
        self.training.evaluated_at = self.shown_step = run.step
        self.save()
        self.shares_shown, self.last = shares, time.monotonic()

    def publish(self) -> None:
        """Publish from the first process. This is not training time."""
        if self.is_first:
            self.publisher(self.training)
        self.published_at = self.last = time.monotonic()
        self.published_step = self.training.run.step

    def step(self, progress: float) -> None:
        """Take a step at the learning rate of this `progress`. Every LOG_EVERY steps, log their means."""
        config, run = self.training.config, self.training.run
        rate = config.lr * run.rate * rate_share(run.step, progress, config.warmup_steps, config.cooldown)
        loss = self.backward()
        norm = self.update(rate)
        self.training.averages.update(run.step)
        self.sums += torch.stack([loss, norm, torch.ones_like(norm)])

        now = time.monotonic()
        run.step, run.elapsed_s, self.last = run.step + 1, run.elapsed_s + now - self.last, now
        run.progress = self.progress()
        if run.step % LOG_EVERY == 0:
            check_finite(added := self.group.added(self.sums), self.training.scaler)
            loss_sum, norm_sum, steps = added.tolist()
            self.sums = torch.zeros_like(self.sums)
            run.loss = loss_sum / steps
            figures = {"loss": run.loss, "grad_norm": norm_sum / steps, "lr": rate}
            self.log.record(run, {**figures, "pictures": run.step * config.batch})
        self.on_step(run)

    def backward(self) -> Tensor:
        """Accumulate the gradients of the parts of a step. Return the loss of this process."""
        training, wrapper = self.training, self.wrapper
        loss = torch.zeros((), device=self.device)
        for part, inputs in zip(self.parts, self.examples(training.run.step), strict=True):
            torch.manual_seed(step_seed(training.config.seed, training.run.step) + part.start)  # of dropout
            # processes exchange gradients after the last part
            with wrapper.no_sync() if wrapper and part is not self.parts[-1] else nullcontext():
                with fast(self.device):
                    own = self.objective(wrapper or training.network, *inputs) / len(self.parts)
                training.scaler.scale(own).backward()  # type: ignore[no-untyped-call]
            loss += own.detach()
        return loss

    def update(self, rate: float) -> Tensor:
        """Update the weights and clear the gradients. Return the norm that these had."""
        training, scaler = self.training, self.training.scaler
        for optimizer in training.optimizers:
            scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(training.network.parameters(), training.config.clip_norm or torch.inf)
        for optimizer in training.optimizers:
            for parameters in optimizer.param_groups:
                parameters["lr"] = rate * parameters.get("share", 1.0)
            scaler.step(optimizer)  # not where the gradients overflow, after which the scale is lower
            optimizer.zero_grad(set_to_none=True)
        scaler.update()
        return norm.nan_to_num(0, 0) if scaler.is_enabled() else norm

    def go_back(self, problem: DivergedError) -> None:
        """Continue from the last saved state with half the rate."""
        training, run = self.training, self.training.run
        diverged_at, rate = run.step, run.rate / 2
        if rate < 0.5**MOST_FALLS:
            at = f"{problem}, also with {run.rate:g} of lr={training.config.lr:g}"
            raise FloatingPointError(f"{at}; lower lr or raise warmup_steps (--set lr=...)") from problem
        training.load_state_dict(load_state(self.folder / STATE, self.recipe, training.network))
        self.group.agreed(0.0)  # so that all have read the file before the first replaces it
        run.rate = rate
        self.sums.zero_()
        self.save()
        self.log.go_back(run.step)
        self.log.record(run, {"diverged_at": diverged_at, "rate": rate})


def begin(
    network: nn.Module, config: RunConfig, folder: Path, recipe: dict[str, Any], device: torch.device,
    group: Processes, made_by: Sequence[Stage],
) -> Training:  # fmt: skip
    """Resume the run in `folder`, or begin a new one. Sets the recipe's optimizer to the one that was chosen.

    Raises TrainerError as `load_state`, and if the processes would resume at different steps.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, network = folder / STATE, network.to(device).train()
    state = load_state(path, recipe, network) if path.exists() else None
    training = Training(network, config, device, state, made_by)
    recipe["optimizer"] = training.config.optimizer
    (step,) = group.agreed(training.run.step)
    if step != training.run.step:
        problem = f"is at step {training.run.step} here, and at step {step:.0f} for the first process"
        raise TrainerError(f"{folder}: {problem}; all processes must resume from the same folder")
    return training


def train(
    objective: Objective, network: nn.Module, config: RunConfig, folder: Path, budget: Budget, *, device: torch.device,
    start_from: str | None = None, on_step: Callable[[Run], None] = lambda _: None, evaluations: int = 1,
    patience: int | None = None, grad_accumulation: int = 1, publish: Callable[[Training], None] = lambda _: None,
    publish_every: Every = NEVER, group: Processes | None = None, made_by: Sequence[Stage] = (),
) -> Training:  # fmt: skip
    """Train `network` until the budget is spent; state, log and TensorBoard events go to `folder`.

    `start_from`: the name of the checkpoint whose weights the network has. A resumed run continues from its own state
    instead. The first process evaluates (`objective.show`) every `config.evaluate_every` steps, and at `evaluations`
    equal shares of the budget, the last of which is its end. `patience`: stop after so many evaluations in a row that
    are worse than the best. `grad_accumulation`: backward passes in a step, each of its part of the batch. The first
    process calls `publish` every `publish_every`, and when a signal stops the run after its warm-up. `group`: the
    processes that share the work, by default all that torchrun started. `made_by`: for the checkpoint's header.

    Where loss or gradient diverges, the run goes back to its last saved state and goes on with half the rate, which the
    log says. Raises FloatingPointError where that has not helped MOST_FALLS times, StoppedError after a signal, and
    TrainerError for another run's `folder` and for a batch that cannot be divided.
    """
    with processes(device) as everyone, kept_memory(), stop_signals() as stopped_by:
        group = group or everyone
        parts = group.parts(config.batch, grad_accumulation)
        recipe = {"objective": objective.name, **objective.source, **config.model_dump(mode="json")}
        recipe["start_from"] = start_from
        training = begin(network, config, folder, recipe, device, group, made_by)
        loop = Loop(
            objective, training, recipe, folder, budget, device, group, parts, stopped_by, on_step, evaluations,
            patience, publish, publish_every,
        )  # fmt: skip
        stop = loop.run()
        # Delete the wrapper before the processes part: otherwise its destructor ends their group while it holds
        # Python's lock, for which gloo's own threads may wait, and the process hangs.
        loop.wrapper = None
    if stop:
        raise StoppedError(stop, f"at step {training.run.step}")
    training.averaged.eval()
    return training
