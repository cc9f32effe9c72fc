"""The upsampler: shapes, what it adds, and checkpoints that carry one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

from shared.checkpoint import CheckpointError, load, publish
from shared.device import autocast_dtype
from shared.diffusion.denoise import finish, sample
from shared.diffusion.model import load_denoiser
from shared.diffusion.solids import SOLIDS
from shared.diffusion.upsampler import (
    MARGIN,
    Drawn,
    Interpolation,
    UpsamplerConfig,
    UpsamplerNet,
    crop,
    enlarge,
    phases,
    without_light,
)
from shared.diffusion.windows import WindowsConfig
from shared.options import EngineName, SamplingOptions
from tests.toy_checkpoint import CAMERA, publish_toy_denoiser, publish_toy_upsampler

OPTIONS = SamplingOptions(steps=2, guidance=1.0)


def upsampler(**config: object) -> UpsamplerNet:
    """An upsampler with random weights in all layers; some of a new one are zero."""
    made = UpsamplerNet(
        UpsamplerConfig(**{"picture": (24, 16), "channels": 8, "dilations": (1, 2), "hidden": 16, **config})
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return made.eval()


@pytest.mark.parametrize(("width", "height", "block"), [(320, 240, 4), (24, 16, 8), (30, 20, 5), (7, 9, 1)])
@pytest.mark.parametrize("side", [16, 64])
def test_any_size_that_is_a_multiple_of_the_block(width: int, height: int, block: int, side: int) -> None:
    made = upsampler(picture=(width, height), block=block)
    assert made.picture_shape == (3, height, width)
    assert made(torch.zeros(2, 3, side, side)).shape == (2, 3, height, width)


def test_a_size_that_is_no_multiple_of_the_block_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"picture \[320, 242\] must be a multiple of the block, 4"):
        UpsamplerConfig(picture=(320, 242))


def test_without_weights_half_of_a_picture_is_interpolated_and_half_its_blocks_means() -> None:
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    made = upsampler(picture=(24, 16), colours=1)
    for parameter in made.parameters():
        nn.init.zeros_(parameter)
    enlarged = F.interpolate(x, (16, 24), mode="bicubic")
    means = F.avg_pool2d(enlarged, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(made(x), (enlarged + means) / 2)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_enlarging_is_interpolation_and_exact_in_lower_precision(mode: Interpolation) -> None:
    x = torch.randn(2, 3, 16, 9, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        made = enlarge(x, (24, 31), mode)
    torch.testing.assert_close(made, F.interpolate(x, (24, 31), mode=mode), atol=1e-5, rtol=0)


def test_a_block_may_have_an_edge_between_two_colours() -> None:
    made = upsampler(picture=(4, 4), colours=2)
    for parameter in made.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        logits, colours, _ = made.head.bias.split(made.parts)
        left, right = logits.view(3, 4, 4)[1:]
        left[:, :3], right[:, 3:] = 100, 100
        colours.view(2, 3)[:] = torch.tensor([[0.1, 0.2, 0.3], [-0.5, -0.6, -0.7]])
    row = made(torch.full((1, 3, 2, 2), 0.25))[0, :, 1]
    torch.testing.assert_close(row[:, 0], torch.tensor([0.35, 0.45, 0.55]))
    torch.testing.assert_close(row, torch.stack([*[row[:, 0]] * 3, torch.tensor([-0.25, -0.35, -0.45])], 1))


def test_blocks_know_their_place_between_the_small_pictures_pixels() -> None:
    rows, columns = phases((8, 16), (8, 4), 4)[0].unflatten(0, (2, 2))
    assert rows.shape == columns.shape == (2, 2 + 2 * MARGIN, 4 + 2 * MARGIN)
    for waves, cosine in ((rows, 1.0), (columns, -1.0)):
        torch.testing.assert_close(
            waves, torch.tensor([0.0, cosine])[:, None, None].expand_as(waves), atol=1e-5, rtol=0
        )


def test_at_the_border_of_an_even_picture_it_is_even() -> None:
    even = upsampler(picture=(32, 24), dilations=(), colours=0)(torch.full((1, 3, 24, 32), 0.5))
    blocks = even.unfold(2, 4, 4).unfold(3, 4, 4)
    torch.testing.assert_close(blocks, blocks[:, :, :1, :1].expand_as(blocks))


def test_squares_are_those_of_the_whole_picture() -> None:
    """Without blocks the network sees one position around each block, and the margin is two."""
    made, x = upsampler(picture=(32, 24), dilations=()), torch.randn(2, 3, 16, 16)
    whole, squares = made(x), made.squares(x, torch.tensor([[[0, 0]], [[2, 4]]]), 4)
    assert squares.shape == (2, 3, 16, 16)
    torch.testing.assert_close(squares[0], whole[0, :, :16, :16])
    torch.testing.assert_close(squares[1], whole[1, :, 8:24, 16:32])
    pixels = torch.arange(24.0).view(1, 1, 4, 6)
    two = crop(pixels, torch.tensor([[[1, 2], [0, 4]]]), 2)
    assert two.tolist() == [[[[8, 9], [14, 15]]], [[[4, 5], [10, 11]]]]


def test_an_adapter_adds_an_upsampler_to_its_base(tmp_path: Path) -> None:
    base = publish_toy_denoiser(tmp_path, "toy", 0, sampling=OPTIONS.model_dump(mode="json"))
    publish_toy_upsampler(tmp_path, "large", base)
    plain, large = (load_denoiser(tmp_path / f"{name}.safetensors") for name in ("toy", "large"))
    assert (plain.image_shape, plain.picture_shape) == ((3, 16, 16), (3, 16, 16))
    assert (large.image_shape, large.picture_shape) == ((3, 16, 16), (3, 24, 32))
    assert large.options == plain.options == OPTIONS
    assert all(torch.equal(a, b) for a, b in zip(plain.network.parameters(), large.network.parameters(), strict=True))
    labels = torch.eye(len(base.vocabulary))[:3]
    small, made = (sample(one.stepper(engine="torch"), labels, OPTIONS, [1, 2, 3]) for one in (plain, large))
    assert (small.shape, made.shape) == ((3, 3, 16, 16), (3, 3, 24, 32))
    enlarged = F.interpolate(small, (24, 32), mode="bicubic")
    assert 0.01 < float((made - enlarged).abs().mean()) < 1  # the network adds something


def test_features_are_seen_where_they_are() -> None:
    made, x = upsampler(picture=(32, 24), dilations=(), features=2), torch.zeros(1, 3, 16, 16)
    features = torch.zeros(1, 2, 8, 8)
    plain = made(x, features=features)
    features[0, :, 4, 4] = 1
    differs = (made(x, features=features) - plain).abs().amax((0, 1)) > 1e-6
    rows, columns = (differs.any(axis).nonzero()[:, 0] for axis in (1, 0))
    # 8 x 8 features for 6 rows and 8 columns of blocks: row 3 has its centre at feature 4.17, column 4 at feature 4
    assert (int(rows[0]), int(rows[-1]) + 1) == (12, 16)
    assert (int(columns[0]), int(columns[-1]) + 1) == (16, 20)
    squares = made.squares(x, torch.tensor([[[2, 4]]]), 4, features)
    torch.testing.assert_close(squares[0], made(x, features=features)[0, :, 8:24, 16:32])


@pytest.mark.parametrize("how", [{"solids": SOLIDS, "camera": CAMERA}, {"windows": WindowsConfig(labels=3)}])
def test_squares_see_what_is_drawn_there(how: dict[str, Any]) -> None:
    made, x = upsampler(picture=(32, 24), dilations=(), **how), torch.zeros(1, 3, 16, 16)
    drawn = made.draw(torch.tensor([[[1, 0.5, 0.4, 1, 0], [0, 0.5, 0.5, 0, 1], [1, 0.9, 0.9, 0, -1]]]))
    assert drawn is not None
    whole, places = made(x, drawn=drawn), torch.tensor([[[2, 4], [0, 1]]])
    assert (whole - made(x, drawn=drawn._replace(pixels=0 * drawn.pixels))).abs().max() > 0.01
    squares = made.squares(x, places, 4, drawn=drawn)
    torch.testing.assert_close(squares[0], whole[0, :, 8:24, 16:32])
    torch.testing.assert_close(squares[1], whole[0, :, :16, 4:20])


def test_a_pixel_may_be_what_is_drawn_in_the_light_of_the_picture() -> None:
    made, x = upsampler(picture=(80, 80), dilations=(), windows=WindowsConfig(labels=3)), torch.rand(1, 3, 16, 16)
    for parameter in made.head.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        made.head.bias[16:32] = 100.0  # every pixel is what is drawn
    pixels = torch.zeros(1, 48, 24, 24)
    pixels[:, :16, 12, 12] = 1  # red, in the block that begins at 40
    drawn, plain = (made(x, drawn=Drawn(one, None))[0] for one in (pixels, 0 * pixels))
    enlarged = F.interpolate(x, (80, 80), mode="bicubic")[0]
    torch.testing.assert_close(
        F.avg_pool2d(plain, 20)[:, 1:3, 1:3], F.avg_pool2d(enlarged, 20)[:, 1:3, 1:3], atol=0.05, rtol=0
    )
    change = drawn - plain
    torch.testing.assert_close(change[1:], torch.zeros(2, 80, 80), atol=1e-5, rtol=0)
    # in the block 1, less its share of the mean of five blocks a side
    torch.testing.assert_close(change[0, 41:43, 41:43], torch.full((2, 2), 1 - 1 / 25), atol=0.01, rtol=0)


def test_objects_are_what_is_painted_in_the_light_of_the_picture() -> None:
    torch.manual_seed(1)
    made, x = upsampler(picture=(80, 80), dilations=(), solids=SOLIDS, camera=CAMERA), torch.rand(1, 3, 16, 16)
    assert made.retouch is not None
    for parameter in made.retouch.parameters():
        nn.init.zeros_(parameter)
    pixels, share = torch.zeros(1, 48, 24, 24), torch.zeros(1, 1, 24, 24)
    pixels[:, :16, 12, 12] = 1  # red, in the block that begins at 40
    share[..., 12, 12] = 1
    drawn, plain = made(x, drawn=Drawn(pixels, share))[0], made(x)[0]
    block = drawn[:, 40:44, 40:44]
    others = torch.ones(80, 80, dtype=torch.bool)
    others[40:44, 40:44] = False
    torch.testing.assert_close(drawn[:, others], plain[:, others])
    enlarged = F.interpolate(x, (80, 80), mode="bicubic")[0]
    # of five blocks a side, but not of the one with an edge
    around = (25 * enlarged[:, 32:52, 32:52].mean((1, 2)) - enlarged[:, 40:44, 40:44].mean((1, 2))) / 24
    torch.testing.assert_close(block.mean((1, 2)), around + torch.tensor([1, 0, 0]), atol=0.03, rtol=0)
    assert block.std((1, 2)).max() < 0.05 < enlarged[:, 40:44, 40:44].std((1, 2)).min()


def test_light_is_linear_between_blocks() -> None:
    slope = torch.linspace(0, 1, 48).expand(1, 1, 48, 48)
    left = F.pixel_shuffle(without_light(F.pixel_unshuffle(slope, 4), 1), 4)
    torch.testing.assert_close(left[..., 12:-12], torch.zeros(1, 1, 48, 24), atol=1e-5, rtol=0)


ONE_STEP = SamplingOptions(sampler="ddim", steps=1, guidance=1.0)


@pytest.mark.parametrize("draws", ["", "paints", "windows"])
@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_with_an_upsampler_that_sees_features_a_picture_is_one_call(
    tmp_path: Path, engine: EngineName, draws: str
) -> None:
    base = publish_toy_denoiser(tmp_path, "toy", 0, positions=True, rotations=True)
    how, sampling = {draws: True} if draws else {}, ONE_STEP.model_dump(mode="json")
    publish_toy_upsampler(tmp_path, "whole", base, features=8, sampling=sampling, **how)
    denoiser = load_denoiser(tmp_path / "whole.safetensors")
    stepper, labels = denoiser.stepper(engine=engine), torch.eye(len(base.vocabulary))[:3]
    rows = [stepper.new_row(one, ONE_STEP, seed) for seed, one in enumerate(labels)]
    x, t, given = torch.stack([row.x for row in rows]), torch.full((3,), 999), torch.stack([row.labels for row in rows])
    made = finish(stepper, rows)
    assert stepper.network_rows == 3
    assert made.shape == (3, 3, 24, 32)
    assert denoiser.upsampler is not None
    with torch.inference_mode():
        features = denoiser.network.features(x, t, given, torch.ones(3, dtype=torch.bool))
        x0_hat = denoiser.alpha_bar[-1].sqrt() * x - (1 - denoiser.alpha_bar[-1]).sqrt() * denoiser.network.paint(
            features
        )
        drawn = denoiser.upsampler.draw(given)
        expected = denoiser.upsampler(x0_hat.float(), features=features, drawn=drawn)
        others = [(0 * features, drawn), *([(features, denoiser.upsampler.draw(0 * given))] if draws else [])]
        other = [denoiser.upsampler(x0_hat.float(), features=one, drawn=two) for one, two in others]
    if not (in_bfloat16 := autocast_dtype(torch.device("cpu"))):
        torch.testing.assert_close(made, expected, atol=1e-4, rtol=0)
    assert min((expected - one).abs().max() for one in other) > 0.1
    assert (made - expected).abs().mean() < (0.3 if in_bfloat16 else 1e-3) * min(
        (made - one).abs().mean() for one in other
    )
    torch.testing.assert_close(
        torch.stack([row.x for row in rows]), x0_hat.float(), atol=0.1 if in_bfloat16 else 1e-4, rtol=0
    )
    for options in (OPTIONS, SamplingOptions(steps=1, guidance=2.0)):
        with pytest.raises(ValueError, match="in one step, without guidance"):
            stepper.new_row(labels[0], options, 0)


def test_autocast_rounds_neither_the_small_picture_nor_the_features(tmp_path: Path) -> None:
    base = publish_toy_denoiser(tmp_path, "toy", 0, positions=True, rotations=True)
    publish_toy_upsampler(tmp_path, "whole", base, features=8, sampling=ONE_STEP.model_dump(mode="json"))
    one_call = load_denoiser(tmp_path / "whole.safetensors").one_call
    assert one_call is not None
    x, labels, keep = torch.randn(2, *one_call.image_shape), torch.zeros(2, one_call.num_labels, 5), torch.ones(2) > 0
    with torch.inference_mode():
        with torch.autocast("cpu", torch.bfloat16):
            trunk = one_call.denoiser.trunk(x, torch.full((2,), 999), labels, keep)
            rounded = one_call.predict(x, *trunk)
        assert trunk[0].dtype == torch.bfloat16
        for one, other in zip(rounded, one_call.predict(x, *(part.float() for part in trunk)), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_an_upsampler_that_sees_features_needs_a_model_of_one_step(tmp_path: Path) -> None:
    base = publish_toy_denoiser(tmp_path, "toy", 0)
    publish_toy_upsampler(tmp_path, "whole", base, features=8, sampling=OPTIONS.model_dump(mode="json"))
    with pytest.raises(CheckpointError, match="must sample in one step, w = 1"):
        load_denoiser(tmp_path / "whole.safetensors")


@pytest.mark.parametrize("how", [{"paints": True}, {"windows": True}])
def test_what_draws_objects_needs_a_denoiser_that_takes_rotations(tmp_path: Path, how: dict[str, bool]) -> None:
    base = publish_toy_denoiser(tmp_path, "toy", 0, positions=True)
    publish_toy_upsampler(tmp_path, "whole", base, features=8, sampling=ONE_STEP.model_dump(mode="json"), **how)
    with pytest.raises(CheckpointError, match="by labels, places and rotations, which its denoiser does not take"):
        load_denoiser(tmp_path / "whole.safetensors")


def test_a_configuration_that_paints_nothing_is_that_of_versions_that_know_no_painter() -> None:
    assert not {"solids", "camera", "objects", "windows"} & UpsamplerConfig(picture=(32, 24)).model_dump().keys()
    assert {"solids", "camera"} <= UpsamplerConfig(picture=(32, 24), solids=SOLIDS, camera=CAMERA).model_dump().keys()
    for half in ({"solids": SOLIDS}, {"camera": CAMERA}):
        with pytest.raises(ValidationError, match="solids need a camera"):
            UpsamplerConfig.model_validate({"picture": (32, 24), **half})


def test_an_upsampler_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    base = publish_toy_denoiser(tmp_path, "toy", 0)
    path = publish_toy_upsampler(tmp_path, "large", base)
    info, tensors = load(tmp_path / "large.safetensors")
    described = {"kind": "denoiser", "vocabulary": path.vocabulary, "training": {}}
    without = {key: value for key, value in info.config.items() if key != "upsampler"}
    publish(tmp_path, "other", tensors, config=without, **described)
    with pytest.raises(CheckpointError, match=r"do not fit: .*upsampler\."):
        load_denoiser(tmp_path / "other.safetensors")
    publish(tmp_path, "other", tensors, config={**info.config, "picture": [64, 48]}, **described)
    with pytest.raises(CheckpointError, match=r"picture is \(64, 48\), the upsampler's is \(32, 24\)"):
        load_denoiser(tmp_path / "other.safetensors")
    del tensors["upsampler.stem.weight"]
    publish(tmp_path, "other", tensors, config=info.config, **described)
    with pytest.raises(CheckpointError, match=r"do not fit: .*stem\.weight"):
        load_denoiser(tmp_path / "other.safetensors")
