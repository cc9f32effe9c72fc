"""What this machine's CPU can compute."""

import pytest
import torch


def has_bf16() -> bool:
    """Whether oneDNN has bf16 kernels for this CPU; without them the service packs nothing."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512") or not torch.backends.mkldnn.is_available()


needs_bf16 = pytest.mark.skipif(not has_bf16(), reason="oneDNN has no bf16 kernels for this CPU")
