"""Which device to use, in which precision it computes fastest, and how a CPU keeps its memory."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of glibc's mallopt(3)


class DeviceError(ValueError):
    """A device that this machine has not got."""


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is the first GPU where there is one, under torchrun each process's own, else the CPU.

    Raises DeviceError for anything but auto, cpu, cuda and cuda:N, and for a GPU that is not there.
    """
    there, own = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
    if name == "cpu" or (name == "auto" and there == 0):
        return torch.device("cpu")
    index = own if name in ("auto", "cuda") else None
    if name.startswith("cuda:") and name.removeprefix("cuda:").isdecimal():
        index = int(name.removeprefix("cuda:"))
    if index is None:
        raise DeviceError(f'no device "{name}"; there are auto, cpu, cuda and cuda:N')
    if index >= there:
        raise DeviceError(f'no device "{name}" here; this machine has {there} GPUs')
    return torch.device("cuda", index)


def lost(error: Exception, device: torch.device) -> bool:
    """Whether an error means that the device computes nothing more for this process.

    After an illegal access CUDA refuses all that follows, after a call that asked for too much it does not: so it is
    given a trifle to compute.
    """
    if not isinstance(error, torch.AcceleratorError):
        return False
    try:
        torch.zeros(1, device=device).add_(1).item()
    except torch.AcceleratorError:
        return True
    return False


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the device multiplies it faster than float32, else None."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
    has_amx = torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_amx or torch.cpu._is_avx512_bf16_supported() else None


@contextmanager
def kept_memory() -> Iterator[None]:
    """Freed memory stays with the process meanwhile, and serves the next tensors; of glibc alone, elsewhere nothing.

    glibc otherwise gives large tensors back to the kernel at once, and every step of a training on a CPU takes tens of
    thousands of zeroed pages anew (docs/decisions.md has what that costs). Afterwards its thresholds are those that it
    settles on by itself, having freed a tensor of 32 MiB.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        yield
        return
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_MAX, 65536)
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 64 << 20)
        libc.malloc_trim(0)
