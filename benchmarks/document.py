"""Pieces of a Markdown document: paragraphs and tables. Knows no section."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field

WIDTH = 120  # of a line


def number(value: float) -> str:
    """Format a number with three significant digits, without an exponent below a million."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.3g}"
    return f"{value:#.3g}".rstrip(".")


@dataclass
class Table:
    """A Markdown table. Cells are converted to text when they are added."""

    header: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)

    def add(self, *cells: object) -> None:
        if len(cells) != len(self.header):
            raise ValueError(f"{len(cells)} cells for {len(self.header)} columns")
        self.rows.append([str(cell) for cell in cells])

    def markdown(self) -> str:
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


Piece = str | Table


def markdown(pieces: Sequence[Piece]) -> str:
    """Return the text of the document."""
    return "\n\n".join(piece.markdown() if isinstance(piece, Table) else wrapped(piece) for piece in pieces) + "\n"


def wrapped(paragraph: str) -> str:
    """Wrap a paragraph at WIDTH. Headings and text with line breaks stay as they are."""
    if "\n" in paragraph or paragraph.startswith("#"):
        return paragraph
    return textwrap.fill(paragraph, WIDTH, break_long_words=False, break_on_hyphens=False)
