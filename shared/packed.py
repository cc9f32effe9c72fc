"""A network made ready for inference in bf16 on a CPU: weights cast and packed once, norms and sums fused.

Autocast casts every weight at every call, and oneDNN lays it out anew: a third of the time of a call with few rows.
Knows the layers of `unet.py` and nothing of sampling.
"""

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.unet import Attention, Conv, Level, ResidualBlock, UNet

ROWS = 32  # what weights are laid out for; other numbers work as well


class PackedConv(nn.Module):
    """A Conv in bf16 with its weight in oneDNN's own layout; adds `other` to the result without another pass."""

    def __init__(self, conv: Conv) -> None:
        super().__init__()
        weight = conv.weight.detach().bfloat16().view(conv.shape).permute(0, 3, 1, 2)  # channels last
        self.stride, self.padding = [conv.stride] * 2, [conv.padding] * 2
        self.bias = conv.bias.detach().bfloat16()
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(
            weight, self.padding, self.stride, [1, 1], 1, [ROWS, weight.shape[1], 16, 16]
        )

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """(B, C, H, W), of any dtype -> (B, C', H', W') bf16."""
        rest = self.weight, self.bias, self.padding, self.stride, [1, 1], 1
        if other is None:
            out: Tensor = torch.ops.mkldnn._convolution_pointwise(x.bfloat16(), *rest, "none", [], None)
        else:
            binary = torch.ops.mkldnn._convolution_pointwise.binary
            out = binary(x.bfloat16(), other, *rest, "add", None, None, [], None)
        return out


class PackedBlock(nn.Module):
    """A ResidualBlock of packed convolutions."""

    def __init__(self, block: ResidualBlock) -> None:
        super().__init__()
        self.weight, self.bias = (p.detach().bfloat16() for p in (block.norm.weight, block.norm.bias))
        self.conv1, self.conv2 = PackedConv(block.conv1), PackedConv(block.conv2)
        self.modulation = deepcopy(block.modulation).bfloat16()
        self.skip = PackedConv(block.skip) if isinstance(block.skip, Conv) else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        normed = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias)
        h = self.conv1(F.silu(normed, inplace=True).permute(0, 3, 1, 2))
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(torch.addcmul(shift, h, 1 + scale), inplace=True)
        out: Tensor = self.conv2(h, self.skip(x))
        return out


def can_pack(device: torch.device, dtype: torch.dtype | None) -> bool:
    """Whether `pack` is for this device and precision."""
    built: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return device.type == "cpu" and dtype is torch.bfloat16 and built


def pack(network: UNet) -> UNet:
    """A copy of a network on the CPU, to be called under bf16 autocast and inference mode; it cannot be trained."""
    packed = deepcopy(network).requires_grad_(False).eval()
    for level in (*packed.encoder, *packed.decoder):
        assert isinstance(level, Level)
        for i, block in enumerate(level.blocks):
            assert isinstance(block, ResidualBlock)
            level.blocks[i] = PackedBlock(block)
        for attention in level.attentions:
            if isinstance(attention, Attention):
                attention.bfloat16()
    for name, conv in list(packed.named_children()):
        if isinstance(conv, Conv):  # the first and the last layer
            setattr(packed, name, PackedConv(conv))
    for convs in (packed.down, packed.up):
        for i, conv in enumerate(convs):
            if isinstance(conv, Conv):
                convs[i] = PackedConv(conv)
    return packed
