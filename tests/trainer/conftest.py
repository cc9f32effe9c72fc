"""The trainer's command line in an empty folder, and a small data set. Toy networks are computed by torch."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared import evaluator
from shared.diffusion import model
from tests.shared_evaluators import load_once
from tests.trainer.command_line import Command
from tests.trainer_fixtures import write_data_folder
from trainer import __main__ as cli
from trainer import export, score


@pytest.fixture(scope="package", autouse=True)
def _quick_networks() -> Iterator[None]:
    """Let commands share the evaluators that they load, and compile no network that computes a few pictures."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (evaluator, export, score):
            patch.setattr(module, "load_evaluator", load_once)
        for module in (evaluator, model):
            patch.setattr(module, "uses_openvino", lambda engine, device: engine == "openvino")
        yield


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Runs a command in an empty folder; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("FORCE_COLOR", "LABELGRID_STORAGE"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["trainer", *map(str, arguments)])
        code = cli.main()
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data set folder of four pictures."""
    return write_data_folder(tmp_path / "data", pictures=4)
