"""The section that compares two models: what it reports. Starts no service."""

from benchmarks.sections.models import report
from benchmarks.timing import figure, paired


def test_the_table_has_both_models_and_their_ratio_by_round() -> None:
    rates, times = ([40.0, 60.0], [20.0, 20.0]), ([10.0, 30.0], [40.0, 40.0])
    data = {
        "models": ("one-call", "in-steps"),
        "figures": {
            "models.pictures_per_s": paired(*rates),
            "models.pictures_per_s_several": paired(*rates),
            "models.single": paired(*times),
        },
        "pictures_per_s": [figure(one) for one in rates],
        "pictures_per_s_several": [figure(one) for one in rates],
        "single_ms": [figure(one) for one in times],
    }
    text, table = report(data)
    assert "`in-steps` draws the same pictures" in str(text)
    assert not isinstance(table, str)
    assert table.header == ["measurement", "`one-call`", "`in-steps`", "ratio"]
    assert [row[1:] for row in table.rows] == [["50.0", "20.0", "2.50"]] * 2 + [["20.0", "40.0", "0.500"]]
