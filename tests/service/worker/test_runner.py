"""What a worker does with jobs, driven step by step in this process against a real Redis."""

import contextlib
import io
import itertools
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from PIL import Image
from redis import Redis

from service.contract.records import JobRecord, JobResult, Verdict
from service.settings import Settings
from service.store.jobs import JobStore, new_id, read_verdicts
from service.store.keys import job_key, png_key, verdicts_key
from service.worker.engine import DeviceLost
from service.worker.loaded_models import LoadedModel
from service.worker.process import PictureWorker
from service.worker.runner import Rate, Runner
from shared.checkpoint import read_info
from shared.diffusion.denoise import Row, sample
from shared.diffusion.model import load_denoiser
from shared.evaluator import Evaluator, load_evaluator, score_set
from shared.options import SamplingOptions, picture_seed
from shared.pictures import to_uint8
from shared.registry import resolve
from shared.vocabulary import ICLEVR, Vocabulary

LISTS = [["red cube", "blue sphere"], ["gray cylinder"], ["cyan cube"]]
QUICK = SamplingOptions(steps=4)


@pytest.fixture
def store(connection: Redis, settings: Settings) -> JobStore:
    return JobStore(connection, settings)


@pytest.fixture
def runner(connection: Redis, settings: Settings) -> Runner:
    one = Runner(connection, settings, "w1")
    one.models.load()
    return one


@pytest.fixture
def create(store: JobStore, settings: Settings) -> Callable[..., JobRecord]:
    def create(
        labels: Sequence[Sequence[str]] = LISTS,
        *,
        seed: int = 7,
        repeats: int = 1,
        options: SamplingOptions = QUICK,
        model: str = "toy",
        digest: str | None = None,
    ) -> JobRecord:
        found = digest or read_info(resolve(settings.storage, model, "denoiser")).digest
        job = JobRecord(
            id=new_id(),
            kind="generate" if repeats == 1 else "score",
            created_at=time.time(),
            model=model,
            digest=found,
            labels=[list(one) for one in labels],
            seed=seed,
            repeats=repeats,
            columns=2,
            options=options,
        )
        store.create(job)
        return job

    return create


class Counting:
    """A stepper that remembers how many pictures each of its steps had."""

    def __init__(self, lane: LoadedModel) -> None:
        self.inner, self.batches = lane.engine.stepper, list[int]()
        lane.engine.stepper = self

    def new_row(
        self, labels: Sequence[float], options: SamplingOptions, seed: int, positions: torch.Tensor | None = None
    ) -> Row:
        return self.inner.new_row(labels, options, seed, positions)

    def step(self, rows: Sequence[Row]) -> None:
        self.batches.append(len(rows))
        self.inner.step(rows)


def status(store: JobStore, job: JobRecord) -> str | None:
    return store.statuses([job.id])[job.id]


def verdicts_of(store: JobStore, job: JobRecord) -> list[Verdict]:
    return read_verdicts(store.connection.hvals(verdicts_key(job.id)))


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=np.int16)


def test_a_job_gives_the_pictures_that_the_trainers_loop_gives(
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


def test_the_result_is_the_score_of_the_set(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord], connection: Redis
) -> None:
    job = create(repeats=3)
    runner.run(job.id)
    raw = connection.hget(job_key(job.id), "result")
    assert raw is not None
    result = JobResult.model_validate_json(raw)
    verdicts = verdicts_of(store, job)
    names = runner.judge.vocabulary.names
    for r, scores in enumerate(result.repeats):
        part = verdicts[r * 3 : r * 3 + 3]
        probabilities = torch.tensor([[verdict.probabilities[name] for name in names] for verdict in part])
        targets = torch.tensor([runner.judge.vocabulary.multi_hot(one) for one in LISTS])
        expected = score_set(probabilities, targets, names)
        assert (scores.accuracy, scores.exact_match, scores.f1) == (
            expected.accuracy,
            expected.exact_match,
            expected.f1,
        )
    assert result.repeats[result.best].accuracy == max(scores.accuracy for scores in result.repeats)


def test_the_grid_shows_the_pictures_in_order(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord], connection: Redis
) -> None:
    job = create()
    runner.run(job.id)
    raw = connection.hget(png_key(job.id), "grid")
    assert isinstance(raw, bytes)
    grid = pixels(raw)
    stored = [pixels(png) for png in store.pngs(job.id, range(3))]
    h, w, _ = stored[0].shape
    for i, picture in enumerate(stored):  # two columns, a border of 2 around each
        y, x = (i // 2) * (h + 2) + 2, (i % 2) * (w + 2) + 2
        assert np.abs(grid[y : y + h, x : x + w] - picture).max() <= 1


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
    lane = runner.models.load()
    counting = Counting(lane)
    first = create()
    runner.run_once()
    second = create(LISTS[:1])
    while runner.models.busy:
        runner.run_once()
    assert counting.batches == [3, 4, 4, 4, 1]
    assert [status(store, job) for job in (first, second)] == ["finished", "finished"]


def test_the_batch_is_bounded_and_what_is_left_follows(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord], settings: Settings
) -> None:
    counting = Counting(runner.models.load())
    job = create(LISTS * 4)
    runner.run(job.id)
    assert status(store, job) == "finished"
    assert counting.batches == [8] * 4 + [4] * 4
    assert settings.batch_pictures == 8


def die(*given: object) -> None:
    """Stands where a worker is killed."""
    raise SystemExit


def test_another_workers_death_between_last_picture_and_grid_is_made_good(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = create()

    with monkeypatch.context() as patch:
        patch.setattr(runner, "_complete", die)
        with pytest.raises(SystemExit):
            runner.run(job.id)
    assert status(store, job) == "running"
    runner.run(job.id)
    assert status(store, job) == "finished"


def test_a_job_whose_last_picture_was_a_dying_workers_is_finished_by_the_one_that_waits(
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
    maker.run_once()  # has all pictures

    run_once, iterations = runner.run_once, iter(range(100))

    def run_both(lane: LoadedModel, job_id: str) -> bool:
        assert next(iterations, None) is not None, "it waits for ever"
        if maker.models.busy:
            with contextlib.suppress(SystemExit):
                maker.run_once()
        return run_once(lane, job_id)

    monkeypatch.setattr("service.worker.runner.CHECK_EVERY_S", 0.1)
    monkeypatch.setattr(maker, "_complete", die)
    monkeypatch.setattr(runner, "run_once", run_both)
    runner.run(job.id)
    assert status(store, job) == "finished"


def test_a_worker_fails_the_job_it_is_at_when_that_is_overdue(
    runner: Runner,
    create: Callable[..., JobRecord],
    connection: Redis,
    store: JobStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.worker.runner.CHECK_EVERY_S", 0)
    job = create()
    connection.hset(job_key(job.id), "overdue_at", connection.time()[0])
    runner.run(job.id)
    assert status(store, job) == "failed"
    assert not runner.models.busy


def test_a_job_whose_result_cannot_be_composed_fails(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord], connection: Redis
) -> None:
    job = create(LISTS * 3)  # more than a batch, so that the first pictures are read again for the grid
    while not store.done_indices(job.id):
        runner.run_once()
    connection.hset(png_key(job.id), "0", b"no PNG")
    runner.run(job.id)
    assert status(store, job) == "failed"


def test_a_dead_workers_pictures_are_made_by_another_and_are_the_same(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord], connection: Redis, settings: Settings
) -> None:
    undisturbed = create()
    runner.run(undisturbed.id)
    job = create()
    dead = Runner(connection, settings, "w2")
    lane = dead.models.load()
    for _ in range(2):
        dead.run_once()
    assert len(lane.claims) == 3
    runner.run(job.id)  # waits until the lease is over
    assert status(store, job) == "finished"
    assert store.pngs(job.id, range(3)) == store.pngs(undisturbed.id, range(3))


def test_a_worker_that_wakes_up_after_its_lease_changes_nothing(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord], connection: Redis, settings: Settings
) -> None:
    job = create()
    paused = Runner(connection, settings, "w2")
    lane = paused.models.load()
    paused.run_once()
    runner.run(job.id)
    before = connection.hgetall(job_key(job.id)), connection.hgetall(png_key(job.id))
    paused.renew_claims()
    while paused.models.busy:
        paused.run_once()
    assert (connection.hgetall(job_key(job.id)), connection.hgetall(png_key(job.id))) == before
    assert connection.xlen(lane.stream.key) == 0


def test_a_worker_that_stops_gives_its_pictures_back(
    store: JobStore, create: Callable[..., JobRecord], connection: Redis, settings: Settings
) -> None:
    patient = settings.model_copy(update={"lease_s": 200.0})  # longer than the test may take
    job = create()
    stopping, other = Runner(connection, patient, "w2"), Runner(connection, patient, "w3")
    stopping.models.load()
    stopping.run_once()
    stopping.stopping = True
    stopping.run(job.id)
    stopping.release_claims()
    assert not stopping.models.busy
    assert connection.llen(store.queue.key) == 2
    begun = time.monotonic()
    other.run(job.id)
    assert status(store, job) == "finished"
    assert time.monotonic() - begun < 200


def test_a_job_ended_elsewhere_leaves_the_batch(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord], connection: Redis
) -> None:
    lane = runner.models.load()
    long = SamplingOptions(steps=1000)
    ended, other = create(options=long), create(LISTS[:1], options=SamplingOptions(steps=200))
    runner.run_once()
    store.fail(ended.id, "cancelled")
    runner.run(other.id)
    assert status(store, other) == "finished"
    assert not runner.models.busy
    assert connection.xlen(lane.stream.key) == 0


def test_a_cancelled_job_leaves_the_batch_at_the_next_step_and_the_others_are_as_ever(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord], connection: Redis
) -> None:
    lane = runner.models.load()
    undisturbed = create(LISTS[:2])
    runner.run(undisturbed.id)
    counting = Counting(lane)
    cancelled, other = create(options=SamplingOptions(steps=1000)), create(LISTS[:2])
    runner.run_once()
    assert store.cancel(cancelled.id)
    runner.run(other.id)
    assert counting.batches == [5, 2, 2, 2]
    assert [status(store, job) for job in (cancelled, other)] == ["cancelled", "finished"]
    assert store.pngs(other.id, range(2)) == store.pngs(undisturbed.id, range(2))
    assert connection.xlen(lane.stream.key) == 0


def test_what_a_cancelled_job_left_in_the_queue_keeps_no_places(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord]
) -> None:
    counting = Counting(runner.models.load())
    cancelled, other = create(LISTS * 10), create(LISTS)
    store.cancel(cancelled.id)
    runner.run(other.id)
    assert counting.batches == [3, 3, 3, 3]
    assert status(store, other) == "finished"


def test_of_a_job_whose_pictures_were_made_beside_anothers_rq_keeps_nothing(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord], connection: Redis, settings: Settings
) -> None:
    taken, beside = create(), create()
    worker = PictureWorker(runner)
    found = worker.next_job(None)
    assert found is not None
    assert found[0].args == [taken.id]
    runner.run(taken.id)
    assert [status(store, job) for job in (taken, beside)] == ["finished", "finished"]
    assert worker.next_job(None) is None
    assert connection.keys("rq:job:*") == [found[0].key.encode()]  # which its worker is yet to end


def test_a_worker_measures_its_rate_over_the_time_it_works(runner: Runner, create: Callable[..., JobRecord]) -> None:
    assert runner.rate.per_s == 0.0
    runner.run_once()  # waits for pictures, in vain
    assert runner.rate.seconds < 0.1
    begun = time.monotonic()
    runner.run(create().id)
    assert runner.rate.pictures == 3
    assert 3 / (time.monotonic() - begun) < runner.rate.per_s


def test_a_rate_follows_what_comes() -> None:
    rate = Rate()
    for _ in range(200):
        rate.add(5, 1.0)
    assert rate.per_s == pytest.approx(5.0)
    for _ in range(200):
        rate.add(1, 1.0)
    assert rate.per_s == pytest.approx(1.0, abs=0.3)


def test_a_poison_picture_fails_its_job_only(
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
    assert connection.hget(job_key(bad.id), "error") == b"picture 0: RuntimeError: poison"
    assert connection.xlen(runner.models.load().stream.key) == 0


@pytest.mark.parametrize("where", ["new_row", "step"])
def test_where_the_device_fails_the_worker_ends_and_fails_no_job(
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
    monkeypatch.setattr("service.worker.engine.lost", lambda error, device: True)
    monkeypatch.setattr("service.worker.runner.end_process", ended.append)
    with pytest.raises(DeviceLost):
        runner.run(job.id)
    assert ended == [70]
    assert status(store, job) == "running"
    stream = runner.models.load().stream
    assert connection.xpending(stream.key, "workers")["pending"] == 3  # which others take over


def test_a_model_whose_labels_the_evaluator_does_not_know_fails_its_job(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord], connection: Redis
) -> None:
    runner.models.load()
    runner.models.loader.judge = Evaluator(Vocabulary(ICLEVR.names[1:])).freeze()
    job = create(model="other")
    runner.run(job.id)
    assert status(store, job) == "failed"
    reason = connection.hget(job_key(job.id), "error")
    assert isinstance(reason, bytes)
    assert f"the evaluator does not know the labels {ICLEVR.names[0]}" in reason.decode()


def test_a_picture_that_kills_workers_fails_its_job_only(
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
            assert deaths <= 3
    assert deaths == 3
    assert [status(store, job) for job in (good, bad)] == ["finished", "failed"]
    reason = connection.hget(job_key(bad.id), "error")
    assert reason == b"workers died 3 times while sampling picture 0"


def test_each_model_has_a_batch_of_its_own(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord], settings: Settings
) -> None:
    one, other = create(), create(model="other")
    runner.run_once()
    runner.run(other.id)
    runner.run(one.id)
    assert [status(store, job) for job in (one, other)] == ["finished", "finished"]
    assert {lane.name for lane in runner.models} == {"toy", "other"}
    assert store.pngs(one.id, range(3)) != store.pngs(other.id, range(3))


def test_no_more_models_stay_loaded_than_the_settings_say(
    connection: Redis, settings: Settings, create: Callable[..., JobRecord]
) -> None:
    runner = Runner(connection, settings.model_copy(update={"loaded_models": 1}), "w1")
    runner.models.load()
    runner.run(create(model="other").id)
    assert [lane.name for lane in runner.models] == ["other"]


@pytest.mark.parametrize(("model", "words"), [("toy", "no longer the checkpoint"), ("gone", "no such denoiser")])
def test_a_job_whose_checkpoint_is_not_there_fails_and_says_so(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord], connection: Redis, model: str, words: str
) -> None:
    job = create(model=model, digest="0" * 64)
    runner.run(job.id)
    assert status(store, job) == "failed"
    reason = connection.hget(job_key(job.id), "error")
    assert isinstance(reason, bytes)
    assert words in reason.decode()


def test_a_job_that_is_not_there_or_has_ended_is_not_run(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord], connection: Redis
) -> None:
    job = create()
    store.fail(job.id, "why")
    runner.run("nobody")
    runner.run(job.id)
    assert status(store, job) == "failed"
