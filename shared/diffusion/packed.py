"""Faster inference of the networks on a CPU: weights are cast and packed once, norms and sums are fused.

Without packing, autocast casts every weight and oneDNN reorders it at every call, a third of the time of a small batch.
Knows the layers of `unet.py` and `upsampler.py`; must not know sampling.
"""

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.device import has_onednn
from shared.diffusion.unet import Attention, Conv, Level, ResidualBlock, UNet
from shared.diffusion.upsampler import PlainBlock, UpsamplerNet
from shared.packed_conv import PackedConv


def pack_conv(conv: Conv) -> PackedConv:
    """Return the convolution in bf16."""
    weight = conv.weight.detach().bfloat16().view(conv.shape).permute(0, 3, 1, 2)  # channels last
    return PackedConv(weight, conv.bias.detach().bfloat16(), conv.stride, conv.padding)


class PackedLinear(nn.Module):
    """A linear layer in bf16 with its weight in oneDNN's layout."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.bias = bias.detach().bfloat16()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().bfloat16(), None)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) of any dtype -> (..., C') bf16."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x.bfloat16(), self.weight, self.bias, "none", [], None)
        return out


class PackedAttention(Attention):
    """Attention with packed layers."""

    def __init__(self, attention: Attention) -> None:
        nn.Module.__init__(self)
        self.heads, self.norm = attention.heads, deepcopy(attention.norm).bfloat16()
        for name in ("qkv", "token_kv", "out"):
            linear = getattr(attention, name)
            setattr(self, name, PackedLinear(linear.weight, linear.bias))


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

    def __init__(self, block: ResidualBlock, start: int) -> None:
        super().__init__()
        self.columns = slice(start, start + block.modulation.out_features)
        self.weight, self.bias = (p.detach().bfloat16() for p in (block.norm.weight, block.norm.bias))
        self.conv1, self.conv2 = pack_conv(block.conv1), pack_conv(block.conv2)
        self.skip = pack_conv(block.skip) if isinstance(block.skip, Conv) else nn.Identity()

    def forward(self, x: Tensor, modulations: Tensor) -> Tensor:
        normed = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias)
        h = self.conv1(F.silu(normed, inplace=True).permute(0, 3, 1, 2))
        scale, shift = modulations[:, self.columns, None, None].chunk(2, dim=1)
        h = F.silu(torch.addcmul(shift, h, 1 + scale), inplace=True)
        out: Tensor = self.conv2(h, self.skip(x))
        return out


class PackedPlainBlock(nn.Module):
    """A PlainBlock whose ReLU and sum are part of its convolutions."""

    def __init__(self, block: PlainBlock) -> None:
        super().__init__()
        self.conv1, self.conv2 = pack_conv(block.conv1), pack_conv(block.conv2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv2(self.conv1(x, relu=True), x)
        return out


def can_pack(device: torch.device, dtype: torch.dtype | None) -> bool:
    """Whether `pack` works on this device and in this precision."""
    return dtype is torch.bfloat16 and has_onednn(device)


def pack(network: UNet) -> UNet:
    """Return a packed copy of a network on the CPU, for use under bf16 autocast and inference mode, not training."""
    packed = deepcopy(network).requires_grad_(False).eval()
    modulations: list[nn.Linear] = []
    for level in (*packed.encoder, *packed.decoder):
        assert isinstance(level, Level)
        for i, block in enumerate(level.blocks):
            assert isinstance(block, ResidualBlock)
            level.blocks[i] = PackedBlock(block, sum(linear.out_features for linear in modulations))
            modulations.append(block.modulation)
        for i, attention in enumerate(level.attentions):
            if isinstance(attention, Attention):
                level.attentions[i] = PackedAttention(attention)
    weight, bias = (torch.cat([getattr(linear, name) for linear in modulations]) for name in ("weight", "bias"))
    packed.modulate = PackedLinear(weight, bias)  # all blocks' modulations in one matrix product
    packed.join = PackedJoin()
    for name, conv in list(packed.named_children()):
        if isinstance(conv, Conv):  # the first and the last layer
            setattr(packed, name, pack_conv(conv))
    for convs in (packed.down, packed.up):
        for i, conv in enumerate(convs):
            if isinstance(conv, Conv):
                convs[i] = pack_conv(conv)
    return packed


def pack_upsampler(upsampler: UpsamplerNet) -> UpsamplerNet:
    """Return a packed copy of an upsampler on the CPU, as `pack` does of a UNet."""
    packed = deepcopy(upsampler).requires_grad_(False).eval()
    blocks = [PackedPlainBlock(block) for block in upsampler.blocks if isinstance(block, PlainBlock)]
    for name, layer in (
        ("stem", pack_conv(upsampler.stem)), ("blocks", nn.Sequential(*blocks)), ("head", pack_conv(upsampler.head)),
    ):  # fmt: skip
        setattr(packed, name, layer)
    return packed
