"""Loads the models of jobs that wait while this worker is busy with others, so that no job waits for another to end.

RQ gives a worker one job at a time, which may last an hour. Knows no batches.
"""

import time
from concurrent.futures import Future

from service.contract.records import JobRecord
from service.store import workers
from service.store.jobs import JobStore
from service.store.sweep import Sweeper
from service.telemetry.logs import get_logger
from service.worker.loaded_models import AnyLoaded, LoadedModels
from shared.checkpoint import CheckpointError
from shared.device import lost

log = get_logger(__name__)

OTHERS_FIRST_S = 1.0  # in which an idle worker would take the job
FORGET_S = 5.0  # a job that no sweep has seen for this long has been taken or has ended
TURN_S = 5.0  # if more models are wanted than may be loaded: how long one keeps its place, at least
RETRY_S = 60.0  # before a model is tried again that could not be loaded


class WantedModels:
    """Which models jobs wait for, by what the sweeps see, and the one that is being loaded for them."""

    def __init__(self, store: JobStore, sweeper: Sweeper, models: LoadedModels) -> None:
        self.store, self.sweeper, self.models = store, sweeper, models
        self._seen: dict[str, tuple[float, float]] = {}  # digest -> monotonic times of the first and last sighting
        self._not_before: dict[str, float] = {}  # digest of a model that could not be loaded -> when to try again
        self._loading: tuple[JobRecord, Future[AnyLoaded]] | None = None
        self._loaded_at = 0.0

    def follow(self) -> None:
        """Take what has been loaded, or begin to load the model that has been wanted longest. Call it in each step."""
        now = time.monotonic()
        if self._loading is not None:
            record, loading = self._loading
            if loading.done():
                self._loading, self._loaded_at = None, now
                self._take(record, loading, now)
            return
        waiting, self.sweeper.waiting = self.sweeper.waiting, {}
        for digest in waiting:
            first, _ = self._seen.get(digest, (now, now))
            self._seen[digest] = first, now
        self._seen = {
            digest: (first, last)
            for digest, (first, last) in self._seen.items()
            if now - last < FORGET_S and self.models.get(digest) is None
        }
        for digest in sorted(self._seen.keys() & waiting.keys(), key=lambda digest: self._seen[digest]):
            if self._may_load(digest, now):
                self._begin(waiting[digest])
                return

    def _may_load(self, digest: str, now: float) -> bool:
        if now - self._seen[digest][0] < OTHERS_FIRST_S or now < self._not_before.get(digest, 0.0):
            return False
        return now - self._loaded_at >= TURN_S or self.models.has_place

    def _begin(self, job_id: str) -> None:
        try:
            record = self.store.record(job_id)
        except ValueError:  # of another version of the service
            return
        if record is not None:
            log.info("loading the model of a waiting job", model=record.model, **record.log_ids)
            loading = self.models.start_loading(record.model, record.digest, is_evaluator=record.sent)
            self._loading = record, loading

    def _take(self, record: JobRecord, loading: "Future[AnyLoaded]", now: float) -> None:
        self._seen.pop(record.digest, None)
        try:
            self.models.use(loading.result())
        except Exception as error:  # of any kind: the pictures in progress must go on
            if lost(error, self.models.device):
                raise
            self._not_before[record.digest] = now + RETRY_S
            log.warning("model of a waiting job cannot be loaded", reason=str(error), **record.log_ids)
            if not isinstance(error, CheckpointError) or self.store.statuses([record.id])[record.id] != "queued":
                return
            if not workers.have_loaded(self.store.connection, record.digest):
                self.store.fail(record.id, f"the model cannot be loaded: {error}")
