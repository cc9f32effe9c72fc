"""Writes a checkpoint as ONNX, in float32, for programs without torch. The file's metadata says what each tensor means.

Knows no command line. docs/models.md has an example.
"""

from __future__ import annotations

import importlib.util
import json
import math
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from shared import storage as files
from shared.checkpoint import CheckpointInfo, read_info
from shared.diffusion.layouts import DRAWS, OUTSIDE, LayoutNetwork, with_positions
from shared.diffusion.model import Denoiser, load_denoiser
from shared.diffusion.predictions import IN_WORDS
from shared.diffusion.samplers import make_table
from shared.diffusion.upsampler import UpsamplerNet
from shared.evaluator import IMAGE_SIZE, Evaluator, load_evaluator
from shared.options import THRESHOLD
from shared.storage import Location
from trainer.errors import TrainerError

ROTATIONS = (
    "float32 (batch, labels, 2): cosine and sine of each object's rotation, where a full circle is the smallest turn "
    "after which it looks the same; draw the angles uniformly, as the service does; zeros where one is unknown, as for "
    "the labels of `symmetric`"
)
POSITIONS = "float32 (batch, labels, 2): x and y of each object's centre, from 0, left or top, to 1, right or bottom"


class EvaluatorGraph(nn.Module):
    """Pictures -> probabilities and, with a position head, positions: as the evaluator's methods of these names."""

    def __init__(self, evaluator: Evaluator) -> None:
        super().__init__()
        self.evaluator = evaluator

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        logits, located = self.evaluator(images.clamp(-1, 1))
        return (logits.sigmoid(),) if located is None else (logits.sigmoid(), located[0])


class DenoiserGraph(nn.Module):
    """The denoising network with labels, positions and rotations as inputs of their own, as far as it takes them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, x_t: Tensor, t: Tensor, labels: Tensor, keep: Tensor,
        positions: Tensor | None = None, rotations: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        given = labels if positions is None else with_positions(labels, positions, rotations)
        out: Tensor | tuple[Tensor, Tensor] = self.network(x_t, t, given, keep)
        return out


class LayoutGraph(nn.Module):
    """One step of `LayoutNetwork.draw`: the logits of all four draws of one object's position."""

    def __init__(self, network: LayoutNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, objects: Tensor, places: Tensor, drawn: Tensor, object: Tensor, number: Tensor) -> Tensor:
        return self.network.step(objects, places, drawn, object, number)


def write_onnx(path: Location, out: Path) -> list[Path]:
    """Write the checkpoint at `path` to `out` and return the files written.

    An adapter is written together with its base, as one network, and so is an upsampler that sees the denoiser's
    features. Another upsampler and a layout network get files of their own, OUT-upsampler.onnx and OUT-layouts.onnx;
    the denoiser's metadata says which it has. Raises TrainerError if the package for that is not installed,
    CheckpointError if the checkpoint cannot be read.
    """
    if importlib.util.find_spec("onnxscript") is None:
        raise TrainerError("ONNX files need the package onnxscript: pip install 'labelgrid[onnx]'")
    if read_info(path).kind == "evaluator":
        _write_evaluator(load_evaluator(path), out)
        return [out]
    denoiser, (upsampler, layouts), written = load_denoiser(path), parts_of(out), [out]
    _write_denoiser(denoiser, out)
    if denoiser.upsampler is not None and not denoiser.one_call:
        written.append(upsampler)
        _write_upsampler(denoiser, denoiser.upsampler, upsampler)
    if denoiser.layouts is not None:
        written.append(layouts)
        _write_layouts(denoiser, denoiser.layouts.network, layouts)
    return written


def parts_of(out: Path) -> tuple[Path, Path]:
    """Return the files of upsampler and layout network, which lie beside a denoiser's."""
    return out.with_stem(f"{out.stem}-upsampler"), out.with_stem(f"{out.stem}-layouts")


def _write_evaluator(evaluator: Evaluator, out: Path) -> None:
    assert evaluator.info is not None
    inputs = {"images": torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE)}
    meanings = {
        "images": f"float32 (batch, 3, {IMAGE_SIZE}, {IMAGE_SIZE}): RGB from -1 to 1, squeezed to this size, unpadded",
        "probabilities": f"float32 (batch, labels): of each label; above {THRESHOLD} it counts as found",
    }
    if evaluator.locator is not None:
        meanings["positions"] = f"{POSITIONS}; without meaning for labels that are not found"
    _write(EvaluatorGraph(evaluator), inputs, meanings, describe(evaluator.info), out)


def _write_denoiser(denoiser: Denoiser, out: Path) -> None:
    """Write the network and what sampling needs: alpha_bar, the prediction, the default options and their table."""
    if inputs_of := denoiser.network.config.inputs:
        raise TrainerError(f"{denoiser.info.name} takes {inputs_of[0]}; networks with inputs are not exported")
    K, T, shape = len(denoiser.vocabulary), len(denoiser.alpha_bar), denoiser.image_shape
    picture = f"float32 (batch, {', '.join(map(str, shape))})"
    inputs = {
        "x_t": torch.zeros(2, *shape),
        "t": torch.zeros(2, dtype=torch.int64),
        "labels": torch.zeros(2, K),
        "keep": torch.ones(2, dtype=torch.bool),
    }
    meanings = {
        "x_t": f"{picture}: sqrt(alpha_bar[t]) x_0 + sqrt(1 - alpha_bar[t]) noise; x_0 is a picture, RGB from -1 to 1",
        "t": f"int64 (batch): timesteps from 0, least noise, to {T - 1}, most",
        "labels": "float32 (batch, labels): 1 for each label to be shown, else 0",
        "keep": "bool (batch): false drops the labels, for guidance: null + w (kept - null)",
        "prediction": f"{picture}: {denoiser.prediction}; {IN_WORDS[denoiser.prediction]}",
    }
    if denoiser.network.config.positions:
        inputs["positions"] = torch.zeros(2, K, 2)
        meanings["positions"] = f"{POSITIONS}; {OUTSIDE:g} for labels that are not shown"
    if denoiser.network.config.rotations:
        inputs["rotations"], meanings["rotations"] = torch.zeros(2, K, 2), ROTATIONS
    to_x0 = denoiser.path.to_x0.rows()
    if denoiser.one_call:
        large = ", ".join(map(str, denoiser.picture_shape))
        meanings["pictures"] = f"float32 (batch, {large}): finished, of x_0, RGB from about -1 to 1"
    has = {"upsampler": denoiser.upsampler and not denoiser.one_call, "layouts": denoiser.layouts}
    more = {
        "prediction_type": denoiser.prediction,
        "to_x0": json.dumps([[p, q, limit if math.isfinite(limit) else None] for p, q, limit in to_x0]),
        "alpha_bar": json.dumps(denoiser.alpha_bar.tolist()),
        "sampling": denoiser.options.model_dump_json(),
        "table": json.dumps(make_table(denoiser.options, denoiser.alpha_bar).rows),
        "symmetric": json.dumps(denoiser.network.config.symmetric),
        "parts": json.dumps([name for name, part in has.items() if part]),
    }
    _write(DenoiserGraph(denoiser.one_call or denoiser.network), inputs, meanings, describe(denoiser.info) | more, out)


def _write_upsampler(denoiser: Denoiser, upsampler: UpsamplerNet, out: Path) -> None:
    small, large = denoiser.image_shape, denoiser.picture_shape
    meanings = {
        "x": f"float32 (batch, {', '.join(map(str, small))}): sampled pictures, RGB from -1 to 1",
        "pictures": f"float32 (batch, {', '.join(map(str, large))}): enlarged, RGB from about -1 to 1",
    }
    _write(upsampler, {"x": torch.zeros(2, *small)}, meanings, describe(denoiser.info), out)


def _write_layouts(denoiser: Denoiser, layouts: LayoutNetwork, out: Path) -> None:
    most, cells = layouts.config.most, layouts.config.cells
    inputs = {
        "objects": torch.zeros(most, dtype=torch.int64),
        "places": torch.zeros(most, 2),
        "drawn": torch.zeros(DRAWS, dtype=torch.int64),
        "object": torch.zeros(1, dtype=torch.int64),
        "number": torch.ones(1, dtype=torch.int64),
    }
    meanings = {
        "objects": f"int64 ({most}): the indices of the labels to be shown in random order, then zeros",
        "places": f"float32 ({most}, 2): x and y of the objects' centres as far as they are drawn, then zeros",
        "drawn": f"int64 ({DRAWS}): one object's cells as far as they are drawn: row, column, finer row, finer column",
        "object": "int64 (1): which of the objects that is, from 0",
        "number": "int64 (1): how many objects there are",
        "logits": f"float32 ({DRAWS}, {cells}): of each draw, given those before it",
    }
    _write(LayoutGraph(layouts), inputs, meanings, describe(denoiser.info), out, has_batch=False)


def describe(info: CheckpointInfo) -> dict[str, str]:
    """Return the metadata of every file: which checkpoint it is, and its labels in the order of the tensors."""
    return {
        "checkpoint": info.name,
        "kind": info.kind,
        "digest": info.digest,
        "label_names": json.dumps(info.vocabulary),
    }


def _write(
    graph: nn.Module,
    inputs: dict[str, Tensor],
    meanings: dict[str, str],
    metadata: dict[str, str],
    out: Path,
    *,
    has_batch: bool = True,
) -> None:
    """Export `graph`, with a free batch size if it has one. `meanings`: of inputs, then outputs, by name, in order."""
    batch = {0: torch.export.Dim("batch")} if has_batch else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns about itself
        # This computes the constants that depend on sizes. Otherwise torch interprets bytecode to export the graph,
        # which takes a quarter longer.
        with torch.no_grad():
            graph.eval()(**inputs)
        program = torch.onnx.export(
            graph, kwargs=inputs, input_names=list(inputs), dynamo=True, verbose=False,
            output_names=[name for name in meanings if name not in inputs],
            dynamic_shapes=dict.fromkeys(inputs, batch),
        )  # fmt: skip
        assert program is not None
        program.model.metadata_props.update(metadata | meanings)
        files.write(out, program.model_proto.SerializeToString())
