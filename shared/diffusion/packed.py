"""Faster inference of the networks on a CPU: weights are cast and packed once, norms and sums are fused.

Without packing, autocast casts every weight and oneDNN reorders it at every call, a third of the time of a small batch.
And in float32, torch's linear layers use another kernel for few rows than for many, with other rounding.
Knows the layers of `unet.py` and `upsampler.py`; must not know sampling.
"""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.device import has_onednn
from shared.diffusion.unet import Conv, Level, ResidualBlock, UNet
from shared.diffusion.upsampler import Enlarge, PlainBlock, UpsamplerNet
from shared.packed_conv import PackedConv


def pack_conv(conv: Conv, dtype: torch.dtype) -> PackedConv:
    """Return the convolution in `dtype`."""
    weight = conv.weight.detach().to(dtype).view(conv.shape).permute(0, 3, 1, 2)  # channels last
    return PackedConv(weight, conv.bias.detach().to(dtype), conv.stride, conv.padding)


class PackedLinear(nn.Module):
    """A linear layer in `dtype` with its weight in oneDNN's layout."""

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.bias = bias.detach().to(dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype), None)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) of any dtype -> (..., C')."""
        x = x.to(self.bias.dtype)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], None)
        return out


class PackedJoin(nn.Module):
    """Join that writes its result in one pass."""

    def forward(self, coarse: Tensor, skip: Tensor) -> Tensor:
        B, C, H, W = coarse.shape
        joined = coarse.new_empty(B, H, 2, W, 2, C + skip.shape[1])
        joined[..., :C] = coarse.permute(0, 2, 3, 1)[:, :, None, :, None]
        whole = joined.view(B, 2 * H, 2 * W, -1)
        whole[..., C:] = skip.permute(0, 2, 3, 1)
        return whole.permute(0, 3, 1, 2)


class PackedBlock(nn.Module):
    """A ResidualBlock with packed convolutions. Its scale and shift are columns of `modulations`, from `start` on."""

    def __init__(self, block: ResidualBlock, start: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.columns = slice(start, start + block.modulation.out_features)
        self.weight, self.bias = (p.detach().to(dtype) for p in (block.norm.weight, block.norm.bias))
        self.conv1, self.conv2 = pack_conv(block.conv1, dtype), pack_conv(block.conv2, dtype)
        self.skip = pack_conv(block.skip, dtype) if isinstance(block.skip, Conv) else nn.Identity()

    def forward(self, x: Tensor, modulations: Tensor) -> Tensor:
        normed = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias)
        h = self.conv1(F.silu(normed, inplace=True).permute(0, 3, 1, 2))
        scale, shift = modulations[:, self.columns, None, None].chunk(2, dim=1)
        h = F.silu(torch.addcmul(shift, h, 1 + scale), inplace=True)
        out: Tensor = self.conv2(h, self.skip(x))
        return out


class PackedPlainBlock(nn.Module):
    """A PlainBlock whose ReLU and sum are part of its convolutions."""

    def __init__(self, block: PlainBlock, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv1, self.conv2 = pack_conv(block.conv1, dtype), pack_conv(block.conv2, dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv2(self.conv1(x, relu=True), x)
        return out


class PackedEnlarge(nn.Module):
    """`Enlarge` as a matrix product for each direction, in float32: a sixth of the time for one picture."""

    def __init__(self, size: Sequence[int]) -> None:
        super().__init__()
        self.size = tuple(size)
        self.matrices: dict[tuple[int, ...], list[Tensor]] = {}  # of the sides of a picture

    def forward(self, x: Tensor) -> Tensor:
        sides = tuple(x.shape[-2:])
        if sides not in self.matrices:
            pairs = zip(sides, self.size, strict=True)
            self.matrices[sides] = [Enlarge((new, old))(torch.eye(old)[None, None])[0, 0] for old, new in pairs]
        rows, columns = self.matrices[sides]
        with torch.autocast(x.device.type, enabled=False):
            return rows @ x.float() @ columns.T


def can_pack(device: torch.device) -> bool:
    """Whether packed networks are faster on this device.

    Without AVX-512 they are not: oneDNN then wants one layout of a weight for one row, another for many.
    """
    return has_onednn(device) and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def pack(network: UNet, dtype: torch.dtype) -> UNet:
    """Return a packed copy of a network on the CPU, for inference mode and autocast to `dtype`, not for training."""
    packed = deepcopy(network).requires_grad_(False).eval()
    modulations: list[nn.Linear] = []
    for level in (*packed.encoder, *packed.decoder):
        assert isinstance(level, Level)
        for i, block in enumerate(level.blocks):
            assert isinstance(block, ResidualBlock)
            level.blocks[i] = PackedBlock(block, sum(linear.out_features for linear in modulations), dtype)
            modulations.append(block.modulation)
    weight, bias = (torch.cat([getattr(linear, name) for linear in modulations]) for name in ("weight", "bias"))
    packed.modulate = PackedLinear(weight, bias, dtype)  # all blocks' modulations in one matrix product
    packed.join = PackedJoin()
    _pack_layers(packed, dtype)
    return packed


def pack_upsampler(upsampler: UpsamplerNet, dtype: torch.dtype) -> UpsamplerNet:
    """Return a packed copy of an upsampler on the CPU, as `pack` does of a UNet."""
    packed = deepcopy(upsampler).requires_grad_(False).eval()
    blocks = [PackedPlainBlock(block, dtype) for block in upsampler.blocks if isinstance(block, PlainBlock)]
    packed.blocks = nn.Sequential(*blocks)
    packed.enlarge = PackedEnlarge(upsampler.picture_shape[1:])
    _pack_layers(packed, dtype)
    return packed


def _pack_layers(network: nn.Module, dtype: torch.dtype) -> None:
    """Pack all convolutions and linear layers that are left in a network, and cast its layer norms."""
    for module in list(network.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, Conv):
                setattr(module, name, pack_conv(layer, dtype))
            elif isinstance(layer, nn.Linear):
                setattr(module, name, PackedLinear(layer.weight, layer.bias, dtype))
            elif isinstance(layer, nn.LayerNorm):
                layer.to(dtype)
