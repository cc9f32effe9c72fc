"""No job waits for another model's long job: a busy worker loads what is wanted, and models take turns."""

import threading
from collections.abc import Callable

import pytest
from redis import Redis

from service.contract.records import JobRecord
from service.settings import Settings
from service.store.jobs import JobStore
from service.worker import runner as runner_module
from service.worker import wanted_models
from service.worker.loaded_models import LoadedModel, LoadedModels
from service.worker.runner import Runner
from shared.options import SamplingOptions
from tests.service.processes import until
from tests.service.worker.conftest import LISTS, status
from tests.service.worker.test_uploaded import create_upload

LONG = SamplingOptions(steps=1000)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "CHECK_EVERY_S", 0)
    monkeypatch.setattr(wanted_models, "OTHERS_FIRST_S", 0.0)


def run_until_ended(runner: Runner, store: JobStore, job: JobRecord) -> None:
    for _ in range(900):
        if status(store, job) not in ("queued", "running"):
            return
        runner.run_once()
    raise AssertionError("the job has not ended")


def test_a_job_of_another_model_does_not_wait_for_a_long_one(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord]
) -> None:
    long = create(options=LONG)
    runner.run_once()
    other = create(model="other")
    run_until_ended(runner, store, other)
    assert [status(store, job) for job in (other, long)] == ["finished", "running"]


def test_a_model_that_is_being_loaded_for_a_job_is_not_loaded_again_when_its_turn_comes(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, read, free = list[str](), runner.models.read_model, threading.Event()

    def read_late(name: str, digest: str) -> LoadedModel:
        reads.append(name)
        free.wait()
        return read(name, digest)

    monkeypatch.setattr(runner.models, "read_model", read_late)
    create(options=LONG)
    runner.run_once()
    other = create(model="other")
    until(lambda: runner.run_once() and bool(reads))
    free.set()
    runner.run(other.id)
    assert status(store, other) == "finished"
    assert reads == ["other"]


def test_uploaded_pictures_do_not_wait_for_a_long_job(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord]
) -> None:
    long = create(options=LONG)
    runner.run_once()
    uploaded = create_upload(runner, 3)
    run_until_ended(runner, store, uploaded)
    assert [status(store, job) for job in (uploaded, long)] == ["finished", "running"]


def test_with_one_place_the_models_take_turns(
    connection: Redis, settings: Settings, store: JobStore, create: Callable[..., JobRecord]
) -> None:
    one_place = settings.model_copy(update={"loaded_models": 1})
    runner = Runner(connection, one_place, "w1")
    runner.models.load()
    long = create(LISTS * 10, options=SamplingOptions(steps=20))
    runner.run_once()
    other = create(LISTS * 4, model="other")
    run_until_ended(runner, store, other)
    assert [status(store, job) for job in (other, long)] == ["finished", "running"]
    run_until_ended(runner, store, long)
    assert status(store, long) == "finished"


def test_a_model_keeps_its_place_for_a_while(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, times = runner.wanted, (100.0, 100.0 + wanted_models.TURN_S)
    wanted._seen, wanted._loaded_at = {"d": (100.0, 100.0)}, 100.0
    for has_place, expected in ((False, [False, True]), (True, [True, True])):
        monkeypatch.setattr(LoadedModels, "has_place", has_place)
        assert [wanted._may_load("d", now) for now in times] == expected


def test_a_model_that_cannot_be_loaded_fails_its_job_and_no_other(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord]
) -> None:
    long = create(options=LONG)
    runner.run_once()
    lost = create(model="toy", digest="0" * 64)
    run_until_ended(runner, store, lost)
    assert [status(store, job) for job in (lost, long)] == ["failed", "running"]


def test_a_job_that_an_idle_worker_may_take_is_left_to_it(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wanted_models, "OTHERS_FIRST_S", 3600.0)
    create(options=LONG)
    create(model="other")
    for _ in range(5):
        runner.run_once()
    assert [loaded.name for loaded in runner.models] == ["toy"]
