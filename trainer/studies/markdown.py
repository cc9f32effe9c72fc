"""Markdown for the reports and the cards. Knows no figures."""

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
    return "\n\n".join(block.strip("\n") for block in blocks) + "\n"
