"""Tiny checkpoints in the real format: random weights, 16x16 pictures."""

import functools
import tempfile
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import nn

from iclevr.labels import ICLEVR
from iclevr.scenes.scene import projection
from shared.checkpoint import CheckpointInfo, publish, read_info
from shared.diffusion.layouts import LAYOUTS, LayoutConfig, LayoutNetwork
from shared.diffusion.solids import Camera, Solid
from shared.diffusion.unet import NetworkConfig, UNet
from shared.diffusion.upsampler import UpsamplerConfig, UpsamplerNet
from shared.diffusion.windows import WindowsConfig
from shared.evaluator import Evaluator
from shared.registry import promote
from shared.storage import Location, write
from shared.vocabulary import Vocabulary

CAMERA = cast(Camera, projection())
SHAPE: dict[str, Any] = {
    "image_size": 16,
    "channels": (8, 16),
    "encoder_blocks": (1, 1),
    "decoder_blocks": (1, 1),
    "attention": (False, True),
    "head_channels": 8,
    "embedding": 16,
}
# without blocks before the lowest resolution, as the shipped networks have none at the highest: it compiles sooner
NETWORK = NetworkConfig(num_labels=len(ICLEVR), **{**SHAPE, "encoder_blocks": (0, 0)})


def randomize(module: nn.Module, seed: int, std: float = 0.3) -> None:
    """Fill all weights with random values: a fresh network has zeros in places and ignores its labels."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=std, generator=generator)


def publish_toy_denoiser(
    storage: Location, name: str, seed: int, *, vocabulary: Vocabulary = ICLEVR, positions: bool = False,
    rotations: bool = False, symmetric: tuple[int, ...] = (), **config: Any,
) -> CheckpointInfo:  # fmt: skip
    """Publish a denoiser whose weights follow from `seed`; it replaces one of the same name.

    With `positions` it has layouts of one to three objects. `symmetric`: labels without rotations. `config`: more of
    its configuration.
    """
    own = NETWORK.model_copy(update={"num_labels": len(vocabulary), "positions": positions, "rotations": rotations})
    own = own.model_copy(update={"symmetric": symmetric})
    described = {"network": own.model_dump(mode="json"), "schedule": "cosine", "timesteps": 1000, "prediction": "v"}
    config = described | config
    torch.manual_seed(seed)  # a few parameters that `randomize` leaves alone are not zero either
    network = UNet(own)
    randomize(network, seed)
    state = network.state_dict()
    if positions:
        layouts = LayoutNetwork(LayoutConfig(num_labels=len(vocabulary), most=3, cells=4, width=8, layers=1, heads=1))
        config["layouts"] = layouts.config.model_dump(mode="json")
        state |= {f"{LAYOUTS}{key}": value for key, value in layouts.state_dict().items()}
    return read_info(
        publish(storage, name, state, kind="denoiser", vocabulary=vocabulary.names, config=config, training={})
    )


def publish_toy_evaluator(
    storage: Location, name: str, vocabulary: Vocabulary = ICLEVR, *, architecture: str = "resnet10"
) -> None:
    """Publish an evaluator of random weights, by default of the smallest architecture that there is."""
    torch.manual_seed(0)  # ResNet's own initialization takes no generator
    judge, config = Evaluator(vocabulary, architecture=architecture).resnet.state_dict(), {"architecture": architecture}
    publish(storage, name, judge, kind="evaluator", vocabulary=vocabulary.names, config=config, training={})


def publish_toy_adapter(storage: Location, name: str, base: CheckpointInfo) -> CheckpointInfo:
    """Publish an adapter that changes one bias of `base`."""
    changes = {"head.bias": torch.full((3 * NETWORK.block**2,), 0.2)}
    config = {**base.config, "base": {"name": base.name, "digest": base.digest}}
    return read_info(
        publish(storage, name, changes, kind="denoiser", vocabulary=base.vocabulary, config=config, training={})
    )


SMALL: Final = {"objects": 2, "curves": 4, "hidden": 8, "width": 16}  # windows of a toy


def publish_toy_upsampler(
    storage: Location, name: str, base: CheckpointInfo, *, features: int = 0, paints: bool = False,
    windows: bool = False, **config: Any
) -> CheckpointInfo:  # fmt: skip
    """Publish an adapter whose upsampler, of random weights, enlarges `base`'s pictures to 32x24.

    `features`: how many of the denoiser's it sees, 0 or the channels of its first level. `paints`: whether it paints
    the objects of i-CLEVR's labels. `windows`: whether it draws them in windows of their own.
    `config`: more of its configuration.
    """
    own = UpsamplerConfig(
        picture=(32, 24), channels=8, dilations=(1,), hidden=16, features=features, objects=2 if paints else 10,
        solids=tuple(cast(Solid, name.split()[1]) for name in base.vocabulary) if paints else (),
        camera=CAMERA if paints else None,
        windows=WindowsConfig(labels=len(base.vocabulary), **SMALL) if windows else None,
    )  # fmt: skip
    network = UpsamplerNet(own)
    randomize(network, 0, std=0.05 if not features else 0.2)
    added = {"base": {"name": base.name, "digest": base.digest}, "picture": [32, 24], **config}
    config = {**base.config, **added, "upsampler": own.model_dump(mode="json")}
    weights = {f"upsampler.{key}": value for key, value in network.state_dict().items()}
    return read_info(
        publish(storage, name, weights, kind="denoiser", vocabulary=base.vocabulary, config=config, training={})
    )


@functools.cache
def _toys() -> dict[str, bytes]:
    """What `publish_toys` publishes, by file name. Drawing and verifying a ResNet's weights takes long."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed, denoiser in enumerate(("toy", "other")):
            publish_toy_denoiser(folder, denoiser, seed)
        publish_toy_evaluator(folder, "toy-evaluator")
        promote(folder, "toy")
        promote(folder, "toy-evaluator")
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def publish_toys(storage: Location) -> None:
    """Publish the denoisers `toy` (promoted) and `other`, and a promoted evaluator."""
    for name, content in _toys().items():
        write(storage / name, content)
    torch.manual_seed(0)  # the same draws follow, whether the files are new or not
