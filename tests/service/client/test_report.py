"""The report of a score: an HTML page without a server, and CSV."""

import base64
import csv
import html
import io
import re
from pathlib import Path
from typing import Any
from unittest import mock

from service.client import Client, report
from service.client.job_command import Outputs
from service.contract.records import LabelScore, ObjectsScore
from service.contract.schemas import Job, PictureResult, Repeat, ScoreResult, Summary
from tests.service.api.answers import JOB_EXAMPLE


def picture(labels: list[str], found: list[str], f1: float, index: int) -> PictureResult:
    scores = dict.fromkeys(labels, 0.1) | dict.fromkeys(found, 0.9)
    measured: dict[str, Any] = {"accuracy": f1, "exact": set(labels) == set(found), "f1": f1, "scores": scores}
    return PictureResult(labels=labels, seed=1, url=f"/jobs/0/images/{index}.png", trajectory_url=None, **measured)


PICTURES = [
    picture(["red cube"], ["red cube"], 1.0, 0),
    picture(["red cube", "blue sphere"], ["blue sphere", "red cylinder"], 0.5, 1),
    picture(["<b>"], [], 0.0, 2),
]
RESULT = ScoreResult(
    repeats=[Repeat(seed=0, accuracy=0.75, exact_match=0.5, f1=0.8)],
    accuracy=Summary(max=0.75, mean=0.75, std=0),
    exact_match=Summary(max=0.5, mean=0.5, std=0),
    f1=Summary(max=0.8, mean=0.8, std=0),
    best=0,
    by_label=[
        LabelScore(label="<b>", asked=1, found=0, extra=0, instead={}),
        LabelScore(label="blue sphere", asked=1, found=1, extra=0, instead={}),
        LabelScore(label="red cube", asked=2, found=1, extra=0, instead={"red cylinder": 1}),
        LabelScore(label="red cylinder", asked=0, found=0, extra=1, instead={}),
    ],
    by_objects=[ObjectsScore(objects=1, pictures=2, exact=1), ObjectsScore(objects=2, pictures=1, exact=0)],
    worst=[PICTURES[2], PICTURES[1]],
    grid_url="",
    pictures=PICTURES,
)


def job(result: ScoreResult) -> Job:
    labels = [one.labels for one in result.pictures]
    return Job.model_validate(JOB_EXAMPLE).model_copy(update={"kind": "score", "labels": labels, "result": result})


def rows_of(page: str) -> list[list[str]]:
    """Return the text of the cells of a page's tables."""
    cells = (re.findall(r"<t[hd]\b.*?>(.*?)</t[hd]>", row, re.S) for row in re.findall(r"<tr.*?</tr>", page, re.S))
    return [[html.unescape(re.sub(r"<.*?>", "", cell)).strip() for cell in row] for row in cells]


def test_the_page_shows_the_scores_and_the_worst_pictures_first() -> None:
    drawn = list[int]()

    def image(index: int) -> bytes:
        drawn.append(index)
        return b"PNG %d" % index

    page = report.html(job(RESULT), image)
    assert drawn == [2, 1]  # not the picture that is as asked
    sources = [f"data:image/png;base64,{base64.b64encode(b'PNG %d' % i).decode()}" for i in drawn]
    assert re.findall(r'<img[^>]* src="(.*?)"', page) == sources
    rows = rows_of(page)
    assert ["accuracy", "0.750", "0.000", "0.750"] in rows
    assert ["2", "1", "0", "0.000"] in rows
    assert [row for row in rows if len(row) == 8][1:] == [
        ["<b>", "1", "0", "1", "0", "0.000", "", ""],
        ["red cube", "2", "1", "1", "0", "0.500", "1.000", "red cylinder 1"],
        ["blue sphere", "1", "1", "0", "0", "1.000", "1.000", ""],
        ["red cylinder", "0", "0", "0", "1", "", "0.000", ""],
    ]
    assert ["red cube", "1"] in rows  # of the table of what was there instead
    assert "2 of the 2 that are not exactly as asked" in page
    assert "list 2:" in page
    none = report.html(job(RESULT.model_copy(update={"worst": [], "by_label": [], "by_objects": []})), image)
    assert ("All pictures are exactly as asked." in none, "<img" in none) == (True, False)


def test_the_worst_pictures_of_all_runs_are_fetched_whichever_run_was_best(tmp_path: Path) -> None:
    """Their indices are those of the job, not of the best run."""
    best = job(RESULT.model_copy(update={"best": 1, "repeats": RESULT.repeats * 2}))
    client = mock.Mock(spec=Client)
    client.image = mock.Mock(return_value=b"PNG")  # Python 3.14 takes the method for a coroutine function
    Outputs(report=tmp_path / "report.html", as_json=True).write(client, best)
    assert client.image.mock_calls == [mock.call(best.id, 2), mock.call(best.id, 1)]


def test_csv_has_a_row_for_each_label() -> None:
    rows = list(csv.reader(io.StringIO(report.as_csv(RESULT.by_label))))[1:]
    assert [row[0] for row in rows] == ["<b>", "blue sphere", "red cube", "red cylinder"]
    assert (rows[2], rows[3][5]) == (["red cube", "2", "1", "1", "0", "0.5", "1.0"], "")
