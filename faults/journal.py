"""What ever happened to jobs, read from Redis's append-only file: every write, in order, whoever made it.

Redis appends what a command or script changed, and nothing for one that changed nothing. So a state that moved twice or
a picture that was stored twice is seen here, however short it lasted. Knows no processes.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

JOB = b"labelgrid:job:"


@dataclass
class Story:
    """One job's writes. `states` and `told`, the job's events, are in order; `stored` counts writes by picture."""

    states: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    stored: Counter[str] = field(default_factory=Counter)
    deleted: bool = False


def commands(log: bytes) -> Iterator[list[bytes]]:
    """The commands of an append-only file. What a crash cut off at its end is left out, as Redis does."""
    at = 0
    try:
        while at < len(log):
            count, at = _number(log, at, b"*")
            parts = []
            for _ in range(count):
                length, at = _number(log, at, b"$")
                if at + length + 2 > len(log):
                    return
                parts.append(log[at : at + length])
                at += length + 2
            yield parts
    except EOFError:
        return


def _number(log: bytes, at: int, mark: bytes) -> tuple[int, int]:
    end = log.find(b"\r\n", at)
    if end < 0:
        raise EOFError
    if log[at : at + 1] != mark:
        raise ValueError(f"byte {at} of the append-only file is {log[at : at + 1]!r}, not {mark!r}")
    return int(log[at + 1 : end]), end + 2


def stories(log: bytes) -> dict[str, Story]:
    """Each job's story, by its id."""
    found: dict[str, Story] = {}
    for name, *arguments in commands(log):
        for key in arguments[: None if name.upper() in (b"DEL", b"UNLINK") else 1]:
            if key.startswith(JOB):
                job_id, _, part = key[len(JOB) :].decode().partition(":")
                _note(found.setdefault(job_id, Story()), name.upper(), part, arguments[1:])
    return found


def _note(story: Story, name: bytes, part: str, arguments: list[bytes]) -> None:
    if name in (b"DEL", b"UNLINK") and part == "":
        story.deleted = True
    elif name in (b"HSET", b"HMSET", b"HSETNX"):
        pairs = dict(zip(arguments[::2], arguments[1::2], strict=True))
        if part == "" and b"status" in pairs:
            story.states.append(pairs[b"status"].decode())
        elif part == "png":
            story.stored.update(name.decode() for name in pairs)
    elif name == b"XADD" and part == "events":
        story.told.append(" ".join(one.decode() for one in arguments[-2:]))


def read(folder: Path) -> dict[str, Story]:
    """The stories in Redis's folder: `appendonly.aof`, or from version 7 on the files beside its manifest."""
    files = [path for path in folder.rglob("*.aof*") if not path.name.endswith((".manifest", ".rdb"))]
    return stories(b"".join(path.read_bytes() for path in sorted(files, key=lambda path: path.stat().st_mtime)))
