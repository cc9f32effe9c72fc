"""Experiment trackers, with stand-ins for their packages: a run that resumes goes on in the tracker's same run."""

import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from trainer.errors import TrainerError
from trainer.runs import Run, read_log, run_log
from trainer.trackers import TRACKERS, TrackerName, check_tracker


@pytest.fixture(params=list(TRACKERS))
def name(request: pytest.FixtureRequest) -> TrackerName:
    found: TrackerName = request.param
    return found


def log(
    monkeypatch: pytest.MonkeyPatch, folder: Path, name: TrackerName, *steps: int, fails: bool = False
) -> MagicMock:
    """Log steps to a stand-in for the tracker's package, which has not seen an earlier process; return it."""
    package = MagicMock()
    package.start_run.return_value.__enter__.return_value.info.run_id = "mlflow's"
    takes = {"wandb": package.init.return_value.__enter__.return_value.log, "mlflow": package.log_metrics}
    taking = takes.get(name, package.log)
    taking.side_effect = ConnectionError("no network") if fails else None
    monkeypatch.setitem(sys.modules, name, package)
    folder.mkdir(exist_ok=True)
    with run_log(folder, name, {"lr": 0.1}) as record:
        for step in steps:
            record(Run(step=step), {"loss": 1 / step})
    assert [call.args[0] for call in taking.mock_calls] == [{"loss": 1 / step} for step in steps]
    assert [call.kwargs["step"] for call in taking.mock_calls] == list(steps)
    return package


def test_a_resumed_run_goes_on_in_the_trackers_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: TrackerName
) -> None:
    first, again, other = (
        log(monkeypatch, tmp_path / folder, name, *steps) for folder, steps in (("a", (1, 2)), ("a", (3,)), ("b", (1,)))
    )
    if name == "mlflow":
        assert [one.start_run.call_args.kwargs["run_id"] for one in (first, again, other)] == [None, "mlflow's", None]
        assert [one.log_params.called for one in (first, again)] == [True, False]  # they cannot be changed later
        return
    begun = [one.init.call_args.kwargs for one in (first, again, other)]
    key = "id" if name == "wandb" else "name"
    assert begun[0][key] == begun[1][key] != begun[2][key]
    assert all((one["resume"], one["config"]) == ("allow", {"lr": 0.1}) for one in begun)
    assert name == "wandb" or first.finish.called


def test_a_tracker_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: TrackerName, caplog: pytest.LogCaptureFixture
) -> None:
    log(monkeypatch, tmp_path / "run", name, 1, 2, fails=True)
    assert [line["step"] for line in read_log(tmp_path / "run" / "log.jsonl")] == [1, 2]
    assert f"{name} did not take the figures of step 2: no network" in caplog.text


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_tracker(None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TrainerError, match="needs its package: pip install wandb"):
        check_tracker("wandb")
