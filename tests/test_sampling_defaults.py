"""A checkpoint's default sampling options: set by the trainer, used by trainer and service unless overridden."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from service.settings import Settings
from shared import evaluator
from shared.checkpoint import read_info, verify
from shared.diffusion import model
from shared.diffusion.model import load_denoiser
from shared.options import SamplingOptions
from tests.conftest import serving
from tests.service.api.answers import scoring
from tests.toy_checkpoint import publish_toy_denoiser
from trainer import __main__ as cli
from trainer.config import TrainConfig

LISTS = [["red cube", "blue sphere"], ["gray cylinder"]]


@pytest.fixture(autouse=True)
def _quick_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile no network that computes a few pictures."""
    for module in (evaluator, model):
        monkeypatch.setattr(module, "uses_openvino", lambda engine, device: engine == "openvino")


@pytest.fixture
def folder(storage: Path, tmp_path: Path) -> Path:
    return shutil.copytree(storage, tmp_path / "storage")


def trainer(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["trainer", *map(str, arguments)])
    return cli.main()


def configure(monkeypatch: pytest.MonkeyPatch, folder: Path, *options: object) -> SamplingOptions:
    assert trainer(monkeypatch, "configure", "toy", "--storage", folder, *options) == 0
    return read_info(folder / "toy.safetensors").sampling


def test_configure_changes_single_options_and_nothing_else(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "toy.safetensors"
    before = read_info(path)
    configure(monkeypatch, folder, "--steps", 8, "--guidance", 1.0)
    options = configure(monkeypatch, folder, "--sampler", "dpmpp_2m")
    assert options == SamplingOptions(steps=8, guidance=1.0, sampler="dpmpp_2m")
    assert load_denoiser(path).options == options
    after = verify(path)
    assert after.config.pop("sampling") == options.model_dump(mode="json")
    assert after == before


def test_score_uses_the_set_options_unless_overridden(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    test, out = tmp_path / "test.json", tmp_path / "score.json"
    test.write_text(json.dumps(LISTS))
    assert trainer(monkeypatch, "configure", "toy", "--storage", folder, "--steps", 3, "--guidance", 1) == 0
    score = ("score", test, "--repeats", 1, "--storage", folder, "--json", out)
    for more, rows in (([], 3), (["--steps", 5], 5), (["--guidance", 2], 6)):
        assert trainer(monkeypatch, *score, *more) == 0
        assert json.loads(out.read_text())["rows_per_picture"] == rows
    capsys.readouterr()
    for wrong, message in (
        (["toy"], "say what to change"),
        (["toy", "--steps", 0], "steps: .*got 0"),
        (["toy-evaluator", "--steps", 8], "is of kind evaluator, not denoiser"),
    ):
        assert trainer(monkeypatch, "configure", *wrong, "--storage", folder) == 1
        assert re.search(message, capsys.readouterr().err)
    assert load_denoiser(folder / "toy.safetensors").options.steps == 3


def test_there_are_no_more_steps_than_timesteps(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish_toy_denoiser(folder, "short", 0, timesteps=20)
    (tmp_path / "test.json").write_text(json.dumps(LISTS))
    score = ("score", tmp_path / "test.json", "--repeats", 1, "--model", "short")
    for command, steps in (((*score, "--preset", "report"), 999), (("configure", "short", "--steps", 21), 21)):
        assert trainer(monkeypatch, *command, "--storage", folder) == 1
        assert capsys.readouterr().err == f"error: {steps} steps: short has 20 timesteps\n"
    with pytest.raises(ValidationError, match="timesteps"):
        TrainConfig(timesteps=15)


@pytest.mark.usefixtures("alive")
def test_request_overrides_checkpoint_overrides_default(
    settings: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(settings.model_copy(update={"storage": folder})) as client:

        def asked(path: str = "/generate", **given: object) -> dict[str, object]:
            body: Any = scoring(LISTS, **given) if path == "/score" else {"json": {"labels": LISTS, **given}}
            response = client.post(path, **body, headers={"prefer": "respond-async"})
            assert response.status_code == 202, response.text
            job: dict[str, object] = response.json()
            return job

        def shown(name: str) -> SamplingOptions:
            models = {model["name"]: model for model in client.get("/models").json()["models"]}
            return SamplingOptions.model_validate(models[name]["sampling"])

        plain = SamplingOptions()
        assert shown("toy") == plain
        earlier = asked()
        own = configure(monkeypatch, folder, "--steps", 8, "--guidance", 1.0)
        assert (shown("toy"), shown("other")) == (own, plain)
        assert asked()["options"] == asked("/score")["options"] == own.model_dump(mode="json")
        assert asked(guidance=2.5)["options"] == {**own.model_dump(mode="json"), "guidance": 2.5}
        assert asked(model="other")["options"] == plain.model_dump(mode="json")
        waiting = client.get(f"/jobs/{earlier['id']}").json()
        assert (waiting["status"], waiting["options"]) == ("queued", plain.model_dump(mode="json"))
