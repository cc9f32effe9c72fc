"""A convolution on a CPU with its weight in oneDNN's layout, through torch's private operators."""

import torch
from torch import Tensor, nn

ROWS, SIDE = 32, 16  # of an input that the weight's layout is optimised for; others work too


class PackedConv(nn.Module):
    """A convolution, for inference, in the dtype of its weight (C', C, k, k), channels last, and bias (C',).

    `side`: height and width of most inputs. A layout for another size can be a hundred times slower: without AVX-512,
    a 3x3 convolution of 512 channels at 2x2 took 157 ms with the layout for 16x16, and 0.5 ms with its own.
    """

    def __init__(self, weight: Tensor, bias: Tensor, stride: int, padding: int, side: int = SIDE) -> None:
        super().__init__()
        self.bias, self.stride, self.padding = bias, [stride] * 2, [padding] * 2
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(
            weight, self.padding, self.stride, [1, 1], 1, [ROWS, weight.shape[1], side, side]
        )

    def forward(self, x: Tensor, other: Tensor | None = None, *, relu: bool = False) -> Tensor:
        """(B, C, H, W) of any dtype -> (B, C', H', W'). Adds `other`, then takes the ReLU, in the same pass."""
        x, rest = x.to(self.bias.dtype), (self.weight, self.bias, self.padding, self.stride, [1, 1], 1)
        if other is None:
            out: Tensor = torch.ops.mkldnn._convolution_pointwise(x, *rest, "relu" if relu else "none", [], None)
        else:
            binary = torch.ops.mkldnn._convolution_pointwise.binary
            out = binary(x, other, *rest, "add", None, "relu" if relu else None, [], None)
        return out
