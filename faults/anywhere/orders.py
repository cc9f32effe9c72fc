"""What fails next: the sweep writes an order at a time into a file that all processes of a service have mapped.

So a process need not start again for each trial, and reading costs no system call.
"""

import hashlib
import json
import mmap
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

SIZE = 1 << 16
NUMBER = 8  # bytes of the order's number, before its JSON

Kind = Literal["unforeseen", "os error", "time-out", "after", "lost"]
Marks = Mapping[str, list[str]]  # victim -> texts, of which every call that concerns it has one


class Unforeseen(Exception):
    """An exception that nobody foresaw."""

    def __init__(self) -> None:
        super().__init__("injected")


@dataclass(frozen=True)
class Fault:
    """How a place fails. marks: of the victim; without any every call fails. for_good: not just the first call."""

    place: str
    kind: Kind = "unforeseen"
    for_good: bool = False
    marks: Marks = field(default_factory=dict)


@dataclass(frozen=True)
class Recording:
    """Report the places that are reached, with this phase, and the victims with these marks that they concern."""

    phase: str
    marks: Marks = field(default_factory=dict)


class OrderBook:
    """The file of orders in `folder`, and beside it what the processes report: places, and which faults have struck.

    A place is reported once in each phase for each victim that it concerns.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._number, self._written = folder, b"", b""
        self._faults: dict[str, Fault] = {}
        self._recording: Recording | None = None
        self._reported = set[str]()
        path = folder / "order"
        if not path.exists():
            path.write_bytes(bytes(SIZE))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), SIZE)

    def fail(self, *faults: Fault) -> None:
        """Have these faults strike from now on, and no others."""
        self._write({"faults": [asdict(fault) for fault in faults]})
        if faults:
            self._written = self._map[:NUMBER]

    def record(self, recording: Recording) -> None:
        self._write({"faults": [], "recording": asdict(recording)})

    def _write(self, order: Any) -> None:
        number = int.from_bytes(self._map[:NUMBER], "big") + 1
        text = json.dumps(order).encode() + b"\0"
        self._map[NUMBER : NUMBER + len(text)] = text
        self._map[:NUMBER] = number.to_bytes(NUMBER, "big")

    def has_struck(self, place: str) -> bool:
        """Whether the last fault at this place has failed a call."""
        return self._mark(self._written, place).exists()

    def _mark(self, number: bytes, place: str) -> Path:
        digest = hashlib.sha256(place.encode()).hexdigest()[:16]
        return self.folder / "struck" / f"{int.from_bytes(number, 'big')}-{digest}"

    def kind_at(self, place: str, about: Callable[[], str]) -> Kind | None:
        """Return how a call fails that is about to be made, None if it does not. `about`: what the call concerns."""
        number = self._map[:NUMBER]
        if number != self._number:
            self._read(number)
        if self._recording is not None:
            self._report(self._recording, place, about())
        fault = self._faults.get(place)
        if fault is None or (fault.marks and not victims_of(about(), fault.marks)):
            return None
        is_first, mark = True, self._mark(number, place)
        mark.parent.mkdir(exist_ok=True)
        try:
            mark.touch(exist_ok=False)  # only one process can
        except FileExistsError:
            is_first = False
        return fault.kind if is_first or fault.for_good else None

    def _read(self, number: bytes) -> None:
        text = self._map[NUMBER:].partition(b"\0")[0]
        order = json.loads(text) if text else {"faults": []}
        self._faults = {one["place"]: Fault(**one) for one in order["faults"]}
        self._recording = Recording(**order["recording"]) if "recording" in order else None
        self._number = number

    def _report(self, recording: Recording, place: str, about: str) -> None:
        line = "\t".join([recording.phase, place, *victims_of(about, recording.marks)]) + "\n"
        if line not in self._reported:
            self._reported.add(line)
            with (self.folder / "places").open("a") as file:  # one write each: processes share it
                file.write(line)

    def places(self) -> list[list[str]]:
        """Return the reports: phase, place, and the victims that the call concerned."""
        path = self.folder / "places"
        return [line.split("\t") for line in path.read_text().splitlines()] if path.exists() else []


def victims_of(about: str, marks: Marks) -> list[str]:
    return [victim for victim, texts in marks.items() if any(text in about for text in texts)]
