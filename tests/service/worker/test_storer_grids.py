"""Scores and grids of jobs that have all their pictures."""

import numpy as np
import pytest

from service.files import picture_name
from service.store import keys
from service.store.claims import BegunClaim
from service.store.jobs import JobStore
from service.worker import storer
from service.worker.runner import Runner
from tests.service.api.answers import pixels
from tests.service.store.helpers import done, done_count, record
from tests.service.worker.conftest import LISTS, Create, error_of, grid_of, run, started, status


def test_of_repeats_with_the_same_accuracy_the_first_with_most_exact_matches_is_best() -> None:
    _, made = done(BegunClaim("1-1", "j", 0, record=record(1)))
    verdicts = [made.verdict.model_copy(update={"index": i, "exact": i > 0}) for i in range(3)]
    assert storer.score(verdicts, 1).best == 1


def test_the_worst_pictures_of_all_repeats_are_those_with_the_lowest_f1() -> None:
    """Thirty repeats of one picture: twenty of the 29 that are not as asked, and of equal ones the first."""
    _, made = done(BegunClaim("1-1", "j", 0, record=record(1)))
    scores = [{"index": i, "exact": i == 7, "f1": i % 4 / 4} for i in range(30)]
    verdicts = [made.verdict.model_copy(update=score) for score in scores]
    assert storer.score(verdicts, 1).worst == [*range(0, 30, 4), *range(1, 30, 4), *range(2, 16, 4)]


def test_a_grid_of_several_batches_is_that_of_one(runner: Runner, store: JobStore, create: Create) -> None:
    """Those of earlier batches are read from storage."""
    lists = LISTS * 4
    job = create(lists)
    run(runner, job.id)
    whole = started(store.connection, store.settings.model_copy(update={"batch_pictures": len(lists)}), "w2")
    other = create(lists)
    run(whole, other.id)
    assert np.array_equal(*(pixels(grid_of(store, one.id)) for one in (job, other)))


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("no picture", "LookupError: a picture is no longer in storage"),
        ("no PNG", "ValueError: a picture is damaged"),
        ("no verdict", "ValidationError"),
    ],
)
def test_a_job_whose_grid_cannot_be_composed_fails_alone(
    runner: Runner, store: JobStore, create: Create, broken: str, reason: str
) -> None:
    job, other = create(LISTS * 3), create()  # more than a batch, so that the first pictures are read for the grid
    while not done_count(store, job.id):
        runner.run_once()
    if broken == "no picture":
        (runner.storer.files.folder(job.id) / picture_name(0)).unlink()
    elif broken == "no PNG":
        runner.storer.files.write(job.id, picture_name(0), b"no PNG")
    else:
        store.connection.hset(keys.verdicts(job.id), "0", b"no JSON")
    run(runner, job.id, other.id)
    assert error_of(store, job).startswith(f"the result cannot be composed: {reason}")
    assert status(store, other) == "finished"
