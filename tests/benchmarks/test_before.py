"""The comparison with an older commit: turns, pairs, ratios and what it says. Nothing is timed but toy networks."""

from pathlib import Path

import pytest

from benchmarks.sections import before
from benchmarks.sections.before import STARTS, Caller, Served
from benchmarks.trees import Tree
from tests.paths import ROOT
from tests.toy_checkpoint import publish_toys

OLDER = Tree("older", Path("older"))


def served(*rounds: tuple[float, int]) -> list[Served]:
    """Rounds of some seconds with so many answers, which took 1, 2, 3, ... s."""
    return [Served(seconds, [float(i + 1) for i in range(count)]) for seconds, count in rounds]


def measured() -> tuple[
    dict[int, tuple[list[float], list[float]]], dict[int, before.Both], dict[str, tuple[list[float], list[float]]]
]:
    """Two rounds in which this commit is faster."""
    called = {1: ([0.02, 0.03], [0.01, 0.01])}
    seen = {0: (served((10, 5), (10, 5)), served((5, 10), (10, 10))), 2: (served((10, 4)), served((10, 2)))}
    return called, seen, {key: ([4.0, 4.0], [1.0, 3.0]) for key in STARTS}


def test_ratios_are_by_round_above_1_for_faster_calls_and_below_1_for_shorter_times() -> None:
    found = before.figures(*measured())
    assert found["before.call_speedup_1_rows"]["median"] == pytest.approx((2 + 3) / 2)
    assert found["before.requests_0_busy"]["high"] == pytest.approx((10 / 5) / (5 / 10))
    assert found["before.requests_0_busy"]["low"] == pytest.approx((10 / 10) / (5 / 10))
    assert found["before.requests_2_busy"]["median"] == pytest.approx(0.5)
    assert found["before.requests_p95_2_busy"]["median"] == pytest.approx(2 / 4)
    assert found["before.worker_ready"]["median"] == pytest.approx(0.5)
    assert all(found[f"before.{key}"]["n"] == 2 for key in STARTS)


def test_a_clone_without_the_commit_skips_the_section_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(before, "checkout", lambda commit: None)
    data = before.measure(quick=False)
    assert data["figures"] == {}
    assert before.report(data) == [
        f"Skipped: this clone has no commit {before.BEFORE}; `git fetch --unshallow` gets it."
    ]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A checkout with this one's code and toy checkpoints."""
    (tmp_path / "shared").symlink_to(ROOT / "shared")
    publish_toys(tmp_path / "models")
    return Tree("toy", tmp_path)


def test_a_process_with_a_trees_code_makes_network_calls(tree: Tree) -> None:
    caller = Caller(tree)
    assert caller.about["code"] == str(tree.folder)
    assert all(0 < caller(rows) < 60 for rows in (8, 1))
    caller.close()
    assert caller.returncode == 0


def test_a_process_with_other_code_is_refused(tree: Tree) -> None:
    (tree.folder / "shared").unlink()
    with pytest.raises(RuntimeError, match=r"toy runs the code of .*, not of"):
        Caller(tree)
