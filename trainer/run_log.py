"""A run's setup, and its figures as lines of JSON and as TensorBoard events. Knows nothing of what they mean."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch.utils.tensorboard import SummaryWriter

from trainer.errors import TrainerError


def keep_setup(folder: Path, setup: dict[str, Any]) -> None:
    """Writes `folder`/setup.json: what is done there, so that nothing is resumed with another.

    TrainerError where `folder` holds another.
    """
    path, now = folder / "setup.json", json.loads(json.dumps(setup))
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists():
        before = json.loads(path.read_text())
        if other := [key for key in now if now[key] != before.get(key)]:
            raise TrainerError(f"{path} was made with another {', '.join(other)}; choose another folder")
    path.write_text(json.dumps(now, indent=1) + "\n")


class RunLog:
    """Appends to `folder`/log.jsonl and `folder`/tensorboard; does nothing where `folder` is None (other ranks)."""

    def __init__(self, folder: Path | None) -> None:
        self.lines = (folder / "log.jsonl").open("a") if folder else None
        self.events: SummaryWriter | None = SummaryWriter(str(folder / "tensorboard")) if folder else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.lines and self.events:
            self.lines.close()
            self.events.close()

    def record(self, step: int, elapsed_s: float, figures: dict[str, float]) -> None:
        if self.lines and self.events:
            self.lines.write(json.dumps({"step": step, "minutes": round(elapsed_s / 60, 2), **figures}) + "\n")
            self.lines.flush()
            for key, value in figures.items():
                self.events.add_scalar(key, value, step)
