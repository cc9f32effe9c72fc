"""Completed jobs: scores, grid, and workers that die in between."""

import contextlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from redis import Redis

from service.contract.records import JobRecord, JobResult
from service.settings import Settings
from service.store import keys
from service.store.claims import Claim
from service.store.jobs import JobStore
from service.worker import completion
from service.worker.runner import Runner
from shared.evaluator import score_set
from tests.service.api.answers import pixels
from tests.service.store.helpers import done, record
from tests.service.worker.conftest import LISTS, status, verdicts_of


def test_the_result_is_the_score_of_the_set(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord], connection: Redis
) -> None:
    job = create(repeats=3)
    runner.run(job.id)
    raw = connection.hget(keys.job(job.id), "result")
    assert raw is not None
    result = JobResult.model_validate_json(raw)
    verdicts = verdicts_of(store, job)
    names = runner.models.judge.vocabulary.names
    for r, scores in enumerate(result.repeats):
        part = verdicts[r * 3 : r * 3 + 3]
        probabilities = torch.tensor([[verdict.probabilities[name] for name in names] for verdict in part])
        targets = torch.tensor([runner.models.judge.vocabulary.multi_hot(one) for one in LISTS])
        expected = score_set(probabilities, targets, names)
        assert (scores.accuracy, scores.exact_match, scores.f1) == (
            expected.accuracy,
            expected.exact_match,
            expected.f1,
        )
    assert result.repeats[result.best].accuracy == max(scores.accuracy for scores in result.repeats)


def test_of_repeats_with_the_same_accuracy_the_first_with_most_exact_matches_is_best() -> None:
    _, made = done(Claim("1-1", next(record(1).pictures()), 0.0))
    verdicts = [made.verdict.model_copy(update={"index": i, "exact": i > 0}) for i in range(3)]
    assert completion.score(verdicts, 1).best == 1


def test_the_grid_shows_the_pictures_in_order(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord], connection: Redis
) -> None:
    job = create()
    runner.run(job.id)
    raw = connection.hget(keys.png(job.id), "grid")
    assert isinstance(raw, bytes)
    grid = pixels(raw)
    stored = [pixels(png) for png in store.pngs(job.id, range(3))]
    h, w, _ = stored[0].shape
    for i, picture in enumerate(stored):  # two columns, a border of 2 around each
        y, x = (i // 2) * (h + 2) + 2, (i % 2) * (w + 2) + 2
        assert np.abs(grid[y : y + h, x : x + w] - picture).max() <= 1


def test_of_pictures_in_earlier_batches_only_the_first_is_decoded_again_for_the_grid(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = list[list[int]]()

    def pngs(job_id: str, indices: list[int]) -> list[bytes]:
        fetched.append(indices)
        return [store_pngs(job_id, [index])[0] for index in indices]

    store_pngs = runner.store.pngs
    monkeypatch.setattr(runner.store, "pngs", pngs)
    lists = LISTS * 4  # more than a batch
    recent = runner.storer._recent
    job = create(lists)
    runner.run(job.id)
    assert (fetched, len(recent)) == ([[0]], 0)
    monkeypatch.setattr(completion, "RECENT_BYTES", 5 * pixels(store.pngs(job.id, [1])[0]).size)
    other = create(lists)
    runner.run(other.id)
    assert fetched[1] == list(range(len(lists) - 5))
    grids = [store.connection.hget(keys.png(one.id), "grid") for one in (job, other)]
    assert np.array_equal(*map(pixels, grids))


def test_pixels_at_hand_do_not_hold_those_of_their_whole_batch() -> None:
    batch, recent = np.zeros((2, 4, 4, 3), np.uint8), completion.RecentPixels()
    _, made = done(Claim("1-1", list(record(2).pictures())[1], 0.0))
    recent.add([replace(made, pixels=batch[1])])
    assert [pixels.base for pixels in recent.values()] == [None]


def die(*given: object) -> None:
    """Take the place of a call in which the worker is killed."""
    raise SystemExit


def test_a_job_is_completed_after_a_worker_died_between_last_picture_and_grid(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = create()

    with monkeypatch.context() as patch:
        patch.setattr(runner.store, "open_verdicts", die)
        with pytest.raises(SystemExit):
            runner.run(job.id)
    assert status(store, job) == "running"
    runner.run(job.id)
    assert status(store, job) == "finished"


def test_a_waiting_worker_completes_a_job_whose_last_picture_came_from_a_dying_worker(
    runner: Runner,
    create: Callable[..., JobRecord],
    connection: Redis,
    settings: Settings,
    store: JobStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = create()
    maker = Runner(connection, settings, "w2")
    maker.models.load()
    maker.run_once()  # claims all pictures

    run_once, iterations = runner.run_once, iter(range(100))

    def run_both(job_id: str) -> bool:
        assert next(iterations, None) is not None, "it waits for ever"
        if maker.models.busy:
            with contextlib.suppress(SystemExit):
                maker.run_once()
        return run_once(job_id)

    monkeypatch.setattr("service.worker.runner.CHECK_EVERY_S", 0.1)
    monkeypatch.setattr(maker.store, "open_verdicts", die)
    monkeypatch.setattr(runner, "run_once", run_both)
    runner.run(job.id)
    assert status(store, job) == "finished"


def test_a_job_whose_grid_cannot_be_composed_fails(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord], connection: Redis
) -> None:
    job = create(LISTS * 3)  # more than a batch, so that the first pictures are read again for the grid
    while not store.done_count(job.id):
        runner.run_once()
    connection.hset(keys.png(job.id), "0", b"no PNG")
    runner.run(job.id)
    assert status(store, job) == "failed"


def test_a_verdict_that_cannot_be_read_fails_its_job_alone(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, whole = create(), create()
    with monkeypatch.context() as patch:
        patch.setattr(completion, "complete_jobs", lambda *given: None)
        while not all(store.done_count(one.id) == one.total for one in (broken, whole)):
            runner.run_once()
    store.connection.hset(keys.verdicts(broken.id), "1", b"no JSON")
    completion.complete_jobs(store, runner.models.judged_by, {broken.id, whole.id}, {}, None)
    assert (status(store, broken), status(store, whole)) == ("failed", "finished")
