"""Experiment trackers, with stand-ins for their packages: a run that resumes goes on in the tracker's same run."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from trainer.errors import TrainerError
from trainer.runs import Run, read_log, run_log
from trainer.trackers import TRACKERS, TrackerName, check_tracker

Runs = dict[str, list[tuple[int, dict[str, float]]]]  # by id: steps and figures


class Tracker(ModuleType):
    """What the three packages have in common: runs by id, which end before others begin."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.runs, self.current, self.fails = dict[str, Any](), "", False

    def begin(self, run_id: str) -> None:
        assert not self.current
        self.current = run_id
        self.runs.setdefault(run_id, [])

    def end(self) -> None:
        assert self.current
        self.current = ""

    def take(self, figures: dict[str, float], step: int) -> None:
        if self.fails:
            raise ConnectionError("no network")
        self.runs[self.current].append((step, figures))


class Wandb(Tracker):
    @contextmanager
    def init(self, *, project: str, id: str, name: str, resume: str, dir: Path, config: Any) -> Iterator[Any]:
        assert (project, name, resume, config) == ("labelgrid", "run", "allow", {"lr": 0.1})
        self.begin(id)
        yield SimpleNamespace(log=lambda figures, step: self.take(figures, step))
        self.end()


class Mlflow(Tracker):
    parameters = 0

    def set_experiment(self, name: str) -> None:
        assert name == "labelgrid"

    @contextmanager
    def start_run(self, run_id: str | None, run_name: str | None) -> Iterator[Any]:
        self.begin(run_id or f"id {len(self.runs)}")
        yield SimpleNamespace(info=SimpleNamespace(run_id=self.current))
        self.end()

    def log_params(self, config: Any) -> None:
        self.parameters += 1
        assert (config, self.parameters) == ({"lr": 0.1}, 1)  # they cannot be changed later

    def log_metrics(self, figures: dict[str, float], step: int) -> None:
        self.take(figures, step)


class Trackio(Tracker):
    def init(self, *, project: str, name: str, resume: str, config: Any) -> None:
        assert (project, resume, config) == ("labelgrid", "allow", {"lr": 0.1})
        self.begin(name)

    def log(self, figures: dict[str, float], step: int) -> None:
        self.take(figures, step)

    def finish(self) -> None:
        self.end()


STAND_INS: dict[TrackerName, type[Tracker]] = {"wandb": Wandb, "mlflow": Mlflow, "trackio": Trackio}


@pytest.fixture(params=list(TRACKERS))
def tracker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    module = STAND_INS[request.param](request.param)
    monkeypatch.setitem(sys.modules, request.param, module)
    return module


def log(folder: Path, tracker: Tracker, *steps: int) -> None:
    folder.mkdir(exist_ok=True)
    with run_log(folder, tracker.__name__, {"lr": 0.1}) as record:  # type: ignore[arg-type]
        for step in steps:
            record(Run(step=step), {"loss": 1 / step})


def test_a_resumed_run_goes_on_in_the_trackers_run(tmp_path: Path, tracker: Tracker) -> None:
    log(tmp_path / "run", tracker, 1, 2)
    log(tmp_path / "run", tracker, 3)
    (found,) = tracker.runs.values()
    assert found == [(1, {"loss": 1.0}), (2, {"loss": 0.5}), (3, {"loss": 1 / 3})]


def test_a_tracker_that_fails_does_not_end_the_run(
    tmp_path: Path, tracker: Tracker, caplog: pytest.LogCaptureFixture
) -> None:
    tracker.fails = True
    log(tmp_path / "run", tracker, 1, 2)
    assert [line["step"] for line in read_log(tmp_path / "run" / "log.jsonl")] == [1, 2]
    assert f"{tracker.__name__} did not take the figures of step 2: no network" in caplog.text


def test_a_damaged_file_of_ids_is_refused(tmp_path: Path, tracker: Tracker) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "trackers.json").write_text("{")
    with pytest.raises(TrainerError, match=r"trackers\.json is damaged; delete it"):
        log(tmp_path / "run", tracker, 1)


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_tracker(None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TrainerError, match="needs its package: pip install wandb"):
        check_tracker("wandb")
