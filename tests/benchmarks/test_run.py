"""`benchmarks.run`: which sections it measures, and what a failing or interrupted run leaves. No section is run."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import run
from benchmarks.results import Results
from benchmarks.timing import figure

Run = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def kept(tmp_path: Path) -> Results:
    return Results(tmp_path / "results.json")


@pytest.fixture
def run_with(kept: Results, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run with these arguments, where one section fails and each other one measures `value`."""

    def run_with(*arguments: str, failing: str = "", value: float = 1.0) -> tuple[int, list[str]]:
        measured: list[str] = []

        def section(name: str, quick: bool) -> str | None:
            measured.append(name)
            if name == failing:
                return "it ended with exit status 1"
            kept.keep(name, {"figures": {f"{name}.x": figure([value])}})
            return None

        monkeypatch.setattr("sys.argv", ["run", *arguments])
        monkeypatch.setattr(run, "run_section", section)
        return run.main(), measured

    monkeypatch.setattr(run, "results", lambda quick: kept)
    monkeypatch.setattr(run, "write_documents", lambda quick: 0)
    monkeypatch.setattr(run, "machine_rate", lambda: 100.0)
    return run_with


def test_every_section_is_measured_once_and_keeps_how_fast_the_machine_was(
    kept: Results, run_with: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = iter([100.0, 120.0] * 20)
    monkeypatch.setattr(run, "machine_rate", lambda: next(rates))
    assert run_with() == (0, list(run.SECTIONS))
    assert all(one["machine_rate"] == [100.0, 120.0] for one in kept.read()["sections"].values())


def test_a_failing_section_does_not_stop_the_others_and_is_measured_again(kept: Results, run_with: Run) -> None:
    assert run_with("--quick", failing="sampling") == (1, list(run.SECTIONS))
    assert kept.read()["sections"]["sampling"] == {"failed": "it ended with exit status 1"}
    assert run_with("--quick") == (0, ["sampling"])
    assert run_with("--quick") == (0, list(run.SECTIONS))  # a finished run starts from scratch


def test_only_measures_some_sections_and_a_failure_loses_no_old_figures(kept: Results, run_with: Run) -> None:
    run_with()
    assert run_with("--only", "growth,load", failing="load", value=2.0) == (1, ["load", "growth"])
    content = json.loads(kept.path.read_text())
    assert content["growth.x"]["median"] == 2.0
    assert content["load.x"]["median"] == content["sampling.x"]["median"] == 1.0


def test_a_full_run_does_not_continue_a_quick_one(kept: Results, run_with: Run) -> None:
    run_with("--quick", failing="startup")
    assert run_with() == (0, list(run.SECTIONS))


def test_an_unknown_section_is_refused(run_with: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_with("--only", "load,grwth")
    assert "unknown section grwth; use roofline, before" in capsys.readouterr().err
