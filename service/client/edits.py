"""Edits as the command line has them, in words."""

import re
from typing import Any, Final

from service.client.errors import ClientError

NUMBER: Final = r"(\d*\.?\d+)"
FORMS: Final = {
    "add": re.compile(rf"add (?P<label>.+) at {NUMBER},? {NUMBER}"),
    "move": re.compile(rf"move (?P<label>.+) to {NUMBER},? {NUMBER}"),
    "recolour": re.compile(r"recolou?r (?P<label>.+?) to (?P<to>.+)"),
    "remove": re.compile(r"remove (?P<label>.+)"),
}
HELP: Final = '"add LABEL at X Y", "move LABEL to X Y", "recolour LABEL to LABEL" or "remove LABEL"'


def read_edit(words: str) -> dict[str, Any]:
    """Return the edit that the words ask for, as the API takes it. ClientError if they are none."""
    for kind, form in FORMS.items():
        if match := form.fullmatch(" ".join(words.split())):
            about: dict[str, Any] = match.groupdict()
            if kind in ("add", "move"):
                about |= {"x": float(match[2]), "y": float(match[3])}
            return {kind: about}
    raise ClientError(f'"{words}" is no edit: give {HELP}')
