"""What must hold of every job after a fault, whatever the fault was. Pure: stories and bytes in, complaints out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from faults.journal import Story
from service.contract.records import TERMINAL

GRID = "grid"


@dataclass(frozen=True)
class Fetched:
    """What a client got of a finished job: each picture and the grid, as PNG."""

    pictures: Sequence[bytes]
    grid: bytes


def check_states(story: Story) -> list[str]:
    """One way from queued to one terminal state, in the job's own field and in the events that clients are told."""
    wrong = []
    if story.deleted:
        wrong.append("its record was deleted")
    shown = " -> ".join(story.states) or "none"
    ends = [state for state in story.states if state in TERMINAL]
    before = story.states[:-1]
    if len(ends) != 1 or story.states[-1:] != ends or before not in (["queued"], ["queued", "running"]):
        wrong.append(f"its states were {shown}")
    told = [event.removeprefix("status ") for event in story.told if event.startswith("status ")]
    if told != story.states[1:]:
        wrong.append(f"its events told of {' -> '.join(told) or 'nothing'}, its states were {shown}")
    return wrong


def check_pictures(story: Story, total: int, fetched: Fetched, undisturbed: Fetched) -> list[str]:
    """Of a finished job: every picture stored once, told once before the end, and the bytes of an undisturbed run."""
    wrong = []
    once = {str(index): 1 for index in range(total)}
    stored = {name: count for name, count in story.stored.items() if name != GRID}
    if stored != once:
        wrong.append(f"its pictures were stored {_differing(stored, once)}")
    names = [event.removeprefix("picture ") for event in story.told if event.startswith("picture ")]
    told = {name: names.count(name) for name in names}
    if told != once:
        wrong.append(f"its events told of pictures {_differing(told, once)}")
    if story.told and story.told[-1] != "status finished":
        wrong.append(f"its last event was {story.told[-1]!r}")
    others = [
        index
        for index, pair in enumerate(zip(fetched.pictures, undisturbed.pictures, strict=False))
        if len(set(pair)) > 1
    ]
    if others or len(fetched.pictures) != len(undisturbed.pictures):
        wrong.append(f"its pictures {others} are not those of an undisturbed run")
    if fetched.grid != undisturbed.grid:
        wrong.append("its grid is not that of an undisturbed run")
    return wrong


def _differing(found: Mapping[str, int], wanted: Mapping[str, int]) -> str:
    names = sorted({*found, *wanted}, key=int)
    return ", ".join(
        f"{name}: {found.get(name, 0)} times" for name in names if found.get(name, 0) != wanted.get(name, 0)
    )
