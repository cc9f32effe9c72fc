"""The growth section fills a Redis through the service's own calls: queued jobs wait, finished jobs have ended."""

from redis import Redis

from benchmarks.sections.growth import Filler
from benchmarks.timing import Deadline
from service.settings import Settings
from tests.service.store.helpers import statuses


def test_the_filler_queues_and_finishes_jobs(connection: Redis, settings: Settings) -> None:
    filler, late = Filler(connection, settings), Deadline(0)
    finished, _ = filler.finish_until(2, b"png", late)
    assert statuses(filler.store, finished) == ["finished"]
    assert (filler.finished, filler.queued) == (2, 0)
    queued, _, _ = filler.queue_until(3, late)
    assert statuses(filler.store, queued) == ["queued"]
    assert filler.queued == 3
