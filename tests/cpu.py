"""What this machine's CPU can compute."""

import pytest
import torch


def has_avx512() -> bool:
    """Whether networks are packed for this CPU; without it, oneDNN has no bf16 kernels either."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512") or not torch.backends.mkldnn.is_available()


needs_avx512 = pytest.mark.skipif(not has_avx512(), reason="without AVX-512 no network is packed")
