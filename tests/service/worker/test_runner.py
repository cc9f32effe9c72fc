"""A worker's loop, driven step by step: batches, workers that die, and pictures that break a batch."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from redis import Redis

from iclevr.labels import ICLEVR
from service.contract.options import PictureOptions
from service.contract.records import ModelName, Picture
from service.settings import Settings
from service.store import keys, workers
from service.store.claims import GROUP, PictureStream
from service.store.jobs import JobStore
from service.worker import process
from service.worker.models import Fetched, Loaded, LoadedModels
from service.worker.runner import Runner
from shared.checkpoint import CheckpointKind, publish, read_info
from shared.diffusion.denoise import sample
from shared.diffusion.model import load_denoiser
from shared.evaluator import load_evaluator
from shared.options import picture_seed
from shared.pictures import to_uint8
from shared.registry import resolve
from tests.service.api.answers import pixels
from tests.service.processes import new_job
from tests.service.store.ageing import age
from tests.service.store.helpers import add_job, done_count
from tests.service.worker.conftest import (
    LISTS,
    QUICK,
    Create,
    Death,
    batches_of,
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


def test_a_request_joins_a_running_batch(runner: Runner, store: JobStore, create: Create) -> None:
    batches = batches_of(engine_of(runner))
    first = create()
    runner.run_once()
    second = create(LISTS[:1])
    run(runner, first.id, second.id)
    assert batches == [3, 4, 4, 4, 1]
    assert [status(store, job) for job in (first, second)] == ["finished", "finished"]


def test_the_batch_is_bounded_and_the_other_pictures_follow(runner: Runner, store: JobStore, create: Create) -> None:
    batches = batches_of(engine_of(runner))
    job = create(LISTS * 4)
    run(runner, job.id)
    assert status(store, job) == "finished"
    assert batches == [8] * 4 + [4] * 4


def test_after_a_death_attempts_begin_anew_and_end_with_the_same_picture(
    connection: Redis, settings: Settings, store: JobStore, create: Create
) -> None:
    """The toy evaluator finds nothing exact, so that all three are drawn."""
    options = QUICK.model_copy(update={"until": "exact", "attempts": 3})
    undisturbed, dying = started(connection, settings, "w1"), started(connection, settings, "w2")
    whole = create(options=options)
    run(undisturbed, whole.id)
    job = create(options=options)
    while not any(one.picture.attempt == 2 for _, engine in dying.models.denoisers() for one in engine.batch.values()):
        dying.run_once()
    assert not store.connection.hlen(keys.verdicts(job.id))
    age(connection, 60)
    run(undisturbed, job.id)
    verdicts = [verdicts_of(store, one) for one in (whole, job)]
    assert verdicts[0] == verdicts[1]
    assert [len(verdict.attempts) for verdict in verdicts[0]] == [3, 3, 3]


def test_a_cancelled_job_leaves_the_batch_at_the_next_step_and_the_others_are_unaffected(
    runner: Runner, store: JobStore, create: Create, connection: Redis
) -> None:
    undisturbed = create(LISTS[:2])
    run(runner, undisturbed.id)
    batches = batches_of(engine_of(runner))
    cancelled, other = create(options=PictureOptions(steps=1000)), create(LISTS[:2])
    runner.run_once()
    assert store.cancel(cancelled.id)
    run(runner, other.id)
    assert batches == [5, 2, 2, 2]
    assert [status(store, job) for job in (cancelled, other)] == ["cancelled", "finished"]
    assert pngs(store, other.id, range(2)) == pngs(store, undisturbed.id, range(2))
    assert connection.xlen(keys.pictures(other.digest)) == 0


def test_idle_time_does_not_count_in_a_workers_rate(runner: Runner, create: Create, connection: Redis) -> None:
    begun = time.monotonic()
    run(runner, create().id)
    busy_s = time.monotonic() - begun
    time.sleep(busy_s)
    runner.run_once()  # finds no pictures
    workers.announce(runner.connection, runner.name, process.about(runner), lease_s=60)
    (about,) = workers.list_live(connection)
    assert about["pictures_per_s"] >= 3 / busy_s


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


@pytest.mark.parametrize(("model", "words"), [("toy", "no longer the checkpoint"), ("gone", "no such denoiser")])
def test_a_job_without_its_checkpoint_fails_with_a_reason(
    runner: Runner, store: JobStore, create: Create, model: str, words: str
) -> None:
    job = create(model=model, digest="0" * 64)
    run(runner, job.id)
    assert words in error_of(store, job)


GRAY = [["gray cube"]]


def test_a_picture_that_breaks_the_batch_fails_only_its_job(
    runner: Runner, store: JobStore, create: Create, connection: Redis
) -> None:
    good, bad = create(), create(GRAY)
    batches_of(engine_of(runner), deadly=RuntimeError("poison"))
    run(runner, bad.id, good.id)
    assert status(store, good) == "finished"
    assert error_of(store, bad) == "picture 0: RuntimeError: poison"
    assert connection.xlen(keys.pictures(good.digest)) == 0


@pytest.mark.parametrize("where", ["new_rows", "step"])
def test_if_the_device_fails_the_worker_ends_and_no_job_fails(
    runner: Runner, store: JobStore, create: Create, connection: Redis,
    monkeypatch: pytest.MonkeyPatch, where: str,
) -> None:  # fmt: skip
    ended: list[int] = []
    job = create()

    def fail(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(engine_of(runner).stepper, where, fail)
    for module in ("judge", "models", "runner"):
        monkeypatch.setattr(f"service.worker.{module}.lost", lambda error, device: True)
    monkeypatch.setattr("service.worker.runner.end_process", ended.append)
    with pytest.raises(torch.AcceleratorError):
        run(runner, job.id)
    assert ended == [70]
    assert status(store, job) == "running"
    assert connection.xpending(keys.pictures(job.digest), "workers")["pending"] == 3  # other workers take them over


def deaths_until_ended(connection: Redis, settings: Settings, *job_ids: str, deadly: bool = False) -> int:
    """Have one worker after the other run the jobs; return how many died."""
    for number in range(9):
        runner = Runner(connection, settings, f"w{number}")
        if deadly:
            runner.models.load()
            batches_of(engine_of(runner), deadly=Death())
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
    assert error_of(store, bad) == "workers died or failed 4 times while sampling picture 0"


@pytest.mark.parametrize("loses_device", [False, True])
def test_a_model_that_kills_the_workers_that_load_it_fails_its_job(
    store: JobStore, create: Create, connection: Redis, settings: Settings,
    monkeypatch: pytest.MonkeyPatch, loses_device: bool,
) -> None:  # fmt: skip
    """One that is too large for their memory, for example; it must not kill them until the job's time is over."""

    def build(models: LoadedModels, model: ModelName, fetched: Fetched) -> Loaded:
        raise torch.AcceleratorError("CUDA error: an illegal memory access") if loses_device else Death

    monkeypatch.setattr(LoadedModels, "_load", build)
    monkeypatch.setattr("service.worker.runner.end_process", die)
    for module in ("models", "runner"):
        monkeypatch.setattr(f"service.worker.{module}.lost", lambda error, _: isinstance(error, torch.AcceleratorError))
    job = create(model="other")
    assert deaths_until_ended(connection, settings, job.id) == 4
    assert error_of(store, job) == "the model cannot be loaded: other: workers died 4 times while they loaded it"


@pytest.mark.parametrize("error", [MemoryError("16 TiB"), OverflowError("too large")])
def test_a_model_that_cannot_be_built_for_any_reason_fails_its_jobs_with_it(
    runner: Runner, store: JobStore, create: Create, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def build(models: LoadedModels, model: ModelName, fetched: Fetched) -> Loaded:
        raise error

    monkeypatch.setattr(LoadedModels, "_load", build)
    job, good = create(model="other"), create()
    run(runner, job.id, good.id)
    assert error_of(store, job) == f"the model cannot be loaded: {type(error).__name__}: {error}"
    assert status(store, good) == "finished"


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
        while not preempted.busy:
            preempted.run_once()
    assert [[claim.alone for claim in model.claims.values()] for model in preempted.models] == [[True]]
    run(Runner(connection, quick, "w5"), job.id)
    assert status(store, job) == "finished"


def test_a_suspect_has_its_worker_for_itself(
    runner: Runner, store: JobStore, create: Create, connection: Redis
) -> None:
    other = load(runner, read_info(resolve(store.settings.storage, "other", "denoiser")))
    suspects, before = create(), create(model="other")
    dead = PictureStream(connection, store.settings, suspects.digest, "dead")
    entries = [claim.entry for claim in store.claim_new(dead, 5)]
    connection.xclaim(dead.key, GROUP, "dead", 0, entries, idle=10**6, retrycount=2, justid=True)
    runner._admit(other, store.claim_new(other.stream, 5))
    jobs = [suspects, before, *(create(model=model) for model in ("toy", "other"))]
    seen = list[int]()
    while store.ended(job.id for job in jobs) != {job.id for job in jobs}:
        runner.run_once()
        claims = [claim for loaded in runner.models for claim in loaded.claims.values()]
        assert len(claims) == 1 or not any(claim.alone for claim in claims)
        seen.append(len(claims))
    assert {status(store, job) for job in jobs} == {"finished"}
    assert sum(seen) == 4 * (3 + 3 + 6)  # after each of four steps; the fifth iteration judges


def test_while_storage_hangs_other_models_are_served_and_the_job_fails_in_the_end(
    connection: Redis, own: Settings, store: JobStore, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = started(connection, own)
    unknown, loaded, answers = create(model="other"), create(), list[int]()

    def hang(storage: Path, name: str, kind: CheckpointKind) -> Path:
        while not answers:
            time.sleep(0.01)
        return resolve(storage, name, kind)

    monkeypatch.setattr("service.worker.checkpoint_cache.resolve", hang)
    run_until(runner, lambda: runner.models.fetches)
    later = create(model="other")
    run(runner, loaded.id)
    assert [status(store, job) for job in (loaded, unknown)] == ["finished", "queued"]
    runner.models.settings = own.model_copy(update={"storage_timeout_s": 0.0})
    run(runner, unknown.id)
    assert error_of(store, unknown) == f"the model cannot be loaded: {own.storage}: has not answered within 0 s"
    assert status(store, later) == "queued"
    runner.models.settings = own
    answers.append(1)
    run(runner, later.id)
    assert status(store, later) == "finished"


def test_a_draining_worker_finishes_what_it_can_and_releases_the_rest(
    settings: Settings, connection: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = settings.model_copy(update={"lease_s": 600.0})  # longer than the test may take
    store, runner = JobStore(connection, patient), started(connection, patient, "a")
    short, long, late = (new_job(settings, steps=steps, pictures=2) for steps in (5, 200, 5))
    add_job(store, short)
    add_job(store, long)
    runner.run_once()
    add_job(store, late)
    iterate = runner.run_once

    def until_the_short_one_ends() -> None:
        iterate()
        if store.ended([short.id]):
            runner.drain_until = 0.0

    monkeypatch.setattr(runner, "run_once", until_the_short_one_ends)
    runner.stop(within_s=600)
    runner.drain()
    assert not runner.busy
    assert [status(store, job) for job in (short, long, late)] == ["finished", "running", "queued"]
    assert done_count(store, long.id) == 0
    pending: Any = connection.xpending_range(keys.pictures(long.digest), GROUP, "-", "+", 9)
    assert [one["times_delivered"] for one in pending] == [0, 0]  # as if never delivered
    run(Runner(connection, patient, "b"), long.id, late.id)  # without waiting for a lease to expire
    assert [status(store, job) for job in (long, late)] == ["finished"] * 2


# What nobody foresaw.


def test_a_picture_that_cannot_be_admitted_fails_only_its_job(
    runner: Runner, store: JobStore, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = model_of(runner).engine
    bad, good, admit = create(LISTS[:2]), create(), engine.admit

    def broken(pictures: list[Picture]) -> None:
        if (bad.id, 1) in [picture.key for picture in pictures]:
            raise OverflowError("a defect")
        admit(pictures)

    monkeypatch.setattr(engine, "admit", broken)
    run(runner, bad.id, good.id)
    assert error_of(store, bad) == "picture 1: OverflowError: a defect"
    assert status(store, good) == "finished"
    settle(runner)
    assert model_of(runner).stream.leased == set()


@pytest.mark.parametrize(
    "task", ["runner.Runner._drop_ended", "runner.Runner.look", "runner.Previews.publish", "models.LoadedModels.follow"]
)
def test_a_periodic_task_that_fails_stops_nothing_else(
    runner: Runner, store: JobStore, create: Create, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr(f"service.worker.{task}", broken)
    job = create()
    run(runner, job.id)
    assert status(store, job) == "finished"


@pytest.mark.parametrize("where", ["_claim", "_advance"])
def test_a_model_that_fails_takes_no_other_models_jobs_with_it(
    store: JobStore, create: Create, connection: Redis, settings: Settings, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Its own are tried again, as after a death, and fail in the end if it fails whenever it is advanced."""
    runner, work = started(connection, settings.model_copy(update={"lease_s": 0.2})), getattr(Runner, where)
    other = load(runner, read_info(resolve(store.settings.storage, "other", "denoiser")))
    failures = list[str]()

    def broken(self: Runner, loaded: Loaded) -> None:
        if loaded.digest == other.digest and (where == "_advance" or not failures):
            failures.append(loaded.name)
            raise KeyError("a defect")
        work(self, loaded)

    monkeypatch.setattr(Runner, where, broken)
    bad, good = create(LISTS[:1], model="other"), create()
    run(runner, bad.id, good.id)
    assert status(store, good) == "finished"
    if where == "_claim":
        assert (status(store, bad), failures) == ("finished", ["other"])
    else:
        assert error_of(store, bad) == "workers died or failed 4 times while sampling picture 0"
        assert len(failures) == 4


def test_a_worker_that_ends_without_a_drain_gives_no_lease_back(
    runner: Runner, create: Create, connection: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the delivery counts as a death of its pictures."""
    job = create()

    def broken(loaded: Loaded) -> None:
        raise SystemExit

    monkeypatch.setattr(runner, "_advance", broken)
    with pytest.raises(SystemExit):
        runner.work()
    pending: Any = connection.xpending_range(keys.pictures(job.digest), GROUP, "-", "+", 9)
    assert [one["times_delivered"] for one in pending] == [1, 1, 1]


def test_while_storage_fails_a_worker_claims_nothing_and_leaves_its_pictures_to_one_that_can_store(
    store: JobStore, create: Create, connection: Redis, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = settings.model_copy(update={"lease_s": 0.2})
    monkeypatch.setattr("service.worker.job_files.RETRY_S", 0.01)
    broken, able = started(connection, quick), started(connection, quick, "w2")
    broken.storage.patience_s = able.storage.patience_s = 60.0

    def fail(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(broken.storage.files, "write", fail)
    job = create()
    run_until(broken, lambda: broken.storage.problem)
    assert broken.storage.problem == "OSError: Read-only file system"
    workers.announce(connection, broken.name, process.about(broken), lease_s=60)
    time.sleep(quick.lease_s)
    for _ in range(3):
        broken.run_once()
    assert broken.busy  # nobody else could store them
    workers.announce(connection, "w2", {"storage_problem": ""}, 60)
    run_until(broken, lambda: not broken.busy)
    waiting = create()
    for _ in range(3):
        broken.run_once()
    assert not broken.busy
    run(able, job.id, waiting.id)
    assert [status(store, one) for one in (job, waiting)] == ["finished"] * 2
    monkeypatch.undo()
    run_until(broken, lambda: not broken.storage.problem)
    last = create()
    run(broken, last.id)
    assert status(store, last) == "finished"
