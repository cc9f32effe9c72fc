"""Workers that die or lose their device, and pictures that break a batch: nobody else is affected."""

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from redis import Redis

from service.contract.records import JobRecord
from service.settings import Settings
from service.store import keys, workers
from service.store.jobs import JobStore
from service.worker.loaded_models import LoadedModel, LoadedModels
from service.worker.runner import Runner
from shared.diffusion.denoise import Row
from tests.service.worker.conftest import Counting, status


def test_a_worker_that_wakes_up_after_its_lease_expired_changes_nothing(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord], connection: Redis, settings: Settings
) -> None:
    job = create()
    paused = Runner(connection, settings, "w2")
    model = paused.models.load()
    paused.run_once()
    runner.run(job.id)
    before = connection.hgetall(keys.job(job.id)), connection.hgetall(keys.png(job.id))
    paused.renew_claims()
    while paused.models.busy:
        paused.run_once()
    assert (connection.hgetall(keys.job(job.id)), connection.hgetall(keys.png(job.id))) == before
    assert connection.xlen(model.stream.key) == 0


def test_a_stopping_worker_releases_its_pictures(
    store: JobStore, create: Callable[..., JobRecord], connection: Redis, settings: Settings
) -> None:
    patient = settings.model_copy(update={"lease_s": 3600.0})  # longer than a test may take
    job = create()
    stopping, other = Runner(connection, patient, "w2"), Runner(connection, patient, "w3")
    stopping.models.load()
    stopping.run_once()
    stopping.stopping = True
    stopping.run(job.id)
    stopping.release_claims()
    assert not stopping.models.busy
    assert connection.llen(store.queue.key) == 2
    other.run(job.id)
    assert status(store, job) == "finished"


def test_a_picture_that_breaks_the_batch_fails_only_its_job(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord], connection: Redis
) -> None:
    good, bad = create(), create([["gray cube"]])

    class Poisoned(Counting):
        def step(self, rows: Sequence[Row]) -> None:
            if any(row.labels[0] for row in rows):
                raise RuntimeError("poison")
            super().step(rows)

    Poisoned(runner.models.load())
    runner.run(bad.id)
    runner.run(good.id)
    assert status(store, good) == "finished"
    assert status(store, bad) == "failed"
    assert connection.hget(keys.job(bad.id), "error") == b"picture 0: RuntimeError: poison"
    assert connection.xlen(runner.models.load().stream.key) == 0


@pytest.mark.parametrize("where", ["new_row", "step"])
def test_if_the_device_fails_the_worker_ends_and_no_job_fails(
    runner: Runner,
    store: JobStore,
    create: Callable[..., JobRecord],
    connection: Redis,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    ended: list[int] = []
    job = create()

    def fail(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(runner.models.load().stepper, where, fail)
    for module in ("engine", "runner"):
        monkeypatch.setattr(f"service.worker.{module}.lost", lambda error, device: True)
    monkeypatch.setattr("service.worker.runner.end_process", ended.append)
    with pytest.raises(torch.AcceleratorError):
        runner.run(job.id)
    assert ended == [70]
    assert status(store, job) == "running"
    stream = runner.models.load().stream
    assert connection.xpending(stream.key, "workers")["pending"] == 3  # other workers take them over


def test_a_picture_that_kills_workers_fails_only_its_job(
    store: JobStore, create: Callable[..., JobRecord], connection: Redis, settings: Settings
) -> None:
    quick = settings.model_copy(update={"lease_s": 0.2})
    good, bad = create(), create([["gray cube"]])

    class Death(BaseException):
        pass

    class Deadly(Counting):
        def step(self, rows: Sequence[Row]) -> None:
            if any(row.labels[0] for row in rows):
                raise Death
            super().step(rows)

    deaths = 0
    for name in itertools.count():
        runner = Runner(connection, quick, f"w{name}")
        Deadly(runner.models.load())
        try:
            runner.run(bad.id)
            runner.run(good.id)
            break
        except Death:
            deaths += 1
            assert deaths <= 4
    assert deaths == 4
    assert [status(store, job) for job in (good, bad)] == ["finished", "failed"]
    reason = connection.hget(keys.job(bad.id), "error")
    assert reason == b"workers died 4 times while sampling picture 0"


@pytest.mark.parametrize("loses_device", [False, True])
def test_a_model_that_kills_the_workers_that_load_it_fails_its_job(
    store: JobStore,
    create: Callable[..., JobRecord],
    connection: Redis,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    loses_device: bool,
) -> None:
    """One that is too large for their memory, for example; it must not kill them until the job's time is over."""

    class Death(BaseException):
        pass

    read = LoadedModels.read_model

    def die(models: LoadedModels, name: str | None, *arguments: Any, **options: Any) -> LoadedModel:
        if name == "other":
            raise torch.AcceleratorError("CUDA error: an illegal memory access") if loses_device else Death
        return read(models, name, *arguments, **options)

    def lost(error: Exception, device: torch.device) -> bool:
        return isinstance(error, torch.AcceleratorError)

    def end(status: int) -> None:
        raise Death

    monkeypatch.setattr(LoadedModels, "read_model", die)
    monkeypatch.setattr("service.worker.runner.end_process", end)
    for module in ("loaded_models", "runner"):
        monkeypatch.setattr(f"service.worker.{module}.lost", lost)
    job, deaths = create(model="other"), 0
    for number in range(9):
        try:
            Runner(connection, settings, f"w{number}").run(job.id)
        except Death:
            deaths += 1
    assert (deaths, status(store, job)) == (4, "failed")
    reason = connection.hget(keys.job(job.id), "error")
    assert reason == b"the model cannot be loaded: other: workers died 4 times while they loaded it"


def test_a_model_that_is_being_loaded_by_live_workers_or_was_in_vain_kills_nobody(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord], connection: Redis
) -> None:
    job, lost = create(model="other"), create(model="toy", digest="0" * 64)
    for number in range(9):
        workers.announce(connection, f"live{number}", {}, 60)
        workers.begin_loading(connection, job.digest, f"live{number}")
    runner.run(lost.id)
    runner.run(job.id)
    assert [status(store, one) for one in (job, lost)] == ["finished", "failed"]
    assert not connection.exists(keys.loading(lost.digest))
    assert connection.scard(keys.loading(job.digest)) == 9
    assert 0 < connection.ttl(keys.loading(job.digest)) <= workers.LOADS_COUNT_S


def test_three_deaths_that_a_picture_has_not_caused_do_not_fail_its_job(
    store: JobStore, create: Callable[..., JobRecord], connection: Redis, settings: Settings
) -> None:
    """As when spot instances are preempted: twice with a full batch, and once with its pictures as suspects."""
    quick, job = settings.model_copy(update={"lease_s": 0.2}), create()
    for name in ("w2", "w3", "w4"):
        preempted = Runner(connection, quick, name)
        preempted.models.load()
        while not preempted.models.busy:
            preempted.run_once()
    assert [[claim.alone for claim in model.claims.values()] for model in preempted.models] == [[True] * 3]
    Runner(connection, quick, "w5").run(job.id)
    assert status(store, job) == "finished"


def test_a_worker_that_knows_of_suspects_takes_no_new_pictures(
    runner: Runner, create: Callable[..., JobRecord], connection: Redis
) -> None:
    """Else it would never be free to sample them alone."""
    model = runner.models.load()
    create()
    mine, *suspects = model.stream.claim_new(5)
    entries = [claim.entry for claim in suspects]
    connection.xclaim(model.stream.key, "workers", "dead", 0, entries, idle=10**6, retrycount=2, justid=True)
    model.admit([mine])
    create()
    runner.run_once()
    assert model.stream.suspects == 2
    assert model.claims.keys() == {mine.picture.key}


def test_only_suspects_share_a_worker(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord], connection: Redis
) -> None:
    toy, other = runner.models.load(), runner.models.load("other")
    suspects, before = create(), create(model="other")
    entries = [claim.entry for claim in toy.stream.claim_new(5)]
    connection.xclaim(toy.stream.key, "workers", "dead", 0, entries, idle=10**6, retrycount=2, justid=True)
    other.admit(other.stream.claim_new(5))
    after = [create(model=model) for model in ("toy", "other")]
    seen = list[int]()
    while any(store.is_open(job.id) for job in (suspects, before, *after)):
        toy.stream._looked_at = 0.0 if not seen else toy.stream._looked_at
        runner.run_once()
        claims = [claim for loaded in runner.models for claim in loaded.claims.values()]
        assert len({claim.alone for claim in claims}) <= 1
        seen.append(len(claims))
    assert {status(store, job) for job in (suspects, before, *after)} == {"finished"}
    assert sum(seen) == 3 * 3 + 3 * 3 + 6 * 3  # after all but the last of four steps


def test_a_job_of_a_newer_version_is_left_to_other_workers(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord], connection: Redis
) -> None:
    newer, plain = create(), create()
    for picture in connection.lrange(keys.pending(newer.id), 0, -1):
        connection.lrem(keys.pending(newer.id), 1, picture)
        connection.rpush(keys.pending(newer.id), picture.replace(b'"clip_x0"', b'"glow":0.5,"clip_x0"'))
    runner.run(plain.id)
    assert status(store, plain) == "finished"
    assert status(store, newer) == "queued"
    stream = runner.models.load().stream
    assert connection.xlen(stream.key) == 3
    # A worker that knows the option takes them at once.
    assert (
        len(connection.xpending_range(stream.key, "workers", "-", "+", 9, idle=int(1000 * store.settings.lease_s))) == 3
    )


def test_a_job_whose_record_is_of_a_newer_version_is_left_to_other_workers(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord], connection: Redis
) -> None:
    job = create()
    connection.hset(keys.job(job.id), "record", "{}")
    runner.run(job.id)
    assert status(store, job) == "queued"
    store.requeue(job.id)
    assert store.fail(job.id, "overdue")


def test_while_storage_hangs_other_models_are_served_and_the_job_fails_in_the_end(
    connection: Redis, own: Settings, store: JobStore, create: Callable[..., JobRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = Runner(connection, own, "w1")
    runner.models.load()
    unknown, loaded = create(model="other"), create()

    def hang(*_: object) -> None:
        while store.is_open(loaded.id):
            time.sleep(0.01)
        raise TimeoutError

    monkeypatch.setattr("service.worker.checkpoint_cache.resolve", hang)
    runner.run(unknown.id)
    assert [status(store, job) for job in (loaded, unknown)] == ["finished", "failed"]
    reason = connection.hget(keys.job(unknown.id), "error")
    assert reason == f"the model cannot be loaded: {own.storage}: has not answered within 120 s".encode()
