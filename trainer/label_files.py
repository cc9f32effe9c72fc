"""Writes the label files of a data set folder; `shared/vocabulary.py` reads them."""

import json
from pathlib import Path

from shared import storage as files


def write_label_file(path: Path, content: object) -> None:
    files.write(path, json.dumps(content).encode())
