"""Trainer and service know no data set: without `iclevr/` they import, train on, score and draw pictures of their own.

Everything runs in one process in which the package cannot be imported.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from tests.paths import ROOT
from tests.trainer.command_line import TINY

SKINS = {"light skin": (247, 222, 206), "medium skin": (212, 171, 136), "dark skin": (124, 83, 62)}
FACES = ("smiling", "frowning", "astonished")
PROGRAM = """
import importlib, json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "iclevr":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
sys.path.insert(0, sys.argv[1])
calls = json.loads(sys.argv[2])

from pathlib import Path
from shared import evaluator
from shared.diffusion import model
from trainer import __main__ as trainer

for module in evaluator, model:  # nothing is compiled for a few pictures
    module.uses_openvino = lambda engine, device: False
codes = []
for call in calls:
    sys.argv[1:] = call
    codes.append(trainer.main())

for module in "labelgrid.__main__", "service.__main__", "service.api.server", "service.openai.routes":
    importlib.import_module(module)
import service.worker.process
from service.contract.options import PictureOptions
from service.contract.records import Picture
from service.worker.engine import BatchSizes, Engine

denoiser = model.load_denoiser(Path("models/faces.safetensors"))
judge = evaluator.load_evaluator(Path("models/judge.safetensors"))
engine = Engine(denoiser.stepper(), denoiser.vocabulary, judge, BatchSizes(4, 8))
options = PictureOptions(**(denoiser.options.model_dump() | {"steps": 2}))
lists = [("light skin", "smiling"), ("dark skin",)]
engine.admit([Picture(job="j", index=i, labels=one, seed=i, options=options) for i, one in enumerate(lists)])
drawn = []
while len(drawn) < len(lists):
    drawn += engine.step()
found = {
    "codes": codes,
    "labels": [one.picture.labels for one in sorted(drawn, key=lambda one: one.picture.index)],
    "pngs": [one.png[:4].hex() for one in drawn],
    "loaded": [name for name in sys.modules if name.partition(".")[0] == "iclevr"],
}
Path("found.json").write_text(json.dumps(found))
"""


def draw_faces(folder: Path, count: int) -> None:
    """Write an image folder of `count` faces of 32x32, each with a colour of skin and an expression."""
    folder.mkdir()
    dice, lines = random.Random(0), ["file_name,labels"]
    for i in range(count):
        skin, face = list(SKINS)[i % 3], FACES[i // 3 % 3]
        picture = Image.new("RGB", (32, 32), "white")
        pen, x = ImageDraw.Draw(picture), dice.randint(-1, 1)
        pen.ellipse((3 + x, 3, 28 + x, 28), fill=SKINS[skin])
        pen.ellipse((9 + x, 10, 12 + x, 14), fill="black")
        pen.ellipse((19 + x, 10, 22 + x, 14), fill="black")
        mouth = (10 + x, 15, 21 + x, 24)
        if face == "astonished":
            pen.ellipse((13 + x, 18, 18 + x, 25), fill="black")
        else:
            pen.arc(mouth, *((20, 160) if face == "smiling" else (200, 340)), fill="black", width=2)
        picture.save(folder / f"{i}.png")
        lines.append(f"{i}.png,{skin};{face}")
    (folder / "metadata.csv").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the program has found, and the lines of its errors."""
    folder = tmp_path_factory.mktemp("faces")
    draw_faces(folder / "faces", 24)
    data, trained = ["--data", "mine/train"], ["--steps", "2", "--set", "batch=8"]
    judge = ["--held-out", "mine/held-out", "--name", "judge", "--architecture", "resnet10"]
    calls = [
        ["import", "faces", "mine", "--held-out", "0.25"],
        ["train", "evaluator", *data, *judge, *trained],
        ["train", "denoiser", *data, "--name", "faces", *trained, *TINY],
        ["promote", "judge"],
        ["score", "mine/train/test.json", "--model", "faces", "--repeats", "1", "--steps", "2", "--json", "score.json"],
        ["evaluate", "faces", *data, "--only", "spectrum", "--count", "8", "--out", "studies"],
        # what only i-CLEVR has is not there, and is refused as anything unknown
        ["render", "out"],
        ["score", "mine/train/test.json", "--renders"],
        ["evaluate", "faces", "--only", "places"],
        ["train", "denoiser", *data, "--preset", "report"],
        ["export", "judge", "checkpoint.pth"],
    ]
    environment = {**os.environ, "LABELGRID_STORAGE": "models", "COLUMNS": "200"}
    line = [sys.executable, "-c", PROGRAM, str(ROOT), json.dumps(calls)]
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    errors = [one for one in done.stderr.splitlines() if one.startswith("error: ")]
    score = json.loads((folder / "score.json").read_text())
    return {**json.loads((folder / "found.json").read_text()), "errors": errors, "score": score}


def test_own_pictures_are_imported_learnt_scored_and_studied(found: dict[str, Any]) -> None:
    assert found["codes"][:6] == [0] * 6, found["errors"]
    assert set(found["score"]["runs"][0]["per_label_recall"]) <= {*SKINS, *FACES}
    assert found["loaded"] == []


def test_the_services_engine_draws_them(found: dict[str, Any]) -> None:
    assert found["labels"] == [["light skin", "smiling"], ["dark skin"]]
    assert found["pngs"] == [b"\x89PNG".hex()] * 2


def test_what_only_the_package_has_is_refused(found: dict[str, Any]) -> None:
    assert found["codes"][6:] == [2, 1, 1, 2, 1]
    wanted = ["No such command 'render'", "--renders: nothing here renders", 'no study "places"; there are coverage']
    wanted += ["'report' is not one of 'default'.", "checkpoint.pth must end in .onnx"]
    assert len(found["errors"]) == len(wanted)
    assert [part for part, line in zip(wanted, found["errors"], strict=True) if part not in line] == []
