"""The evaluator's file of the course whose lab has i-CLEVR: checkpoint.pth, {"model": state_dict}."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from iclevr.labels import ICLEVR
from shared import storage as files
from shared.checkpoint import CheckpointError
from shared.evaluator import Evaluator, make_evaluator, short
from shared.options import EngineName
from trainer.errors import TrainerError


def read(path: Path, device: str | torch.device = "cpu", engine: EngineName = "auto") -> Evaluator:
    """Load the course's checkpoint.pth. CheckpointError if the file is none."""
    return make_evaluator(path.name, ICLEVR, _state_in(path), device=device, engine=engine)


def _state_in(path: Path) -> Mapping[str, Any]:
    try:
        state: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)["model"]
    except OSError as error:
        raise CheckpointError(path.name, f"cannot be read: {error.strerror or error}") from error
    except Exception as error:  # torch raises a dozen kinds of error for a foreign file
        reason = f'not a checkpoint of the form {{"model": state_dict}}: {short(error)}'
        raise CheckpointError(path.name, reason) from error
    return state


def write(evaluator: Evaluator, path: Path) -> None:
    """Write {"model": state_dict}, which the course's unchanged evaluator.py loads as its checkpoint.pth.

    The position head is left out, since that file has no place for it. TrainerError for an evaluator of other labels.
    """
    if evaluator.vocabulary != ICLEVR:
        name = evaluator.info.name if evaluator.info else "the evaluator"
        raise TrainerError(f"{name} has other labels than i-CLEVR's, which the course's evaluator.py is made for")
    state = {key: value.to("cpu").contiguous() for key, value in evaluator.resnet.state_dict().items()}
    content = io.BytesIO()
    torch.save({"model": state}, content)
    files.write(path, content.getbuffer())
