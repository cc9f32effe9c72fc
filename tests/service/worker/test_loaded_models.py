"""A worker whose storage changes: jobs are sampled with the weights that they were accepted with."""

import itertools
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from redis import Redis

from service.contract.records import JobRecord
from service.settings import Settings
from service.store import keys, workers
from service.store.jobs import JobStore
from service.worker import runner as runner_module
from service.worker import wanted_models
from service.worker.loaded_models import LoadedModel
from service.worker.runner import Runner
from shared.checkpoint import CheckpointError, CheckpointInfo, read_info
from shared.evaluator import JudgeInside
from shared.options import SamplingOptions
from shared.registry import promote
from tests.service.store.helpers import record
from tests.toy_checkpoint import publish_toy_denoiser

LISTS = [["red cube", "blue sphere"], ["gray cylinder"]]
MANY_ITERATIONS = 2000


@pytest.fixture
def store(connection: Redis, own: Settings) -> JobStore:
    return JobStore(connection, own)


@pytest.fixture
def create(store: JobStore) -> Callable[..., JobRecord]:
    def create(info: CheckpointInfo, *, steps: int = 4) -> JobRecord:
        options = SamplingOptions(steps=steps)
        job = record(model=info.name, digest=info.digest, labels=LISTS, columns=2, options=options)
        store.create(job)
        return job

    return create


def toy(folder: Path) -> CheckpointInfo:
    return read_info(folder / "toy.safetensors")


def run_until(runner: Runner, condition: Callable[[], object]) -> None:
    for _ in range(MANY_ITERATIONS):
        if condition():
            return
        runner.run_once()
        time.sleep(0.002)
    raise AssertionError("the condition never became true")


def test_jobs_accepted_before_a_change_use_the_old_weights(
    connection: Redis, own: Settings, folder: Path, store: JobStore, create: Callable[..., JobRecord]
) -> None:
    old, runner = toy(folder), Runner(connection, own, "w1")
    runner.models.load()
    undisturbed = create(old)
    runner.run(undisturbed.id)
    begun = create(old)
    runner.run_once()
    new = publish_toy_denoiser(folder, "toy", 5)
    accepted, fresh = create(old), create(new)
    for job in (begun, fresh, accepted):
        runner.run(job.id)
    made = [store.pngs(job.id, range(2)) for job in (undisturbed, begun, accepted, fresh)]
    assert made[0] == made[1] == made[2] != made[3]
    assert {model.digest for model in runner.models} == {old.digest, new.digest}


@pytest.mark.parametrize("change", ["replaced", "damaged", "gone"])
def test_a_new_worker_can_still_sample_jobs_that_were_accepted(
    connection: Redis, own: Settings, folder: Path, store: JobStore, create: Callable[..., JobRecord], change: str
) -> None:
    old = toy(folder)
    undisturbed, accepted = create(old), create(old)
    Runner(connection, own, "w1").run(undisturbed.id)
    if change == "replaced":
        publish_toy_denoiser(folder, "toy", 5)
    elif change == "damaged":
        (folder / "toy.safetensors").write_bytes(b"junk")
    else:
        (folder / "toy.safetensors").unlink()
    Runner(connection, own, "w2").run(accepted.id)
    assert store.pngs(accepted.id, range(2)) == store.pngs(undisturbed.id, range(2))


@pytest.mark.parametrize("is_busy", [False, True])
def test_a_job_whose_checkpoint_only_another_worker_has_is_left_to_it(
    connection: Redis, own: Settings, folder: Path, tmp_path: Path, store: JobStore,
    create: Callable[..., JobRecord], monkeypatch: pytest.MonkeyPatch, is_busy: bool,
) -> None:  # fmt: skip
    """Whether a worker is given the job by RQ, or wants its model while it samples another one."""
    monkeypatch.setattr(runner_module, "CHECK_EVERY_S", 0)
    monkeypatch.setattr(wanted_models, "OTHERS_FIRST_S", 0.0)
    one, old = Runner(connection, own, "w1"), publish_toy_denoiser(folder, "other", 6)
    job = create(old)
    loaded = one.models.load("other")
    publish_toy_denoiser(folder, "other", 7)
    elsewhere = Runner(connection, own.model_copy(update={"cache": tmp_path / "elsewhere"}), "w2")
    elsewhere.models.load("toy")

    def tries() -> None:
        if is_busy:
            create(toy(folder), steps=1000)
            run_until(elsewhere, lambda: elsewhere.wanted._not_before)
        else:
            elsewhere.run(job.id)

    about = {"models": [{"name": loaded.name, "digest": loaded.digest}]}
    workers.announce(connection, one.name, about, own.lease_s)
    tries()
    assert store.is_open(job.id)
    one.run(job.id)
    assert connection.hget(keys.job(job.id), "status") == b"finished"
    workers.withdraw(connection, one.name)
    job = create(old)
    elsewhere.wanted._not_before.clear()
    tries()
    assert connection.hget(keys.job(job.id), "status") == b"failed"


def test_a_promoted_model_is_loaded_before_a_job_needs_it(connection: Redis, own: Settings, folder: Path) -> None:
    runner = Runner(connection, own, "w1")
    runner.models.load()
    promote(folder, "other")
    run_until(runner, lambda: len(list(runner.models)) == 2)
    assert runner.models.promoted == read_info(folder / "other.safetensors").digest
    new = publish_toy_denoiser(folder, "other", 6)
    run_until(runner, lambda: runner.models.promoted == new.digest and runner.models.get(new.digest))


def test_a_damaged_promoted_model_is_logged_once(
    connection: Redis, own: Settings, folder: Path, create: Callable[..., JobRecord], caplog: pytest.LogCaptureFixture
) -> None:
    old, runner = toy(folder), Runner(connection, own, "w1")
    runner.models.load()
    promote(folder, "other")
    content = bytearray((folder / "other.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "other.safetensors").write_bytes(content)
    caplog.set_level(logging.WARNING)
    run_until(runner, lambda: caplog.records)
    job = create(old)
    runner.run(job.id)
    assert connection.hget(keys.job(job.id), "status") == b"finished"
    (record,) = caplog.records
    assert "other.safetensors: damaged: the tensors do not match their digest" in record.__dict__["reason"]


def test_a_promoted_model_that_killed_the_workers_that_loaded_it_does_not_kill_those_that_are_left(
    connection: Redis, own: Settings, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runner = Runner(connection, own, "w1")
    served = runner.models.load()
    promote(folder, "other")
    for number in range(own.max_deliveries):
        workers.begin_loading(connection, read_info(folder / "other.safetensors").digest, f"dead{number}")
    caplog.set_level(logging.WARNING)
    run_until(runner, lambda: caplog.records or len(list(runner.models)) > 1)
    assert list(runner.models) == [served]
    assert "workers died 4 times while they loaded it" in caplog.records[0].__dict__["reason"]


def test_pictures_of_a_padded_network_are_judged_without_their_borders(
    connection: Redis, own: Settings, folder: Path
) -> None:
    runner = Runner(connection, own, "w1")
    padded = publish_toy_denoiser(folder, "padded", 5, aspect=4 / 3)
    judges = [runner.models.read_model(name).engine.judge for name in ("toy", padded.name)]
    assert judges == [runner.models.judge, JudgeInside(runner.models.judge, 4 / 3)]


def test_evaluators_that_no_loaded_model_uses_are_forgotten(
    runner: Runner, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer that publishes the evaluator of another vocabulary again and again must not fill a worker's memory."""
    models, loaded, numbers = runner.models, runner.models.load(), itertools.count()
    evaluators = (SimpleNamespace(name="pets", digest=f"{number:064}") for number in numbers)
    monkeypatch.setattr(models.cache, "evaluator_for", lambda info: next(evaluators))
    monkeypatch.setattr(models.cache, "fetch", lambda *_: folder)
    monkeypatch.setattr("service.worker.loaded_models.load_evaluator", lambda *_: models.judge)
    pets = toy(folder).model_copy(update={"vocabulary": ("cat", "dog")})
    loaded.judged_by = models._judge_for(pets)[1]
    for _ in range(3):
        models._judge_for(pets)
    assert list(map(int, models._judges)) == [0, 3]


def test_unused_models_are_unloaded_but_never_one_with_pictures_in_progress(
    connection: Redis, own: Settings, folder: Path, create: Callable[..., JobRecord]
) -> None:
    runner = Runner(connection, own.model_copy(update={"idle_model_s": 0.0}), "w1")
    promoted = runner.models.load()
    other = runner.models.load("other")
    create(read_info(folder / "other.safetensors"), steps=30)
    runner.run_once()
    for _ in range(20):
        runner.run_once()
    assert other.engine.busy
    assert {model.digest for model in runner.models} == {promoted.digest, other.digest}
    run_until(runner, lambda: runner.models.get(other.digest) is None)
    assert {model.digest for model in runner.models} == {promoted.digest}


def test_a_worker_that_stops_while_it_loads_does_not_count_as_killed_by_the_model(
    connection: Redis, own: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, begun, go_on = Runner(connection, own, "w1").models, threading.Event(), threading.Event()

    def read(*_: object) -> LoadedModel:
        begun.set()
        go_on.wait()
        raise CheckpointError("other", "hung")

    monkeypatch.setattr(models, "read_model", read)
    loading = models.start_loading("other", "0" * 64, is_evaluator=False)
    begun.wait()
    assert workers.died_loading(connection, "0" * 64) == 1  # it is not announced
    models.close(within_s=0)
    assert workers.died_loading(connection, "0" * 64) == 0
    go_on.set()
    assert isinstance(loading.exception(), CheckpointError)


def test_pictures_in_progress_continue_while_another_model_loads(
    connection: Redis, own: Settings, folder: Path, store: JobStore, create: Callable[..., JobRecord],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    runner = Runner(connection, own, "w1")
    runner.models.load()
    first, second = create(toy(folder)), create(read_info(folder / "other.safetensors"))
    runner.run_once()
    read = runner.models.read_model

    def read_slowly(name: str | None, digest: str | None) -> LoadedModel:
        assert threading.current_thread() is not threading.main_thread()
        while store.is_open(first.id):  # would never end if the batch waited for the loading
            time.sleep(0.002)
        return read(name, digest)

    monkeypatch.setattr(runner.models, "read_model", read_slowly)
    runner.run(second.id)
    assert list(store.statuses([first.id, second.id]).values()) == ["finished", "finished"]
