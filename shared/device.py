"""Chooses the device and its fastest precision, detects a lost GPU, and spares a CPU work that nobody needs."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor

THREADS: Final = torch.get_num_threads()  # of this process's computations, by the cores or OMP_NUM_THREADS
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of glibc's mallopt(3)


class DeviceError(ValueError):
    """A device that this machine does not have."""


def pick_device(name: str = "auto") -> torch.device:
    """Return the device `auto`, `cpu`, `cuda` or `cuda:N`.

    `auto` is the first GPU (under torchrun, the process's own), or the CPU if there is none. Raises DeviceError for
    any other name, and for a GPU that this machine does not have.
    """
    # not device_count() alone, which also counts GPUs that CUDA cannot use, as with a driver too old for this torch
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    own = int(os.environ.get("LOCAL_RANK", "0"))
    if name == "cpu" or (name == "auto" and there == 0):
        return torch.device("cpu")
    index = own if name in ("auto", "cuda") else None
    if name.startswith("cuda:") and name.removeprefix("cuda:").isdecimal():
        index = int(name.removeprefix("cuda:"))
    if index is None:
        raise DeviceError(f'unknown device "{name}"; use auto, cpu, cuda or cuda:N')
    if index >= there:
        raise DeviceError(f'no device "{name}": this machine has {there} GPUs')
    return torch.device("cuda", index)


def lost(error: Exception, device: torch.device) -> bool:
    """Whether an error means that the device no longer computes anything for this process.

    CUDA refuses all further work after an illegal access, but not after a call with invalid sizes, so a tiny
    computation tells them apart. The error itself does not: cuBLAS and cuDNN raise any RuntimeError.
    """
    if not isinstance(error, RuntimeError):
        return False
    try:
        torch.zeros(1, device=device).add_(1).item()
    except torch.OutOfMemoryError:
        return False
    except torch.AcceleratorError:
        return True
    return False


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return bfloat16 if the device multiplies it faster than float32, else None."""
    if device.type == "cuda":
        # not is_bf16_supported(), which also counts emulation, slow and without convolutions, and looks at GPU 0
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else None
    has_amx = torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_amx or torch.cpu._is_avx512_bf16_supported() else None


def flush_denormals() -> None:
    """Make this process count numbers nearer to zero than float32's normal ones as zero.

    In float32, some CPUs compute with them many times slower, and gradients hold many (docs/dev/decisions.md).
    Call it before the first computation, since threads inherit it when they start.
    """
    torch.set_flush_denormal(True)


def initial_weights(*shape: int, std: float) -> Tensor:
    """Draw normal weights of a new network. On the meta device, which has no values, return them undrawn.

    For that torch would import its compiler, which takes a second.
    """
    weights = torch.empty(shape)
    return weights if weights.is_meta else weights.normal_(std=std)


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Give torch so many threads inside this context; None changes nothing."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def kept_memory() -> Iterator[None]:
    """Make glibc keep freed memory for the next tensors inside this context. Has no effect with other C libraries.

    By default glibc returns large tensors to the kernel at once, so that every training step on a CPU faults in tens
    of thousands of zeroed pages (docs/dev/decisions.md has the cost).
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        yield
        return
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:  # what glibc itself arrives at after it has freed a tensor of 32 MiB
        libc.mallopt(M_MMAP_MAX, 65536)
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 64 << 20)
        libc.malloc_trim(0)
