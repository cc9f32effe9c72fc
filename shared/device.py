"""All that differs by device: which there is, its precision, copies to it. Spares a CPU work that nobody needs.

No other module asks for a device's type, so that all that a GPU needs can be read here, and tests put other answers in
its place.
"""

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Final

import torch
from torch import Tensor

THREADS: Final = torch.get_num_threads()  # of this process's computations, by the cores or OMP_NUM_THREADS
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of glibc's mallopt(3)


class DeviceError(ValueError):
    """A device that this machine does not have."""


def pick_device(name: str = "auto") -> torch.device:
    """Return the device `auto`, `cpu`, `cuda`, `cuda:N` or `mps`, the GPU of a Mac.

    `auto` is the first CUDA GPU (under torchrun, the process's own), or the CPU if there is none; never `mps`, which
    nobody has run yet. Raises DeviceError for any other name, and for a GPU that this machine does not have.
    """
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise DeviceError('no device "mps": this machine has no GPU that Metal knows')
        return torch.device("mps")
    # not device_count() alone, which also counts GPUs that CUDA cannot use, as with a driver too old for this torch
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    own = int(os.environ.get("LOCAL_RANK", "0"))
    if name == "cpu" or (name == "auto" and there == 0):
        return torch.device("cpu")
    index = own if name in ("auto", "cuda") else None
    if name.startswith("cuda:") and name.removeprefix("cuda:").isdecimal():
        index = int(name.removeprefix("cuda:"))
    if index is None:
        raise DeviceError(f'unknown device "{name}"; use auto, cpu, cuda, cuda:N or mps')
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


def device_name(device: torch.device) -> str:
    """Return what the device is, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    chip = platform.processor() or platform.machine()
    return f"the GPU of an {chip}" if device.type == "mps" else f"{os.cpu_count()} cores of {chip}"


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the type that the device multiplies faster than float32: bfloat16, or float16 on GPUs without; else None.

    A Mac's GPU computes in float32.
    """
    if device.type == "cuda":
        # not is_bf16_supported(), which also counts emulation, slow and without convolutions, and looks at GPU 0
        capability = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if capability >= (8, 0) else torch.float16 if capability >= (7, 0) else None
    if device.type != "cpu":
        return None
    has_amx = torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_amx or torch.cpu._is_avx512_bf16_supported() else None


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Compute in `dtype` what it is exact enough for, inside this context; None changes nothing."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def fast(device: torch.device) -> AbstractContextManager[object]:
    """Compute in the device's fastest precision inside this context."""
    return autocast(device, autocast_dtype(device))


def exact(device: torch.device) -> AbstractContextManager[object]:
    """Compute in the tensors' own precision inside this context, in spite of `fast` around it."""
    return torch.autocast(device.type, enabled=False)


def loss_scaler(device: torch.device) -> torch.amp.GradScaler:
    """Return what scales the loss so that float16 holds its gradients (Micikevicius et al. 2018, sec. 3.2).

    It does nothing for other types.
    """
    scales = autocast_dtype(device) is torch.float16
    return torch.amp.GradScaler(device.type if scales else "cpu", enabled=scales)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy values to the device without waiting for it: CUDA fetches them from memory that is not swapped out."""
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def draws_ahead(device: torch.device) -> bool:
    """Whether the CPU is free to draw a step's examples while the device computes the step before."""
    return device.type != "cpu"


def fuses_attention(device: torch.device) -> bool:
    """Whether attention is faster in one kernel: not on a CPU, where the products alone are faster."""
    return device.type == "cuda"


def overlaps(device: torch.device) -> bool:
    """Whether two threads compute at the same time: not on a GPU, where the second one's work waits for the first's."""
    return device.type == "cpu"


def process_backends(device: torch.device) -> str:
    """Return what processes exchange tensors by: nccl on CUDA, and gloo for what is on the CPU."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


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
    of thousands of zeroed pages (docs/dev/decisions.md).
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
