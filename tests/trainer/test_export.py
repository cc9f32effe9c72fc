"""`trainer export` to ONNX: onnxruntime's outputs against torch's, element by element, and what the metadata says.

float32 sums in another order differ by about 1e-6 of the largest term: hence the tolerances.
"""

import json
import math
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from iclevr.labels import ICLEVR
from shared.checkpoint import publish, read_info, reconfigure
from shared.diffusion.layouts import DRAWS, OUTSIDE, as_rotations, positions_at, with_positions
from shared.diffusion.model import load_denoiser, make_stepper
from shared.diffusion.predictions import to_x0
from shared.diffusion.schedules import alpha_bar
from shared.evaluator import Evaluator
from shared.options import SamplingOptions
from shared.pictures import to_uint8
from tests.paths import ROOT
from tests.toy_checkpoint import (
    publish_toy_adapter,
    publish_toy_denoiser,
    publish_toy_upsampler,
)
from tests.trainer.command_line import Command, refused
from trainer import __main__ as cli
from trainer.export import write_onnx

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
QUIET = {"sampler": "dpmpp_2m", "steps": 3, "guidance": 2.0}  # adds no noise
EXAMPLE = ROOT / "examples/draw_onnx.py"
SYMMETRIC = tuple(ICLEVR.encode(["blue sphere", "red cylinder"]))


def run(file: Path, **inputs: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(file)
    outputs = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    return [torch.from_numpy(output) for output in outputs]


def metadata(file: Path) -> dict[str, str]:
    found: dict[str, str] = onnxruntime.InferenceSession(file).get_modelmeta().custom_metadata_map
    return found


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ONNX files of an adapter, of a denoiser with positions, rotations and an upsampler, and of one of one call.

    Each takes seconds to write, whatever the sizes.
    """
    folder = tmp_path_factory.mktemp("exported")
    publish_toy_denoiser(folder, "toy", 0)
    reconfigure(folder / "toy.safetensors", lambda _: {"prediction": "eps", "sampling": QUIET})
    publish_toy_adapter(folder, "adapter", read_info(folder / "toy.safetensors"))
    placed = publish_toy_denoiser(
        folder, "placed", 3, positions=True, rotations=True, symmetric=SYMMETRIC, sampling=QUIET
    )
    publish_toy_upsampler(folder, "large", placed)
    one_step = SamplingOptions(sampler="ddim", steps=1, guidance=1.0).model_dump(mode="json")
    publish_toy_upsampler(folder, "whole", placed, features=8, windows=True, sampling=one_step)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("adapter", "large", "whole"):
            line = ["trainer", "export", name, str(folder / f"{name}.onnx"), "--storage", str(folder)]
            patch.setattr(sys, "argv", line)
            assert cli.main() == 0
    return folder


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Evaluator]:
    """An evaluator's ONNX file, and the evaluator itself, unfolded. Its statistics are not those of a new network."""
    torch.manual_seed(0)
    config, folder = {"architecture": "resnet10"}, tmp_path_factory.mktemp("evaluator")
    made = Evaluator(ICLEVR, locates=True, **config).eval()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    publish(folder, "judge", made.tensors(), kind="evaluator", vocabulary=ICLEVR.names, config=config, training={})
    write_onnx(folder / "judge.safetensors", folder / "evaluator.onnx")
    return folder / "evaluator.onnx", made


def test_the_evaluator(evaluator: tuple[Path, Evaluator]) -> None:
    file, made = evaluator
    images = torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))  # some outside [-1, 1]
    probabilities, positions = run(file, images=images)
    torch.testing.assert_close(probabilities, made.probabilities(images), **CLOSE)
    torch.testing.assert_close(positions, made.positions(images), **CLOSE)


def denoiser_inputs(batch: int, shape: tuple[int, int, int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    labels = (torch.rand(batch, len(ICLEVR), generator=generator) < 0.2).float()
    return {
        "x_t": torch.randn(batch, *shape, generator=generator),
        "t": torch.arange(0, 1000, 999 // (batch - 1))[:batch],
        "labels": labels,
        "keep": torch.arange(batch) != 1,
        "positions": torch.rand(batch, len(ICLEVR), 2, generator=generator).where(labels[..., None] > 0, OUTSIDE),
        "rotations": as_rotations(torch.rand(batch, len(ICLEVR), generator=generator)),
    }


@torch.inference_mode()
def test_denoisers(exported: Path) -> None:
    """An adapter, a denoiser with positions, rotations and an upsampler, and one whose pictures take one call."""
    adapter, base, large = (load_denoiser(exported / f"{name}.safetensors") for name in ("adapter", "toy", "large"))
    inputs = denoiser_inputs(5, large.image_shape)
    plain = [inputs[name] for name in ("x_t", "t", "labels", "keep")]
    labels = with_positions(inputs["labels"], inputs["positions"], inputs["rotations"])
    [found] = run(exported / "large.onnx", **inputs)
    torch.testing.assert_close(found, large.network(*plain[:2], labels, plain[3]), **CLOSE)
    assert large.upsampler is not None
    [pictures] = run(exported / "large-upsampler.onnx", x=found)
    torch.testing.assert_close(pictures, large.upsampler(found), **CLOSE)
    one_call = load_denoiser(exported / "whole.safetensors").one_call
    assert one_call is not None
    assert not (exported / "whole-upsampler.onnx").exists()
    (found, pictures), own = run(exported / "whole.onnx", **inputs), one_call(*plain[:2], labels, plain[3])
    torch.testing.assert_close(found, own[0], rtol=1e-4, atol=1e-4)  # up to 20
    torch.testing.assert_close(pictures, own[1], rtol=1e-4, atol=5e-3)  # edges move with rounded angles
    del inputs["positions"], inputs["rotations"]
    [found] = run(exported / "adapter.onnx", **inputs)
    torch.testing.assert_close(found, adapter.network(*plain), **CLOSE)
    assert not torch.allclose(found, base.network(*plain), atol=0.1)


@torch.inference_mode()
def test_the_layout_network(exported: Path) -> None:
    """Each step against the network, and what `draw` takes from it against `forward`, which training uses."""
    drawer = load_denoiser(exported / "large.safetensors").layouts
    assert drawer is not None
    layouts, generator = drawer.network, torch.Generator().manual_seed(0)
    n, side, losses = layouts.config.most, layouts.config.cells, []
    objects = torch.randperm(len(ICLEVR), generator=generator)[:n]
    cells = torch.randint(0, side, (n, DRAWS), generator=generator)
    places = (cells[:, [1, 0]] + cells[:, [3, 2]] / side) / side + 1e-4
    for i in range(n):
        inputs = {"objects": objects, "places": places, "drawn": cells[i]}
        inputs |= {"object": torch.tensor([i]), "number": torch.tensor([n])}
        [logits] = run(exported / "large-layouts.onnx", **inputs)
        torch.testing.assert_close(logits, layouts.step(**inputs), **CLOSE)
        losses.append(nn.functional.cross_entropy(logits, cells[i], reduction="sum"))
    torch.testing.assert_close(torch.stack(losses), layouts(objects[None], places[None])[0], **CLOSE)


@pytest.mark.parametrize("name", ["adapter", "large", "whole"])
def test_the_example_draws_the_services_picture(exported: Path, tmp_path: Path, name: str) -> None:
    """Given its noise, layout and rotations, the stepping loop of the service draws the same."""
    program = f"import sys, runpy\nsys.modules['torch'] = None\nrunpy.run_path({str(EXAMPLE)!r}, run_name='__main__')"
    arguments = [exported / f"{name}.onnx", "picture.png", "red cube", "blue sphere", "--seed", "3"]
    line = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rng, chosen = np.random.default_rng(3), ICLEVR.encode(["red cube", "blue sphere"])
    loaded, positions = load_denoiser(exported / f"{name}.safetensors"), None
    if loaded.layouts is not None:
        session = onnxruntime.InferenceSession(exported / f"{name}-layouts.onnx")
        points = runpy.run_path(str(EXAMPLE))["draw_layout"](session, list(chosen), rng)
        assert json.loads(done.stdout) == points.tolist()
        positions = positions_at(chosen, points.tolist(), len(ICLEVR))
    upsampler, one_call = (None, loaded.picture_shape) if loaded.one_call else (loaded.upsampler, None)
    stepper = make_stepper(
        loaded.one_call or loaded.network, loaded.network.config, loaded.path, loaded.layouts,
        upsampler=upsampler, one_call=one_call,
    )  # fmt: skip
    row = stepper.new_row(ICLEVR.multi_hot(["red cube", "blue sphere"]), loaded.options, 0, positions)
    if loaded.network.config.rotations:
        row.labels[:, 3:] = as_rotations(torch.from_numpy(rng.random(len(ICLEVR), np.float32)))
        row.labels[SYMMETRIC, 3:] = 0
    row.x = torch.from_numpy(rng.standard_normal(loaded.image_shape, np.float32))
    while not row.done:
        stepper.step([row])
    expected = to_uint8(stepper.pictures([row]))[0].astype(np.int16)
    drawn = np.asarray(Image.open(tmp_path / "picture.png"), dtype=np.int16)
    assert np.abs(drawn - expected).max() <= 1
    assert drawn.std() > 1


def test_the_metadata_says_what_the_tensors_mean(exported: Path, evaluator: tuple[Path, Evaluator]) -> None:
    names = ("adapter", "large", "large-upsampler", "large-layouts", "whole")
    for file in (*(exported / f"{name}.onnx" for name in names), evaluator[0]):
        session = onnxruntime.InferenceSession(file)
        said = session.get_modelmeta().custom_metadata_map
        assert json.loads(said["label_names"]) == list(ICLEVR.names)
        for tensor in [*session.get_inputs(), *session.get_outputs()]:
            kind, dimensions = re.match(r"(\w+) \(([^)]*)\): .", said[tensor.name]).groups()  # type: ignore[union-attr]
            assert tensor.type == {"float32": "tensor(float)", "int64": "tensor(int64)", "bool": "tensor(bool)"}[kind]
            sizes = {"batch": "free", "labels": len(ICLEVR)}
            wanted = [sizes.get(one) or int(one) for one in dimensions.split(", ")]
            assert ["free" if isinstance(one, str) else one for one in tensor.shape] == wanted
    said = metadata(exported / "adapter.onnx")
    assert (said["checkpoint"], said["kind"], said["prediction_type"]) == ("adapter", "denoiser", "eps")
    assert json.loads(said["alpha_bar"]) == alpha_bar("cosine", 1000).tolist()
    rows = json.loads(said["to_x0"])
    wanted = to_x0(alpha_bar("cosine", 1000), "eps").rows()
    assert rows == [[p, q, None if math.isinf(limit) else limit] for p, q, limit in wanted]
    assert rows[-1][2] == 1  # clamped where eps says nothing
    assert len(json.loads(said["table"])) == json.loads(said["sampling"])["steps"] >= 1
    assert json.loads(said["parts"]) == []
    said = metadata(exported / "large.onnx")
    assert (said["prediction_type"], json.loads(said["parts"])) == ("v", ["upsampler", "layouts"])
    assert json.loads(metadata(exported / "whole.onnx")["parts"]) == ["layouts"]


def test_the_example_that_judges_needs_no_torch(evaluator: tuple[Path, Evaluator], tmp_path: Path) -> None:
    file, made = evaluator
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    program = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    line = [
        sys.executable,
        "-c",
        program,
        str(ROOT / "examples/judge_onnx.py"),
        str(file),
        str(tmp_path / "picture.png"),
    ]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    located = made.positions(images)
    assert located is not None
    rows = zip(ICLEVR.names, made.probabilities(images)[0], located[0], strict=True)
    wanted = [f"{name} at {x:.2f}, {y:.2f}" for name, probability, (x, y) in rows if probability > 0.5]
    assert 0 < len(wanted) < len(ICLEVR)
    assert done.stdout.splitlines() == wanted


def test_what_cannot_be_exported_is_refused(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    publish_toy_denoiser(Path("models"), "toy", 0)
    refused(command("export", "toy", "network.bin"), r"network\.bin must end in \.onnx or \.pth")
    Path("toy-layouts.onnx").mkdir()
    refused(command("export", "toy", "toy.onnx"), r"toy-layouts\.onnx is a folder, not a file to write")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    refused(command("export", "toy", "network.onnx"), r"need the package onnxscript: pip install 'labelgrid\[onnx\]'")


def test_the_example_refuses_a_label_that_the_model_does_not_know(exported: Path, tmp_path: Path) -> None:
    line = [sys.executable, str(EXAMPLE), str(exported / "adapter.onnx"), "picture.png", "red cube", "pink cube"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "does not know pink cube; its labels are gray cube, red cube" in done.stderr
    assert "Traceback" not in done.stderr
