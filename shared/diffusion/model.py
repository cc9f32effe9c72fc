"""Loads a denoiser checkpoint: builds the network, schedule and sampling options that its configuration describes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from shared.checkpoint import SUFFIX, CheckpointError, CheckpointInfo, base_problem, load
from shared.device import autocast_dtype
from shared.diffusion.denoise import Network, OneCallStepper, Stepper, Upsampler
from shared.diffusion.inputs import INPUTS, with_inputs
from shared.diffusion.layout_draws import LayoutDrawer
from shared.diffusion.layouts import LAYOUTS, LayoutConfig, LayoutNetwork, Layouts, with_positions
from shared.diffusion.path import NoisePath
from shared.diffusion.predictions import PredictionName
from shared.diffusion.samplers import make_table
from shared.diffusion.solids import SOLIDS, ObjectPainter, Painter
from shared.diffusion.solids import Windows as Painted
from shared.diffusion.solids import lay as lay_painted
from shared.diffusion.unet import NetworkConfig, UNet, time_features
from shared.diffusion.upsampler import OneCall, UpsamplerConfig, UpsamplerNet, draws_objects
from shared.diffusion.windows import ObjectWindows, OneObject, Windows, lay
from shared.openvino import TORCH_THREADS, CompiledNetwork, uses_openvino
from shared.options import EngineName, SamplingOptions
from shared.storage import Location
from shared.support import picture_size
from shared.vocabulary import Vocabulary

UPSAMPLER = "upsampler."  # begins the names of the upsampler's tensors in a checkpoint


class CompiledDenoiser:
    """A denoising network in OpenVINO, as the stepping loop sees it (`denoise.Network`)."""

    def __init__(self, network: UNet, kept: Path | None = None) -> None:
        self.image_shape, self.num_labels = network.image_shape, network.num_labels
        self._features = partial(time_features, dim=network.config.embedding)
        self._compiled = CompiledNetwork(network, example_row(network), kept and kept / "denoiser")

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor, keep: Tensor) -> Tensor:
        # the features of t in float32: in a graph, OpenVINO would round the angles to bfloat16
        (prediction,) = self._compiled(x, self._features(t), labels, keep)
        return prediction


def example_row(network: UNet | OneCall) -> list[Tensor]:
    """Return typical arguments of a denoising network for one row, with the features of t."""
    config = network.config
    # all labels at once, at places of their own: a sum of few labels might round alike in any order
    labels = torch.ones(1, network.num_labels)
    if config.positions:
        places = torch.rand(1, network.num_labels, 2)
        labels = with_positions(labels, places, places if config.rotations else None)
    given = {name: torch.rand(1, INPUTS[name].numbers) for name in config.inputs}
    labels = with_inputs(labels, given, config.inputs)
    t, keep = time_features(torch.tensor([500]), config.embedding), torch.tensor([True])
    return [torch.randn(1, *network.image_shape), t, labels, keep]


class Part(nn.Module):
    """A method of a network, as a network of its own."""

    def __init__(self, network: nn.Module, method: str) -> None:
        super().__init__()
        self.network, self.method = network, method

    def forward(self, *arguments: Tensor) -> Any:
        return getattr(self.network, self.method)(*arguments)


class CompiledOneCall:
    """A network of one call in OpenVINO, as the stepping loop sees it (`denoise.Network`).

    As three: the one that makes the small picture computes and returns float32 on every CPU, because bfloat16 gives
    small pictures away (docs/dev/decisions.md). Rows are alone in their calls: that takes the least memory, and no more
    time.
    """

    def __init__(self, network: OneCall, kept: Path | None = None) -> None:
        self.image_shape, self.num_labels = network.image_shape, network.num_labels
        self._features = partial(time_features, dim=network.config.embedding)
        painter, windows = network.upsampler.painter, network.upsampler.windows
        self._drawer: CompiledPainter | CompiledWindows | None = None
        if windows is not None:
            self._drawer = CompiledWindows(windows, kept and kept / "windows")
        elif painter is not None:
            self._drawer = CompiledPainter(painter, kept and kept / "painter")
        x, *given = example_row(network)
        with torch.inference_mode():
            h = network.denoiser.trunk(x, *given)
            _, *small = network.predict(x, *h)
        drawn = self._drawer(given[1]) if self._drawer else []

        def part(module: nn.Module, method: str, example: list[Tensor], exact: bool = False) -> CompiledNetwork:
            return CompiledNetwork(Part(module, method), example, kept and kept / method, most=1, exact=exact)

        self._trunk = part(network.denoiser, "trunk", [x, *given])
        self._predict = part(network, "predict", [x, *h], exact=True)
        self._enlarge = part(network, "enlarge", [*small, *drawn])

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        prediction, *small = self._predict(x, *self._trunk(x, self._features(t), labels, keep))
        (pictures,) = self._enlarge(*small, *(self._drawer(labels) if self._drawer else []))
        return prediction, pictures


class CompiledWindows:
    """The windows of objects in OpenVINO, with a row for each object. In float32: bfloat16 would move the edges."""

    def __init__(self, windows: ObjectWindows, kept: Path | None = None) -> None:
        self._windows = windows
        example = [torch.rand(1, 5), torch.tensor([0])]
        self._compiled = CompiledNetwork(OneObject(windows), example, kept, most=1, exact=True)

    def __call__(self, labels: Tensor) -> list[Tensor]:
        windows, (known, which) = self._windows, self._windows.nearest_first(labels)
        sides = [side // windows.block + 2 * windows.margin for side in windows.size]
        pictures, there = torch.zeros(len(labels), windows.channels * windows.block**2, *sides), known[..., 0] > 0
        if there.any():
            drawn = [Windows(*one) for one in zip(*self._compiled(known[there], which[there]), strict=True)]
            for i, window in zip(reversed(there.nonzero()[:, 0].tolist()), reversed(drawn), strict=True):
                lay(window, pictures[i], windows.margin)
        return [pictures]


class CompiledPainter:
    """A painter in OpenVINO, with a row for each object. Only cubes show, so pictures without them need none.

    In float32, also where the CPU multiplies bfloat16: that would round the places of edges.
    """

    def __init__(self, painter: Painter, kept: Path | None = None) -> None:
        self._painter = painter
        self._cubes = torch.tensor([solid == SOLIDS.index("cube") for solid in painter.solids])
        example = [torch.rand(1, 5), torch.tensor([0])]
        self._compiled = CompiledNetwork(ObjectPainter(painter), example, kept, most=1, exact=True)

    def __call__(self, labels: Tensor) -> list[Tensor]:
        painter, (known, which) = self._painter, self._painter.nearest_first(labels)
        height, width = (side // painter.block + 2 * painter.margin for side in painter.size)
        pixels = torch.zeros(len(labels), painter.channels * painter.block**2, height, width)
        shares = torch.zeros(len(labels), 1, height, width)
        shown = (labels[:, self._cubes, 0] > 0).any(1)[:, None] & (known[..., 0] > 0)
        if shown.any():
            rows = [Painted(*one) for one in zip(*self._compiled(known[shown], which[shown]), strict=True)]
            for i, window in zip(reversed(shown.nonzero()[:, 0].tolist()), reversed(rows), strict=True):
                lay_painted(window, pixels[i], shares[i], painter.margin)
        return [pixels, shares]


class CompiledUpsampler:
    """An upsampler in OpenVINO, as the stepping loop sees it (`denoise.Upsampler`), with a call for each picture."""

    def __init__(self, network: UpsamplerNet, shape: tuple[int, int, int], kept: Path | None = None) -> None:
        self.picture_shape = network.picture_shape
        self._compiled = CompiledNetwork(network, [torch.randn(1, *shape)], kept, most=1)

    def __call__(self, x: Tensor) -> Tensor:
        (pictures,) = self._compiled(x)
        return pictures


@dataclass
class Denoiser:
    """A denoiser, ready to sample."""

    info: CheckpointInfo
    vocabulary: Vocabulary
    network: UNet  # in eval mode
    path: NoisePath  # from pictures to noise, with what the network predicts
    layouts: LayoutDrawer | None  # of a network that takes positions
    options: SamplingOptions  # the default ones for this checkpoint
    upsampler: UpsamplerNet | None = None  # in eval mode; enlarges the network's pictures
    aspect: float = 1.0  # width over height of its training pictures before padding; 1 if they were squeezed

    @property
    def alpha_bar(self) -> Tensor:
        """(T,) float64."""
        return self.path.alpha_bar

    @property
    def prediction(self) -> PredictionName:
        """What the network predicts."""
        return self.path.prediction

    @property
    def fit(self) -> Literal["squeeze", "pad"]:
        """How its training pictures were made square."""
        return "squeeze" if self.aspect == 1 else "pad"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of the pictures that the network samples."""
        return self.network.image_shape

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of a finished picture: that of the upsampler's output, where there is one."""
        return self.image_shape if self.upsampler is None else self.upsampler.picture_shape

    @property
    def one_call(self) -> OneCall | None:
        """The whole network, if its upsampler sees the denoiser's features: it samples in one step."""
        if self.upsampler is None or not self.upsampler.config.features:
            return None
        return OneCall(self.network, self.upsampler, *self.first_step[1:]).eval()

    @property
    def first_step(self) -> tuple[int, float, float]:
        """The timestep t of the default sampling's first step, and there p and q of x0_hat = p x + q prediction."""
        table, at = self.path.to_x0, make_table(self.options, self.alpha_bar).rows[0][0]
        return at, float(table.p[at]), float(table.q[at])

    def stepper(self, *, max_rows: int = 64, engine: EngineName = "auto", kept: Path | None = None) -> Stepper:
        """Return a stepping loop on the network's device, in the device's fastest precision.

        `kept`: a folder of this checkpoint's own that keeps compiled networks. Raises EngineError if the engine is not
        there.
        """
        device = next(self.network.parameters()).device
        dtype = autocast_dtype(device)
        threads: int | None = None
        one_call, upsampling = self.one_call, None if self.one_call else self.upsampler
        network: Network = one_call or self.network
        upsampler: Upsampler | None = upsampling
        if uses_openvino(engine, device):
            dtype, threads = None, TORCH_THREADS
            with ThreadPoolExecutor(1) as beside:  # compiling takes one core each
                compile = partial(CompiledOneCall, one_call) if one_call else partial(CompiledDenoiser, self.network)
                denoising: Future[Network] = beside.submit(compile, kept)
                if upsampling is not None:
                    upsampler = CompiledUpsampler(upsampling, self.image_shape, kept and kept / "upsampler")
            network = denoising.result()
        return make_stepper(
            network, self.network.config, self.path, self.layouts, device=device, dtype=dtype, max_rows=max_rows,
            upsampler=upsampler, one_call=one_call.picture_shape if one_call else None, threads=threads,
        )  # fmt: skip


def make_stepper(
    network: Network, config: NetworkConfig, path: NoisePath, layouts: Layouts | None, *,
    one_call: tuple[int, int, int] | None = None, **options: Any,
) -> Stepper:  # fmt: skip
    """Return the stepping loop of a network of this configuration: what it has to be given follows from that.

    The one place that builds a loop, for finished checkpoints and for networks that are still trained. `one_call`: the
    shape (C, H', W') of the pictures that a network of one call returns. `options`: those of `Stepper`.
    """
    options |= {"layouts": layouts, "inputs": config.inputs}
    options |= {"rotations": config.rotations, "symmetric": config.symmetric}
    if one_call is not None:
        return OneCallStepper(network, path, picture_shape=one_call, **options)
    return Stepper(network, path, **options)


def load_denoiser(path: Location, *, device: str | torch.device = "cpu") -> Denoiser:
    """Load a denoiser, or an adapter together with its base from the same storage.

    Raises CheckpointError, with the file's name and the reason, for a damaged file and for other kinds.
    """
    info, state = load(path)
    if info.kind != "denoiser":
        raise CheckpointError(path.name, f"holds an {info.kind}, not a denoiser")
    base = _base_weights(path, info) if info.config.get("base") else None
    try:
        if base is not None:
            state = adapt(base, state)
        config = NetworkConfig.model_validate(info.config["network"])
        prediction = TypeAdapter(PredictionName).validate_python(info.config["prediction"])
        noise_path = NoisePath.of(info.config["schedule"], info.config["timesteps"], prediction)
        options, aspect = info.sampling, float(info.config.get("aspect", 1.0))
        if config.num_labels != len(info.vocabulary):
            raise ValueError(f"{config.num_labels} labels in the network, {len(info.vocabulary)} in the vocabulary")
        if not 0 < aspect < math.inf:
            raise ValueError(f"aspect {aspect} is not a ratio of two sides")
        layouts = _load_layouts(info, state) if config.positions else None
        upsampler = _load_upsampler(info, state)
        if upsampler is not None and upsampler.config.features and (options.steps, options.guidance) != (1, 1.0):
            raise ValueError("its upsampler sees the denoiser's features, so it must sample in one step, w = 1")
        if upsampler is not None:
            _check_drawing(upsampler.config, config)
        with torch.device("meta"):  # no initial weights: the checkpoint's take their place, and drawing them is slow
            network = UNet(config)
        network.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]  # torch lists every tensor on a line
        raise CheckpointError(path.name, f"configuration and weights do not fit: {reason}") from error
    network.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    if upsampler is not None:
        upsampler.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    vocabulary = info.labels
    return Denoiser(info, vocabulary, network, noise_path, layouts, options, upsampler, aspect)


def _load_upsampler(info: CheckpointInfo, state: dict[str, Tensor]) -> UpsamplerNet | None:
    """Take the upsampler's tensors out of `state` and return the upsampler, if the configuration has one.

    ValueError or RuntimeError if the two do not fit.
    """
    if (given := info.config.get("upsampler")) is None:
        return None
    weights = {name: state.pop(name) for name in list(state) if name.startswith(UPSAMPLER)}
    config = UpsamplerConfig.model_validate(given)
    if config.picture != picture_size(info.config):
        raise ValueError(f"picture is {picture_size(info.config)}, the upsampler's is {config.picture}")
    with torch.device("meta"):
        upsampler = UpsamplerNet(config)
    tensors = {name.removeprefix(UPSAMPLER): value.float() for name, value in weights.items()}
    upsampler.load_state_dict(tensors, assign=True)
    return upsampler


def _check_drawing(upsampler: UpsamplerConfig, network: NetworkConfig) -> None:
    """Raise ValueError if the upsampler draws objects by what its denoiser does not take."""
    labels = upsampler.windows.labels if upsampler.windows else len(upsampler.solids)
    if labels and not (upsampler.features and draws_objects(network) and labels == network.num_labels):
        raise ValueError(
            "its upsampler draws objects by labels, places and rotations, which its denoiser does not take"
        )


def _load_layouts(info: CheckpointInfo, state: dict[str, Tensor]) -> LayoutDrawer:
    """Return the checkpoint's layout network, and take its tensors out of `state`."""
    if "layouts" not in info.config:
        raise ValueError(
            "it remembers layouts, as before version 0.2; `trainer train denoiser --start-from` it learns them anew"
        )
    network = LayoutNetwork(LayoutConfig.model_validate(info.config["layouts"]))
    names = [name for name in state if name.startswith(LAYOUTS)]
    tensors = {name.removeprefix(LAYOUTS): state.pop(name).float() for name in names}
    if tensors.keys() != network.state_dict().keys():
        raise ValueError("its layout network is of another version; `trainer train layouts` learns one anew")
    network.load_state_dict(tensors)
    return LayoutDrawer(network.eval())


def _base_weights(path: Location, adapter: CheckpointInfo) -> dict[str, Tensor]:
    """Return the weights that the adapter checkpoint at `path` changes, from the same storage."""
    name = adapter.config["base"]["name"]
    try:
        base, weights = load(path.with_name(name + SUFFIX))
    except CheckpointError as error:
        raise CheckpointError(path.name, f"changes {name}, which cannot be loaded: {error.reason}") from error
    if problem := base_problem(adapter, base):
        raise CheckpointError(path.name, problem)
    return weights


def adapt(weights: Mapping[str, Tensor], changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add an adapter's changes to weights: NAME.up @ NAME.down to a matrix (LoRA, Hu et al. 2022, eq. 3), else NAME.

    An adapter's upsampler is not added to the base's weights; it stands beside them. KeyError or RuntimeError for
    changes that do not fit, ValueError for changes to what the base does not have.
    """
    upsampler = {name: value for name, value in changes.items() if name.startswith(UPSAMPLER)}
    named = {name.removesuffix(".up").removesuffix(".down") for name in changes.keys() - upsampler.keys()}
    if unknown := sorted(named - weights.keys()):
        raise ValueError(f"it changes {unknown[0]}, which its base does not have")
    changed = {}
    for name, weight in weights.items():
        if f"{name}.up" in changes:
            weight = weight.float() + changes[f"{name}.up"].float() @ changes[f"{name}.down"].float()
        elif name in changes:
            weight = weight.float() + changes[name].float()
        changed[name] = weight
    return changed | upsampler
