"""What a worker keeps loaded: no job waits for another model's job, and each has the weights it was accepted with."""

from pathlib import Path

import pytest
from redis import Redis

from service.contract.options import PictureOptions
from service.settings import Settings
from service.store import workers
from service.store.jobs import JobStore
from service.worker.models import TURN_S
from service.worker.runner import Runner
from shared.checkpoint import CheckpointInfo, read_info
from shared.evaluator import JudgeInside
from tests.service.worker.conftest import (
    LISTS,
    LONG,
    Create,
    create_upload,
    engine_of,
    error_of,
    load,
    pngs,
    run,
    run_until,
    started,
    status,
)
from tests.toy_checkpoint import publish_toy_denoiser


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of another machine, which no test gives a model that storage no longer has."""
    return tmp_path_factory.mktemp("elsewhere")


@pytest.fixture
def own(settings: Settings, folder: Path) -> Settings:
    """Settings with the test's own storage. The cache is this run's: each model is compiled once."""
    return settings.model_copy(update={"storage": folder})


@pytest.fixture
def store(connection: Redis, own: Settings) -> JobStore:
    return JobStore(connection, own)


@pytest.fixture
def runner(connection: Redis, own: Settings) -> Runner:
    return started(connection, own)


def info_of(folder: Path, name: str = "toy") -> CheckpointInfo:
    return read_info(folder / f"{name}.safetensors")


# Storage changes.


def test_jobs_accepted_before_a_change_use_the_old_weights(
    runner: Runner, folder: Path, store: JobStore, create: Create
) -> None:
    old = info_of(folder)
    undisturbed = create()
    run(runner, undisturbed.id)
    begun = create()
    runner.run_once()
    new = publish_toy_denoiser(folder, "toy", 5)
    accepted, fresh = create(digest=old.digest), create(digest=new.digest)
    run(runner, begun.id, fresh.id, accepted.id)
    made = [pngs(store, job.id, range(2)) for job in (undisturbed, begun, accepted, fresh)]
    assert made[0] == made[1] == made[2] != made[3]
    assert {model.digest for model in runner.models} == {old.digest, new.digest}


@pytest.mark.parametrize(("is_busy", "is_draining"), [(False, False), (True, False), (False, True)])
def test_a_job_whose_checkpoint_only_another_worker_has_is_left_to_it(
    connection: Redis, own: Settings, folder: Path, elsewhere: Path, store: JobStore, create: Create,
    is_busy: bool, is_draining: bool,
) -> None:  # fmt: skip
    """Whether a worker has nothing to do, or wants its model while it samples another one; and if the other drains."""
    one, old = started(connection, own), publish_toy_denoiser(folder, "other", 6)
    two = started(connection, own.model_copy(update={"cache": elsewhere}), "w2")
    load(one, old)
    publish_toy_denoiser(folder, "other", 7)
    if is_busy:
        create(options=LONG)
    job = create(model="other", digest=old.digest)
    about = {"models": [{"name": old.name, "digest": old.digest}], "draining": is_draining}
    workers.announce(connection, one.name, about, lease_s=60)
    run_until(two, lambda: two._not_before)
    assert status(store, job) == "queued"
    run(one, job.id)
    assert status(store, job) == "finished"
    workers.withdraw(connection, one.name)
    two._not_before.clear()
    job = create(model="other", digest=old.digest)
    run(two, job.id)
    assert "no longer the checkpoint" in error_of(store, job)


# Evaluators.


def test_pictures_of_a_padded_network_are_judged_without_their_borders(runner: Runner, folder: Path) -> None:
    padded, judge = load(runner, publish_toy_denoiser(folder, "padded", 5, aspect=4 / 3)), engine_of(runner).judge
    assert padded.engine.judge == JudgeInside(judge, 4 / 3)


# What stays loaded, and what is loaded.


def test_unused_models_are_unloaded_but_never_the_last_one_or_one_with_pictures_in_progress(
    connection: Redis, own: Settings, folder: Path, store: JobStore, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.worker.models.IDLE_MODEL_S", 0.0)
    runner = started(connection, own)
    other = load(runner, info_of(folder, "other"))
    long = create(model="other", options=LONG)
    run_until(runner, lambda: [model.name for model in runner.models] == ["other"])
    assert other.claims
    run(runner, create().id)
    assert other.claims
    store.cancel(long.id)
    for _ in range(3):
        runner.run_once()
    assert [model.name for model in runner.models] == ["other"]


def test_at_most_as_many_models_stay_loaded_as_the_settings_allow(
    connection: Redis, own: Settings, folder: Path, store: JobStore, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many are wanted at the same time."""
    monkeypatch.setattr("service.worker.models.TURN_S", 3600.0)
    runner = started(connection, own.model_copy(update={"loaded_models": 1}))
    for seed in range(3):
        publish_toy_denoiser(folder, f"extra{seed}", 10 + seed)
    jobs, most = [create(model=f"extra{seed}") for seed in range(3)], 0
    while store.ended(job.id for job in jobs) != {job.id for job in jobs}:
        runner.run_once()
        most = max(most, len(list(runner.models)))
    assert [status(store, job) for job in jobs] == ["finished"] * 3
    assert most == 1


@pytest.mark.parametrize("wanted", ["denoiser", "upload", "lost"])
def test_a_job_of_another_model_does_not_wait_for_a_long_one(
    runner: Runner, store: JobStore, create: Create, wanted: str
) -> None:
    long = create(options=LONG)
    runner.run_once()
    if wanted == "upload":
        other = create_upload(runner, 3)
    else:
        other = create(model="other", digest="0" * 64 if wanted == "lost" else None)
    run(runner, other.id)
    assert status(store, other) == ("failed" if wanted == "lost" else "finished")
    assert status(store, long) == "running"


def test_a_model_is_used_as_soon_as_it_is_loaded(runner: Runner, create: Create) -> None:
    job = create(model="other")
    run_until(runner, lambda: runner.models.get(job.digest))
    assert not runner.idle  # else it would wait for an RQ job first


def test_a_job_that_an_idle_worker_may_take_is_left_to_it(
    runner: Runner, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.worker.runner.OTHERS_FIRST_S", 3600.0)
    create(options=LONG)
    runner.run_once()
    create(model="other")
    for _ in range(5):
        runner.run_once()
    assert not runner.models.fetches
    assert [loaded.name for loaded in runner.models] == ["toy"]


def test_with_one_place_the_models_take_turns(
    connection: Redis, own: Settings, store: JobStore, create: Create
) -> None:
    runner = started(connection, own.model_copy(update={"loaded_models": 1}))
    long = create(LISTS * 10, options=PictureOptions(steps=20))
    runner.run_once()
    runner.models._loaded_at -= TURN_S
    other = create(LISTS * 4, model="other")
    run(runner, other.id)
    assert [status(store, job) for job in (other, long)] == ["finished", "running"]
    runner.models._loaded_at -= TURN_S
    run(runner, long.id)
    assert status(store, long) == "finished"


@pytest.mark.parametrize("change", ["replaced", "damaged", "gone"])
def test_a_new_worker_can_still_sample_jobs_that_were_accepted(
    runner: Runner, connection: Redis, own: Settings, folder: Path, store: JobStore, create: Create, change: str
) -> None:
    undisturbed = create()
    run(runner, undisturbed.id)
    accepted = create()
    if change == "replaced":
        publish_toy_denoiser(folder, "toy", 5)
    elif change == "damaged":
        (folder / "toy.safetensors").write_bytes(b"junk")
    else:
        (folder / "toy.safetensors").unlink()
    run(Runner(connection, own, "w2"), accepted.id)
    assert pngs(store, accepted.id, range(3)) == pngs(store, undisturbed.id, range(3))
