"""The processes that torchrun starts: which part of a batch each one takes, and what all of them must do alike."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from shared.device import process_backends
from trainer.errors import TrainerError

TIMEOUT: Final = timedelta(minutes=30)  # long, since the others wait while the first process samples and scores


@dataclass(frozen=True)
class Processes:
    """This process among all: `rank` of `size`."""

    rank: int = 0
    size: int = 1

    def parts(self, batch: int, accumulation: int) -> list[slice]:
        """Return this process's parts of a batch, one for each backward pass of a step."""
        count = self.size * accumulation
        if batch % count:
            problem = f"{self.size} processes times --grad-accumulation {accumulation}"
            raise TrainerError(f"batch {batch} must be a multiple of {problem}")
        length = batch // count
        first = self.rank * accumulation
        return [slice(k * length, (k + 1) * length) for k in range(first, first + accumulation)]

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Let the first process do something before the others do: sample what they then find on disk."""
        if self.rank > 0:
            self.agreed()
        yield
        if self.rank == 0:
            self.agreed()

    def agreed(self, *values: float) -> list[float]:
        """Return the first process's values, for what all must decide alike, such as when to stop."""
        if self.size == 1:
            return list(values)
        own = torch.tensor(values, dtype=torch.float64)  # on the CPU, so that a GPU need not be waited for
        dist.broadcast(own, 0)
        return own.tolist()

    def from_first(self, make: Callable[[], Any]) -> Any:
        """Return what `make` returns in the first process. The others wait for it; it must be possible to pickle."""
        found = [make() if self.rank == 0 else None]
        if self.size > 1:
            dist.broadcast_object_list(found, 0, device=torch.device("cpu"))
        return found[0]

    def added(self, values: Tensor) -> Tensor:
        """Return the sums of `values` over all processes."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values


@contextmanager
def processes(device: torch.device) -> Iterator[Processes]:
    """Join the other processes where torchrun started several. The outermost of nested contexts leaves them again."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield Processes()
        return
    outermost = not dist.is_initialized()
    if outermost:
        # gloo beside nccl for what is on the CPU: decisions, and the layout network
        dist.init_process_group(process_backends(device), timeout=TIMEOUT)
    yield Processes(dist.get_rank(), dist.get_world_size())
    if outermost:
        dist.barrier()  # no process leaves while the first still evaluates
        dist.destroy_process_group()
