"""What workers repair: they fail overdue jobs, and forget dead workers and former libraries."""

import math
import time

from redis import Redis

from service.store import functions, keys, workers
from service.store.jobs import JobStore

PRUNE_EVERY_S = 3600
FORGET_EVERY_S = 60.0  # dead workers and former libraries; a name costs each worker a command
OVERDUE = "not finished within the time limit for a job"


class Sweeper:
    """One worker's sweeps. Any worker may sweep at any time."""

    def __init__(self, store: JobStore) -> None:
        self.store = store
        self._forgot_at = -math.inf  # in monotonic seconds

    def sweep(self) -> None:
        for job_id in self.store.overdue():
            self.store.fail(job_id, OVERDUE)
        if time.monotonic() - self._forgot_at >= FORGET_EVERY_S:
            self._forgot_at = time.monotonic()
            workers.forget_dead(self.store.connection)
            functions.drop_others(self.store.connection, workers.libraries(self.store.connection))


def is_time_to_prune(connection: Redis) -> bool:
    """Return whether this process is to remove old files from storage; one does, once in `PRUNE_EVERY_S`."""
    return bool(connection.set(keys.PRUNED, 1, nx=True, ex=PRUNE_EVERY_S))
