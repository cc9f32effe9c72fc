"""A picture does not depend on its batch: for networks that do depend on it, and for real ones on this CPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shared.diffusion import same_bits
from shared.diffusion.denoise import Stepper, sample
from shared.diffusion.model import load_denoiser
from shared.diffusion.same_bits import BUDGET_S, comparing, without_pauses
from shared.diffusion.schedules import alpha_bar
from shared.options import SamplingOptions
from shared.registry import resolve
from tests.cpu import needs_avx512
from tests.paths import ROOT
from tests.toy import ToyNetwork
from tests.toy_checkpoint import publish_toy_denoiser

AB = alpha_bar("linear", 100)


class Uneven(ToyNetwork):
    """A network whose rows depend on the size of the call, or on their place in it, as some kernels' do."""

    def __init__(self, error: Callable[[int], Tensor]) -> None:
        super().__init__(AB)
        self.error = error  # of each row of a call of n rows

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor, keep: Tensor) -> Tensor:
        return super().__call__(x, t, labels, keep) + self.error(len(x))[:, None, None, None]


KERNELS: dict[str, tuple[Callable[[int], Tensor], int, list[int]]] = {
    "even": (lambda n: torch.zeros(n), 8, []),
    "one row": (lambda n: torch.full((n,), 1e-6 * (n == 1)), 8, [2, 3, 4, 5, 6, 7, 8]),
    "by fours": (lambda n: torch.full((n,), 1e-6 * (n % 4)), 8, [4, 8]),
    "every size": (lambda n: torch.full((n,), 1e-6 * n), 8, [8]),
    "the last row": (lambda n: 1e-6 * (torch.arange(n) == n - 1), 1, []),
    "from five rows on": (lambda n: torch.full((n,), 1e-6 * (n > 4)), 4, []),
    "powers of two": (lambda n: torch.full((n,), 1e-6 * (n not in (1, 2, 4, 8))), 8, [1, 2, 4, 8]),
}


@pytest.mark.parametrize(("error", "max_rows", "pad_to"), KERNELS.values(), ids=KERNELS)
def test_calls_have_sizes_with_which_a_picture_is_the_same_alone_and_beside_others(
    error: Callable[[int], Tensor], max_rows: int, pad_to: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(same_bits, "can_pack", lambda device: True)
    network = Uneven(error)
    stepper = Stepper(network, network.alpha_bar, "v")
    same_bits.bound(stepper, 8)
    assert (stepper.max_rows, stepper.pad_to) == (max_rows, pad_to)
    assert_same_alone_and_together(stepper, 11)


def assert_same_alone_and_together(stepper: Stepper, pictures: int) -> None:
    labels = torch.eye(stepper.network.num_labels)[torch.arange(pictures) % stepper.network.num_labels]
    options = [SamplingOptions(steps=2, guidance=3.0 if i % 2 else 1.0) for i in range(pictures)]
    seeds = list(range(pictures))
    together = sample(stepper, labels, options, seeds)
    for i in seeds:
        assert torch.equal(sample(stepper, labels[i : i + 1], options[i : i + 1], seeds[i : i + 1])[0], together[i])


class OfManyLabels(ToyNetwork):
    """A network that adds several labels in another order for one row than for many, as a matrix product may."""

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor, keep: Tensor) -> Tensor:
        error = 1e-6 * (labels.sum(1) > 1) * (len(x) == 1)
        return super().__call__(x, t, labels, keep) + error[:, None, None, None]


def test_sizes_are_tried_with_many_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(same_bits, "can_pack", lambda device: True)
    assert same_bits.bound(Stepper(OfManyLabels(AB), AB, "v"), 8) == list(range(2, 9))


def test_sizes_are_tried_with_an_object_at_every_place(tmp_path: Path) -> None:
    publish_toy_denoiser(tmp_path, "placed", 0, positions=True)
    stepper = load_denoiser(tmp_path / "placed.safetensors").stepper()
    seen: list[Tensor] = []
    call = stepper._call_network
    stepper._call_network = lambda *inputs: (seen.append(inputs[2]), call(*inputs))[1]  # type: ignore[method-assign]
    same_bits.bound(stepper, 2)
    assert all(float(labels.min()) >= 0 for labels in seen)  # no place is unknown, `layouts.OUTSIDE`
    assert seen[0].shape[1:] == (24, 3)


@pytest.mark.parametrize("name", ["toy", "shipped"])
def test_real_networks_give_the_same_picture_alone_and_beside_others(name: str, storage: Path) -> None:
    """On the CPU that runs the test, whatever its kernels do."""
    folder, model = (storage, "toy") if name == "toy" else (ROOT / "models", None)
    stepper = load_denoiser(resolve(folder, model, "denoiser")).stepper()
    same_bits.bound(stepper, 8)
    assert_same_alone_and_together(stepper, 5)


@needs_avx512
def test_the_shipped_network_packed_needs_no_padding() -> None:
    stepper = load_denoiser(resolve(ROOT / "models", None, "denoiser")).stepper()
    assert same_bits.bound(stepper, 8, clock=lambda: 0.0) == list(range(1, 9))


def test_the_budget_leaves_small_gaps_between_the_sizes() -> None:
    now = 0.0

    def call(rows: int) -> Tensor:
        nonlocal now
        now += BUDGET_S / 8
        return torch.zeros(rows, 1)

    assert without_pauses(comparing(call, 16, lambda: now)) == [1, 2, 3, 4, 6, 8, 10, 12, 14, 16]
    assert without_pauses(comparing(call, 100, lambda: now)) == [1, 2, 4, 8, 16, 32, 48, 64, 82, 100]


def test_powers_of_two_are_tried_whatever_they_take() -> None:
    now = 0.0

    def call(rows: int) -> Tensor:
        nonlocal now
        now += BUDGET_S
        return torch.zeros(rows, 1)

    assert without_pauses(comparing(call, 24, lambda: now)) == [1, 2, 4, 8, 16, 24]
