"""A worker's loop, driven step by step in this process against a real Redis."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from redis import Redis

from service.contract.records import JobRecord
from service.settings import Settings
from service.store import keys
from service.store.jobs import JobStore
from service.telemetry.metrics import WORKER
from service.worker.process import PictureWorker
from service.worker.runner import Rate, Runner
from shared.checkpoint import publish
from shared.diffusion.denoise import sample
from shared.diffusion.model import load_denoiser
from shared.evaluator import Evaluator, load_evaluator
from shared.options import SamplingOptions, picture_seed
from shared.pictures import to_uint8
from shared.registry import resolve
from shared.vocabulary import ICLEVR, Vocabulary
from tests.service.api.answers import pixels
from tests.service.worker.conftest import LISTS, QUICK, Counting, status, verdicts_of


def test_a_job_gives_the_same_pictures_as_the_sampling_loop(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord], settings: Settings
) -> None:
    job = create()
    runner.run(job.id)
    assert status(store, job) == "finished"
    denoiser = load_denoiser(resolve(settings.storage, "toy", "denoiser"))
    labels = torch.tensor([denoiser.vocabulary.multi_hot(one) for one in LISTS])
    images = sample(denoiser.stepper(), labels, QUICK, [picture_seed(7, i) for i in range(3)])
    stored = [pixels(png) for png in store.pngs(job.id, range(3))]
    assert np.abs(np.stack(stored) - to_uint8(images).astype(np.int16)).max() <= 1
    evaluator = load_evaluator(resolve(settings.storage, None, "evaluator"), "cpu")
    probabilities = evaluator.probabilities(images)
    for verdict, row in zip(verdicts_of(store, job), probabilities.tolist(), strict=True):
        assert list(verdict.probabilities.values()) == pytest.approx(row, abs=1e-4)


def test_a_repeat_gives_the_pictures_of_a_request_with_the_next_seed(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord]
) -> None:
    scored, single = create(repeats=2, seed=40), create(seed=41)
    runner.run(scored.id)
    runner.run(single.id)
    for one, other in zip(store.pngs(scored.id, range(3, 6)), store.pngs(single.id, range(3)), strict=True):
        assert np.abs(pixels(one) - pixels(other)).max() <= 1


def test_two_requests_share_a_batch(runner: Runner, store: JobStore, create: Callable[..., JobRecord]) -> None:
    counting = Counting(runner.models.load())
    first, second = create(), create(LISTS[:2], options=SamplingOptions(steps=6, guidance=1.0))
    runner.run(first.id)
    assert status(store, first) == "finished"
    assert status(store, second) == "running"
    runner.run(second.id)
    assert status(store, second) == "finished"
    assert counting.batches == [5, 5, 5, 5, 2, 2]


def test_a_request_joins_a_running_batch(runner: Runner, store: JobStore, create: Callable[..., JobRecord]) -> None:
    model = runner.models.load()
    counting = Counting(model)
    first = create()
    runner.run_once()
    second = create(LISTS[:1])
    while runner.models.busy:
        runner.run_once()
    assert counting.batches == [3, 4, 4, 4, 1]
    assert [status(store, job) for job in (first, second)] == ["finished", "finished"]


def test_the_batch_is_bounded_and_the_other_pictures_follow(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord], settings: Settings
) -> None:
    counting = Counting(runner.models.load())
    job = create(LISTS * 4)
    runner.run(job.id)
    assert status(store, job) == "finished"
    assert counting.batches == [8] * 4 + [4] * 4
    assert settings.batch_pictures == 8


def test_a_worker_fails_its_current_job_once_it_is_overdue(
    runner: Runner,
    create: Callable[..., JobRecord],
    connection: Redis,
    store: JobStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.worker.runner.CHECK_EVERY_S", 0)
    job = create()
    connection.hset(keys.job(job.id), "overdue_at", connection.time()[0])
    connection.lpop(store.queue.key)  # as a worker that takes the job does
    runner.run(job.id)
    assert status(store, job) == "failed"
    assert not runner.models.busy


def test_a_cancelled_job_leaves_the_batch_at_the_next_step_and_the_others_are_unaffected(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord], connection: Redis
) -> None:
    model = runner.models.load()
    undisturbed = create(LISTS[:2])
    runner.run(undisturbed.id)
    counting = Counting(model)
    cancelled, other = create(options=SamplingOptions(steps=1000)), create(LISTS[:2])
    runner.run_once()
    assert store.cancel(cancelled.id)
    runner.run(other.id)
    assert counting.batches == [5, 2, 2, 2]
    assert [status(store, job) for job in (cancelled, other)] == ["cancelled", "finished"]
    assert store.pngs(other.id, range(2)) == store.pngs(undisturbed.id, range(2))
    assert connection.xlen(model.stream.key) == 0


def test_pending_pictures_of_a_cancelled_job_take_no_places_in_the_batch(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord]
) -> None:
    counting = Counting(runner.models.load())
    cancelled, other = create(LISTS * 10), create(LISTS)
    store.cancel(cancelled.id)
    runner.run(other.id)
    assert counting.batches == [3, 3, 3, 3]
    assert status(store, other) == "finished"


def test_a_job_that_finished_in_another_jobs_batch_leaves_nothing_in_rq(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord], connection: Redis, settings: Settings
) -> None:
    taken, beside = create(), create()
    worker = PictureWorker(runner)
    found = worker.dequeue_job_and_maintain_ttl(None)
    assert found is not None
    assert found[0].args == [taken.id]
    runner.run(taken.id)
    assert [status(store, job) for job in (taken, beside)] == ["finished", "finished"]
    assert worker.dequeue_job_and_maintain_ttl(None) is None
    assert connection.keys("rq:job:*") == [found[0].key.encode()]  # which its worker has not ended yet


def test_idle_time_does_not_count_in_a_workers_rate(runner: Runner, create: Callable[..., JobRecord]) -> None:
    assert runner.rate.per_s == 0.0
    runner.run_once()  # finds no pictures
    assert runner.rate.seconds == 0.0
    begun = time.monotonic()
    runner.run(create().id)
    assert runner.rate.pictures == 3
    assert 3 / (time.monotonic() - begun) < runner.rate.per_s


def test_a_rate_follows_recent_work() -> None:
    rate = Rate()
    for _ in range(200):
        rate.add(5, 1.0)
    assert rate.per_s == pytest.approx(5.0)
    for _ in range(200):
        rate.add(1, 1.0)
    assert rate.per_s == pytest.approx(1.0, abs=0.3)


def test_a_model_of_another_vocabulary_has_a_judge_of_its_own(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord]
) -> None:
    """The worker's own evaluator does not know a label of the model, but the one in storage does."""
    runner.models.load()
    runner.models.judge = Evaluator(Vocabulary(ICLEVR.names[1:])).freeze()
    job = create(model="other")
    runner.run(job.id)
    assert status(store, job) == "finished"
    loaded = runner.models.get(job.digest)
    assert loaded is not None
    assert loaded.judged_by == runner.models.judged_by  # which says what the worker began with


def test_a_job_fails_if_no_evaluator_knows_its_models_labels(
    store: JobStore, create: Callable[..., JobRecord], connection: Redis, settings: Settings, tmp_path: Path
) -> None:
    storage = Path(shutil.copytree(str(settings.storage), tmp_path / "storage"))
    runner = Runner(connection, settings.model_copy(update={"storage": storage}), "w2")
    runner.models.load()
    known = ICLEVR.names[1:]
    runner.models.judge = Evaluator(Vocabulary(known)).freeze()
    name, tensors = resolve(storage, None, "evaluator").stem, {"x": torch.zeros(1)}
    publish(storage, name, tensors, kind="evaluator", vocabulary=known, config={}, training={})
    job = create(model="other")
    runner.run(job.id)
    assert status(store, job) == "failed"
    reason = connection.hget(keys.job(job.id), "error")
    assert isinstance(reason, bytes)
    assert f"does not know, nor any other: {ICLEVR.names[0]}" in reason.decode()


def test_each_model_has_its_own_batch(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord], settings: Settings
) -> None:
    one, other = create(), create(model="other")
    runner.run_once()
    runner.run(other.id)
    runner.run(one.id)
    assert [status(store, job) for job in (one, other)] == ["finished", "finished"]
    assert {model.name for model in runner.models} == {"toy", "other"}
    assert store.pngs(one.id, range(3)) != store.pngs(other.id, range(3))


def test_at_most_as_many_models_stay_loaded_as_the_settings_allow(
    connection: Redis, settings: Settings, create: Callable[..., JobRecord]
) -> None:
    runner = Runner(connection, settings.model_copy(update={"loaded_models": 1}), "w1")
    runner.models.load()
    runner.run(create(model="other").id)
    assert [model.name for model in runner.models] == ["other"]


@pytest.mark.parametrize(("model", "words"), [("toy", "no longer the checkpoint"), ("gone", "no such denoiser")])
def test_a_job_without_its_checkpoint_fails_with_a_reason(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord], connection: Redis, model: str, words: str
) -> None:
    job = create(model=model, digest="0" * 64)
    runner.run(job.id)
    assert status(store, job) == "failed"
    reason = connection.hget(keys.job(job.id), "error")
    assert isinstance(reason, bytes)
    assert words in reason.decode()


def test_a_job_that_is_unknown_or_has_ended_is_not_run(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord], connection: Redis
) -> None:
    job = create()
    store.fail(job.id, "why")
    runner.run("nobody")
    runner.run(job.id)
    assert status(store, job) == "failed"


def test_a_picture_of_unknown_age_does_not_count_as_having_waited_since_1970(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord]
) -> None:
    def waited_s() -> float:
        return WORKER.get_sample_value("labelgrid_picture_wait_seconds_sum", {"model": "toy"}) or 0.0

    before, job = waited_s(), create()  # with an id as former versions made them
    runner.run(job.id)
    assert status(store, job) == "finished"
    assert waited_s() == before
