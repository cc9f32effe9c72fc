"""Workers that die or lose their device, and pictures that break a batch: nobody else is affected."""

import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from redis import Redis

from service.settings import Settings
from service.store import keys, workers
from service.store.doorbell import ModelName
from service.store.jobs import JobStore
from service.worker.models import Fetched, Loaded, Models
from service.worker.runner import Runner
from shared.checkpoint import CheckpointKind, read_info
from shared.diffusion.denoise import Row
from shared.registry import resolve
from tests.service.worker.conftest import (
    Counting,
    Create,
    Death,
    die,
    engine_of,
    error_of,
    load,
    model_of,
    pngs,
    run,
    run_until,
    settle,
    started,
    status,
    verdicts_of,
)

GRAY = [["gray cube"]]


class Deadly(Counting):
    """Raises `error` in each step with a picture of the first label."""

    error: BaseException = Death()

    def step(self, rows: Sequence[Row]) -> None:
        if any(row.labels[0] for row in rows):
            raise self.error
        super().step(rows)


def test_a_worker_that_wakes_up_after_its_lease_expired_changes_nothing(
    runner: Runner, store: JobStore, create: Create, connection: Redis, settings: Settings
) -> None:
    job, paused = create(), started(connection, settings, "w2")
    paused.run_once()
    run(runner, job.id)
    before = connection.hgetall(keys.job(job.id)), verdicts_of(store, job), pngs(store, job.id, range(3))
    paused.renew_claims()
    settle(paused)
    assert (connection.hgetall(keys.job(job.id)), verdicts_of(store, job), pngs(store, job.id, range(3))) == before
    assert connection.xlen(keys.stream(job.digest)) == 0


def test_a_picture_that_breaks_the_batch_fails_only_its_job(
    runner: Runner, store: JobStore, create: Create, connection: Redis
) -> None:
    good, bad = create(), create(GRAY)
    Deadly(engine_of(runner)).error = RuntimeError("poison")
    run(runner, bad.id, good.id)
    assert status(store, good) == "finished"
    assert error_of(store, bad) == "picture 0: RuntimeError: poison"
    assert connection.xlen(keys.stream(good.digest)) == 0


@pytest.mark.parametrize("where", ["new_row", "step"])
def test_if_the_device_fails_the_worker_ends_and_no_job_fails(
    runner: Runner, store: JobStore, create: Create, connection: Redis,
    monkeypatch: pytest.MonkeyPatch, where: str,
) -> None:  # fmt: skip
    ended: list[int] = []
    job = create()

    def fail(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(engine_of(runner).stepper, where, fail)
    for module in ("engine", "runner"):
        monkeypatch.setattr(f"service.worker.{module}.lost", lambda error, device: True)
    monkeypatch.setattr("service.worker.runner.end_process", ended.append)
    with pytest.raises(torch.AcceleratorError):
        run(runner, job.id)
    assert ended == [70]
    assert status(store, job) == "running"
    assert connection.xpending(keys.stream(job.digest), "workers")["pending"] == 3  # other workers take them over


def deaths_until_ended(connection: Redis, settings: Settings, *job_ids: str, deadly: bool = False) -> int:
    """Have one worker after the other run the jobs; return how many died."""
    for number in range(9):
        runner = Runner(connection, settings, f"w{number}")
        if deadly:
            runner.models.load()
            Deadly(engine_of(runner))
        try:
            run(runner, *job_ids)
        except Death:
            continue
        return number
    raise AssertionError("the jobs have not ended")


def test_a_picture_that_kills_workers_fails_only_its_job(
    store: JobStore, create: Create, connection: Redis, settings: Settings
) -> None:
    good, bad = create(), create(GRAY)
    quick = settings.model_copy(update={"lease_s": 0.2})
    assert deaths_until_ended(connection, quick, bad.id, good.id, deadly=True) == 4
    assert status(store, good) == "finished"
    assert error_of(store, bad) == "workers died 4 times while sampling picture 0"


@pytest.mark.parametrize("loses_device", [False, True])
def test_a_model_that_kills_the_workers_that_load_it_fails_its_job(
    store: JobStore, create: Create, connection: Redis, settings: Settings,
    monkeypatch: pytest.MonkeyPatch, loses_device: bool,
) -> None:  # fmt: skip
    """One that is too large for their memory, for example; it must not kill them until the job's time is over."""

    def build(models: Models, model: ModelName, fetched: Fetched) -> Loaded:
        raise torch.AcceleratorError("CUDA error: an illegal memory access") if loses_device else Death

    monkeypatch.setattr(Models, "_load", build)
    monkeypatch.setattr("service.worker.runner.end_process", die)
    for module in ("models", "runner"):
        monkeypatch.setattr(f"service.worker.{module}.lost", lambda error, _: isinstance(error, torch.AcceleratorError))
    job = create(model="other")
    assert deaths_until_ended(connection, settings, job.id) == 4
    assert error_of(store, job) == "the model cannot be loaded: other: workers died 4 times while they loaded it"


def test_a_model_that_is_being_loaded_by_live_workers_or_was_in_vain_kills_nobody(
    runner: Runner, store: JobStore, create: Create, connection: Redis
) -> None:
    job, lost = create(model="other"), create(model="toy", digest="0" * 64)
    for number in range(9):
        workers.announce(connection, f"live{number}", {}, 60)
        workers.begin_loading(connection, job.digest, f"live{number}")
    run(runner, lost.id, job.id)
    assert [status(store, one) for one in (job, lost)] == ["finished", "failed"]
    assert not connection.exists(keys.loading(lost.digest))
    assert connection.scard(keys.loading(job.digest)) == 9
    assert 0 < connection.ttl(keys.loading(job.digest)) <= workers.LOADS_COUNT_S


def test_three_deaths_that_a_picture_has_not_caused_do_not_fail_its_job(
    store: JobStore, create: Create, connection: Redis, settings: Settings
) -> None:
    """As when spot instances are preempted: twice with a full batch, and once alone."""
    quick, job = settings.model_copy(update={"lease_s": 0.2}), create()
    for name in ("w2", "w3", "w4"):
        preempted = started(connection, quick, name)
        while not preempted.models.busy:
            preempted.run_once()
    assert [[claim.alone for claim in model.claims.values()] for model in preempted.models] == [[True]]
    run(Runner(connection, quick, "w5"), job.id)
    assert status(store, job) == "finished"


def test_a_worker_that_knows_of_suspects_takes_no_new_pictures(
    runner: Runner, create: Create, connection: Redis
) -> None:
    """Else it would never be free to sample them alone."""
    model = model_of(runner)
    create()
    mine, *suspects = model.stream.claim_new(5)
    entries = [claim.entry for claim in suspects]
    connection.xclaim(model.stream.key, "workers", "dead", 0, entries, idle=10**6, retrycount=2, justid=True)
    assert mine.picture is not None
    model.admit([(mine.picture, mine)])
    create()
    runner.run_once()
    assert model.stream.suspects == 2
    assert model.claims.keys() == {mine.picture.key}


def test_a_suspect_has_its_worker_for_itself(
    runner: Runner, store: JobStore, create: Create, connection: Redis
) -> None:
    toy = model_of(runner)
    other = load(runner, read_info(resolve(store.settings.storage, "other", "denoiser")))
    suspects, before = create(), create(model="other")
    entries = [claim.entry for claim in toy.stream.claim_new(5)]
    connection.xclaim(toy.stream.key, "workers", "dead", 0, entries, idle=10**6, retrycount=2, justid=True)
    other.admit([(claim.picture, claim) for claim in other.stream.claim_new(5) if claim.picture])
    jobs = [suspects, before, *(create(model=model) for model in ("toy", "other"))]
    seen = list[int]()
    while store.ended(job.id for job in jobs) != {job.id for job in jobs}:
        toy.stream._looked_at = 0.0 if not seen else toy.stream._looked_at
        runner.run_once()
        claims = [claim for loaded in runner.models for claim in loaded.claims.values()]
        assert len(claims) == 1 or not any(claim.alone for claim in claims)
        seen.append(len(claims))
    assert {status(store, job) for job in jobs} == {"finished"}
    assert sum(seen) == 3 * 3 + 3 * 3 + 6 * 3  # after all but the last of four steps


def test_a_job_of_a_newer_version_is_left_to_other_workers(
    runner: Runner, store: JobStore, create: Create, connection: Redis
) -> None:
    newer, plain = create(), create()
    for picture in connection.lrange(keys.pending(newer.id), 0, -1):
        connection.lrem(keys.pending(newer.id), 1, picture)
        connection.rpush(keys.pending(newer.id), picture.replace(b'"clip_x0"', b'"glow":0.5,"clip_x0"'))
    run(runner, plain.id)
    assert [status(store, job) for job in (plain, newer)] == ["finished", "queued"]
    stream = keys.stream(plain.digest)
    assert connection.xlen(stream) == 3
    # A worker that knows the option takes them at once.
    free = connection.xpending_range(stream, "workers", "-", "+", 9, idle=int(1000 * store.settings.lease_s))
    assert len(free) == 3


def test_while_storage_hangs_other_models_are_served_and_the_job_fails_in_the_end(
    connection: Redis, own: Settings, store: JobStore, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = started(connection, own)
    runner.models.settings = own.model_copy(update={"storage_timeout_s": 0.5})
    unknown, loaded, answers = create(model="other"), create(), list[int]()

    def hang(storage: Path, name: str, kind: CheckpointKind) -> Path:
        while not answers:
            time.sleep(0.01)
        return resolve(storage, name, kind)

    monkeypatch.setattr("service.worker.checkpoint_cache.resolve", hang)
    run_until(runner, lambda: runner.models.fetching)
    later = create(model="other")
    run(runner, unknown.id, loaded.id)
    assert status(store, loaded) == "finished"
    assert error_of(store, unknown) == f"the model cannot be loaded: {own.storage}: has not answered within 0.5 s"
    assert status(store, later) == "queued"
    answers.append(1)
    run(runner, later.id)
    assert status(store, later) == "finished"
