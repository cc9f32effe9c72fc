"""The section on drawing until exact: its requests, and what it reads from jobs. Starts no service."""

from typing import Any

from benchmarks.sections.selected import ALONE, OBJECTS, SELECTED, Seen, bodies, report
from benchmarks.timing import figure


def job(exact: list[bool]) -> dict[str, Any]:
    """A job of one picture with these attempts, of which the last one was kept."""
    picture = {"exact": exact[-1], "attempts": [{"exact": one} for one in exact]}
    return {"result": {"pictures": [picture]}}


def test_every_other_request_is_selected_and_both_loads_ask_for_the_same_pictures() -> None:
    plain, mixed = (bodies(3, 6, 1, select=select) for select in (False, True))
    assert ["until" in body for body in mixed] == [False, True] * 3
    assert plain == [{name: body[name] for name in ("labels", "seed")} for body in mixed]
    assert all(len(set(body["labels"][0])) == 3 for body in plain)
    assert plain != bodies(3, 6, 2, select=False)


def test_exact_match_and_extra_rows_are_those_of_selected_pictures() -> None:
    seen = Seen()
    seen.jobs = [[job([True]), job([False, True])], [job([False, False, False]), job([True])]]
    assert seen.exact(rows=6) == (figure([0.5, 0.5]), figure([1.0, 0.5]), figure([3.0, 6.0]))


def test_the_table_has_a_row_for_each_number_of_objects() -> None:
    kinds = "first_exact", "exact", "extra_rows", "plain_p95_beside", "p95"
    figures = {f"selected.{kind}_{n}": figure([0.5]) for kind in kinds for n in OBJECTS}
    p95_s = {str(n): {ALONE: 0.1, "plain beside": 0.2, SELECTED: 0.4} for n in OBJECTS}
    data = {"figures": figures, "p95_s": p95_s, "pictures": {str(n): 32 for n in OBJECTS}, "requests": 8}
    _, table = report(data)
    assert not isinstance(table, str)
    assert table.rows[0] == ["3", "32", "0.500", "0.500", "0.500", "100", "200", "400", "0.500"]
    assert [row[0] for row in table.rows] == ["3", "5", "8"]
