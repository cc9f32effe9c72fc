"""The device and its precision, kept memory, by counted page faults, flushed denormals, and a lost device."""

import re
import subprocess
import sys
import threading
from collections import Counter

import pytest
import torch

from shared.device import DeviceError, autocast_dtype, flush_denormals, lost, pick_device
from tests.paths import ROOT

FAULTS = """
import resource, torch
from shared.device import kept_memory

def faults():
    torch.empty(32 << 20).fill_(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.empty(32 << 20).fill_(1)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

faults()
with kept_memory():
    faults()
faults()
"""  # page faults while a tensor of 128 MiB is allocated and freed repeatedly


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc alone")
def test_kept_memory_is_reused_for_the_next_tensors() -> None:
    # in a process of its own: what other tests did before decides what glibc keeps
    printed = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout
    without, kept, afterwards = map(int, printed.split())
    assert kept * 10 < without
    assert afterwards * 2 > without  # the memory is handed back


def test_flushed_denormals_count_as_zero() -> None:
    found: dict[str, float] = {}

    def compute() -> None:
        denormal = torch.tensor([2.0**-140])
        found["before"] = float(denormal * 1)
        flush_denormals()
        found["after"] = float(denormal * 1)

    thread = threading.Thread(target=compute)  # this thread's own numbers stay as they are
    thread.start()
    thread.join()
    assert found == {"before": 2.0**-140, "after": 0.0}


@pytest.mark.parametrize("raised", [torch.AcceleratorError, RuntimeError])  # by CUDA; by cuBLAS and cuDNN
def test_a_device_is_lost_if_it_computes_nothing_after_an_error(
    raised: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    device, error = torch.device("cpu"), raised("CUDA error: an illegal memory access was encountered")

    def refuse(*_: object, **__: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    assert not lost(error, device)
    monkeypatch.setattr(torch, "zeros", refuse)
    assert lost(error, device)
    assert not lost(ValueError("poison"), device)


def test_a_device_without_free_memory_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "zeros", refuse)
    assert not lost(torch.AcceleratorError("CUDA error: out of memory"), torch.device("cpu"))


def test_a_gpu_that_cuda_cannot_use_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # as with a driver too old for this torch
    assert pick_device("auto") == torch.device("cpu")


def test_a_gpu_without_bfloat16_computes_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A T4 as the second GPU: it emulates bfloat16, so that torch calls it supported. A P100 has neither."""
    capabilities = {0: (9, 0), 1: (7, 5), 2: (6, 0)}
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index])
    assert autocast_dtype(torch.device("cuda", 0)) is torch.bfloat16
    assert autocast_dtype(torch.device("cuda", 1)) is torch.float16
    assert autocast_dtype(torch.device("cuda", 2)) is None


def test_the_gpu_of_a_mac_is_used_if_it_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (pick_device("auto"), pick_device("mps")) == (torch.device("cpu"), torch.device("mps"))
    assert autocast_dtype(torch.device("mps")) is None
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(DeviceError, match='no device "mps"'):
        pick_device("mps")


SEAM = re.compile(r"\.type\b.*[!=]=|\.cuda\.|\.mps\b|pin_memory|torch\.autocast|GradScaler\(")


def test_only_one_module_asks_what_a_device_is() -> None:
    """A CPU is also where OpenVINO runs, and where a worker's batches are smaller."""
    elsewhere = {"shared/openvino.py": 1, "service/worker/models.py": 1}
    found = Counter(
        str(path.relative_to(ROOT))
        for package in ("shared", "trainer", "service/worker")
        for path in (ROOT / package).rglob("*.py")
        for line in path.read_text().splitlines()
        if "device" in line and SEAM.search(line)
    )
    assert found.pop("shared/device.py") > 5
    assert found == elsewhere
