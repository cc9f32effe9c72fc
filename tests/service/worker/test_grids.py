"""Scores and grids of jobs that have all their pictures."""

import numpy as np
import pytest
import torch
from redis import Redis

from service import pictures
from service.contract.records import JobResult
from service.store import keys
from service.store.claims import Claim
from service.store.jobs import JobStore
from service.worker import grids
from service.worker.runner import Runner
from shared.evaluator import score_set
from tests.service.api.answers import pixels
from tests.service.store.helpers import done, record
from tests.service.worker.conftest import (
    LISTS,
    Create,
    engine_of,
    error_of,
    grid_of,
    pngs,
    run,
    started,
    status,
    verdicts_of,
)


def test_the_result_is_the_score_of_the_set(runner: Runner, store: JobStore, create: Create, connection: Redis) -> None:
    job = create(repeats=3)
    run(runner, job.id)
    result = JobResult.read(connection.hget(keys.job(job.id), "result") or b"")
    verdicts, vocabulary = verdicts_of(store, job), engine_of(runner).judge.vocabulary
    for r, scores in enumerate(result.repeats):
        part = verdicts[r * 3 : r * 3 + 3]
        probabilities = torch.tensor([[verdict.probabilities[name] for name in vocabulary.names] for verdict in part])
        targets = torch.tensor([vocabulary.multi_hot(one) for one in LISTS])
        expected = score_set(probabilities, targets, vocabulary.names)
        found = scores.accuracy, scores.exact_match, scores.f1
        assert found == (expected.accuracy, expected.exact_match, expected.f1)
    assert result.repeats[result.best].accuracy == max(scores.accuracy for scores in result.repeats)


def test_of_repeats_with_the_same_accuracy_the_first_with_most_exact_matches_is_best() -> None:
    _, made = done(Claim("1-1", "j", next(record(1).pictures())))
    verdicts = [made.verdict.model_copy(update={"index": i, "exact": i > 0}) for i in range(3)]
    assert grids.score(verdicts, 1).best == 1


def test_the_worst_pictures_of_all_repeats_are_those_with_the_lowest_f1() -> None:
    """Thirty repeats of one picture: twenty of the 29 that are not as asked, and of equal ones the first."""
    _, made = done(Claim("1-1", "j", next(record(1).pictures())))
    scores = [{"index": i, "exact": i == 7, "f1": i % 4 / 4} for i in range(30)]
    verdicts = [made.verdict.model_copy(update=score) for score in scores]
    assert grids.score(verdicts, 1).worst == [*range(0, 30, 4), *range(1, 30, 4), *range(2, 16, 4)]


def test_the_grid_shows_the_pictures_in_order(runner: Runner, store: JobStore, create: Create) -> None:
    job = create()
    run(runner, job.id)
    grid, stored = pixels(grid_of(store, job.id)), [pixels(png) for png in pngs(store, job.id, range(3))]
    h, w, _ = stored[0].shape
    for i, picture in enumerate(stored):  # two columns, a border of 2 around each
        y, x = (i // 2) * (h + 2) + 2, (i % 2) * (w + 2) + 2
        assert np.abs(grid[y : y + h, x : x + w] - picture).max() <= 1


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
    ("content", "reason"),
    [(None, "LookupError: a picture is no longer in storage"), (b"no PNG", "ValueError: a picture is damaged")],
)
def test_a_job_whose_grid_cannot_be_composed_fails(
    runner: Runner, store: JobStore, create: Create, content: bytes | None, reason: str
) -> None:
    job = create(LISTS * 3)  # more than a batch, so that the first pictures are read again for the grid
    while not store.done_count(job.id):
        runner.run_once()
    if content is None:
        (runner.storer.files.folder(job.id) / pictures.picture(0)).unlink()
    else:
        runner.storer.files.write(job.id, pictures.picture(0), content)
    run(runner, job.id)
    assert error_of(store, job).startswith(f"the result cannot be composed: {reason}")


@pytest.mark.parametrize("what", ["verdict", "record"])
def test_what_cannot_be_read_of_a_job_fails_it_alone(
    runner: Runner, store: JobStore, create: Create, connection: Redis, what: str
) -> None:
    broken, whole = create(LISTS * 3), create()
    while not store.done_count(broken.id):
        runner.run_once()
    if what == "verdict":
        connection.hset(keys.verdicts(broken.id), "0", b"no JSON")
    else:
        connection.hset(keys.job(broken.id), "record", "{}")
    run(runner, broken.id, whole.id)
    assert error_of(store, broken).startswith("the result cannot be composed: ValidationError")
    assert status(store, whole) == "finished"
