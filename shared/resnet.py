"""ResNet-18, and ResNet-10 with half as many blocks (He et al. 2016).

Has torchvision's names in its state dict, without torchvision: importing that costs a worker as much time as torch
itself. Must not know labels or scores.
"""

from typing import Final

from torch import Tensor, nn
from torch.nn import functional as F

from shared.device import initial_weights

BLOCKS: Final = {"resnet10": 1, "resnet18": 2}  # of each layer


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


class ResNet(nn.Module):
    """The four layers of `blocks` each. `fc`, the last layer, is for the caller to apply to layer 4's mean."""

    def __init__(self, fc: nn.Sequential, blocks: int) -> None:
        super().__init__()
        self.conv1 = _conv(3, 64, 7, 2)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = _layer(64, 64, 1, blocks)
        self.layer2 = _layer(64, 128, 2, blocks)
        self.layer3 = _layer(128, 256, 2, blocks)
        self.layer4 = _layer(256, 512, 2, blocks)
        self.fc = fc

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the outputs of layers 2, 3 and 4: (N, 128, H/8, W/8), (N, 256, H/16, W/16), (N, 512, H/32, W/32)."""
        fine = self.layer2(self.layer1(self.maxpool(F.relu(self.bn1(self.conv1(x))))))
        coarse = self.layer3(fine)
        return fine, coarse, self.layer4(coarse)


def _layer(inputs: int, channels: int, stride: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(Block(inputs, channels, stride), *(Block(channels, channels, 1) for _ in range(blocks - 1)))


def _conv(inputs: int, channels: int, side: int, stride: int) -> nn.Conv2d:
    """Return a convolution with the initial weights of He et al. 2015, which keep the gradients' variance."""
    conv = nn.Conv2d(inputs, channels, side, stride, padding=side // 2, bias=False)
    std = (2 / (channels * side * side)) ** 0.5
    conv.weight = nn.Parameter(initial_weights(channels, inputs, side, side, std=std))
    return conv
