"""Scores compared with hand-made cases and torchmetrics; checkpoint files."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_f1_score

from iclevr.labels import ICLEVR
from shared.checkpoint import CheckpointError, publish
from shared.device import autocast_dtype
from shared.evaluator import (
    Evaluator,
    Locator,
    as_input,
    cropping_judge,
    load_evaluator,
    score_pictures,
    score_set,
)
from shared.options import EngineName
from shared.vocabulary import Vocabulary
from tests.shared_evaluators import random_evaluator

NAMES = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    return random_evaluator()


@pytest.fixture(scope="module")
def locating(evaluator: Evaluator) -> Evaluator:
    """The same evaluator with a position head."""
    torch.manual_seed(1)
    locating = Evaluator(ICLEVR, locates=True)
    locating.resnet.load_state_dict(evaluator.resnet.state_dict())
    return locating.eval()


def test_the_compiled_evaluator_judges_as_the_trained_one(locating: Evaluator, tmp_path: Path) -> None:
    publish(tmp_path, "judge", locating.tensors(), kind="evaluator", vocabulary=ICLEVR.names, config={}, training={})
    engines = list[EngineName](["openvino", "torch"])
    compiled, plain = (load_evaluator(tmp_path / "judge.safetensors", engine=engine) for engine in engines)
    images = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(3)) * 2 - 1
    # a float32 is 2^-24 from its number at most, a bfloat16 2^-9, and there are 20 layers
    apart = 1e-5 if autocast_dtype(torch.device("cpu")) is None else 0.02
    torch.testing.assert_close(compiled.probabilities(images), plain.probabilities(images), rtol=0, atol=apart)
    torch.testing.assert_close(compiled.features(images), plain.features(images), rtol=0, atol=10 * apart)
    torch.testing.assert_close(compiled.positions(images), plain.positions(images), rtol=0, atol=apart)


def _rows(*rows: list[float]) -> Tensor:
    return torch.tensor(rows)


@pytest.mark.parametrize(
    ("probabilities", "targets", "hits", "k", "exact"),
    [
        ([0.9, 0.8, 0.1, 0.2], [1, 1, 0, 0], 2, 2, True),
        ([0.9, 0.1, 0.8, 0.2], [1, 1, 0, 0], 1, 2, False),
        ([0.1, 0.2, 0.9, 0.8], [1, 1, 0, 0], 0, 2, False),
        ([0.4, 0.1, 0.2, 0.3], [1, 0, 0, 0], 1, 1, False),  # first of all, but under the threshold
        ([0.9, 0.1, 0.2, 0.8], [1, 0, 0, 0], 1, 1, False),  # an extra object, which top-k does not see
        ([0.9, 0.8, 0.7, 0.6], [1, 1, 1, 1], 4, 4, True),
        ([0.5, 0.5, 0.5, 0.5], [0, 1, 0, 0], 0, 1, False),  # ties go to the lower index
        ([0.5, 0.5, 0.5, 0.5], [1, 1, 0, 0], 2, 2, False),
    ],
)
def test_picture_score(probabilities: list[float], targets: list[float], hits: int, k: int, exact: bool) -> None:
    (verdict,) = score_pictures(_rows(probabilities), _rows(targets))
    assert (verdict.hits, verdict.k, verdict.exact) == (hits, k, exact)
    assert verdict.accuracy == hits / k


def test_the_accuracy_of_a_set_is_hits_over_labels() -> None:
    probabilities = _rows([0.9, 0.1, 0.1, 0.1], [0.9, 0.1, 0.8, 0.7])
    targets = _rows([1, 0, 0, 0], [1, 1, 1, 0])
    score = score_set(probabilities, targets, NAMES)
    assert score.accuracy == (1 + 2) / (1 + 3)  # and not the mean of 1 and 2/3
    assert score.exact_match == 0.5
    assert score.per_label_recall == {"a": 1.0, "b": 0.0, "c": 1.0}  # d was never asked


def test_f1_against_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(40, 24, generator=generator)
    targets = (torch.rand(40, 24, generator=generator) < 0.2).float()
    targets[:, 3] = 1
    wanted = binary_f1_score(probabilities, targets.long(), threshold=0.5, multidim_average="samplewise")
    verdicts = score_pictures(probabilities, targets)
    torch.testing.assert_close(torch.tensor([v.f1 for v in verdicts]), wanted)
    assert score_set(probabilities, targets, ICLEVR.names).f1 == pytest.approx(float(wanted.mean()))


@pytest.mark.parametrize("size", [32, 64, 160])
def test_pictures_of_another_size_are_resized_like_pillow(size: int) -> None:
    picture = torch.rand(size, size, generator=torch.Generator().manual_seed(0))
    wanted = Image.fromarray(picture.numpy()).resize((64, 64), Image.Resampling.BILINEAR)
    found = as_input(picture.expand(1, 3, size, size))[0, 1]
    torch.testing.assert_close(found, torch.from_numpy(np.array(wanted)), rtol=0, atol=1e-5)


def test_a_padded_picture_is_judged_without_its_padding(evaluator: Evaluator) -> None:
    inside = torch.rand(2, 3, 24, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    padded = F.pad(inside, (0, 0, 4, 4), mode="replicate")
    judge = cropping_judge(evaluator, 32 / 24)
    assert judge.vocabulary == evaluator.vocabulary
    assert torch.equal(judge.probabilities(padded), evaluator.probabilities(inside))
    assert not torch.equal(judge.probabilities(padded), evaluator.probabilities(padded))
    assert cropping_judge(evaluator, 1.0) is evaluator


def test_a_position_is_the_mean_of_its_heatmap() -> None:
    """Two labels on a grid of 2 rows and 4 columns, given their maps instead of features."""
    locator = Locator(2)
    heat, offsets = torch.zeros(2, 2, 4), torch.zeros(2, 2, 2, 4)
    heat[0, 1, 3] = 200.0  # all in one cell, whose centre is (7/8, 3/4)
    offsets[0, :, 1, 3] = torch.tensor([0.01, -0.02])
    heat[1, 0, :2] = torch.tensor([200.0 + math.log(3), 200.0])  # three quarters at (1/8, 1/4), a quarter at (3/8, 1/4)
    offsets[1, 0, 0, 0] = 0.04
    maps = torch.cat([heat, offsets.flatten(0, 1)])[None]
    locator.convs = nn.Sequential(_Returns(maps))
    found, heatmaps = locator(torch.zeros(1, 128, 2, 4), torch.zeros(1, 256, 1, 2))
    wanted = [[[7 / 8 + 0.01, 3 / 4 - 0.02], [3 / 4 * (1 / 8 + 0.04) + 1 / 4 * 3 / 8, 1 / 4]]]
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=0, atol=1e-5)
    torch.testing.assert_close(heatmaps.exp()[0, 1, :3], torch.tensor([3 / 4, 1 / 4, 0.0]), rtol=0, atol=1e-5)


class _Returns(nn.Module):
    """A network with a known answer."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1:] == (128 + 256, *self.answer.shape[2:])
        return self.answer


def test_all_that_is_said_of_pictures_is_of_clamped_and_resized_ones_in_batches(locating: Evaluator) -> None:
    images = torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    for view, shape in ((locating.probabilities, (24,)), (locating.features, (512,)), (locating.positions, (24, 2))):
        whole = view(images)
        assert whole is not None
        assert (whole.shape, whole.dtype) == ((5, *shape), torch.float32)
        assert float(whole.std(0).mean()) > 0  # they depend on the picture
        torch.testing.assert_close(whole, view(images.clamp(-1, 1), batch=2), rtol=1e-4, atol=1e-5)
        small, large = (view(torch.full((1, 3, side, side), 0.3)) for side in (32, 64))
        torch.testing.assert_close(small, large, rtol=1e-4, atol=1e-5)
        empty = view(images[:0])
        assert empty is not None
        assert empty.shape == (0, *shape)
    with torch.inference_mode():
        logits, (positions, _) = locating(images.clamp(-1, 1))
        from_features = locating.resnet.fc(locating.features(images))
    torch.testing.assert_close(locating.positions(images), positions, rtol=0, atol=1e-5)
    for probabilities in (logits.sigmoid(), from_features):
        torch.testing.assert_close(locating.probabilities(images), probabilities, rtol=1e-4, atol=1e-5)


def test_a_verdict_does_not_depend_on_the_batch(locating: Evaluator) -> None:
    """Bit by bit, or the same recipe would now and then give a PNG with another digit in its verdict."""
    frozen = Evaluator(ICLEVR, locates=True)
    frozen.load_state_dict(locating.state_dict())
    frozen.freeze()
    images = torch.randn(9, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    for judge in (frozen.probabilities, frozen.positions):
        alone = judge(images, batch=1)
        assert alone is not None
        for batch in (4, 9):
            batched = judge(images, batch=batch)
            assert batched is not None
            assert torch.equal(batched, alone)


def test_a_position_head_lies_beside_the_resnets_tensors(locating: Evaluator, tmp_path: Path) -> None:
    tensors = locating.tensors()
    path = publish(tmp_path, "e", tensors, kind="evaluator", vocabulary=ICLEVR.names, config={}, training={})
    loaded = load_evaluator(path, engine="torch")
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2)) * 2 - 1
    torch.testing.assert_close(loaded.positions(images), locating.positions(images), rtol=0, atol=1e-5)
    assert (loaded.vocabulary, loaded.training, loaded.info and loaded.info.name) == (ICLEVR, False, "e")
    assert loaded.tensors().keys() == tensors.keys()
    assert all(torch.equal(value, tensors[key]) for key, value in loaded.tensors().items())
    del tensors["locator.convs.4.bias"]
    path = publish(tmp_path, "e", tensors, kind="evaluator", vocabulary=ICLEVR.names, config={}, training={})
    with pytest.raises(CheckpointError, match=r"weights do not fit .*convs\.4\.bias"):
        load_evaluator(path)


def test_positions_in_a_padded_picture_are_fractions_of_all_of_it(locating: Evaluator) -> None:
    inside = torch.rand(2, 3, 24, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    padded = F.pad(inside, (0, 0, 4, 4), mode="replicate")
    found, within = cropping_judge(locating, 32 / 24).positions(padded), locating.positions(inside)
    assert found is not None
    assert within is not None
    torch.testing.assert_close(found[..., 0], within[..., 0])
    torch.testing.assert_close(found[..., 1], (4 + 24 * within[..., 1]) / 32)


def test_probabilities_that_are_not_finite_are_refused() -> None:
    broken = Evaluator(Vocabulary(("a", "b")))
    torch.nn.init.constant_(broken.resnet.fc[0].weight, torch.nan)
    with pytest.raises(FloatingPointError, match="the evaluator's output is not finite"):
        broken.freeze("torch").probabilities(torch.zeros(1, 3, 64, 64))


def test_a_checkpoint_of_another_kind_or_for_other_labels_is_refused(tmp_path: Path) -> None:
    small = Evaluator(Vocabulary(("a", "b"))).resnet.state_dict()
    described = {"config": {}, "training": {}}
    path = publish(tmp_path, "s", small, kind="evaluator", vocabulary=("a", "b"), **described)
    assert load_evaluator(path, engine="torch").probabilities(torch.zeros(1, 3, 64, 64)).shape == (1, 2)
    wrong = publish(tmp_path, "w", small, kind="evaluator", vocabulary=("a", "b", "c"), **described)
    with pytest.raises(CheckpointError, match="weights do not fit"):
        load_evaluator(wrong)
    other = publish(tmp_path, "d", small, kind="denoiser", vocabulary=("a", "b"), **described)
    with pytest.raises(CheckpointError, match="holds a denoiser, not an evaluator"):
        load_evaluator(other)
