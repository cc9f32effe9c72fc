"""The documents: they are what the committed results say, and a section that failed says so."""

from pathlib import Path

import pytest

from benchmarks import capacity_model, report
from benchmarks.document import Plot, markdown
from benchmarks.results import ROOT, results
from benchmarks.timing import figure


def test_the_committed_document_is_written_from_the_committed_results() -> None:
    """Every section's table and sentence. Plots are drawn by another test."""
    expected = markdown(report.performance(results(quick=False).read()), "performance")
    assert (ROOT / "docs" / "performance.md").read_text() == expected, "`python -m benchmarks.report` writes it"


def test_a_failed_section_says_so_and_there_is_no_capacity_without_it() -> None:
    content = results(quick=False).read()
    content["sections"]["load"] = {"failed": "it took longer than 330 s"}
    del content["sections"]["growth"]
    texts = [piece for piece in report.performance(content) if isinstance(piece, str)]
    assert texts.count("Not measured: it took longer than 330 s.") == 1
    assert texts.count("Not measured yet.") == len(report.TITLES.keys() - content["sections"].keys())
    assert capacity_model.capacity(content) == []


@pytest.mark.parametrize(("overhead_ms", "met"), [(14.4, "yes"), (14.6, "no")])
def test_a_goal_is_met_or_not(overhead_ms: float, met: str) -> None:
    """The overhead's goal depends on the loop's time, that of the limit does not."""
    sections = {"service": {"goal_ms": figure([14.46])}}
    found = {"service.single_overhead_ms": figure([overhead_ms]), "limit.fraction": figure([0.4, 0.45])}
    limit, overhead = report.goals(found | {"sections": sections}).rows
    assert limit[1:] == ["0.425", "", "at least 0.6", "no"]
    assert overhead[-2:] == ["at most 14.5", met]


def test_a_goal_may_depend_on_the_machine() -> None:
    key = "before.call_speedup_1_rows"
    sections = {"before": {"goals": {key: 1.3}}}
    ((*_, goal, met),) = report.goals({key: figure([1.4]), "sections": sections}).rows
    assert (goal, met) == ("at least 1.3", "yes")


def test_a_section_says_what_differed_when_it_was_measured() -> None:
    here, section = {"cpu": "A", "cores": 2, "features": ["avx512f"]}, {"seconds": 9.6, "commit": "abc"}
    line = "`python -m benchmarks.sections.load`, 10 s, commit abc."
    assert report.measured_line("load", section | {"machine": here, "others_percent": 5.0}, here) == line
    busy = section | {"machine": here | {"cpu": "B"}, "others_percent": 40.4, "machine_rate": [100.0, 120.0]}
    assert report.measured_line("load", busy, here) == (
        f"{line} On another machine: B, 2 cores (avx512f). Other work took 40 % of the machine just before. "
        "The machine's speed changed by 20 % meanwhile."
    )


def test_plots_of_the_committed_results_can_be_drawn(tmp_path: Path) -> None:
    plots = [piece for piece in report.performance(results(quick=False).read()) if isinstance(piece, Plot)]
    for plot in plots:
        plot.save(tmp_path / plot.file_name("x"))
    assert len(list(tmp_path.iterdir())) == len(plots) > 0
