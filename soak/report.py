"""Keeps a soak's figures in `results.json`, for docs/reliability.md."""

import json
from typing import Any

from faults import report as faults

ROOT = faults.ROOT


def keep(result: dict[str, Any]) -> None:
    """Save a result and write the document."""
    faults.SOAK.write_text(json.dumps(result, indent=1) + "\n")
    faults.DOCUMENT.write_text(faults.document(faults.read()))
