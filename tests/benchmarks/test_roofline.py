"""The kernels that the network is compared with: their operations are counted right, and they compute."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.document import Plot, Table
from benchmarks.sections import roofline
from benchmarks.timing import figure, paired


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


def test_the_report_compares_operations_with_the_best_kernel() -> None:
    """A row of 2 GFLOP at 30 rows/s is 60 GFLOP/s, 0.6 of a kernel with 100."""
    rows = {"16": figure([30.0])}
    data = {
        "library": "OpenVINO",
        "flops_per_row": 2e9,
        "precision": "bfloat16",
        "gflops": {"conv": figure([100.0]), "product": figure([50.0])},
        "best": "conv",
        "rows": rows,
        "fractions": {"16": paired([30.0], [50.0])},
    }
    text, table, plot = roofline.report(data)
    assert "fastest kernel of OpenVINO, conv: 100 GFLOP/s in bfloat16; the slowest, product, has 50.0" in text
    assert isinstance(table, Table)
    assert isinstance(plot, Plot)
    assert [row[1] for row in table.rows] == ["30.0", "60.0", "0.60"]
