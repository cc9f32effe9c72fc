"""Markdown for the reports and the cards, whose generated parts have marks. Knows no figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def picture(path: Path, caption: str) -> str:
    """A picture that lies beside the page, with its caption below."""
    return f"![{caption}]({path.name})\n\n{caption}"


def page(blocks: Sequence[str]) -> str:
    return "\n\n".join(block.strip("\n") for block in blocks if block.strip()) + "\n"


def marks(name: str) -> tuple[str, str]:
    """Return the marks before and after a generated part: comments, which a page does not show."""
    return f"<!-- begin {name} -->", f"<!-- end {name} -->"


def part_of(text: str, name: str) -> str:
    """Return the text between the marks of that name; an empty one if the page lacks a mark."""
    begin, end = marks(name)
    inside, found, _ = text.partition(begin)[2].partition(end)
    return inside.strip("\n") if found else ""


def with_part(text: str, name: str, content: str) -> str:
    """Return the page with `content` between the marks of that name. The rest stays as it is.

    If the page lacks one of the marks, the part goes to its end.
    """
    begin, end = marks(name)
    part = page([begin, content, end])
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if found:
        return before + part.removesuffix("\n") + after
    return page([text.replace(begin, "").replace(end, ""), part])
