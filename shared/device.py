"""Which device to use, and in which precision it computes fastest."""

import torch


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is the first GPU where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the device multiplies it faster than float32, else None."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
    has_amx = torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_amx or torch.cpu._is_avx512_bf16_supported() else None
