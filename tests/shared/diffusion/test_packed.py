"""The packed network compared with the network itself."""

import copy

import pytest
import torch
from torch import nn

from shared.diffusion.denoise import Stepper, sample
from shared.diffusion.packed import PackedEnlarge, can_pack, pack
from shared.diffusion.schedules import alpha_bar
from shared.diffusion.unet import NetworkConfig, UNet
from shared.diffusion.upsampler import Enlarge
from shared.options import SamplingOptions
from tests.cpu import needs_avx512

CONFIG = {
    "num_labels": 5,
    "image_size": 16,
    "channels": (8, 16),
    "encoder_blocks": (1, 1),
    "decoder_blocks": (1, 2),
    "attention": (False, True),
    "head_channels": 8,
    "embedding": 16,
}


def network(**changes: object) -> UNet:
    torch.manual_seed(0)
    made = UNet(NetworkConfig(**{**CONFIG, **changes}))
    for parameter in made.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return made.to(memory_format=torch.channels_last).eval()


def inputs(count: int, places: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, 16, 16, generator=generator)
    labels = (torch.rand(count, 5, generator=generator) < 0.4).float()
    if places:
        labels = torch.cat([labels[..., None], torch.rand(count, 5, places, generator=generator)], -1)
    return x, torch.randint(0, 1000, (count,), generator=generator), labels, torch.arange(count) % 2 == 0


@needs_avx512
@pytest.mark.parametrize("count", [1, 2, 7, 40])
@pytest.mark.parametrize(
    ("places", "changes"),
    [(0, {}), (0, {"conditioning": "channels"}), (2, {"positions": True}), (4, {"positions": True, "rotations": True})],
)
def test_it_is_as_close_to_float32_as_autocast(count: int, places: int, changes: dict[str, object]) -> None:
    made = network(**changes)
    arguments = inputs(count, places)
    with torch.inference_mode():
        exact = made(*arguments)
        with torch.autocast("cpu", torch.bfloat16):
            plain, packed = made(*arguments).float(), pack(made, torch.bfloat16)(*arguments).float()
        same = pack(made, torch.float32)(*arguments)
    assert packed.shape == exact.shape
    assert (packed - exact).norm() <= 1.5 * (plain - exact).norm()
    assert (packed - exact).norm() <= 0.05 * exact.norm()
    torch.testing.assert_close(same, exact, rtol=1e-5, atol=1e-5)


@needs_avx512
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packing_does_not_change_the_network(dtype: torch.dtype) -> None:
    made = network()
    before = copy.deepcopy(made.state_dict())
    pack(made, dtype)
    after = made.state_dict()
    assert all(torch.equal(before[name], after[name]) and after[name].dtype == torch.float32 for name in before)
    assert all(parameter.requires_grad for parameter in made.parameters())


@needs_avx512
@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_a_picture_does_not_depend_on_its_batch(dtype: torch.dtype | None) -> None:
    ab = alpha_bar("cosine", 1000)
    stepper = Stepper(pack(network(), dtype or torch.float32), ab, "v", dtype=dtype)
    labels, options = torch.eye(5), SamplingOptions(steps=4)
    together = sample(stepper, labels, options, [1, 2, 3, 4, 5])
    assert torch.equal(sample(stepper, labels[2:3], options, [3])[0], together[2])


@pytest.mark.parametrize(
    ("device", "capability", "expected"), [("cpu", "AVX512", True), ("cpu", "AVX2", False), ("cuda", "AVX512", False)]
)
def test_only_a_cpu_with_avx512_is_packed_for(
    device: str, capability: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert can_pack(torch.device(device)) == (expected and torch.backends.mkldnn.is_available())


@pytest.mark.parametrize("sides", [(16, 16), (12, 20)])
def test_enlarging_by_matrices_is_bicubic_interpolation(sides: tuple[int, int]) -> None:
    x, packed = torch.randn(2, 3, *sides), PackedEnlarge((30, 40))
    for pictures in (x, x.to(torch.bfloat16)):
        torch.testing.assert_close(packed(pictures), Enlarge((30, 40))(pictures.float()), rtol=0, atol=1e-5)
