"""The kernels that the network is compared with: their operations are counted right."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.sections import roofline


@pytest.mark.parametrize(("kind", "width", "side"), [("conv", 4, 6), ("product", 8, 0)])
def test_torchs_kernels_have_so_many_operations(kind: str, width: int, side: int) -> None:
    run = roofline.torch_kernel(kind, width, side, torch.float32, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == roofline.operations(kind, width, side)
