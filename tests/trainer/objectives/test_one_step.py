"""Training for one network call a picture: examples, losses, and the command."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from shared.device import exact
from shared.diffusion.denoise import sample
from shared.diffusion.model import Denoiser, load_denoiser
from shared.diffusion.upsampler import crop
from shared.options import SamplingOptions
from tests.toy_checkpoint import publish_toy_denoiser
from tests.trainer.command_line import Command, refused, succeeded
from tests.trainer_fixtures import write_data_folder
from trainer.config import with_changes
from trainer.data import as_tensor, load_dataset, to_float
from trainer.data_folder import find_pictures
from trainer.errors import TrainerError
from trainer.objectives.adversary import detail_of
from trainer.objectives.one_step import (
    SAMPLING,
    OneStep,
    OneStepConfig,
    OneStepNetworks,
    Weights,
    check_base,
    in_levels,
    light_apart,
    losses_of_grain,
    make_networks,
)
from trainer.objectives.upsampler import HELD_OUT_EVERY
from trainer.train import make_optimizers

CHANGES = ["crop=4", "squares=2", "batch=3", "network.channels=8", "network.dilations=[1]", "network.hidden=16"]
SET = [part for change in CHANGES for part in ("--set", change)]


def write_folder(folder: Path) -> Path:
    names = list(json.loads((write_data_folder(folder, 6, 32, 24, noise=True) / "train.json").read_text()))
    (folder / "positions.json").write_text(json.dumps({name: [[0.25, 0.75]] for name in names}))
    (folder / "rotations.json").write_text(json.dumps({name: [0.5] for name in names}))
    return folder


def publish_base(storage: Path) -> None:
    publish_toy_denoiser(
        storage, "step", 0, positions=True, rotations=True, sampling=SAMPLING.model_dump(mode="json")
    )  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> Denoiser:
    publish_base(tmp_path)
    return load_denoiser(tmp_path / "step.safetensors")


def made(tmp_path: Path, base: Denoiser, *changes: str) -> tuple[OneStep, OneStepNetworks]:
    folder = tmp_path / "data" if (tmp_path / "data").exists() else write_folder(tmp_path / "data")
    pictures, config = find_pictures([folder], None), with_changes(OneStepConfig(), [*CHANGES, *changes])
    networks = make_networks(base, base, pictures.size, config)
    upsampler = networks.drawing.upsampler.config
    return OneStep(load_dataset(folder, size=16), pictures, base, upsampler, config, tmp_path / "run"), networks


def drawn(objective: OneStep, share: slice = slice(None)) -> list[Tensor]:
    return objective.draw(torch.tensor([0, 1, 2]), share, torch.Generator().manual_seed(0))


def test_what_differs_from_the_mean_around_it_is_detail() -> None:
    x = torch.randn(2, 3, 12, 9, generator=torch.Generator().manual_seed(0))
    for side in (3, 5, 9):
        expected = x - F.avg_pool2d(x, side, 1, side // 2, count_include_pad=False)
        torch.testing.assert_close(detail_of(x, side), expected)


def test_squares_are_those_of_the_renders_around_their_objects(tmp_path: Path, base: Denoiser) -> None:
    objective, _ = made(tmp_path, base)
    z, labels, corners, squares, small, *noises = whole = drawn(objective)
    assert (z.shape, labels.shape, squares.shape) == ((3, 3, 16, 16), (3, 24, 5), (3, 2, 3, 16, 16))
    assert [noise.shape for noise in noises] == [(3, 2, 2, 2, 3, side, side) for side in (16, 8, 4)]
    renders = torch.stack([as_tensor(objective.pictures.read(i)) for i in objective.trained[:3].tolist()])
    assert torch.equal(crop(renders, corners * 4, 16), squares.flatten(0, 1))
    assert torch.equal(labels, objective.labels[objective.trained[:3]])
    torch.testing.assert_close(small, F.interpolate(to_float(renders), (16, 16), mode="bilinear", antialias=True))
    # the object's middle is at column 8 and row 18, the square's first corner 8 pixels before, 20 more or less
    many = objective._corners(labels, torch.rand(3, 50, 2), torch.Generator().manual_seed(0)).flatten(0, 1)
    assert many.amin(0).tolist() == [0, 0]
    assert many.amax(0).tolist() == [2, 4]  # of 6 rows and 8 columns of blocks
    middle = torch.full((3, 1, 2), 0.5)
    assert objective._corners(labels, middle, torch.Generator()).flatten(0, 1).tolist() == [[2, 0]] * 3
    parts = [drawn(objective, slice(0, 1)), drawn(objective, slice(1, 3))]  # processes draw their shares
    assert all(torch.equal(torch.cat(two), one) for one, *two in zip(whole, *parts, strict=True))


def test_the_discriminators_teach_where_they_have_weight(tmp_path: Path, base: Denoiser) -> None:
    grads = list[dict[str, Tensor]]()
    for weight in (0, 1):
        objective, networks = made(tmp_path, base, f"adversarial={weight}")
        assert len(networks.discriminators) == (3 if weight else 0)
        objective(networks, *drawn(objective)).backward()
        grads.append({name: one.grad for name, one in networks.named_parameters() if one.grad is not None})
    without, with_them = grads
    assert not any(name.startswith("discriminators") for name in without)
    learnt = {name for name in with_them if name.startswith("discriminators") and with_them[name].any()}
    assert {".".join(name.split(".")[:2]) for name in learnt} == {f"discriminators.{i}" for i in range(3)}
    for name in ("drawing.denoiser.head.weight", "drawing.upsampler.head.weight"):
        assert without[name].any()
        assert not torch.allclose(without[name], with_them[name], rtol=0.1)


def test_discriminators_see_whole_levels_of_256() -> None:
    shown = in_levels(torch.tensor([-1.2, -1.0, 0.001, 0.3, 1.0, 2.0]))
    assert torch.equal(shown, ((shown + 1) * 127.5).round() / 127.5 - 1)
    assert (shown.min(), shown.max()) == (-1, 1)
    assert (shown[1:5] - torch.tensor([-1.0, 0.001, 0.3, 1.0])).abs().max() <= 0.5 / 127.5 + 1e-6


def cost(made: Tensor, real: Tensor) -> float:
    losses = losses_of_grain(made, real, 4)
    assert losses.keys() == {"grid", "tint", "flat"}
    return sum(float(loss) * getattr(Weights(), name) for name, loss in losses.items())


def test_grain_below_a_level_costs_where_renders_are_even() -> None:
    """As a pattern of blocks, as tint and as detail; beside an edge of the render it costs nothing."""
    level = 0.4 / 127.5
    even, square = torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32)
    square[..., 16:] = 1
    assert cost(even, even) == 0
    dots = even.clone()
    dots[..., ::4, ::4] = level  # gray, once in each block
    tinted = even.clone()
    tinted[:, 0, ::2] = level
    noise = level * (torch.randint(0, 2, (1, 1, 32, 32), generator=torch.Generator().manual_seed(0)) * 2.0 - 1)
    in_blocks, as_tint, as_noise = (cost(even + x, even) for x in (dots, tinted, noise))
    assert in_blocks > 5 * cost(dots, dots)  # a render's own dots are no pattern to unlearn
    assert as_tint > 0
    assert as_noise > 0
    beside = torch.zeros(1, 3, 32, 32)
    beside[..., 15:17] = noise[..., 15:17]  # within four pixels of the edge
    assert cost(square + beside, square) == 0


def test_the_denoiser_learns_at_its_share_of_the_rate(tmp_path: Path, base: Denoiser) -> None:
    _, networks = made(tmp_path, base, "denoiser_lr=0.25")
    (optimizer,) = make_optimizers(networks, OneStepConfig())
    shares = {id(one): group["share"] for group in optimizer.param_groups for one in group["params"]}
    assert len(shares) == len(list(networks.parameters()))
    for name, parameter in networks.named_parameters():
        assert shares[id(parameter)] == (0.25 if name.startswith("drawing.denoiser") else 1)


def test_the_light_is_that_of_the_start_where_neither_has_edges() -> None:
    start, real = torch.zeros(1, 3, 32, 32), torch.full((1, 3, 32, 32), 0.5)
    assert light_apart(start, start, 16, detail_of(start, 5), detail_of(real, 5)) == 0  # whatever the render's light is
    torch.testing.assert_close(
        light_apart(start + 0.1, start, 16, detail_of(start, 5), detail_of(real, 5)), torch.tensor(0.1)
    )
    for edges in (start, real):
        edges[..., ::2, :16] = 1  # in the left half
        torch.testing.assert_close(
            light_apart(start + 0.1, start, 16, detail_of(start, 5), detail_of(real, 5)), torch.tensor(0.05)
        )
        edges[..., ::2, :16] = edges[..., 1::2, :16]


def test_the_light_to_keep_is_computed_in_float32(
    tmp_path: Path, base: Denoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training computes in bfloat16, which shifts it by more than a tenth of a level of 256."""
    objective, networks = made(tmp_path, base, "adversarial=0")
    kept = list[Tensor]()

    def record(made: Tensor, start: Tensor, *others: object) -> Tensor:
        kept.append(start)
        return made.new_zeros(())

    monkeypatch.setattr("trainer.objectives.one_step.light_apart", record)
    z, labels, *rest = drawn(objective)
    with torch.autocast("cpu", torch.bfloat16):
        objective(networks, z, labels, *rest)
    at, p, q = base.first_step
    with torch.no_grad():
        keep = torch.ones(3, dtype=torch.bool)
        wanted = p * z + q * base.network(z, torch.full((3,), at), labels, keep)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = p * z + q * base.network(z, torch.full((3,), at), labels, keep).float()
    _, small = kept
    assert small.dtype is torch.float32
    assert (small - wanted).abs().max() < 0.01 / 127.5
    assert (rounded - wanted).abs().max() > 0.1 / 127.5


def test_losses_have_names_and_the_weights_of_the_recipe(tmp_path: Path, base: Denoiser) -> None:
    names = {"detail", "light", "small_detail", "small_light", "grid", "tint", "flat", "drawn"}
    objective, networks = made(tmp_path, base, "adversarial=0")
    inputs = drawn(objective)
    found, _ = objective.losses(networks, *inputs)
    losses = {name: float(loss.detach()) for name, loss in found.items()}
    assert losses.keys() == names
    weights = {name: getattr(objective.config.weights, name) for name in names}
    expected = sum(weights[name] * loss for name, loss in losses.items())
    assert float(objective(networks, *inputs).detach()) == pytest.approx(expected, rel=1e-5)
    only = json.dumps(dict.fromkeys(names - {"detail"}, 0) | {"detail": 2})
    objective, _ = made(tmp_path, base, "adversarial=0", f"weights={only}")
    assert float(objective(networks, *inputs).detach()) == pytest.approx(2 * losses["detail"], rel=1e-5)
    objective, networks = made(tmp_path, base)
    found, _ = objective.losses(networks, *drawn(objective))
    sizes = ("full", "half", "quarter")
    assert found.keys() - names == {f"{side}_{size}" for side in ("adversarial", "discriminator") for size in sizes}


def test_what_has_no_share_of_the_rate_does_not_learn(tmp_path: Path, base: Denoiser) -> None:
    objective, networks = made(tmp_path, base, "adversarial=0", "denoiser_lr=0", "upsampler_lr=0")
    objective(networks, *drawn(objective)).backward()
    learning = {name for name, one in networks.drawing.named_parameters() if one.requires_grad}
    assert learning == {name for name in learning if name.startswith("upsampler.windows.")}
    for name in ("windows.label", "windows.curve.weight", "windows.out.weight"):
        gradient = networks.drawing.upsampler.get_parameter(name).grad
        assert gradient is not None
        assert gradient.any()


def test_a_model_of_more_steps_is_distilled_first(tmp_path: Path) -> None:
    more = SamplingOptions(steps=2, guidance=1.0).model_dump(mode="json")
    publish_toy_denoiser(tmp_path, "toy", 0, positions=True, sampling=more)
    with pytest.raises(TrainerError, match="toy samples in 2 steps; distil it first"):
        check_base(load_denoiser(tmp_path / "toy.safetensors"))


def test_the_command_publishes_a_model_of_one_call_and_goes_on_from_it(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch's bfloat16 convolutions sometimes have gradients that are no numbers, of inputs as small as four pixels
    monkeypatch.setattr("trainer.train.fast", exact)
    write_folder(tmp_path / "data")
    publish_base(Path("models"))
    line = ("train", "one-step", "--data", "data", "--base", "step", "--name", "whole", *SET)
    succeeded(command(*line, "--run", "pixels", "--steps", 2, "--set", "adversarial=0"))
    first = load_denoiser(Path("models/whole.safetensors"))
    assert (first.options, first.picture_shape) == (SAMPLING, (3, 24, 32))
    assert first.info.config.get("base") is None
    weights = load_file("models/whole.safetensors")
    whole = {name for name, one in weights.items() if one.dtype is torch.float32 and not name.startswith("layouts")}
    assert {name.split(".")[0] for name in whole} == {"decoder", "norm", "head"}
    assert {name.split(".")[1] for name in whole if name.startswith("decoder")} == {"1"}  # the last level
    assert len(list(Path("pixels").glob("samples-*.png"))) == 1
    stepper = first.stepper()
    assert sample(stepper, torch.eye(24)[:2], SAMPLING, [1, 2]).shape == (2, 3, 24, 32)
    assert stepper.network_rows == 2
    succeeded(command(*line, "--run", "both", "--steps", 2, "--start-from", "whole"))
    second = load_denoiser(Path("models/whole.safetensors"))
    assert second.info.digest != first.info.digest
    assert second.info.training["started_from"] == "whole"
    before, after = (one.info.training["last"] for one in (first, second))
    assert before["held_out_loss"] == before["held_out_l1"]
    assert after["held_out_loss"] == after["held_out_swd"]  # which chooses the best under an adversarial loss
    assert {"held_out/detail", "held_out/drawn"} < before.keys() < after.keys()
    assert {"held_out/adversarial_half", "held_out/discriminator_half"} <= after.keys() - before.keys()
    write_folder(Path("unseen"))
    succeeded(command(*line, "--run", "unseen-run", "--steps", 1, "--held-out", "unseen"))
    other = command(*line, "--run", "other", "--steps", 2, "--start-from", "whole", "--set", "network.channels=4")
    refused(other, "whole has an upsampler of another shape")
    assert HELD_OUT_EVERY > 6  # so the one held-out picture is the first
