"""A score as one HTML file: what was found by label and by number of objects, and the worst pictures."""

import base64
import csv
import io
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Final

from jinja2 import Environment, PackageLoader

from service.contract.records import LabelScore
from service.contract.schemas import Job, ScoreResult
from shared.options import THRESHOLD

COLUMNS: Final = ("label", "asked", "found", "missing", "extra", "recall", "precision")


def html(job: Job, image: Callable[[int], bytes]) -> str:
    """Return the report of a finished score job. `image` returns the PNG of a picture by its index."""
    result = job.result
    assert isinstance(result, ScoreResult)
    n = len(result.pictures)
    worst = []
    for picture in result.worst:
        index = int(PurePosixPath(picture.url).stem)
        run = f", run {index // n}" if len(result.repeats) > 1 else ""
        src = "data:image/png;base64," + base64.b64encode(image(index)).decode()
        worst.append((f"list {index % n}{run}", src, picture))
    rows = sorted(result.by_label, key=lambda one: (one.recall is None, one.recall, one.label))
    confused = [one for one in rows if one.instead]
    environment = Environment(
        loader=PackageLoader("service.client", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html").render(
        job=job,
        result=result,
        rows=rows,
        confused=confused,
        others=sorted({other for one in confused for other in one.instead}),
        most=max((count for one in confused for count in one.instead.values()), default=1),
        wrong=sum(one.pictures - one.exact for one in result.by_objects),
        worst=worst,
        threshold=THRESHOLD,
    )


def as_csv(rows: Sequence[LabelScore]) -> str:
    """Return the scores by label as CSV with a header."""
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        writer.writerow(getattr(row, name) for name in COLUMNS)
    return written.getvalue()
