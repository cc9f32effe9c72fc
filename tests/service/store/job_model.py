"""What Redis should hold of all jobs, in memory: the model with which test_job_model.py compares the store."""

from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass, field

from service.contract.errors import KeyReuse
from service.contract.records import ACTIVE, TERMINAL, JobRecord
from service.store.idempotency import IdempotentRequest

T = 600  # a tick of the model's clock in seconds: long enough that a slow machine changes nothing
OWNERS, DIGESTS = ("ann", "bob"), ("d" * 64, "e" * 64)
EXPECTED_BYTES = 400  # of a picture
LIMITS: dict[str, int] = {
    "job_ttl_s": 5 * T,
    "remembered_s": 5 * T,
    "job_timeout_s": 10 * T,
    "idempotent_s": 8 * T,
    "max_queued_pictures": 9,
    "max_queued_pictures_per_owner": 6,
    "max_stored_bytes_per_owner": 6000,
    "lease_s": T // 2,
    "max_deliveries": 3,
}
LIFETIME_S = LIMITS["job_timeout_s"] + LIMITS["job_ttl_s"]  # of what is counted for an open job
LAST_TRY = 2  # deliveries after which a picture is suspected to kill workers


@dataclass
class Job:
    """A job as the model knows it. `stored`: the PNG of each picture that was stored first, by index."""

    record: JobRecord
    created: int
    pending: set[int]
    status: str = "queued"
    ended: int = 0
    moves: list[str] = field(default_factory=list)
    stored: dict[int, bytes] = field(default_factory=dict)
    bytes: int = 0
    is_deleted: bool = False

    @property
    def is_open(self) -> bool:
        return self.status in ACTIVE

    def move(self, to: str, now: int) -> None:
        self.status = to
        self.moves.append(to)
        if to in TERMINAL:
            self.ended = now
            self.pending.clear()
            self.bytes += len(self.record.write())


@dataclass
class Entry:
    """A picture in a stream. `stale`: its lease has expired, or it was released."""

    job: str
    index: int
    deliveries: int = 1
    stale: bool = False


class Model:
    """The jobs, the pictures in the streams and the idempotency keys, at the time `now`."""

    def __init__(self) -> None:
        self.now = 0
        self.jobs: dict[str, Job] = {}
        self.entries: dict[str, dict[str, Entry]] = {digest: {} for digest in DIGESTS}
        self.keepers: dict[str, str] = {}  # digest -> the worker that samples suspects
        self.keys: dict[tuple[str, str], tuple[str, str, int]] = {}  # owner and key -> request, job, time

    def job(self, position: int) -> Job:
        """Return a job, counted from the newest, for any number."""
        return list(self.jobs.values())[-1 - position % len(self.jobs)]

    def open_jobs(self) -> list[Job]:
        return [job for job in self.jobs.values() if job.is_open]

    def exists(self, job: Job) -> bool:
        return not job.is_deleted and (job.is_open or self.now < job.ended + LIMITS["job_ttl_s"])

    def remembers(self, job: Job) -> bool:
        """Whether the job has a tombstone: from its creation, or from its end if it did not finish."""
        since = job.ended if job.status in ("failed", "cancelled") else job.created + LIMITS["job_timeout_s"]
        return self.now < since + LIMITS["job_ttl_s"] + LIMITS["remembered_s"]

    def end_early(self, job: Job, to: str) -> None:
        job.move(to, self.now)
        entries = self.entries[job.record.digest]
        self.entries[job.record.digest] = {name: one for name, one in entries.items() if one.job != job.record.id}

    def of(self, digest: str) -> Iterator[Job]:
        return (job for job in self.jobs.values() if job.record.digest == digest)

    def pending(self, digest: str) -> Counter[str]:
        """Return the number of pending pictures by owner."""
        counts: Counter[str] = Counter()
        for job in self.of(digest):
            counts[job.record.owner] += len(job.pending)
        return counts

    def stored_bytes(self, owner: str) -> tuple[int, int]:
        """Return the bounds of an owner's counted bytes: what expires, does so at a full minute."""
        least = most = 0
        for job in self.jobs.values():
            if job.record.owner == owner and not job.is_deleted:
                if job.is_open:
                    counted = EXPECTED_BYTES * job.record.total * (self.now < job.created + LIFETIME_S)
                    least, most = least + counted, most + counted
                else:
                    least += job.bytes * (self.now < job.ended + LIMITS["job_ttl_s"])
                    most += job.bytes * (self.now <= job.ended + LIMITS["job_ttl_s"])
        return least, most

    def full(self, owner: str, digest: str, n: int) -> set[str]:
        """Return what may be named as full for a new job; "" if it may fit."""
        pending = self.pending(digest)
        share = LIMITS["max_queued_pictures_per_owner"]
        queued = len(self.entries[digest]) + sum(min(count, share) for count in pending.values())
        if queued and queued + n > LIMITS["max_queued_pictures"]:
            return {"queue"}
        own = pending[owner]
        if own and own + n > share:
            return {"owner"}
        least_and_most = self.stored_bytes(owner)
        limit = LIMITS["max_stored_bytes_per_owner"]
        return {"bytes" if taken and taken + n * EXPECTED_BYTES > limit else "" for taken in least_and_most}

    def existing(self, request: IdempotentRequest) -> str | None:
        """Return the job that the same request created. KeyReuse if the key's job, of another request, exists."""
        known = self.keys.get((request.owner, request.key))
        if known is None or self.now >= known[2] + LIMITS["idempotent_s"] or not self.exists(self.jobs[known[1]]):
            return None
        if known[0] != request.request:
            raise KeyReuse("")
        return known[1]

    def take_stale(self, who: str, digest: str, room: int, held: Container[str]) -> tuple[dict[str, bool], set[str]]:
        """Deliver stale entries again. Return them, with whether they must be sampled alone, and the hopeless ones."""
        entries = self.entries[digest]
        stale = [name for name, entry in entries.items() if entry.stale and name not in held]
        hopeless = {name for name in stale if entries[name].deliveries > LAST_TRY}
        suspects = [name for name in stale if entries[name].deliveries == LAST_TRY]
        innocent = [name for name in stale if entries[name].deliveries < LAST_TRY]
        keeps = bool(suspects) and self.keepers.setdefault(digest, who) == who
        taken = {suspects[0]: True} if keeps else dict.fromkeys(innocent[:room], False)
        for name in (*taken, *hopeless):
            entries[name].stale = False
            entries[name].deliveries += 1
        return taken, hopeless
