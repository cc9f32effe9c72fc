"""Several processes, or parts of a batch, learn what one process learns of the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

from shared.diffusion.model import load_denoiser
from tests.paths import ROOT
from tests.trainer.objectives import test_one_step

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


def in_two_processes(folder: Path, program: str, *arguments: str) -> None:
    (folder / "script.py").write_text(program)
    done = subprocess.run(
        [*LINE, *arguments], cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


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
