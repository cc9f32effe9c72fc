"""Where checkpoints are read from, if nobody says so. Imports nothing of ours."""

import os
from pathlib import Path
from typing import Final

PACKAGED: Final = Path(__file__).parent / "models"  # the weights that came with the installation
FOLDER: Final = "models"  # the service's own default


def default_storage() -> str:
    """Return LABELGRID_STORAGE, or else the folder `models`, or else the weights that came with the installation.

    A folder named models without a checkpoint is another program's.
    """
    if given := os.environ.get("LABELGRID_STORAGE"):
        return given
    return str(PACKAGED) if PACKAGED.exists() and not any(Path(FOLDER).glob("*.safetensors")) else FOLDER
