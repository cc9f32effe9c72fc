"""What must hold of every job after any fault. Pure functions: histories and bytes in, problems out."""

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from faults.history import History
from service.contract.records import TERMINAL


@dataclass(frozen=True)
class Fetched:
    """The pictures and the grid of a finished job, as PNG."""

    pictures: Sequence[bytes]
    grid: bytes


def check_states(job: History) -> list[str]:
    """Check that the job went from queued to one terminal state, in its record and in its events."""
    problems = []
    if job.deleted:
        problems.append("its record was deleted")
    shown = " -> ".join(job.states) or "none"
    ends = [state for state in job.states if state in TERMINAL]
    before = job.states[:-1]
    if len(ends) != 1 or job.states[-1:] != ends or before not in (["queued"], ["queued", "running"]):
        problems.append(f"its states were {shown}")
    announced = [event.removeprefix("status ") for event in job.events if event.startswith("status ")]
    if announced != job.states[1:]:
        problems.append(f"its events announced {' -> '.join(announced) or 'nothing'}, its states were {shown}")
    return problems


def check_pictures(job: History, total: int, fetched: Fetched, undisturbed: Fetched) -> list[str]:
    """Check a finished job: each picture stored and announced once, and equal to that of an undisturbed run."""
    problems = []
    once = {str(index): 1 for index in range(total)}
    if job.stored != once:
        problems.append(f"its pictures were stored {_differing(job.stored, once)}")
    announced = Counter(event.removeprefix("picture ") for event in job.events if event.startswith("picture "))
    if announced != once:
        problems.append(f"its events announced pictures {_differing(announced, once)}")
    if job.events and job.events[-1] != "status finished":
        problems.append(f"its last event was {job.events[-1]!r}")
    others = [
        index
        for index, pair in enumerate(zip(fetched.pictures, undisturbed.pictures, strict=False))
        if not _equal(*pair)
    ]
    if others or len(fetched.pictures) != len(undisturbed.pictures):
        problems.append(f"its pictures {others} differ from an undisturbed run")
    if not _equal(fetched.grid, undisturbed.grid):
        problems.append("its grid differs from an undisturbed run")
    return problems


def _equal(one: bytes, other: bytes) -> bool:
    """Compare the pixels of two PNGs, since releases compress differently. What cannot be read equals only itself."""
    if one == other:
        return True
    try:
        first, second = (np.asarray(Image.open(io.BytesIO(png))) for png in (one, other))
    except OSError:
        return False
    return np.array_equal(first, second)


def _differing(found: Mapping[str, int], wanted: Mapping[str, int]) -> str:
    names = sorted({*found, *wanted}, key=int)
    return ", ".join(
        f"{name}: {found.get(name, 0)} times" for name in names if found.get(name, 0) != wanted.get(name, 0)
    )
