"""Adds marks to cards without them, as trainers before version 0.2 wrote. To be removed in version 0.3."""

from __future__ import annotations

import re

from trainer.studies.markdown import marks, page

MADE_BY = re.compile(r"^Made by.*\n?(?:[ \t]*\n|    .*\n?)*", re.M)  # with the indented lines below
SCORES_BEGIN = "Mean and standard deviation over the runs, seeds 0 upwards"


def with_marks(text: str, name: str) -> str:
    """Return the card of checkpoint `name` with marks for its generated parts, which are still empty.

    What people wrote stays where it was. What they wrote in "Made by" goes between marks, since a checkpoint that knows
    its stages replaces it. text: without the Hub's metadata.
    """
    intro, *sections = re.split(r"^(?=## )", text, flags=re.M)
    above, below = re.sub(r"\A\s*# .*\n*(?:Kind: .*)?", "", intro), list[str]()
    for section in sections:
        title = section.splitlines()[0].removeprefix("## ")
        if title == "Scores":
            blocks = section.strip("\n").split("\n\n")[1:]
            below += [one for one in blocks if not one.startswith((SCORES_BEGIN, "| file"))]
        elif title not in ("Training", "Configuration"):
            below.append(section)
    made_by = MADE_BY.search(above)
    parts = [f"# {name}", *marks("about"), marks("made-by")[0], made_by[0] if made_by else "", marks("made-by")[1]]
    return page([*parts, MADE_BY.sub("", above), *marks("scores"), *below, *marks("training")])
