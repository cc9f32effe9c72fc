"""Faster inference on a CPU: weights are cast and packed once, norms and sums are fused.

Without packing, autocast casts every weight and oneDNN reorders it at every call, a third of the time of a small batch.
Knows the layers of `unet.py` and of torchvision's ResNet; must not know sampling or scores.
"""

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models import ResNet

from shared.diffusion.unet import Attention, Conv, Level, ResidualBlock, UNet

ROWS = 32  # the batch size that the weights' layout is optimised for; other sizes work too


class PackedConv(nn.Module):
    """A Conv in bf16 with its weight in oneDNN's layout. Adds `other` to the result in the same pass."""

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


class FoldedConv:
    """A convolution with the batch norm that follows it folded in, in `dtype`, its weight in oneDNN's layout."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, dtype: torch.dtype) -> None:
        folded = fuse_conv_bn_eval(conv, norm)
        assert folded.bias is not None
        self.stride, self.padding = list(conv.stride), [int(p) for p in conv.padding]
        self.bias = folded.bias.detach().to(dtype)
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(
            folded.weight.detach().to(dtype, memory_format=torch.channels_last),
            self.padding, self.stride, [1, 1], 1, [ROWS, conv.in_channels, 16, 16],
        )  # fmt: skip

    def __call__(self, x: Tensor, *, relu: bool = False, other: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W'); with `other`, ReLU of their sum."""
        rest = self.weight, self.bias, self.padding, self.stride, [1, 1], 1
        if other is None:
            name = "relu" if relu else "none"
            out: Tensor = torch.ops.mkldnn._convolution_pointwise(x, *rest, name, [], None)
        else:
            out = torch.ops.mkldnn._convolution_pointwise.binary(x, other, *rest, "add", None, "relu", [], None)
        return out


class FoldedResNet:
    """A ResNet of basic blocks (He et al. 2016) without its last layer, for inference in `dtype` on a CPU."""

    def __init__(self, resnet: ResNet, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.stem, self.pool = FoldedConv(resnet.conv1, resnet.bn1, dtype), resnet.maxpool
        self.blocks: list[tuple[FoldedConv, FoldedConv, FoldedConv | None]] = []
        for layer in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4):
            for block in layer:
                skip = None
                if block.downsample is not None:
                    conv, norm = block.downsample
                    skip = FoldedConv(conv, norm, dtype)
                convs = FoldedConv(block.conv1, block.bn1, dtype), FoldedConv(block.conv2, block.bn2, dtype)
                self.blocks.append((*convs, skip))

    def __call__(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, C) float32, averaged over positions."""
        h: Tensor = self.pool(self.stem(images.to(self.dtype, memory_format=torch.channels_last), relu=True))
        for first, second, skip in self.blocks:
            h = second(first(h, relu=True), other=h if skip is None else skip(h))
        return h.float().mean((2, 3))


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
        self.conv1, self.conv2 = PackedConv(block.conv1), PackedConv(block.conv2)
        self.skip = PackedConv(block.skip) if isinstance(block.skip, Conv) else nn.Identity()

    def forward(self, x: Tensor, modulations: Tensor) -> Tensor:
        normed = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias)
        h = self.conv1(F.silu(normed, inplace=True).permute(0, 3, 1, 2))
        scale, shift = modulations[:, self.columns, None, None].chunk(2, dim=1)
        h = F.silu(torch.addcmul(shift, h, 1 + scale), inplace=True)
        out: Tensor = self.conv2(h, self.skip(x))
        return out


def can_fold(device: torch.device) -> bool:
    """Whether `FoldedResNet` works on this device."""
    built: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return device.type == "cpu" and built


def can_pack(device: torch.device, dtype: torch.dtype | None) -> bool:
    """Whether `pack` works on this device and in this precision."""
    return dtype is torch.bfloat16 and can_fold(device)


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
            setattr(packed, name, PackedConv(conv))
    for convs in (packed.down, packed.up):
        for i, conv in enumerate(convs):
            if isinstance(conv, Conv):
                convs[i] = PackedConv(conv)
    return packed
