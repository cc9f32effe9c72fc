"""The upsampler's training: examples, degradation, loss, and the commands."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from iclevr.labels import ICLEVR
from shared.checkpoint import load, read_info
from shared.diffusion.model import Denoiser, load_denoiser
from shared.diffusion.samplers import make_table
from shared.diffusion.upsampler import crop
from shared.options import SamplingOptions
from shared.registry import promote
from tests.toy_checkpoint import publish_toy_denoiser, publish_toy_upsampler, publish_toys
from tests.trainer.command_line import Command, refused, succeeded
from tests.trainer_fixtures import write_data_folder, write_objects_file
from trainer.config import with_changes
from trainer.data import as_tensor, load_dataset, to_float
from trainer.data_folder import find_pictures
from trainer.errors import TrainerError
from trainer.objectives.upsampler import UpsampleConfig, Upsampling, make_upsampler, scenes_of, split

CHANGES = ["crop=4", "squares=2", "batch=3", "network.channels=8", "network.dilations=[1]", "network.hidden=16"]
SET = [part for change in CHANGES for part in ("--set", change)]


def write_folder(folder: Path) -> Path:
    return write_data_folder(folder, 6, 32, 24, noise=True)


@pytest.fixture
def base(tmp_path: Path) -> Denoiser:
    publish_toys(tmp_path / "models")
    return load_denoiser(tmp_path / "models" / "toy.safetensors")


def objective(tmp_path: Path, base: Denoiser, *changes: str) -> Upsampling:
    folder = tmp_path / "data" if (tmp_path / "data").exists() else write_folder(tmp_path / "data")
    pictures, config = find_pictures([folder], None), with_changes(UpsampleConfig(), [*CHANGES, *changes])
    network = make_upsampler(base, pictures.size, config)
    return Upsampling(load_dataset(folder, size=16), pictures, base, network.config, config, tmp_path / "run")


def drawn(made: Upsampling, share: slice = slice(None)) -> list[torch.Tensor]:
    return made.draw(torch.tensor([0, 1, 2]), share, torch.Generator().manual_seed(0))


def test_squares_belong_to_their_pictures_and_corners(tmp_path: Path, base: Denoiser) -> None:
    made = objective(tmp_path, base)
    squeezed, labels, eps, level, denoise, corners, squares, noise = whole = drawn(made)
    assert (squeezed.shape, eps.shape, squares.shape) == ((3, 3, 16, 16), (3, 3, 16, 16), (3, 2, 3, 16, 16))
    assert (labels.shape, level.shape, denoise.dtype, corners.shape) == ((3, 24), (3,), torch.bool, (3, 2, 2))
    assert noise.shape == (3, 2, 2, 3, 16, 16)
    pictures = [made.pictures.read(i) for i in made.trained[:3].tolist()]
    assert torch.equal(crop(torch.stack([*map(as_tensor, pictures)]), corners * 4, 16), squares.flatten(0, 1))
    assert torch.equal(labels, made.dataset.labels[made.trained[:3]])
    for i, picture, own in zip(made.trained.tolist(), pictures, squeezed, strict=False):  # as read, or averaged
        box = as_tensor(picture.resize((16, 16), Image.Resampling.BOX))
        assert torch.equal(own, made.dataset.images[i]) or torch.equal(own, box)
    parts = [drawn(made, slice(0, 1)), drawn(made, slice(1, 3))]  # processes draw their shares
    assert all(torch.equal(torch.cat(two), one) for one, *two in zip(whole, *parts, strict=True))


def test_whole_scenes_are_held_out(tmp_path: Path, base: Denoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.objectives.upsampler.HELD_OUT_EVERY", 2)
    folder = write_data_folder(tmp_path / "data", 6, 32, 24, noise=True)
    labels = json.loads((folder / "train.json").read_text())
    names = [f"scene_{scene}_{number}.png" for scene in (0, 1, 2) for number in (0, 1)]
    for former, name in zip(labels, names, strict=True):
        (folder / "iclevr" / former).rename(folder / "iclevr" / name)
    (folder / "train.json").write_text(json.dumps(dict(zip(names, labels.values(), strict=True))))
    made = objective(tmp_path, base)
    assert (made.held_out.tolist(), made.trained.tolist()) == ([0, 1, 4, 5], [2, 3])
    assert scenes_of([Path("1.png"), Path("2.png")]).tolist() == [0, 1]
    assert scenes_of([Path("a_1.png"), Path("a_2.png")]).tolist() == [0, 1]  # else all were one scene


def test_measured_pictures_are_spread_over_all_held_out_scenes() -> None:
    """Of 300 scenes of 10 pictures, 6 are held out: 60 pictures, of which 48 are measured."""
    paths = [Path(f"scene_{scene:03d}_{number}.png") for scene in range(300) for number in range(10)]
    labels = torch.ones(len(paths), 2)
    measured, trained = split(labels, paths, 0)
    assert len(measured) == 48
    assert sorted({i // 10 for i in measured.tolist()}) == [0, 50, 100, 150, 200, 250]
    assert not {i // 10 for i in trained.tolist()} & {0, 50, 100, 150, 200, 250}
    assert len(trained) == 2940
    labels[-5:] = 0
    measured, trained = split(labels, paths, 1000)  # a folder of its own, at the end
    assert (int(measured[0]), int(measured[-1]), len(measured)) == (2000, 2994, 48)
    assert torch.equal(trained, torch.arange(2000))


def test_a_folder_is_held_out(upsample: Command, tmp_path: Path) -> None:
    write_data_folder(tmp_path / "unseen", 3, 64, 48)  # of flat colours; scaled to the size of the others
    line = ("--steps", 1, "--set", "denoised=0", "--set", "adversarial=0")
    succeeded(upsample(*line))
    own = read_info(Path("models/large.safetensors")).training["last"]
    succeeded(upsample(*line, "--run", "other", "--held-out", "unseen"))
    other = read_info(Path("models/large.safetensors")).training["last"]
    assert other["held_out_l1"] < 0.7 * own["held_out_l1"]  # flat pictures instead of noise
    assert other["held_out_loss"] == other["held_out_l1"]
    refused(upsample(*line, "--held-out", "data"), "data is given as --data and as --held-out")
    refused(upsample("--steps", 2, *line[2:], "--held-out", "unseen"), "was started with another held out")


def test_degraded_pictures_go_through_the_last_sampling_steps_or_get_some_noise(
    tmp_path: Path, base: Denoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.openvino.autocast_dtype", lambda _: None)  # two steps in bf16 differ more
    made = objective(tmp_path, base)
    made.options = SamplingOptions(sampler="ddim", steps=4, guidance=2.0, guidance_interval=(0.4, 0.8))
    table = make_table(made.options, base.alpha_bar)
    assert [t for t, *_ in table.rows] == [999, 749, 500, 250]
    made.left = base.alpha_bar[[999, 749, 500, 250]].float()
    x = to_float(drawn(made)[0]).repeat(2, 1, 1, 1)[:4]
    eps, labels, level = torch.randn(x.shape), made.labels[:4], torch.tensor([0.6, 0.8, 0.5, 0.0])
    out, left = made.degrade(x.clone(), labels, eps, level, torch.tensor([True, True, False, False]))
    assert left.tolist() == pytest.approx([float(base.alpha_bar[500]), float(base.alpha_bar[250]), 1, 1])
    torch.testing.assert_close(out[2], x[2] + 0.005 * eps[2])
    assert torch.equal(out[3], x[3])

    def predict(x_t: torch.Tensor, t: int, i: int, w: float) -> torch.Tensor:
        a, s = base.alpha_bar[t].sqrt().float(), (1 - base.alpha_bar[t]).sqrt().float()
        with torch.inference_mode():
            at, own = torch.tensor([t]), labels[i : i + 1]
            kept, dropped = (base.network(x_t, at, own, torch.tensor([keep])) for keep in (True, False))
        return a * x_t - s * (dropped + w * (kept - dropped))

    def noised(i: int, t: int) -> torch.Tensor:
        return base.alpha_bar[t].sqrt().float() * x[i : i + 1] + (1 - base.alpha_bar[t]).sqrt().float() * eps[i : i + 1]

    x_t = noised(0, 500)
    x_t = table.rows[2][1] * x_t + table.rows[2][2] * predict(x_t, 500, 0, 2.0)  # guided inside the interval
    torch.testing.assert_close(out[:1], predict(x_t, 250, 0, 1.0), rtol=0.05, atol=0.05)
    torch.testing.assert_close(out[1:2], predict(noised(1, 250), 250, 1, 1.0), rtol=0.05, atol=0.05)


def test_one_loss_teaches_the_upsampler_pixels_and_edges_and_the_discriminator(tmp_path: Path, base: Denoiser) -> None:
    pixels, both = (objective(tmp_path, base, f"adversarial={weight}", "denoised=0") for weight in (0, 1))
    network = make_upsampler(base, pixels.pictures.size, pixels.config)
    grads = list[dict[str, Tensor]]()
    for made in (pixels, both):
        network.zero_grad()
        made(network, *drawn(made)).backward()
        grads.append({name: value.grad.clone() for name, value in network.named_parameters() if value.grad is not None})
    of_discriminator = [name for name in grads[0] if name.startswith("discriminator.")]
    assert of_discriminator
    # the last bias has none: it is in both scores that the loss compares
    assert all(grads[0][name].any() for name in of_discriminator if name.endswith("weight"))
    for name in of_discriminator:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-3, atol=1e-6)  # threads sum in any order
    head = "upsampler.head.weight"
    assert not torch.allclose(grads[0][head], grads[1][head], rtol=0.1)


def test_of_a_picture_that_was_replaced_only_mean_colours_count(tmp_path: Path, base: Denoiser) -> None:
    made = objective(tmp_path, base)
    _, _, _, _, _, corners, squares, _ = drawn(made)
    x, real = torch.full((3, 3, 16, 16), 0.5), to_float(squares.flatten(0, 1))
    checks = 0.1 * (-1) ** torch.arange(16.0)  # none in the mean
    cases = [(0, x.new_full(real.shape, 0.6), 0.1), (0, 0.5 + checks.expand_as(real), 0), (1, real, 0)]
    for left, squares, loss in cases:
        shares = torch.full((3,), float(left))
        assert float(made.pixel_loss(squares, real, x, shares, corners)) == pytest.approx(loss, abs=1e-6)
    halves = made.pixel_loss(real + 0.2, real, x, torch.ones(3), corners)
    assert float(halves) == pytest.approx(0.2, abs=1e-6)


def test_labels_are_those_of_the_denoiser(tmp_path: Path, base: Denoiser) -> None:
    before = objective(tmp_path, base)
    write_objects_file(tmp_path / "data", ICLEVR.names[::-1])
    assert torch.equal(objective(tmp_path, base).labels, before.labels)


def test_only_pictures_with_labels_are_enlarged(tmp_path: Path, base: Denoiser) -> None:
    everything = objective(tmp_path, base)
    train = json.loads((tmp_path / "data/train.json").read_text())
    names = list(train)
    (tmp_path / "data/train.json").write_text(json.dumps({**train, names[0]: [], names[3]: []}))
    made = objective(tmp_path, base)
    assert (everything.held_out.tolist(), everything.trained.tolist()) == ([0], [1, 2, 3, 4, 5])
    assert (made.held_out.tolist(), made.trained.tolist(), len(made)) == ([1], [2, 4, 5], 3)
    (tmp_path / "data/train.json").write_text(json.dumps(dict.fromkeys(names, ())))
    with pytest.raises(TrainerError, match="none of the pictures has labels"):
        objective(tmp_path, base)


def test_what_cannot_be_trained_is_refused(tmp_path: Path, base: Denoiser) -> None:
    with pytest.raises(TrainerError, match=r"pictures of \(32, 24\) pixels are smaller than crop=7 blocks"):
        objective(tmp_path, base, "crop=7")
    publish_toy_denoiser(tmp_path, "padded", 0, aspect=1.5)
    with pytest.raises(TrainerError, match="padded learnt padded pictures"):
        objective(tmp_path, load_denoiser(tmp_path / "padded.safetensors"))
    publish_toy_denoiser(tmp_path, "placed", 0, positions=True)
    with pytest.raises(TrainerError, match="placed takes positions"):
        objective(tmp_path, load_denoiser(tmp_path / "placed.safetensors"))


@pytest.fixture
def upsample(command: Command, tmp_path: Path) -> Command:
    """Runs `train upsampler` of the toy's pictures."""
    write_folder(tmp_path / "data")
    publish_toys(tmp_path / "models")
    common = ["train", "upsampler", "--data", "data", "--base", "toy", "--name", "large", "--run", "run", *SET]
    return lambda *options: command(*common, *options)


def test_the_command_trains_publishes_and_resumes(upsample: Command) -> None:
    succeeded(upsample("--steps", 2))
    info = read_info(Path("models/large.safetensors"))
    assert "base" not in info.config
    assert (info.config["picture"], info.training["steps"]) == ([32, 24], 2)
    assert load_denoiser(Path("models/large.safetensors")).picture_shape == (3, 24, 32)
    denoisers = (load_denoiser(Path(f"models/{name}.safetensors")).network for name in ("large", "toy"))
    for one, other in zip(*(network.parameters() for network in denoisers), strict=True):
        torch.testing.assert_close(one, other, rtol=0.01, atol=1e-6)  # in bfloat16
    succeeded(upsample("--steps", 3))
    last = read_info(Path("models/large.safetensors")).training["last"]
    assert last.keys() == {"held_out_loss", "held_out_l1", "held_out_swd"}
    assert last["held_out_loss"] == last["held_out_swd"]  # which chooses the best under an adversarial loss
    assert Path("run/samples-0000003.png").exists()
    lines = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "held_out_loss" in line] == [2, 3]
    refused(upsample("--steps", 3, "--size", "24x16"), "was started with another size")
    promote(Path("models"), "large")
    publish_toy_denoiser(Path("models"), "toy", 7)  # the base learnt on
    refused(upsample("--steps", 6), "was started with another base; choose another --run")


def test_the_command_refuses_bad_arguments(upsample: Command) -> None:
    refused(upsample(), "say how long")
    refused(upsample("--steps", 1, "--size", "30x24"), "must be a multiple of the block, 4")
    refused(upsample("--name", "toy", "--steps", 1), "toy: is the checkpoint that the new one changes")
    assert not Path("run").exists()


def test_only_the_first_of_several_processes_publishes(upsample: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others know no figures of held-out pictures: a header of theirs would lack them."""
    monkeypatch.setattr("trainer.commands.terminal.MAIN_PROCESS", False)
    succeeded(upsample("--steps", 1))
    assert Path("run/state.pt").exists()
    assert not Path("models/large.safetensors").exists()


def test_a_run_starts_from_a_published_upsampler(upsample: Command) -> None:
    publish_toy_upsampler(Path("models"), "large", read_info(Path("models/toy.safetensors")))
    common = ("--base", "other", "--name", "next", "--steps", 1, "--set", "lr=1e-9", "--set", "weight_decay=0")
    succeeded(upsample(*common, "--start-from", "large"))
    assert read_info(Path("models/next.safetensors")).training["started_from"] == "large"
    before, after = (load(Path(f"models/{name}.safetensors"))[1] for name in ("large", "next"))
    for name, value in before.items():
        torch.testing.assert_close(after[name].float(), value, rtol=0.01, atol=1e-6)
    refused(upsample(*common, "--start-from", "toy"), "toy has no upsampler")
    other = ("--start-from", "large", "--set", "network.colours=2")
    refused(upsample(*common, *other), "large has an upsampler of another")
