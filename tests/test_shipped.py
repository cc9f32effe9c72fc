"""The weights in models/ load, match their cards, and draw what is asked."""

import re
import subprocess
import sys

import pytest

from iclevr.labels import ICLEVR
from shared.diffusion.model import Denoiser, load_denoiser
from shared.evaluator import Evaluator, load_evaluator
from shared.registry import promoted, resolve, scan
from tests.paths import ROOT
from trainer.score import score_run

MODELS = ROOT / "models"
LISTS = [["red cube"], ["gray cylinder"], ["blue sphere"], ["yellow cylinder"], ["cyan cube", "purple sphere"]]


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    return load_denoiser(resolve(MODELS, None, "denoiser"))


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    return load_evaluator(resolve(MODELS, None, "evaluator"))


def test_every_file_is_intact_and_small_enough_to_ship() -> None:
    found = scan(MODELS)
    assert not found.problems
    assert found.usable().found == found.found
    assert {info.name for info in found.infos} >= {promoted(MODELS), promoted(MODELS, "evaluator")}
    assert sum(path.stat().st_size for path in MODELS.glob("*.safetensors")) < 96_000_000


def test_squeezed_pictures_are_shown_in_the_proportions_of_the_data() -> None:
    found = [info for info in scan(MODELS).of_kind("denoiser") if info.vocabulary == ICLEVR.names]
    assert {info.name for info in found} >= {"iclevr-320x240", "iclevr-64", "iclevr-64-1step", "iclevr-64-labels"}
    assert {tuple(info.config["proportions"]) for info in found} == {(4, 3)}


def test_they_load_without_torchs_compiler() -> None:
    """Which takes a second to import. Random numbers on the meta device would do so."""
    program = """
import sys
from pathlib import Path
from shared.diffusion.model import load_denoiser
from shared.evaluator import load_evaluator
from shared.registry import resolve
load_denoiser(resolve(Path("models"), None, "denoiser")).stepper()
load_evaluator(resolve(Path("models"), None, "evaluator"))
print(sorted({"sympy", "torch._dynamo"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_card_is_of_this_checkpoint(denoiser: Denoiser, evaluator: Evaluator) -> None:
    for info in (denoiser.info, evaluator.info):
        assert info is not None
        assert info.digest[:16] in (MODELS / f"{info.name}.md").read_text()


def test_the_clients_page_asks_for_no_more_stages_than_the_model_has() -> None:
    asked = r"labelgrid generate .*--model (\S+) --trajectory (\d+)"
    ((model, stages),) = re.findall(asked, (ROOT / "docs/client.md").read_text())
    assert int(stages) <= load_denoiser(resolve(MODELS, model, "denoiser")).options.steps + 1


def test_the_default_model_draws_a_picture_in_one_call(denoiser: Denoiser) -> None:
    assert denoiser.info.is_one_call
    assert denoiser.picture_shape == (3, 240, 320)


def test_single_objects_are_drawn_as_asked(denoiser: Denoiser, evaluator: Evaluator) -> None:
    run = score_run(denoiser.stepper(), evaluator, LISTS, denoiser.options, seed=0)
    assert run.score.accuracy >= 5 / 6  # six labels in all; a broken sampler or schedule draws almost none of them
