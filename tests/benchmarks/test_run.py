"""`benchmarks.run`: which sections it measures, and that a failing one stops no other. No section is run."""

from pathlib import Path

import pytest

from benchmarks import run
from benchmarks.results import Results


def test_a_failing_section_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = list[str]()

    def note(module: str, quick: bool) -> str | None:
        ran.append(module)
        return "ended with exit status 1" if module == "sections.load" else None

    monkeypatch.setattr(run, "run", note)
    monkeypatch.setattr("sys.argv", ["run", "--only", "growth,load"])
    assert run.main() == 1
    assert ran == ["sections.load", "sections.growth", "report"]


def test_a_sections_data_replace_its_own_alone(tmp_path: Path) -> None:
    kept = Results(tmp_path / "new" / "results.json")
    for name, value in (("load", 1), ("growth", 2), ("load", 3)):
        kept.keep(name, {"x": value})
    assert kept.read() == {"load": {"x": 3}, "growth": {"x": 2}}
