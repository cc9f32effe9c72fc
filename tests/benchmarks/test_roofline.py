"""The kernels that the network is compared with: their operations are counted right, and they compute."""

import numpy as np
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


@pytest.mark.parametrize(("kind", "width", "side"), [("conv", 4, 6), ("product", 8, 0)])
def test_openvinos_kernels_have_as_many_layers(kind: str, width: int, side: int) -> None:
    """Its output is that of the same layers in torch."""
    pytest.importorskip("openvino")
    run = roofline.openvino_kernel(kind, width, side, torch.float32)
    rng = np.random.default_rng(0)
    shape = (width, width) if kind == "product" else (roofline.PICTURES, width, side, side)
    taps = width if kind == "product" else 9 * width
    size = (width, width) if kind == "product" else (width, width, 3, 3)
    weights = [torch.tensor(rng.standard_normal(size) / taps**0.5).float() for _ in range(roofline.LAYERS)]
    x = torch.tensor(rng.standard_normal(shape)).float()
    for w in weights:
        x = x @ w if kind == "product" else torch.nn.functional.conv2d(x, w, None, 1, 1)
    (found,) = run().values()
    assert np.allclose(found, x.numpy(), atol=1e-4)
