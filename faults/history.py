"""Every job's history from Redis's append-only file: all writes, in order, by any process.

Redis appends whatever a command or script changed, and nothing if it changed nothing. So a second terminal state, or a
picture that is stored twice, shows up here however briefly it existed. Knows no processes.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from service.contract.records import TERMINAL

JOB = b"labelgrid:job:"


@dataclass
class History:
    """One job's writes: its states and its events in order, how often each picture was stored, what came too late."""

    states: list[str] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    stored: Counter[str] = field(default_factory=Counter)
    late: list[str] = field(default_factory=list)
    deleted: bool = False


def commands(log: bytes) -> Iterator[list[bytes]]:
    """Yield the commands of an append-only file. Like Redis, ignore a command that a crash truncated at the end."""
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


def applied(log: bytes) -> Iterator[list[bytes]]:
    """Yield the commands that Redis applied, one transaction after the other.

    When Redis restarts, it undoes a transaction that a crash truncated, and appends to the same file. Such a
    transaction has no EXEC, and a SELECT follows it.
    """
    transaction: list[list[bytes]] | None = None
    for command in commands(log):
        name = command[0].upper()
        if name == b"MULTI":
            transaction = []
        elif name == b"EXEC":
            yield from transaction or ()
            transaction = None
        elif name == b"SELECT":
            transaction = None
        elif transaction is not None:
            transaction.append(command)
        else:
            yield command


def histories(log: bytes) -> dict[str, History]:
    """Return each job's history, by its id."""
    found: dict[str, History] = {}
    for name, *arguments in applied(log):
        for key in arguments[: None if name.upper() in (b"DEL", b"UNLINK") else 1]:
            if key.startswith(JOB):
                job_id, _, part = key[len(JOB) :].decode().partition(":")
                _note(found.setdefault(job_id, History()), name.upper(), part, arguments[1:])
    return found


def _note(job: History, name: bytes, part: str, arguments: list[bytes]) -> None:
    if name in (b"DEL", b"UNLINK") and part == "":
        job.deleted = True
    elif name in (b"HSET", b"HMSET", b"HSETNX") and part in ("", "verdicts"):
        pairs = dict(zip(arguments[::2], arguments[1::2], strict=True))
        if job.deleted:
            job.late.append(f"{part or 'its record'} was written after it was deleted or had expired")
        if part == "verdicts":
            indices = [index.decode() for index in pairs]
            if job.states and job.states[-1] in TERMINAL:
                job.late.append(f"pictures {indices} were stored after its end")
            job.stored.update(indices)
        elif b"status" in pairs:
            job.states.append(pairs[b"status"].decode())
    elif name == b"XADD" and part == "events":
        if arguments[-2] == b"last_picture":  # one entry says that the only picture is there, and the job's end
            job.events.append(f"picture {arguments[-1].decode()}")
            arguments = arguments[:-2]
        job.events.append(" ".join(one.decode() for one in arguments[-2:]))


def files(folder: Path) -> list[Path]:
    """Return the files of commands, oldest first: `appendonly.aof`, or since Redis 7 those beside its manifest."""
    found = [path for path in folder.rglob("*.aof*") if not path.name.endswith((".manifest", ".rdb"))]
    return sorted(found, key=lambda path: path.stat().st_mtime)


def read(folder: Path) -> dict[str, History]:
    """Return the histories in Redis's folder."""
    return histories(b"".join(path.read_bytes() for path in files(folder)))
