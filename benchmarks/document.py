"""Pieces of a Markdown document: tables, numbers, plots. Knows no subject."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def number(value: float) -> str:
    """Three significant digits, without an exponent below a million."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.3g}"
    return f"{value:#.3g}".rstrip(".")


@dataclass
class Table:
    """A table; its cells become text as they are added."""

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
    """A plot: `draw(axes)` fills `panels` axes side by side."""

    name: str
    caption: str
    draw: Callable[[Sequence[Any]], None]
    panels: int = 1

    def save(self, folder: Path, prefix: str) -> str:
        """Writes PREFIX-NAME.png and returns the line that shows it."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(1, self.panels, figsize=(4.8 * self.panels, 3.4), squeeze=False)
        self.draw(axes[0])
        figure.tight_layout()
        path = folder / f"{prefix}-{self.name}.png"
        # no date and no version inside: the same figures give the same file
        figure.savefig(path, dpi=90, metadata={"Software": None})
        pyplot.close(figure)
        return f"![{self.caption}]({path.name})"


def write(pieces: Sequence[str | Table | Plot], path: Path) -> None:
    """A document of paragraphs, tables and plots; plots lie beside it under its own name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = []
    for piece in pieces:
        match piece:
            case Table():
                parts.append(piece.markdown())
            case Plot():
                parts.append(piece.save(path.parent, path.stem))
            case _:
                parts.append(wrapped(piece))
    path.write_text("\n\n".join(parts) + "\n")


def wrapped(paragraph: str, width: int = 120) -> str:
    """Lines of at most `width`; headings, code, lists and what has lines already stay as they are."""
    import textwrap

    if "\n" in paragraph or paragraph.startswith(("#", "    ", "-", "|", "!")):
        return paragraph
    return textwrap.fill(paragraph, width, break_long_words=False, break_on_hyphens=False)
