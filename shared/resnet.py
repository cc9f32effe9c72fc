"""ResNet-18 (He et al. 2016), and a faster form of it for inference on a CPU.

Has torchvision's names in its state dict, without torchvision: importing that costs a worker as much time as torch
itself. Must not know labels or scores.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from shared.packed_conv import PackedConv


class Block(nn.Module):
    """A basic block: two 3x3 convolutions beside a shortcut, which is projected where the shape changes."""

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels, 3, 1)
        self.bn2 = nn.BatchNorm2d(channels)
        is_same = stride == 1 and inputs == channels
        projection = () if is_same else (_conv(inputs, channels, 1, stride), nn.BatchNorm2d(channels))
        self.downsample = nn.Sequential(*projection)  # without layers, it is the identity

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.downsample(x))


class ResNet18(nn.Module):
    """The four layers of blocks. `fc`, the last layer, is for the caller to apply to layer 4's mean."""

    def __init__(self, fc: nn.Sequential) -> None:
        super().__init__()
        self.conv1 = _conv(3, 64, 7, 2)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(Block(64, 64, 1), Block(64, 64, 1))
        self.layer2 = nn.Sequential(Block(64, 128, 2), Block(128, 128, 1))
        self.layer3 = nn.Sequential(Block(128, 256, 2), Block(256, 256, 1))
        self.layer4 = nn.Sequential(Block(256, 512, 2), Block(512, 512, 1))
        self.fc = fc

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the outputs of layers 2, 3 and 4: (N, 128, H/8, W/8), (N, 256, H/16, W/16), (N, 512, H/32, W/32)."""
        fine = self.layer2(self.layer1(self.maxpool(F.relu(self.bn1(self.conv1(x))))))
        coarse = self.layer3(fine)
        return fine, coarse, self.layer4(coarse)


def _conv(inputs: int, channels: int, side: int, stride: int) -> nn.Conv2d:
    """Return a convolution with the initial weights of He et al. 2015, which keep the gradients' variance."""
    conv = nn.Conv2d(inputs, channels, side, stride, padding=side // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d, dtype: torch.dtype, side: int) -> PackedConv:
    """Return the convolution with the batch norm that follows it folded in. Its inputs are `side` pixels wide."""
    folded = fuse_conv_bn_eval(conv, norm).requires_grad_(False)
    assert folded.bias is not None
    weight = folded.weight.to(dtype, memory_format=torch.channels_last)
    return PackedConv(weight, folded.bias.to(dtype), conv.stride[0], int(conv.padding[0]), side)


class FoldedResNet:
    """A ResNet-18 without its last layer, for inference in `dtype` on a CPU.

    `side`: height and width of the pictures for which it is fast.
    """

    def __init__(self, resnet: ResNet18, dtype: torch.dtype = torch.float32, side: int = 64) -> None:
        self.dtype = dtype
        self.stem, self.pool = fold(resnet.conv1, resnet.bn1, dtype, side), resnet.maxpool
        self.layers: list[list[tuple[PackedConv, PackedConv, PackedConv | None]]] = []
        side //= 4  # of the stem, and of the pooling
        for layer in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4):
            self.layers.append([])
            for block in layer:
                assert isinstance(block, Block)
                first = fold(block.conv1, block.bn1, dtype, side)
                after = side // block.conv1.stride[0]
                second = fold(block.conv2, block.bn2, dtype, after)
                skip = fold(*block.downsample, dtype, side) if block.downsample else None  # type: ignore[call-arg]
                self.layers[-1].append((first, second, skip))
                side = after

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, 3, H, W) -> the outputs of layers 2, 3 and 4 as `ResNet18` returns them, in `dtype`."""
        h: Tensor = self.pool(self.stem(images.to(self.dtype, memory_format=torch.channels_last), relu=True))
        outputs = []
        for layer in self.layers:
            for first, second, skip in layer:
                h = second(first(h, relu=True), h if skip is None else skip(h), relu=True)
            outputs.append(h)
        _, fine, coarse, last = outputs
        return fine, coarse, last
