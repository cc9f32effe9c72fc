"""The report of a score: an HTML page without a server, and CSV."""

import base64
import csv
import io
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock

from service.client import Client
from service.client.job_command import Outputs
from service.client.report import as_csv, html
from service.contract.breakdown import LabelScore, ObjectsScore
from service.contract.schemas import Job, PictureResult, Progress, Repeat, ScoreResult, Summary


def picture(labels: list[str], found: list[str], f1: float, index: int) -> PictureResult:
    return PictureResult(
        labels=labels,
        seed=1,
        accuracy=f1,
        exact=set(labels) == set(found),
        f1=f1,
        scores=dict.fromkeys(labels, 0.1) | dict.fromkeys(found, 0.9),
        url=f"/jobs/0/images/{index}.png",
        trajectory_url=None,
    )


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
    return Job(
        id="0", kind="score", status="finished", created_at="2026-01-01", started_at=None, finished_at=None,
        model="model", digest="0" * 64, seed=0, options=None, progress=Progress(done=3, total=3),
        error=None,
        labels=[one.labels for one in result.pictures], layouts=None, first=0, trajectory=None, columns=8,
        result=result,
    )  # fmt: skip


class Page(HTMLParser):
    """The rows of a page's tables, and the sources of its pictures."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows, self.sources, self.text = list[list[str]](), list[str](), ""
        self.in_cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")
            self.in_cell = True
        elif tag == "img":
            self.sources.append(dict(attributes)["src"] or "")

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("th", "td")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] = (self.rows[-1][-1] + data).strip()


def test_the_page_shows_the_scores_and_the_worst_pictures_first() -> None:
    drawn = list[int]()

    def image(index: int) -> bytes:
        drawn.append(index)
        return b"PNG %d" % index

    page = Page(html(job(RESULT), image))
    assert drawn == [2, 1]  # not the picture that is as asked
    assert page.sources == ["data:image/png;base64," + base64.b64encode(b"PNG %d" % i).decode() for i in drawn]
    assert ["accuracy", "0.750", "0.000", "0.750"] in page.rows
    assert ["2", "1", "0", "0.000"] in page.rows
    labels = [row for row in page.rows if len(row) == 8][1:]
    assert labels == [
        ["<b>", "1", "0", "1", "0", "0.000", "", ""],
        ["red cube", "2", "1", "1", "0", "0.500", "1.000", "red cylinder 1"],
        ["blue sphere", "1", "1", "0", "0", "1.000", "1.000", ""],
        ["red cylinder", "0", "0", "0", "1", "", "0.000", ""],
    ]
    assert ["red cube", "1"] in page.rows  # of the table of what was there instead
    assert "2 of the 2 that are not exactly as asked" in page.text
    assert "list 2:" in page.text


def test_the_worst_pictures_of_all_runs_are_fetched_whichever_run_was_best(tmp_path: Path) -> None:
    """Their indices are those of the job, not of the best run."""
    best = RESULT.model_copy(update={"best": 1, "repeats": RESULT.repeats * 2})
    client = mock.Mock(spec=Client)
    client.image = mock.Mock(return_value=b"PNG")  # Python 3.14 takes the method for a coroutine function
    Outputs(report=tmp_path / "report.html", as_json=True).write(client, job(best))
    assert client.image.mock_calls == [mock.call("0", 2), mock.call("0", 1)]


def test_a_score_without_a_fault_says_so() -> None:
    result = RESULT.model_copy(update={"worst": [], "by_label": [], "by_objects": []})
    page = Page(html(job(result), lambda index: b""))
    assert "All pictures are exactly as asked." in page.text
    assert page.sources == []


def test_csv_has_a_row_for_each_label() -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(RESULT.by_label))))
    assert [row["label"] for row in rows] == ["<b>", "blue sphere", "red cube", "red cylinder"]
    assert rows[2] == {
        "label": "red cube", "asked": "2", "found": "1", "missing": "1", "extra": "0", "recall": "0.5",
        "precision": "1.0",
    }  # fmt: skip
    assert rows[3]["recall"] == ""
