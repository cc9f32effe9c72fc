"""What an installation offers: `load`, `labelgrid.Client`, `labelgrid.AsyncClient` and the command `labelgrid`.

    from labelgrid import Client, load

Imports the client only: no torch, no Redis, no FastAPI. `load` imports torch when it is called. `models/` are the
weights, which the wheel brings along.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from service import client
from service.client import *  # noqa: F403 - the names that it lists

if TYPE_CHECKING:
    from labelgrid.model import Model
    from shared.options import EngineName
    from shared.storage import Location

__all__ = [*client.__all__, "load"]


def load(
    name: str | None = None,
    *,
    storage: str | Location | None = None,
    evaluator: str | None = None,
    device: str = "auto",
    engine: EngineName = "auto",
) -> Model:
    """Load a model into this process, with the evaluator that judges its pictures: no service is needed.

    `name`: a denoiser in the storage, by default the promoted one. `storage`: a folder, or an address such as
    s3://bucket/path; by default LABELGRID_STORAGE, the folder `models`, or the weights that came with the installation.
    `evaluator`: the name of another one than the service would choose. `device`: auto, cpu, cuda, cuda:N or mps.
    `engine`: what computes the networks on a CPU: auto, openvino or torch.

    Raises ModuleNotFoundError if the extra `torch` is not installed. Otherwise a ValueError in one sentence:
    CheckpointError for a checkpoint that is missing or damaged and for an evaluator that does not know the model's
    labels, DeviceError and EngineError for what this machine does not have, and ValueError itself for a storage that no
    installed driver can open.
    """
    try:
        from labelgrid.model import load_model
    except ModuleNotFoundError as error:
        needed = f"labelgrid.load needs more packages: pip install 'labelgrid[torch]' (there is no {error.name})"
        raise ModuleNotFoundError(needed, name=error.name) from None
    return load_model(name, storage, evaluator, device, engine)
