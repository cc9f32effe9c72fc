"""The comparison with an older commit: turns, pairs, ratios and what it says. Nothing is timed but toy networks."""

import os
from pathlib import Path

import pytest

from benchmarks.document import markdown
from benchmarks.sections import before
from benchmarks.sections.before import STARTS, Caller, Served
from benchmarks.trees import HERE, Tree
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


def test_both_commits_start_in_turn_and_the_first_changes() -> None:
    order: list[str] = []

    def seconds_of(tree: Tree) -> dict[str, float]:
        order.append(tree.name)
        return dict.fromkeys(STARTS, float(len(order)))

    taken = before.starts((OLDER, HERE), 3, seconds_of)
    assert order == ["older", "this commit", "this commit", "older", "older", "this commit"]
    assert taken["worker_ready"] == ([1.0, 4.0, 5.0], [2.0, 3.0, 6.0])


def test_each_start_has_a_home_of_its_own() -> None:
    home = before.own_home("/tmp/x")
    assert HERE.environment(**home)["HOME"] == "/tmp/x"
    assert home["LABELGRID_CACHE"] == home["XDG_CACHE_HOME"] == "/tmp/x/cache"
    assert HERE.environment(**home)["PATH"] == os.environ["PATH"]


def test_the_goals_of_calls_depend_on_the_machine() -> None:
    assert before.goals(True)["before.call_speedup_32_rows"] == 1.3
    assert before.goals(False)["before.call_speedup_32_rows"] == 1.0


def test_a_clone_without_the_commit_skips_the_section_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(before, "checkout", lambda commit: None)
    data = before.measure(quick=False)
    assert data["figures"] == {}
    assert before.report(data) == [
        f"Skipped: this clone has no commit {before.BEFORE}; `git fetch --unshallow` gets it."
    ]


def test_the_report_has_both_commits_and_their_ratio() -> None:
    called, seen, started = measured()
    data = {
        "figures": before.figures(called, seen, started),
        "names": ["older", "this commit"],
        "libraries": ["torch", "OpenVINO"],
        "same_checkpoint": True,
        "calls": {str(rows): [before.figure(rows / s for s in one) for one in both] for rows, both in called.items()},
        "requests": {str(count): [before.described(runs) for runs in both] for count, both in seen.items()},
        "starts": {key: [before.figure(one) for one in both] for key, both in started.items()},
    }
    text = markdown(before.report(data), "performance").replace("\n", " ")
    assert "| 2 | 0.400 | 0.200 | 4.00 | 2.00 |" in text
    assert "rows/s: 1 41.7 and 100." in text
    assert "each serves the same checkpoint" in text


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
