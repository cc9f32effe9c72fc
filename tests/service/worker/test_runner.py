"""A worker's loop, driven step by step in this process against a real Redis."""

import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from redis import Redis

from service.settings import Settings
from service.store import keys
from service.store.jobs import JobStore
from service.store.sweep import OVERDUE
from service.worker.runner import Rate, Runner
from shared.checkpoint import publish
from shared.diffusion.denoise import sample
from shared.diffusion.model import load_denoiser
from shared.evaluator import load_evaluator
from shared.options import SamplingOptions, picture_seed
from shared.pictures import to_uint8
from shared.registry import resolve
from shared.vocabulary import ICLEVR
from tests.service.api.answers import pixels
from tests.service.worker.conftest import (
    LISTS,
    QUICK,
    Counting,
    Create,
    engine_of,
    error_of,
    model_of,
    pngs,
    run,
    settle,
    status,
    verdicts_of,
)


def test_a_job_gives_the_same_pictures_as_the_sampling_loop(
    runner: Runner, store: JobStore, create: Create, settings: Settings
) -> None:
    job = create()
    run(runner, job.id)
    assert status(store, job) == "finished"
    denoiser = load_denoiser(resolve(settings.storage, "toy", "denoiser"))
    labels = torch.tensor([denoiser.vocabulary.multi_hot(one) for one in LISTS])
    images = sample(denoiser.stepper(), labels, QUICK, [picture_seed(7, i) for i in range(3)])
    stored = [pixels(png) for png in pngs(store, job.id, range(3))]
    assert np.abs(np.stack(stored) - to_uint8(images).astype(np.int16)).max() <= 1
    evaluator = load_evaluator(resolve(settings.storage, None, "evaluator"), "cpu")
    probabilities = evaluator.probabilities(images)
    for verdict, row in zip(verdicts_of(store, job), probabilities.tolist(), strict=True):
        assert list(verdict.probabilities.values()) == pytest.approx(row, abs=1e-4)


def test_a_repeat_gives_the_pictures_of_a_request_with_the_next_seed(
    runner: Runner, store: JobStore, create: Create
) -> None:
    scored, single = create(repeats=2, seed=40), create(seed=41)
    run(runner, scored.id)
    run(runner, single.id)
    for one, other in zip(pngs(store, scored.id, range(3, 6)), pngs(store, single.id, range(3)), strict=True):
        assert np.abs(pixels(one) - pixels(other)).max() <= 1


def test_two_requests_share_a_batch(runner: Runner, store: JobStore, create: Create) -> None:
    counting = Counting(engine_of(runner))
    jobs = create(), create(LISTS[:2], options=SamplingOptions(steps=6, guidance=1.0))
    run(runner, *(job.id for job in jobs))
    assert [status(store, job) for job in jobs] == ["finished", "finished"]
    assert counting.batches == [5, 5, 5, 5, 2, 2]


def test_a_request_joins_a_running_batch(runner: Runner, store: JobStore, create: Create) -> None:
    counting = Counting(engine_of(runner))
    first = create()
    runner.run_once()
    second = create(LISTS[:1])
    run(runner, first.id, second.id)
    assert counting.batches == [3, 4, 4, 4, 1]
    assert [status(store, job) for job in (first, second)] == ["finished", "finished"]


def test_the_batch_is_bounded_and_the_other_pictures_follow(
    runner: Runner, store: JobStore, create: Create, settings: Settings
) -> None:
    counting = Counting(engine_of(runner))
    job = create(LISTS * 4)
    run(runner, job.id)
    assert status(store, job) == "finished"
    assert counting.batches == [8] * 4 + [4] * 4
    assert settings.batch_pictures == 8


def test_a_worker_fails_its_current_job_once_it_is_overdue(
    runner: Runner, create: Create, connection: Redis, store: JobStore
) -> None:
    job = create()
    runner.run_once()
    connection.zadd(keys.OPEN, {job.id: connection.time()[0]})
    run(runner, job.id)
    assert error_of(store, job) == OVERDUE
    settle(runner)


def test_a_cancelled_job_leaves_the_batch_at_the_next_step_and_the_others_are_unaffected(
    runner: Runner, store: JobStore, create: Create, connection: Redis
) -> None:
    undisturbed = create(LISTS[:2])
    run(runner, undisturbed.id)
    counting = Counting(engine_of(runner))
    cancelled, other = create(options=SamplingOptions(steps=1000)), create(LISTS[:2])
    runner.run_once()
    assert store.cancel(cancelled.id)
    run(runner, other.id)
    assert counting.batches == [5, 2, 2, 2]
    assert [status(store, job) for job in (cancelled, other)] == ["cancelled", "finished"]
    assert pngs(store, other.id, range(2)) == pngs(store, undisturbed.id, range(2))
    assert connection.xlen(keys.stream(other.digest)) == 0


def test_pending_pictures_of_a_cancelled_job_take_no_places_in_the_batch(
    runner: Runner, store: JobStore, create: Create
) -> None:
    counting = Counting(engine_of(runner))
    cancelled, other = create(LISTS * 10), create(LISTS)
    store.cancel(cancelled.id)
    run(runner, other.id)
    assert counting.batches == [3, 3, 3, 3]
    assert status(store, other) == "finished"


def test_idle_time_does_not_count_in_a_workers_rate(runner: Runner, create: Create) -> None:
    assert runner.rate.per_s == 0.0
    runner.run_once()  # finds no pictures
    assert runner.rate.seconds == 0.0
    begun = time.monotonic()
    run(runner, create().id)
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


@pytest.fixture
def limited(runner: Runner, tmp_path: Path) -> Runner:
    """A worker whose own evaluator does not know the first label."""
    publish(
        tmp_path, "own", {"x": torch.zeros(1)}, kind="evaluator", vocabulary=ICLEVR.names[1:], config={}, training={}
    )
    runner.models._own_judge = tmp_path / "own.safetensors"
    return runner


def test_a_model_of_another_vocabulary_has_a_judge_of_its_own(limited: Runner, store: JobStore, create: Create) -> None:
    job = create(model="other")
    run(limited, job.id)
    assert status(store, job) == "finished"
    loaded = limited.models.get(job.digest)
    assert loaded is not None
    assert loaded.judged_by == model_of(limited).judged_by  # the one in storage


def test_a_job_fails_if_no_evaluator_knows_its_models_labels(
    limited: Runner, store: JobStore, create: Create, tmp_path: Path
) -> None:
    limited.models.cache.storage = tmp_path
    shutil.copy(resolve(store.settings.storage, "other", "denoiser"), tmp_path)
    (tmp_path / "promoted.json").write_text('{"evaluator": "own"}')
    job = create(model="other")
    run(limited, job.id)
    assert f"does not know, nor any other: {ICLEVR.names[0]}" in error_of(store, job)


def test_each_model_has_its_own_batch(runner: Runner, store: JobStore, create: Create) -> None:
    one, other = create(), create(model="other")
    run(runner, one.id, other.id)
    assert [status(store, job) for job in (one, other)] == ["finished", "finished"]
    assert {model.name for model in runner.models} == {"toy", "other"}
    assert pngs(store, one.id, range(3)) != pngs(store, other.id, range(3))


@pytest.mark.parametrize(("model", "words"), [("toy", "no longer the checkpoint"), ("gone", "no such denoiser")])
def test_a_job_without_its_checkpoint_fails_with_a_reason(
    runner: Runner, store: JobStore, create: Create, model: str, words: str
) -> None:
    job = create(model=model, digest="0" * 64)
    run(runner, job.id)
    assert words in error_of(store, job)
