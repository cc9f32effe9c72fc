"""Whether a new job fits: into its model's queue, and into what its owner may store. Knows no HTTP.

The function that creates a job (`jobs.lua`) checks it, so that simultaneous requests cannot pass a limit together.
"""

from dataclasses import dataclass
from typing import Any

from service.settings import Settings


@dataclass(frozen=True)
class Full:
    """Why a job does not fit. `what`: the model's "queue", the "owner"'s part of it, or what the owner has "stored".

    `taken`: how many pictures there are, `most` the limit.
    """

    what: str
    taken: int
    most: int


class NoRoom(Exception):
    """A job does not fit; `full` says why."""

    def __init__(self, full: Full) -> None:
        super().__init__(full)
        self.full = full


def limits(settings: Settings) -> dict[str, int]:
    """Return the most that fits, by what may be full; 0 is no limit."""
    own = {"owner": settings.max_queued_pictures_per_owner, "stored": settings.max_stored_pictures_per_owner}
    return {"queue": settings.max_queued_pictures, **(own if settings.has_keys else dict.fromkeys(own, 0))}


def full_of(settings: Settings, answer: list[Any]) -> Full:
    """Return why a job does not fit, given the answer of `create`."""
    what, taken = answer
    return Full(what.decode(), int(taken), limits(settings)[what.decode()])
