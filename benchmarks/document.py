"""Pieces of a Markdown document: paragraphs, tables and plots. Knows no section."""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Plot:
    """A plot: `draw(axes)` fills `panels` axes, side by side."""

    name: str
    caption: str
    draw: Callable[[Sequence[Any]], None]
    panels: int = 1

    def file_name(self, stem: str) -> str:
        """Return the file's name beside document STEM.md."""
        return f"{stem}-{self.name}.png"

    def save(self, path: Path) -> None:
        """Draw the plot and write it as PNG."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(1, self.panels, figsize=(4.8 * self.panels, 3.4), squeeze=False)
        self.draw(axes[0])
        figure.tight_layout()
        # no date and no version inside, so that equal figures give an equal file
        figure.savefig(path, dpi=90, metadata={"Software": None})
        pyplot.close(figure)


Piece = str | Table | Plot


def write(pieces: Sequence[Piece], path: Path) -> None:
    """Write a document, and its plots beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for piece in pieces:
        if isinstance(piece, Plot):
            piece.save(path.parent / piece.file_name(path.stem))
    path.write_text(markdown(pieces, path.stem))


def markdown(pieces: Sequence[Piece], stem: str) -> str:
    """Return the text of document STEM.md."""
    parts = []
    for piece in pieces:
        match piece:
            case Table():
                parts.append(piece.markdown())
            case Plot():
                parts.append(f"![{piece.caption}]({piece.file_name(stem)})")
            case _:
                parts.append(wrapped(piece))
    return "\n\n".join(parts) + "\n"


def wrapped(paragraph: str) -> str:
    """Wrap a paragraph at WIDTH. Headings, code, lists and text with line breaks stay as they are."""
    if "\n" in paragraph or paragraph.startswith(("#", "    ", "-", "|", "!")):
        return paragraph
    return textwrap.fill(paragraph, WIDTH, break_long_words=False, break_on_hyphens=False)
