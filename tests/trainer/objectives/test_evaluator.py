"""The evaluator: its distortions, losses and figures, and that it learns positions."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shared.checkpoint import read_info
from shared.diffusion.layouts import OUTSIDE
from shared.evaluator import Evaluator, load_evaluator
from shared.vocabulary import Vocabulary
from tests.trainer_fixtures import write_data_folder
from trainer.data import Dataset, in_vocabulary, load_dataset
from trainer.errors import TrainerError
from trainer.objectives import evaluator as fitting
from trainer.objectives.evaluator import RUN, Recognising, make_network, start_from
from trainer.runs import Budget, Run
from trainer.train import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return load_dataset(write_data_folder(tmp_path_factory.mktemp("data") / "d", pictures=12), size=64)


@pytest.fixture
def located(dataset: Dataset) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    positions = torch.rand(*dataset.labels.shape, 2, generator=generator)
    return replace(dataset, positions=positions.where(dataset.labels[..., None] > 0, OUTSIDE))


@pytest.mark.parametrize("seed", range(2))
def test_distortions_move_positions_with_the_picture(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A white blot is where its position says, to a twentieth of a pixel; the pictures were moved by far more."""
    monkeypatch.setattr(fitting, "distort", lambda bordered, _: bordered[..., 8:-8, 8:-8])
    monkeypatch.setattr(fitting, "TINT", 0.0)
    generator = torch.Generator().manual_seed(seed)
    positions = 0.3 + 0.4 * torch.rand(6, 1, 2, generator=generator)
    axis = (torch.arange(64) + 0.5) / 64
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)  # (64, 64, 2): x, y
    blots = torch.exp(-0.5 * ((grid - positions[:, :, None]) * 64 / 2).square().sum(-1))  # (6, 64, 64)
    distorted, moved = fitting.augment(blots[:, None].expand(-1, 3, -1, -1) * 2 - 1, positions, generator)
    seen = (distorted[:, 0] + 1) / 2
    centres = torch.einsum("nhw,hwc->nc", seen, grid) / seen.sum((1, 2))[:, None]
    torch.testing.assert_close(moved[:, 0], centres, rtol=0, atol=0.05 / 64)
    assert float((moved - positions).norm(dim=-1).max()) > 0.5 / 64


def test_draws_follow_from_the_generator_alone(dataset: Dataset) -> None:
    """Also those of a thread that draws ahead while the training loop seeds and uses torch's global generator."""
    objective, index = Recognising(dataset, dataset), torch.arange(12).repeat(4)

    def draw() -> list[Tensor]:
        return objective.draw(index, slice(0, 48), torch.Generator().manual_seed(7))

    alone, before = draw(), torch.get_rng_state()
    with ThreadPoolExecutor(1) as beside:
        drawn = beside.submit(draw)
        while not drawn.done():
            torch.manual_seed(0)
    assert all(torch.equal(one, other) for one, other in zip(alone, drawn.result(), strict=True))
    torch.set_rng_state(before)
    draw()
    assert torch.equal(torch.get_rng_state(), before)


def test_distortions_stay_in_range_and_noise_is_as_frequent_as_documented(dataset: Dataset) -> None:
    objective = Recognising(dataset, dataset)
    pictures, *_ = objective.draw(torch.zeros(400).long(), slice(0, 400), torch.Generator().manual_seed(0))
    assert pictures.shape == (400, 3, 64, 64)
    assert pictures.abs().max() <= 1.0
    # in these flat pictures nothing but noise, of at least 0.03 in [0, 1], makes neighbours differ
    grain = pictures.diff(dim=-1).square().mean((1, 2, 3)).view(100, 4)  # by group
    noisy = grain > 1e-3
    assert torch.equal(noisy.any(1), noisy.all(1))
    assert 30 <= int(noisy.any(1).sum()) <= 50  # 40 expected, with a standard deviation of 5


def test_the_position_loss_counts_only_objects_that_are_there() -> None:
    found = torch.tensor([[[0.5, 0.5], [9.0, 9.0]], [[0.25, 0.5], [0.75, 0.5]]])
    wanted = torch.tensor([[[0.75, 0.25], [OUTSIDE, OUTSIDE]], [[0.5, 0.5], [0.75, 0.5]]])
    labels = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    shares = torch.full((2, 2, 4), 1 / 8)  # of heatmaps with 2 x 2 cells
    shares[0, 0, 1] = 5 / 8  # upper right, where (0.75, 0.25) is
    shares[1, 0, 3] = 5 / 8
    shares[1, 1, 3] = 5 / 8  # lower right, where (0.5, 0.5) and (0.75, 0.5) are
    weights = fitting.shares_of_objects(labels)
    distance, missed = fitting.position_loss((found, shares.log()), wanted, weights)
    assert float(distance) == pytest.approx((0.5 + 0.25 + 0.0) / 3)
    assert float(missed) == pytest.approx(-math.log(5 / 8))
    nothing = fitting.shares_of_objects(torch.zeros(2, 2))
    assert [float(loss) for loss in fitting.position_loss((found, shares.log()), wanted, nothing)] == [0, 0]


def test_shares_of_a_batch_add_up_to_its_gradient(located: Dataset) -> None:
    """Without batch norm, which sees a share. The first share has three objects a picture, the second one."""
    labels = located.labels.clone()
    labels[:2, :3] = 1
    positions = torch.rand(*labels.shape, 2, generator=torch.Generator().manual_seed(0))
    dataset = replace(located, labels=labels, positions=positions.where(labels[..., None] > 0, OUTSIDE))
    objective, network = Recognising(dataset, dataset), make_network(dataset, 0, "resnet10").eval()

    def learnt(*shares: slice) -> dict[str, Tensor]:
        network.zero_grad()
        for share in shares:
            inputs = objective.draw(torch.tensor([0, 1, 4, 5]), share, torch.Generator().manual_seed(0))
            (objective(network, *inputs) / len(shares)).backward()
        return {name: one.grad.clone() for name, one in network.named_parameters() if one.grad is not None}

    whole, parts = learnt(slice(0, 4)), learnt(slice(0, 2), slice(2, 4))
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-3, atol=1e-5)


def test_with_positions_the_head_is_trained_measured_and_started_from(located: Dataset, tmp_path: Path) -> None:
    objective, network = Recognising(located, located), make_network(located, 0, "resnet10")
    assert network.locator is not None
    before = {key: value.clone() for key, value in network.locator.state_dict().items()}
    config = RUN.model_copy(update={"batch": 4})
    training = train(objective, network, config, tmp_path / "run", Budget(steps=2), device=CPU)
    assert not any(torch.equal(before[key], value) for key, value in network.locator.state_dict().items())
    (figures,) = training.run.history
    scores = {"accuracy", "exact_match", "f1", "position_error_median", "position_error_mean"}
    assert figures.keys() == scores
    held_out = read_info(objective.publish(training.averaged, tmp_path, "judge", {})).training["held_out"]
    assert held_out.keys() == scores | {"exact_match_of"}
    assert figures.items() <= held_out.items()
    start_from(again := make_network(located, 1, "resnet10"), tmp_path, "judge")
    wanted = load_evaluator(tmp_path / "judge.safetensors")
    assert all(torch.equal(value, other) for value, other in zip(again.parameters(), wanted.parameters(), strict=True))
    other = replace(located, vocabulary=Vocabulary(located.vocabulary.names[::-1]))
    with pytest.raises(TrainerError, match="judge has another vocabulary than the data set"):
        start_from(make_network(other, 0, "resnet10"), tmp_path, "judge")


class Knowing(Evaluator):
    """Finds the first label in every picture, at a fifth of the side from its upper left corner along each axis."""

    def probabilities(self, images: Tensor, *, batch: int = 64) -> Tensor:
        return torch.eye(len(self.vocabulary))[torch.zeros(len(images), dtype=torch.long)]

    def positions(self, images: Tensor, *, batch: int = 64) -> Tensor:
        return torch.full((len(images), len(self.vocabulary), 2), 0.2)


def test_what_is_measured_on_held_out_pictures() -> None:
    vocabulary = Vocabulary(("a", "b"))
    labels = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    positions = torch.tensor([[0.2, 0.2], [0.5, 0.6]])[None].repeat(4, 1, 1).where(labels[..., None] > 0, OUTSIDE)
    dataset = Dataset(vocabulary, torch.zeros(4, 3, 64, 64, dtype=torch.uint8), labels, positions)
    figures = fitting.measure(Knowing(vocabulary, locates=True), dataset)
    assert figures["exact_match_of"] == {"1": pytest.approx(2 / 3), "2": 0.0}
    assert figures["exact_match"] == 0.5
    assert figures["position_error_median"] == pytest.approx(0.0)
    assert figures["position_error_mean"] == pytest.approx((0 + 0 + 0.5 + 0 + 0.5) / 5)
    assert "position_error_mean" not in fitting.measure(Knowing(vocabulary), dataset)


def test_held_out_pictures_may_have_labels_in_another_order(dataset: Dataset) -> None:
    turned = in_vocabulary(dataset, Vocabulary(dataset.vocabulary.names[::-1]), "model")
    network = make_network(dataset, 0, "resnet10").eval()
    one, other = (Recognising(dataset, unseen).show(network, Run()) for unseen in (dataset, turned))
    assert one == other
