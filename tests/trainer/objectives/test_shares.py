"""Several processes, or parts of a batch, learn what one process learns of the whole batch."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shared.diffusion.model import load_denoiser
from tests.paths import ROOT
from tests.toy_checkpoint import publish_toys, randomize
from tests.trainer.objectives import test_one_step, test_upsampler
from trainer.objectives.upsampler import make_upsampler
from trainer.processes import Processes
from trainer.train import Objective

# Runs PROGRAM in two processes, without OpenVINO, which takes long to compile.
LINE = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "script.py"]
HEAD = """
import sys
from pathlib import Path
import torch
import shared.device
import shared.diffusion.model
import shared.openvino
import trainer.train
for module in (shared.device, shared.openvino, shared.diffusion.model, trainer.train):
    module.autocast_dtype = lambda _: None
shared.diffusion.model.uses_openvino = lambda *_: False
"""
TRAIN = f"""{HEAD}
from trainer.__main__ import main
sys.exit(main())
"""
GRADIENTS = f"""{HEAD}
from tests.trainer.objectives.test_shares import gradients
from trainer.processes import processes
with processes(torch.device("cpu")) as group:
    found = dict(gradients(Path("."), group))
    if group.rank == 0:
        torch.save(found, "gradients.pt")
"""


def in_two_processes(folder: Path, program: str, *arguments: str) -> None:
    (folder / "script.py").write_text(program)
    done = subprocess.run(
        [*LINE, *arguments], cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def gradients(folder: Path, group: Processes) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield what each adversarial objective's networks learn from one batch of four pictures, by all processes."""
    base = load_denoiser(folder / "models" / "toy.safetensors")
    upsampling = test_upsampler.objective(folder, base, "denoised=0")
    objectives: dict[str, tuple[Objective, nn.Module]] = {
        "upsampler": (upsampling, make_upsampler(base, upsampling.pictures.size, upsampling.config))
    }
    placed = load_denoiser(folder / "step.safetensors")
    for adversarial in (0, 1):
        objectives[f"one-step, {adversarial}"] = test_one_step.made(folder, placed, "adversarial=0")
    for name, (objective, network) in objectives.items():
        randomize(network, 0, 0.1)
        wrapper = DistributedDataParallel(network) if group.size > 1 else network
        (share,) = group.parts(4, 1)
        inputs = objective.draw(torch.arange(4), share, torch.Generator().manual_seed(0))
        objective(wrapper, *inputs).backward()
        yield name, {key: one.grad for key, one in network.named_parameters() if one.grad is not None}


def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    test_one_step.write_folder(tmp_path / "data")
    test_one_step.publish_base(tmp_path)
    publish_toys(tmp_path / "models")
    in_two_processes(tmp_path, GRADIENTS)
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    for name, wanted in gradients(tmp_path, Processes()):
        assert found[name].keys() == wanted.keys()
        for key, gradient in wanted.items():
            torch.testing.assert_close(found[name][key], gradient, rtol=1e-3, atol=1e-6, msg=f"{name}: {key}")


def test_two_processes_train_a_model_of_one_call(tmp_path: Path) -> None:
    """Without discriminators, as in the stage before them: none may wait for gradients that never come."""
    test_one_step.write_folder(tmp_path / "data")
    test_one_step.publish_base(tmp_path)
    in_two_processes(
        tmp_path, TRAIN, "train", "one-step", "--device", "cpu", "--data", "data", "--run-folder", "run",
        "--storage", ".", "--base", "step", "--name", "whole", "--steps", "3", *test_one_step.SET,
        "--set", "batch=4", "--set", "adversarial=0",
    )  # fmt: skip
    assert load_denoiser(tmp_path / "whole.safetensors").info.training["steps"] == 3
