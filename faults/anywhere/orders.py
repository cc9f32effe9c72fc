"""What fails next: the sweep writes one order at a time into a file that all processes of a service have mapped.

So a process need not start again for each trial, and reading costs no system call.
"""

import json
import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

SIZE = 1 << 16
NUMBER = 8  # bytes of the order's number, before its JSON

Kind = Literal["unforeseen", "os error", "time-out", "after", "lost"]
Marks = Mapping[str, list[str]]  # victim -> texts, of which every call that concerns it has one


class Unforeseen(Exception):
    """An exception that nobody foresaw."""

    def __init__(self) -> None:
        super().__init__("injected")


@dataclass(frozen=True)
class Order:
    """Fail `place`, or without one record the places that are reached.

    marks: of the victim; without any every call fails. for_good: all of its calls fail, not just the first one.
    phase: recorded with each place.
    """

    place: str = ""
    kind: Kind = "unforeseen"
    for_good: bool = False
    marks: Marks = field(default_factory=dict)
    phase: str = ""


class OrderBook:
    """The file of orders in `folder`, and beside it what the processes report: places, and whether an order failed any.

    A place is reported once in each phase for each victim that it concerns.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._number, self._written = folder, b"", b""
        self._order: Order | None = None
        self._reported = set[str]()
        path = folder / "order"
        if not path.exists():
            path.write_bytes(bytes(SIZE))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), SIZE)

    def write(self, order: Order | None) -> None:
        """Put an order in force, or none."""
        number = int.from_bytes(self._map[:NUMBER], "big") + 1
        text = json.dumps(order and asdict(order)).encode() + b"\0"
        self._map[NUMBER : NUMBER + len(text)] = text
        self._map[:NUMBER] = number.to_bytes(NUMBER, "big")
        if order is not None:
            self._written = self._map[:NUMBER]

    @property
    def has_failed(self) -> bool:
        """Whether the last order that this process wrote has failed a call."""
        return self._mark(self._written).exists()

    def _mark(self, number: bytes) -> Path:
        return self.folder / f"failed-{int.from_bytes(number, 'big')}"

    def kind_at(self, place: str, about: Callable[[], str]) -> Kind | None:
        """Return how a call fails that is about to be made, None if it does not. `about`: what the call concerns."""
        number = self._map[:NUMBER]
        if number != self._number:
            text = self._map[NUMBER:].partition(b"\0")[0]
            found = json.loads(text) if text else None
            self._number, self._order = number, Order(**found) if found else None
        order = self._order
        if order is None:
            return None
        if not order.place:
            self._report(order, place, about())
            return None
        if order.place != place or (order.marks and not victims_of(about(), order.marks)):
            return None
        is_first = True
        try:
            os.close(os.open(self._mark(number), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            is_first = False
        return order.kind if is_first or order.for_good else None

    def _report(self, order: Order, place: str, about: str) -> None:
        line = "\t".join([order.phase, place, *victims_of(about, order.marks)]) + "\n"
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
