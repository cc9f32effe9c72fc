"""Faster inference of a ResNet on a CPU: batch norms are folded into the convolutions, weights are packed once.

Knows torchvision's ResNet of basic blocks; must not know labels or scores.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models import ResNet

ROWS = 32  # the batch size that the weights' layout is optimised for; other sizes work too


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
