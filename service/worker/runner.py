"""A worker's loop: claim pictures, step the batch, store what is finished, until the job has ended.

The one place where engine and Redis meet. Knows neither HTTP nor RQ, so that a test can drive it.
"""

import contextlib
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

from redis import Redis

from service.contract.records import FinishedPicture, JobRecord
from service.results.writer import ResultWriter
from service.settings import Settings
from service.store import workers
from service.store.claims import Claim
from service.store.connection import best_effort
from service.store.jobs import JobStore
from service.store.sweep import Sweeper
from service.telemetry import tracing
from service.telemetry.logs import get_logger
from service.telemetry.metrics import PICTURES, WAIT_SECONDS, one_step
from service.worker.checkpoint_cache import CheckpointCache
from service.worker.completion import Storer, Work
from service.worker.engine import Outcome
from service.worker.loaded_models import AnyLoaded, LoadedEvaluator, LoadedModels
from service.worker.previews import Previews
from service.worker.uploaded import judge_uploaded
from service.worker.wanted_models import WantedModels
from shared.checkpoint import CheckpointError
from shared.device import lost, pick_device

log = get_logger(__name__)

RATE_OVER_S = 60.0
IDLE_WAIT_S = 0.02  # between two iterations without work
CHECK_EVERY_S = 1  # how often to check what others, RQ included, left undone
EXIT_DEVICE_LOST = 70  # EX_SOFTWARE of sysexits.h
end_process = os._exit  # RQ would catch an exception and fail the job


@dataclass
class Rate:
    """Sampled pictures per second of work. Idle time does not count, and older work counts less."""

    pictures: float = 0.0
    seconds: float = 0.0

    def add(self, pictures: int, seconds: float) -> None:
        self.pictures, self.seconds = self.pictures + pictures, self.seconds + seconds
        if self.seconds > RATE_OVER_S:
            self.pictures, self.seconds = self.pictures / 2, self.seconds / 2

    @property
    def per_s(self) -> float:
        return self.pictures / self.seconds if self.pictures else 0.0


class Runner:
    """A worker process's models and the pictures in progress on them. Only `renew_claims` is safe in another thread."""

    def __init__(self, connection: Redis, settings: Settings, name: str) -> None:
        self.connection, self.settings, self.name = connection, settings, name
        self.store = JobStore(connection, settings)
        patience_s = min(settings.storage_timeout_s, settings.lease_s / 2)  # a job's end should not take longer
        results = None if settings.results is None else ResultWriter(settings.results, patience_s)
        self.storer = Storer(self.store, results)
        self.sweeper = Sweeper(self.store, lambda digest: self.models.get(digest) is not None)
        self.device = pick_device(settings.device)
        cache = CheckpointCache(settings.cache, settings.storage, settings.cache_bytes, settings.storage_timeout_s)
        self.models = LoadedModels(connection, settings, self.device, cache, name)
        self.wanted = WantedModels(self.store, self.sweeper, self.models)
        self.previews = Previews(connection, settings.live_every_s)
        self.spans = tracing.BatchSpans(self._traceparent)
        self.rate = Rate()
        self.idle = True  # the last iteration had no pictures
        self.stopping = False  # a signal handler sets it, in which an Event's lock could deadlock
        self.drain_until = math.inf  # monotonic seconds
        self.iteration_s = 0.0  # moving average of iterations with work
        self.moved_at = time.monotonic()  # end of the last iteration, or of the last attempt to reach Redis
        self._swept_at = time.monotonic()

    def _traceparent(self, job_id: str) -> str:
        try:
            record = self.store.record(job_id)
        except ValueError:  # another version wrote it
            record = None
        return record.traceparent if record else ""

    @property
    def stalled(self) -> bool:
        """Whether the loop seems to hang: the worker counts as not ready, some time before the watchdog ends it."""
        return time.monotonic() - self.moved_at > self.settings.stalled_after_s / 2

    def run(self, job_id: str) -> None:
        """Work until the job has ended, here or in another worker; other jobs' pictures may share the batch.

        Returns early, with the job queued again, when `stopping` is set.
        """
        try:
            record = self.store.record(job_id)
        except ValueError as error:  # a sweep queues the job again within seconds, until a worker can read it
            log.warning("job of another version; left to other workers", job_id=job_id, reason=str(error))
            return
        if record is None or not self.store.is_open(job_id):
            return
        try:
            loaded = self._load_for(record)
        except CheckpointError as error:
            if workers.have_loaded(self.connection, record.digest):  # as after a change of storage: it samples the job
                log.warning(
                    "model cannot be loaded; its job is left to other workers", reason=str(error), **record.log_ids
                )
            else:
                self.store.fail(job_id, f"the model cannot be loaded: {error}")
            return
        if loaded is None:
            self.store.requeue(job_id)
            return
        self.store.begin(job_id)
        judged_by = loaded.judged_by
        del loaded  # it may be unloaded while another model has its turn
        checked_at = -math.inf
        while not self.stopping:
            if time.monotonic() - checked_at >= CHECK_EVERY_S:
                checked_at = time.monotonic()
                if self.store.done_count(job_id) >= record.total:  # the worker with the last picture died
                    self.storer.submit(Work(judged_by=judged_by, jobs={job_id}))
            if not self.run_once(job_id):
                return
        if self.store.is_open(job_id):
            self.store.requeue(job_id)

    def _load_for(self, record: JobRecord) -> AnyLoaded | None:
        """Return the model of a job; work on other pictures while it loads. None if the worker is to stop."""
        loaded = self.models.get(record.digest)
        if loaded is None:
            with tracing.span("load", record.traceparent, {"job_id": record.id, "model": record.model}):
                loading = self.models.start_loading(record.model, record.digest, is_evaluator=record.sent)
                while not loading.done():
                    if self.stopping:
                        return None
                    self.run_once()
                with self._end_if_device_lost():
                    loaded = loading.result()
        return self.models.use(loaded)

    def run_once(self, job_id: str | None = None, *, rests: bool = True) -> bool:
        """Claim pictures for every loaded model and advance those in progress.

        If job `job_id` has ended, only drop the pictures of ended jobs, and return False. Without pictures in progress,
        sleep for a moment if `rests`, or if some are being stored.
        """
        with self._end_if_device_lost():
            self._collect()
            if job_id in self._drop_ended(job_id):
                return False
            if not self.stopping:
                self._sweep()
                for loaded in self.models.claiming():
                    self._claim(loaded)
                self.models.follow_storage()  # afterwards, so that no model is unloaded before it was used
                self.wanted.follow()
            begun = time.monotonic()
            busy = [loaded for loaded in self.models if loaded.claims]
            self.idle = not busy
            for loaded in busy:
                loaded.used_at = begun
                self._advance(loaded)
                self.moved_at = time.monotonic()  # an iteration over several models is as long as all of their steps
            if busy:
                seconds = time.monotonic() - begun
                self.iteration_s = 0.8 * self.iteration_s + 0.2 * seconds if self.iteration_s else seconds
            elif rests or self.models.busy:
                time.sleep(IDLE_WAIT_S)
            self.spans.keep(self._jobs())
            self.previews.publish(
                [
                    (*pair, model.stepper.picture_shape)
                    for model in self.models.denoisers()
                    for pair in model.engine.rows()
                ]
            )
            self.moved_at = time.monotonic()
            return True

    @contextlib.contextmanager
    def _end_if_device_lost(self) -> Iterator[None]:
        """End the process at once if the device is lost, as if it had been killed.

        Other workers then take over its pictures, and give up one that kills again.
        """
        try:
            yield
        except Exception as error:
            if lost(error, self.device):
                log.critical("the device has failed; this worker ends", exc_info=True)
                end_process(EXIT_DEVICE_LOST)
            raise

    def _jobs(self) -> set[str]:
        """Return the jobs that have pictures in progress, or being stored."""
        return {claim.picture.job for loaded in self.models for claim in loaded.held}

    def _drop_ended(self, awaited: str | None) -> set[str]:
        """Drop the pictures of jobs that ended elsewhere; return those jobs, and `awaited` if it has ended."""
        if ended := self.store.ended(self._jobs() | ({awaited} if awaited else set())):
            for loaded in self.models:
                loaded.stream.discard(loaded.take_out({key for key in loaded.claims if key[0] in ended}))
        return ended

    def _sweep(self) -> None:
        if time.monotonic() - self._swept_at >= CHECK_EVERY_S:
            self._swept_at = time.monotonic()
            with best_effort():  # the next sweep repairs what this one cannot
                self.sweeper.sweep()

    def _claim(self, loaded: AnyLoaded) -> None:
        """Claim as many pictures as there is room for, those of dead workers first.

        A picture that killed too many workers fails its job.
        """
        held = {claim.entry for claim in loaded.held}
        room = 0 if self._holds_back else loaded.room
        claims, hopeless = loaded.stream.claim_stale(room, may_be_alone=not self.models.busy, held=held)
        room = loaded.room - len(claims)
        if room > 0 and not (self._holds_back or any(claim.alone for claim in claims)):
            claims += loaded.stream.claim_new(room)
        for one in hopeless:
            self.store.fail(one.job, one.reason)
        loaded.stream.discard([one.entry for one in hopeless])
        if claims:
            self._admit(loaded, claims)

    @property
    def _holds_back(self) -> bool:
        """Whether a picture is, or is to be, the only one in this process: it may kill it."""
        return any(loaded.stream.suspects or any(claim.alone for claim in loaded.held) for loaded in self.models)

    def _admit(self, loaded: AnyLoaded, claims: list[Claim]) -> None:
        """Admit claims whose job is open and whose picture is not done, and discard the others."""
        unfinished = self.store.unfinished(claim.picture.key for claim in claims)
        wanted = [claim for claim in claims if claim.picture.key in unfinished]
        loaded.stream.discard([claim.entry for claim in claims if claim.picture.key not in unfinished])
        loaded.admit(wanted)
        for claim in wanted:
            if claim.asked_at:
                WAIT_SECONDS.labels(loaded.name).observe(max(0.0, time.time() - claim.asked_at))
        self.spans.join(claim.picture.job for claim in wanted)

    def _advance(self, loaded: AnyLoaded) -> None:
        """Step the batch of a model, or judge the pictures that an evaluator has; store what is finished."""
        begun = time.monotonic()
        if isinstance(loaded, LoadedEvaluator):
            judged_at = time.time()
            pictures = [claim.picture for claim in loaded.claims.values()]
            outcomes = judge_uploaded(self.connection, loaded.judge, pictures, self.device)
            self._store(loaded, outcomes, (judged_at, time.time()))
        else:
            with one_step(loaded.name, len(loaded.engine.rows()), loaded.stepper):
                outcomes = loaded.engine.step()
            self._store(loaded, outcomes, loaded.engine.judged_at)
            self.rate.add(len(outcomes), time.monotonic() - begun)

    def _store(self, loaded: AnyLoaded, outcomes: list[Outcome], judged_at: tuple[float, float]) -> None:
        """Store finished pictures, complete the jobs that have all of theirs, and fail jobs that cannot have them."""
        finished, failed = [], []
        for outcome in outcomes:
            picture = outcome.picture
            claim = loaded.claims.pop(picture.key)
            PICTURES.labels(loaded.name, "made" if isinstance(outcome, FinishedPicture) else "failed").inc()
            if isinstance(outcome, FinishedPicture):
                loaded.storing[picture.key] = claim
                finished.append((claim.entry, outcome))
            else:
                failed.append(claim.entry)
                self.store.fail(picture.job, f"picture {picture.index}: {outcome.reason}")
        loaded.stream.discard(failed)
        if finished:
            work = Work(judged_by=loaded.judged_by, stream=loaded.stream.key, finished=finished, judged_at=judged_at)
            self.storer.submit(work)
            self._collect()

    def _collect(self) -> None:
        """Let go of pictures that are stored, or could not be: their leases expire, and a worker samples them again."""
        works, error = self.storer.collect()
        for loaded in self.models:
            for work in works:
                for one in work.pictures:
                    loaded.storing.pop(one.picture.key, None)
        if error is not None:
            raise error
        for work in works:
            job_ids = {one.picture.job for one in work.pictures}
            self.spans.record("judge", job_ids, *work.judged_at)
            self.spans.record("store", job_ids, *work.stored_at)
            if job_ids:
                self.spans.keep(self._jobs(), work.judged_at[0])

    def renew_claims(self) -> None:
        """Renew the leases of the pictures in progress, or being stored. The heartbeat's thread calls it."""
        for loaded in self.models:
            loaded.stream.renew([claim.entry for claim in loaded.held])

    def stop(self, within_s: float) -> None:
        """Claim nothing more, and give `drain` so long. Safe in a signal handler."""
        self.stopping, self.drain_until = True, time.monotonic() + within_s

    def drain(self) -> None:
        """After `stop`, finish the pictures in progress that fit into the time left; release the others at once."""
        log.info("draining", pictures=sum(len(loaded.held) for loaded in self.models))
        for model in self.models.denoisers():
            model.engine.efficient_rows = None  # all step each time, so that the time they take is predictable
        while self.models.busy and (left_s := self.drain_until - time.monotonic()) > 0:
            for model in self.models.denoisers():
                rows = model.engine.rows()
                fit = {p.key for p, row in rows if (len(row.table) - row.step) * self.iteration_s <= left_s}
                model.stream.release(model.take_out(model.claims.keys() - fit))
            if self.models.busy:
                self.run_once()
        self.release_claims()

    def release_claims(self) -> None:
        """Leave all pictures in progress, or being stored, to other workers at once."""
        for loaded in self.models:
            loaded.stream.release(loaded.take_out(set(loaded.claims)) + [one.entry for one in loaded.storing.values()])
            loaded.storing.clear()
        self.spans.keep(())
