"""The document is what the committed results say; a goal is met or not."""

import pytest

from benchmarks import report
from benchmarks.document import markdown
from benchmarks.results import ROOT, results
from benchmarks.timing import figure


def test_the_committed_documents_are_written_from_the_committed_results() -> None:
    content = results(quick=False).read()
    for page, pieces in (("performance.md", report.performance(content)), ("dev/goals.md", report.goals_page(content))):
        assert (ROOT / "docs" / page).read_text() == markdown(pieces), "`python -m benchmarks.report` writes it"


def test_a_section_that_is_not_measured_says_so_and_there_is_no_capacity_without_it() -> None:
    content = results(quick=False).read()
    texts = [piece for piece in report.performance(content) if isinstance(piece, str)]
    assert "## Capacity" in texts
    del content["service"]
    texts = [piece for piece in report.performance(content) if isinstance(piece, str)]
    assert texts[texts.index("## The service over the bare loop") + 1] == "Not measured yet."
    assert "## Capacity" not in texts


@pytest.mark.parametrize(("overhead_ms", "met"), [(14.4, "yes"), (14.6, "no")])
def test_a_goal_is_met_or_not(overhead_ms: float, met: str) -> None:
    """The overhead's goal depends on the loop's time, that of the limit does not."""
    content = {
        "roofline": {"figures": {"limit.fraction": figure([0.4, 0.45])}},
        "service": {"figures": {"service.single_overhead_ms": figure([overhead_ms])}, "goal_ms": figure([14.46])},
    }
    limit, overhead = report.goals(content).rows
    assert limit[1:] == ["0.425", "", "at least 0.6", "no"]
    assert overhead[-2:] == ["at most 14.5", met]
