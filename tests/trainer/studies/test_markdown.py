"""Blocks of Markdown, and how they make a page."""

from pathlib import Path

from trainer.studies.markdown import page, picture, table


def test_blocks_make_a_page() -> None:
    blocks = ["# First", "a < `b`, **c** in [d](e.md)\n", "## Second", table(["x", "y"], [["1", "<2>"]])]
    rows = "| x | y |\n| --- | --- |\n| 1 | <2> |"
    wanted = f"# First\n\na < `b`, **c** in [d](e.md)\n\n## Second\n\n{rows}\n\n![p](a.png)\n\np\n"
    assert page([*blocks, picture(Path("some/a.png"), "p")]) == wanted
