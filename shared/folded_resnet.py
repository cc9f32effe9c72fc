"""Faster inference of a ResNet on a CPU: batch norms are folded into the convolutions, weights are packed once.

Knows torchvision's ResNet of basic blocks; must not know labels or scores.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models import ResNet

from shared.packed_conv import PackedConv


def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d, dtype: torch.dtype, side: int) -> PackedConv:
    """Return the convolution with the batch norm that follows it folded in. Its inputs are `side` pixels wide."""
    folded = fuse_conv_bn_eval(conv, norm).requires_grad_(False)
    assert folded.bias is not None
    weight = folded.weight.to(dtype, memory_format=torch.channels_last)
    return PackedConv(weight, folded.bias.to(dtype), conv.stride[0], int(conv.padding[0]), side)


class FoldedResNet:
    """A ResNet of basic blocks (He et al. 2016) without its last layer, for inference in `dtype` on a CPU.

    `side`: height and width of the pictures for which it is fast.
    """

    def __init__(self, resnet: ResNet, dtype: torch.dtype = torch.float32, side: int = 64) -> None:
        self.dtype = dtype
        self.stem, self.pool = fold(resnet.conv1, resnet.bn1, dtype, side), resnet.maxpool
        self.layers: list[list[tuple[PackedConv, PackedConv, PackedConv | None]]] = []
        side //= 4  # of the stem, and of the pooling
        for layer in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4):
            self.layers.append([])
            for block in layer:
                first = fold(block.conv1, block.bn1, dtype, side)
                after = side // block.conv1.stride[0]
                second, skip = fold(block.conv2, block.bn2, dtype, after), None
                if block.downsample is not None:
                    conv, norm = block.downsample
                    skip = fold(conv, norm, dtype, side)
                self.layers[-1].append((first, second, skip))
                side = after

    def __call__(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) -> the outputs of the four layers, (N, C, H', W') in `dtype`."""
        h: Tensor = self.pool(self.stem(images.to(self.dtype, memory_format=torch.channels_last), relu=True))
        outputs = []
        for layer in self.layers:
            for first, second, skip in layer:
                h = second(first(h, relu=True), h if skip is None else skip(h), relu=True)
            outputs.append(h)
        return outputs
