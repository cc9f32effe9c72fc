"""What a fault is: a function, whose docstring describes it in docs/reliability.md, and the service that it breaks."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from faults.harness import Beside
from faults.trial import Trial


@dataclass(frozen=True)
class Case:
    """A fault, and the service into which it is injected."""

    run: Callable[[Trial], None]
    workers: int = 2
    worker_command: str = "service worker"
    environment: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)  # of every request
    bodies: Sequence[dict[str, Any]] = ()  # requests beside those of every fault
    clocks: bool = False  # whether its clocks can jump
    beside: Beside = contextlib.nullcontext

    @property
    def name(self) -> str:
        return self.run.__name__.replace("_", "-")

    @property
    def description(self) -> str:
        return " ".join((self.run.__doc__ or "").split())
