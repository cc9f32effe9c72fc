"""The discriminator: what it sees, and who learns from which loss."""

import torch
from torch import Tensor

from shared.diffusion.upsampler import UpsamplerConfig, UpsamplerNet
from trainer.objectives.adversary import Adversaries, Discriminator, detail_of


def adversaries() -> Adversaries:
    torch.manual_seed(0)
    config = UpsamplerConfig(picture=(32, 24), channels=8, dilations=(1,), hidden=16)
    return Adversaries(UpsamplerNet(config))


def competing(network: Adversaries) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x, real = (torch.rand(2, 3, side, side, generator=generator) for side in (16, 16))
    noise = 0.01 * torch.randn(2, 2, 3, 16, 16, generator=generator)
    found: tuple[Tensor, ...] = network(x, torch.tensor([[[0, 1]], [[2, 3]]]), 4, real, noise)
    return found


def learning(network: Adversaries, loss: Tensor) -> set[str]:
    network.zero_grad()
    loss.backward()
    named = [name for name, value in network.named_parameters() if value.grad is not None and value.grad.any()]
    return {name.split(".")[0] for name in named}


def test_each_learns_from_its_own_loss() -> None:
    network = adversaries()
    assert learning(network, competing(network)[1]) == {"upsampler"}
    assert learning(network, competing(network)[2]) == {"discriminator"}


def test_light_is_not_seen_and_edges_are() -> None:
    torch.manual_seed(0)
    network, x = Discriminator(), torch.zeros(1, 3, 32, 32)
    flat, light = network(x), network(x + 0.3)
    torch.testing.assert_close(flat, light, atol=1e-4, rtol=0)
    x[..., 16:] = 0.1
    assert abs(float((network(x) - flat).detach())) > 0.01


def test_detail_is_exact_where_the_networks_compute_in_bfloat16() -> None:
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = detail_of(x, 9)
    assert torch.equal(rounded, detail_of(x, 9))
