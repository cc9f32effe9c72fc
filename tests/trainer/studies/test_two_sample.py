"""The two-sample test: sets whose answer is known, and the command."""

import itertools
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image
from torch import Tensor

from shared.diffusion.model import load_denoiser
from shared.options import SamplingOptions
from tests.toy_checkpoint import publish_toy_denoiser, publish_toy_upsampler
from tests.trainer.command_line import Command, refused, succeeded
from tests.trainer_fixtures import write_data_folder
from trainer.data import layouts_of, load_dataset
from trainer.studies import two_sample
from trainer.studies.two_sample import (
    NETWORKS,
    NetworkName,
    augmented,
    choose,
    crops,
    crops_around,
    generate,
    tell_apart,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_sample, "STEPS", 30)
    monkeypatch.setattr(two_sample, "SIDE", 16)


def noise(count: int, seed: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(seed)).byte()


@pytest.mark.parametrize("kind", NETWORKS)
def test_sets_of_one_distribution_are_not_told_apart(kind: NetworkName) -> None:
    verdicts = tell_apart(noise(160, 0), noise(160, 1), CPU, 0, kind=kind)
    assert verdicts.accuracies.mean() == pytest.approx(0.5, abs=0.1)  # 320 answers: three deviations are 0.084
    assert verdicts.scores.shape == (2, 160)


def test_sets_of_two_distributions_are_told_apart() -> None:
    blurred = noise(160, 1).float()
    blurred = torch.nn.functional.avg_pool2d(blurred, 3, 1, 1, count_include_pad=False)
    blurred = (blurred - blurred.mean()) * (noise(160, 1).float().std() / blurred.std()) + 127.5  # as bright, as strong
    verdicts = tell_apart(noise(160, 0), blurred.clamp(0, 255).byte(), CPU, 0)
    assert verdicts.accuracies.mean() > 0.95
    assert (verdicts.scores[1] > 0).float().mean() > 0.9


def tinted(opposite: bool, seed: int) -> Tensor:
    """Grain whose left and right borders are both redder or both less red, or else `opposite`: (160, 3, 56, 56)."""
    generator = torch.Generator().manual_seed(seed)
    x = 128 + 8 * torch.randn(160, 3, 56, 56, generator=generator)
    sign = 60.0 * torch.randint(2, (160, 1, 1), generator=generator) - 30
    x[:, 0, :, :8] += sign
    x[:, 0, :, -8:] += -sign if opposite else sign
    return x.round().clamp(0, 255).byte()


def test_the_resnet_sees_light_that_the_detail_network_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    """The borders are 40 pixels apart, and the detail network sums what it sees in windows of 36."""
    monkeypatch.setattr(two_sample, "STEPS", 200)
    found = {
        kind: float(tell_apart(tinted(False, 0), tinted(True, 1), CPU, 0, kind=kind, folds=1).accuracies)
        for kind in NETWORKS
    }
    assert found["ResNet on RGB"] > 0.95
    assert found["detail network"] == pytest.approx(0.5, abs=0.17)  # 80 answers: three deviations


def test_what_the_resnet_learns_from_is_flipped_shifted_and_tinted() -> None:
    x = torch.rand(12, 3, 20, 30, generator=torch.Generator().manual_seed(1))
    found = list[tuple[bool, int, int]]()
    for one, other in zip(x, augmented(x, torch.Generator().manual_seed(0)), strict=True):
        for flip, top, left in itertools.product((False, True), range(-4, 5), range(-4, 5)):
            moved = (one.flip(2) if flip else one).roll((-top, -left), (1, 2))
            tint = (other - moved)[:, 4:-4, 4:-4]
            if float(tint.std((1, 2)).max()) < 1e-5:
                found.append((flip, top, left))
                assert 0 < float(tint.abs().max()) <= 6.001 / 127.5
    assert len(found) == 12
    assert all(len(set(each)) > 1 for each in zip(*found, strict=True))


def test_what_a_network_learnt_from_is_not_what_it_is_tested_on(monkeypatch: pytest.MonkeyPatch) -> None:
    learnt: list[Tensor] = []
    learn = two_sample._learn
    monkeypatch.setattr(two_sample, "STEPS", 1)
    monkeypatch.setattr(two_sample, "_learn", lambda x, *rest: (learnt.append(x), learn(x, *rest))[1])
    marked = torch.arange(16, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 16, 16)
    tell_apart(marked, marked, CPU, 0)
    tested = [sorted(set(range(16)) - set(x[:, 0, 0, 0].tolist())) for x in learnt]
    assert tested == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert not tell_apart(marked, marked, CPU, 0, folds=1).scores[:, 4:].any()
    assert len(learnt) == 5


def test_crops_are_cut_around_coloured_pixels() -> None:
    picture = torch.full((3, 60, 80), 120, dtype=torch.uint8)
    picture[0, 40, 50] = 200
    other = torch.full((3, 60, 80), 100, dtype=torch.uint8)
    other[1, 0, 79] = 180  # in a corner, so that the square is not around it
    found = crops(torch.stack([picture, other]), torch.Generator().manual_seed(0))
    assert found.shape == (2 * two_sample.CROPS, 3, 16, 16)
    assert all(torch.equal(one, picture[:, 32:48, 42:58]) for one in found[: two_sample.CROPS])
    assert all(torch.equal(one, other[:, :16, -16:]) for one in found[two_sample.CROPS :])
    small = crops(picture[None, :, :8, :12], torch.Generator())
    assert torch.equal(small, picture[None, :, :8, :12].expand(two_sample.CROPS, -1, -1, -1))


def test_squares_around_objects_are_at_their_places() -> None:
    pictures = torch.arange(2 * 3 * 60 * 80).remainder(251).byte().view(2, 3, 60, 80)
    layouts = torch.zeros(2, 3, 5)  # labels, positions, rotations
    layouts[0, 0] = torch.tensor([1, 0.5, 0.5, 0, 0])
    layouts[0, 1] = torch.tensor([1, 0.1, 0.1, 0, 0])  # of another label
    layouts[0, 2] = torch.tensor([1, 0.25, 0.75, 0, 0])
    layouts[1, 2] = torch.tensor([1, 1, 0, 0, 0])  # in the corner
    found = crops_around(pictures, layouts, [0, 2])
    expected = [pictures[0, :, 22:38, 32:48], pictures[0, :, 37:53, 12:28], pictures[1, :, :16, -16:]]
    assert torch.equal(found, torch.stack(expected))
    assert crops_around(pictures, layouts[:, :1] * 0, [0]).shape == (0, 3, 60, 80)


def write_folder(folder: Path) -> Path:
    names = list(json.loads((write_data_folder(folder, 16, 32, 24, noise=True) / "train.json").read_text()))
    (folder / "positions.json").write_text(json.dumps({name: [[0.5, 0.25]] for name in names}))
    (folder / "rotations.json").write_text(json.dumps({name: [0.5] for name in names}))
    return folder


def test_the_upsampler_alone_enlarges_the_folders_pictures(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data")
    publish_toy_upsampler(tmp_path, "large", publish_toy_denoiser(tmp_path, "toy", 0, positions=True, rotations=True))
    denoiser, dataset = load_denoiser(tmp_path / "large.safetensors"), load_dataset(folder, size=16)
    chosen, others = choose(dataset, 8)
    assert not set(chosen.tolist()) & set(others.tolist())
    made, taken = generate(denoiser, dataset, chosen, denoiser.options, 0, upsampler_alone=True)
    assert torch.equal(taken, layouts_of(dataset, denoiser)[chosen])
    assert made.shape == (8, 3, 24, 32)
    assert denoiser.upsampler is not None
    with torch.inference_mode():
        plain = denoiser.upsampler(dataset.images[chosen] / 127.5 - 1)
    assert ((plain.clamp(-1, 1) + 1) * 127.5 - made).abs().max() < 4  # bf16


def test_the_command_compares_both_sizes(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_sample, "STEPS", 3)
    write_folder(tmp_path / "data")
    publish_toy_upsampler(Path("models"), "large", publish_toy_denoiser(Path("models"), "toy", 0, positions=True))

    def found(model: str, *options: object) -> list[dict[str, Any]]:
        line = ("evaluate", model, "--only", "two-sample", "--data", "data", "--out", ".", "--count", 8, *options)
        succeeded(command(*line))
        return cast(list[dict[str, Any]], json.loads(Path("two-sample.json").read_text())["rows"])

    kinds = ("detail network", "ResNet on RGB")
    expected = [*itertools.product(("32x24", "16x16"), ("generated", "the data's"), kinds)]
    assert [(one["size"], one["pictures"], one["network"]) for one in found("large")] == expected
    with Image.open("two-sample.png") as shown:
        assert shown.width == 2 + 8 * (16 + 2)
    assert found("toy") != found("toy", "--noise", 99)
    around = found("large", "--around", "e", "--longer", 2)
    assert [(one["size"], one["pictures"], one["network"]) for one in around] == expected[:4]
    assert around != found("large", "--around", "e")
    too_many = command("evaluate", "large", "--only", "two-sample", "--data", "data", "--count", 9)
    refused(too_many, "--count 9 needs at least 8 and at most 8 pictures")


def test_an_upsampler_that_needs_the_denoisers_features_enlarges_nothing_else(command: Command, tmp_path: Path) -> None:
    write_folder(tmp_path / "data")
    base = publish_toy_denoiser(Path("models"), "toy", 0, positions=True)
    one_step = {"sampling": SamplingOptions(sampler="ddim", steps=1, guidance=1.0).model_dump(mode="json")}
    publish_toy_upsampler(Path("models"), "whole", base, features=8, **one_step)
    line = ("--only", "two-sample", "--data", "data", "--count", 8, "--upsampler-alone")
    why = "whole draws in one network call, and its upsampler needs the denoiser's features; leave the option out$"
    refused(command("evaluate", "whole", *line), f"--upsampler-alone: {why}")
    refused(command("evaluate", "toy", *line), "--upsampler-alone: toy has no upsampler; leave the option out$")
