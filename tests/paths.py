"""Where tests find the project and the task's own files."""

from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
TASK_FILES: Final = ROOT.parent / "shared"  # label files and reference renders; tests skip where they are absent
