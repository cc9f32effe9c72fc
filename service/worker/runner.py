"""A worker's loop: claim pictures, step the batches, and hand finished pictures over to be stored.

The one place where engine and Redis meet. A test can drive it, an iteration at a time.
"""

import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from service.contract.records import FinishedPicture, ModelName, created_at
from service.files import PictureFiles
from service.settings import Settings
from service.store import keys, workers
from service.store.claims import BegunClaim, PictureStream
from service.store.connection import best_effort
from service.store.jobs import JobStore
from service.telemetry.boundary import Watchdog, attempt, confined
from service.telemetry.logs import get_logger
from service.telemetry.metrics import NETWORK_ROWS, PICTURES, STEP_PICTURES, STEP_SECONDS, WAIT_SECONDS
from service.worker.checkpoint_cache import CheckpointCache
from service.worker.engine import Engine, Member
from service.worker.job_files import JobFiles
from service.worker.judge import Outcome
from service.worker.models import Loaded, LoadedModels
from service.worker.storer import Storer, Work
from shared.device import lost, pick_device

log = get_logger(__name__)

THREADS_WAIT_S = 0.02  # between two iterations while there is nothing to do but to wait for storage
CHECK_EVERY_S = 1.0  # how often to look at what no worker does: overdue jobs, models that nobody has loaded, old leases
OTHERS_FIRST_S = 1.0  # in which an idle worker would load a model
RETRY_S = 60.0  # before a model is tried again that could not be loaded
LIVE_EVERY_S = 0.5  # between two progress events of a job with previews, at least
PREVIEWS_AT_ONCE = 16  # of all jobs together; the rest of a larger batch follows the next time
EXIT_DEVICE_LOST = 70  # EX_SOFTWARE of sysexits.h
Confined = Callable[..., AbstractContextManager[None]]
end_process = os._exit  # nothing may catch it


class Runner:
    """A worker process's models and the pictures in progress on them. Only `renew_claims` is safe in another thread."""

    def __init__(self, connection: Redis, settings: Settings, name: str) -> None:
        self.connection, self.settings, self.name = connection, settings, name
        self.store = JobStore(connection, settings)
        self.storage = JobFiles(PictureFiles(settings.pictures), patience_s=settings.lease_s)
        self.storer = Storer(self.store, self.storage)
        self.device = pick_device(settings.device)
        cache = CheckpointCache(settings.cache, settings.storage, settings.cache_bytes)
        self.models = LoadedModels(connection, settings, self.device, cache, self.storage, name)
        self.confined = partial(confined, passes=self.models.passes)
        self.previews = Previews(connection, LIVE_EVERY_S, self.confined)
        self.sampled, self.worked_s = 0, 0.0  # pictures so far, and the time that they took
        self.loading = True  # the first model
        self.idle = True  # nothing is in progress, being stored or being fetched
        self.paused = False  # `rq suspend`: finish what is in progress, and claim nothing more
        self.stopping = False  # a signal handler sets it, in which an Event's lock could deadlock
        self.drain_until = math.inf  # monotonic seconds
        self.watchdog = Watchdog(settings.stalled_after_s)
        self._looked_at = time.monotonic()
        self._wanted_since = dict[str, float]()  # digest of a model that waits -> monotonic time
        self._not_before = dict[str, float]()  # digest of a model that could not be loaded -> when to try again

    @property
    def busy(self) -> bool:
        """Whether pictures are in progress, or being stored."""
        return bool(self.storer.works) or any(loaded.claims for loaded in self.models)

    def work(self) -> None:
        """Work until nothing is left to do or, after `stop`, drain.

        Only a drain gives leases back: after any other end they expire, and count as deaths of their pictures.
        """
        try:
            self.run_once()
            if self.idle:  # nothing for the loaded models, so perhaps for another
                self._looked_at = -math.inf
                self.run_once()
            while not (self.idle or self.stopping):
                self.run_once()
            if self.stopping:
                self.drain()
        except RedisError:
            if not self.stopping:
                raise

    def run_once(self) -> None:
        """Claim pictures for every loaded model and advance those in progress.

        If the device is lost, end the process at once, as if it had been killed: other workers then take over its
        pictures, and give up one that kills again.
        """
        try:
            with self.confined("periodic task", task="dropping ended jobs"):
                self._drop_ended()
            if not self.stopping:
                with self.confined("periodic task", task="following models"):
                    self.models.follow(self._cannot_load)
            if not (self.stopping or self.paused):
                for loaded in self.models.claiming() if not self.storage.problem else ():
                    with self.confined("model", partial(self._expire, loaded), model=loaded.name):
                        self._claim(loaded)
                with self.confined("periodic task", task="looking for work"):
                    self._load_wanted()  # after the claims, so that a model which was just loaded has its place
            in_progress = [loaded for loaded in self.models if loaded.claims]
            for loaded in in_progress:
                with self.confined("model", partial(self._forget, loaded), model=loaded.name):
                    self._advance(loaded)
                self.watchdog.moved()  # an iteration over several models is as long as all of their steps
            self.idle = not (in_progress or self.storer.works or self.models.fetches)
            if not (in_progress or self.idle):
                time.sleep(THREADS_WAIT_S)
            with self.confined("periodic task", task="previews"):
                self.previews.publish([one for _, engine in self.models.denoisers() for one in engine.batch.values()])
            self.watchdog.moved()
        except Exception as error:
            if lost(error, self.device):
                log.critical("the device has failed; this worker ends", exc_info=True)
                end_process(EXIT_DEVICE_LOST)
            raise

    def _drop_ended(self) -> None:
        """Drop the pictures of jobs that ended elsewhere."""
        works = list(self.storer.works)
        jobs = {claim.job for loaded in self.models for claim in loaded.claims.values()} | {work.job for work in works}
        if ended := self.store.ended(jobs):
            for loaded in self.models:
                if unneeded := loaded.take_out({key for key in loaded.claims if key[0] in ended}):
                    loaded.stream.discard(unneeded)
            self.storer.drop(work for work in works if work.job in ended)

    def _expire(self, loaded: Loaded, _: str = "") -> None:
        """Let leases of a model expire on which nothing works: their pictures could not be admitted."""
        working = [claim.entry for claim in loaded.claims.values()]
        loaded.stream.leased.intersection_update(
            working + [e for work in list(self.storer.works) for e in work.entries]
        )

    def _forget(self, loaded: Loaded, _: str = "") -> None:
        """End a model, as a death would, with its pictures in progress. It is loaded again if work for it is left."""
        self.models.forget(loaded)
        loaded.claims.clear()
        self._expire(loaded)

    def look(self) -> list[ModelName] | None:
        """Now and then, unload idle models, fail overdue jobs, and return the models whose work no worker takes."""
        now = time.monotonic()
        if now - self._looked_at < CHECK_EVERY_S:
            return None
        self._looked_at = now
        self.models.unload()
        with best_effort():  # the next look repairs what this one cannot
            self.store.fail_overdue()
            if self.storage.problem:
                self._give_back()
                return None
            return [model for model in self.store.wanted() if now >= self._not_before.get(model.digest, 0.0)]
        return None

    def _load_wanted(self) -> None:
        """Load the models whose work no worker takes: those wanted longest first, and at once if idle."""
        if (found := self.look()) is None:
            return
        now = time.monotonic()
        wanted = {model.digest: model for model in found if self.models.get(model.digest) is None}
        self._wanted_since = {digest: self._wanted_since.get(digest, now) for digest in wanted}
        for digest in sorted(wanted, key=self._wanted_since.__getitem__):
            if self.idle or now - self._wanted_since[digest] >= OTHERS_FIRST_S:
                self.models.want(wanted[digest])

    def _give_back(self) -> None:
        """Leave everything to other workers, if storage has failed here for a lease, and not for all of them."""
        if self.busy and time.monotonic() - self.storage.failing_since >= self.settings.lease_s:
            others = workers.ready(workers.list_live(self.connection))  # by now this one has announced its problem
            if not all(about.get("storage_problem") for about in others):
                log.warning("storage fails; the pictures are left to other workers")
                self.release_claims()

    def _cannot_load(self, model: ModelName, awaited_s: float, reason: str) -> None:
        """Fail the jobs of a model that cannot be used, if no other worker has it.

        But not those that were created after this worker asked storage for it: it is asked again for them.
        """
        self._not_before[model.digest] = time.monotonic() + RETRY_S
        log.warning("model cannot be loaded", model=model.name, digest=model.digest, reason=reason)
        if not workers.have_loaded(self.connection, model.digest):
            self._not_before.pop(model.digest)  # its next job may find it
            seconds, microseconds = self.connection.time()  # by which ids are dated
            asked_at = seconds + microseconds / 1e6 - awaited_s
            for job_id in self.store.of_model(model.digest):
                if created_at(job_id) <= asked_at:
                    with self.confined("job", job_id=job_id):
                        self.store.fail(job_id, f"the model cannot be loaded: {reason}")

    def _claim(self, loaded: Loaded) -> None:
        """Claim as many pictures as there is room for; now and then those of dead workers first.

        A picture that killed too many workers fails its job.
        """
        unstored = self.storer.count(loaded.stream)  # storage may be slow
        room = min(loaded.engine.room, loaded.engine.max_pictures - unstored)
        room = 0 if self._holds_back else max(0, room)
        if not (room or loaded.stream.suspects):
            return
        claims, now = list[BegunClaim](), time.monotonic()
        if loaded.stream.suspects or now - loaded.took_over_at >= CHECK_EVERY_S:
            claims, loaded.took_over_at = self.store.take_over(loaded.stream, room, may_be_alone=not self.busy), now
        if room > len(claims) and not (loaded.stream.suspects or any(claim.alone for claim in claims)):
            claims += self.store.claim_new(loaded.stream, room - len(claims))
        attempt(partial(self._admit, loaded), claims, partial(self._refuse, loaded), about, self.models.passes)

    @property
    def _holds_back(self) -> bool:
        """Whether a picture or grid is, or is to be, the only one in this process: it may kill it."""
        claims = [claim for loaded in self.models for claim in loaded.claims.values()]
        claims += [claim for work in list(self.storer.works) for claim in list(work.complete)]
        return any(claim.alone for claim in claims) or any(loaded.stream.suspects for loaded in self.models)

    def _admit(self, loaded: Loaded, claims: Sequence[BegunClaim]) -> None:
        """Admit pictures; compose grids."""
        pictures = [(claim.record.picture(claim.index), claim) for claim in claims if claim.index is not None]
        loaded.engine.admit([picture for picture, _ in pictures])
        loaded.claims |= {picture.key: claim for picture, claim in pictures}
        for claim in claims:
            if claim.index is None:
                work = Work(job=claim.job, stream=loaded.stream, judged_by=loaded.judged_by, complete=[claim])
                self.storer.submit(work)
            else:
                WAIT_SECONDS.labels(loaded.name).observe(max(0.0, time.time() - created_at(claim.job)))

    def _refuse(self, loaded: Loaded, claim: BegunClaim, reason: str) -> None:
        """Fail the job of a picture or grid that cannot be had."""
        self.store.fail(claim.job, reason if claim.index is None else f"picture {claim.index}: {reason}")
        loaded.stream.discard([claim.entry])

    def _advance(self, loaded: Loaded) -> None:
        """Step the batch of a model, or judge the pictures that an evaluator has, and hand over those that ended."""
        loaded.used_at = begun = time.monotonic()
        engine = loaded.engine
        if not isinstance(engine, Engine):
            self._hand_over(loaded, engine.step())
            engine.wait()
            return
        stepper, pictures = engine.stepper, len(engine.batch)
        rows, worked = stepper.network_rows, engine.worked
        self.sampled += self._hand_over(loaded, engine.step())  # while the next step is taken
        engine.wait()
        took_s = time.monotonic() - begun
        self.worked_s += took_s
        loaded.rate.add(engine.worked - worked, begun + took_s - (loaded.stepped_at or begun))
        loaded.stepped_at = begun + took_s if engine.batch else None
        if stepper.network_rows > rows:  # otherwise no picture needed a step
            STEP_SECONDS.labels(loaded.name).observe(took_s)
            STEP_PICTURES.labels(loaded.name).observe(pictures)
            NETWORK_ROWS.labels(loaded.name).inc(stepper.network_rows - rows)

    def _hand_over(self, loaded: Loaded, outcomes: Sequence[Outcome]) -> int:
        """Have finished pictures stored, and fail jobs that cannot have theirs. Return how many pictures ended."""
        works = dict[str, Work]()  # by job
        of_job = partial(Work, stream=loaded.stream, judged_by=loaded.judged_by, judged_at=loaded.engine.judged_at)
        for outcome in outcomes:
            job_id = outcome.picture.job
            claim = loaded.claims.pop(outcome.picture.key)
            PICTURES.labels(loaded.name, "made" if isinstance(outcome, FinishedPicture) else "failed").inc()
            if isinstance(outcome, FinishedPicture):
                works.setdefault(job_id, of_job(job=job_id)).finished.append((claim, outcome))
            else:
                with self.confined("job", job_id=job_id):
                    self._refuse(loaded, claim, outcome.reason)
        for work in works.values():
            self.storer.submit(work)
        return len(outcomes)

    def renew_claims(self) -> None:
        """Renew the leases of the pictures in progress, or being stored. The heartbeat's thread calls it."""
        for stream in self._streams():
            with self.confined("model", digest=stream.digest):
                stream.renew()

    def _streams(self) -> set[PictureStream]:
        """Return the streams of which this worker may hold entries. Safe in another thread."""
        return {loaded.stream for loaded in self.models} | {work.stream for work in list(self.storer.works)}

    def stop(self, within_s: float) -> None:
        """Claim nothing more, and give `drain` so long. Safe in a signal handler."""
        self.stopping, self.drain_until = True, time.monotonic() + within_s

    def drain(self) -> None:
        """After `stop`, work until nothing is in progress or the time is over, and leave the rest to other workers."""
        log.info("draining", pictures=sum(len(loaded.claims) for loaded in self.models))
        while self.busy and time.monotonic() < self.drain_until:
            self.run_once()
        self.release_claims()

    def release_claims(self) -> None:
        """Leave all pictures in progress, or being stored, to other workers at once."""
        for stream in self._streams():
            stream.release(list(stream.leased))
        for loaded in self.models:
            loaded.take_out(set(loaded.claims))
        self.storer.drop(self.storer.works)
        self.storer.works.clear()


def about(claim: BegunClaim) -> dict[str, Any]:
    return {"job_id": claim.job, "picture": claim.index}


class Previews:
    """Reports a worker's pictures to clients that watch their jobs, every `every_s` seconds at most."""

    def __init__(self, connection: Redis, every_s: float, confined: Confined = confined) -> None:
        self.connection, self.every_s, self.confined = connection, every_s, confined
        self._published_at = 0.0
        self._next = 0  # index of the first picture to render next time

    def publish(self, batch: Sequence[Member]) -> None:
        """Report steps and previews. Computes nothing for a job that nobody watches."""
        if not batch or time.monotonic() - self._published_at < self.every_s:
            return
        self._published_at = time.monotonic()
        job_ids = list({one.picture.job for one in batch})
        found = self.connection.mget([keys.watched(job_id) for job_id in job_ids])
        watched = {job_id for job_id, watch in zip(job_ids, found, strict=True) if watch is not None}
        shown = [one for one in batch if one.picture.job in watched and one.row.x0_hat is not None]
        if not shown:
            return
        start = self._next % len(shown)
        shown = shown[start:] + shown[:start]
        self._next = start + min(len(shown), PREVIEWS_AT_ONCE)
        reports = defaultdict[str, list[dict[str, Any]]](list)
        for i, one in enumerate(shown):
            report: dict[str, Any] = {"index": one.picture.index, "step": one.row.step, "steps": len(one.row.table)}
            if one.picture.attempt > 1:
                report["attempt"] = one.picture.attempt
            if i < PREVIEWS_AT_ONCE:
                with self.confined("preview", job_id=one.picture.job, picture=one.picture.index):
                    report["preview"] = one.preview()
            reports[one.picture.job].append(report)
        with best_effort(), self.connection.pipeline(transaction=False) as pipe:
            for job_id, pictures in reports.items():
                pipe.publish(keys.PREVIEWS, f"{job_id} {json.dumps(pictures)}")
            pipe.execute()
