"""What Redis should hold of all jobs, in memory: the model with which test_job_model.py compares the store."""

from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass, field

from service.contract.errors import KeyReuse
from service.contract.records import TERMINAL, JobRecord, created_at
from service.store.async_jobs import IdempotentRequest

T = 3600  # a tick of the model's time in seconds: long enough that a slow machine changes nothing
CLOCK = 1767268800  # Redis's clock at the beginning, at a full hour
OWNERS, DIGESTS = ("ann", "bob"), ("d" * 64, "e" * 64)
LIMITS: dict[str, float] = {
    "keep_days": 6 * T / 86400,
    "job_timeout_s": 10 * T,
    "max_queued_pictures": 9,
    "max_queued_pictures_per_owner": 6,
    "max_stored_pictures_per_owner": 14,
    "lease_s": T // 2,
}
KEEP_S = 6 * T
IDEMPOTENT_S = KEEP_S
LIFETIME_S = 10 * T + KEEP_S
LAST_TRY = 2  # deliveries after which a picture is suspected to kill workers


@dataclass
class Job:
    """A job as the model knows it. `stored`: the pictures that have a verdict."""

    record: JobRecord
    overdue_at: int
    pending: set[int]
    status: str = "queued"
    ended: int = 0
    moves: list[str] = field(default_factory=list)
    stored: set[int] = field(default_factory=set)
    is_deleted: bool = False

    @property
    def is_open(self) -> bool:
        return self.status not in TERMINAL

    @property
    def is_complete(self) -> bool:
        return len(self.stored) == self.record.total

    @property
    def hour(self) -> int:
        return int(created_at(self.record.id) // 3600)

    def move(self, to: str, now: int) -> None:
        self.status = to
        self.moves.append(to)
        if to in TERMINAL:
            self.ended = now
            self.pending.clear()


@dataclass
class Entry:
    """A picture in a stream; without an index, a grid. `stale`: its lease has expired, or it was released."""

    job: str
    index: int | None
    deliveries: int = 1
    stale: bool = False


class Model:
    """The jobs, the entries of the streams, the idempotency keys and what owners have stored, at the time `now`.

    `clock`: Redis's, which may jump. By it jobs are overdue; times to live and leases are not so.
    """

    def __init__(self) -> None:
        self.now, self.clock = 0, CLOCK
        self.jobs: dict[str, Job] = {}
        self.entries: dict[str, dict[str, Entry]] = {digest: {} for digest in DIGESTS}
        self.keepers: dict[str, str] = {}  # digest -> the worker that samples suspects
        self.keys: dict[tuple[str, str], tuple[str, str, int]] = {}  # owner and key -> request, job, time
        self.stored: dict[str, dict[int, int]] = {owner: {} for owner in OWNERS}  # hour -> pictures
        self.stored_until = dict.fromkeys(OWNERS, 0)

    def job(self, position: int) -> Job:
        """Return a job, counted from the newest, for any number."""
        return list(self.jobs.values())[-1 - position % len(self.jobs)]

    def open_job(self, job_id: str) -> Job | None:
        """Return a job if it is open; also ids of jobs that Redis has lost are asked for."""
        job = self.jobs.get(job_id)
        return job if job is not None and job.is_open else None

    def exists(self, job_id: str) -> bool:
        job = self.jobs.get(job_id)
        return job is not None and not job.is_deleted and (job.is_open or self.now < job.ended + KEEP_S)

    def add(self, job: JobRecord) -> None:
        added = self.jobs[job.id] = Job(job, self.clock + 10 * T, set(range(job.total)))
        hours = self.stored[job.owner]
        hours[added.hour] = hours.get(added.hour, 0) + job.total
        self.stored_until[job.owner] = self.now + LIFETIME_S + 3600

    def delete(self, job: Job) -> None:
        job.is_deleted = True
        if job.hour in self.stored[job.record.owner]:
            self.stored[job.record.owner][job.hour] -= job.record.total

    def end_early(self, job: Job, to: str) -> None:
        job.move(to, self.now)
        entries = self.entries[job.record.digest]
        self.entries[job.record.digest] = {name: one for name, one in entries.items() if one.job != job.record.id}

    def time_passes(self, ticks: int) -> None:
        self.now += ticks * T
        if ticks:
            self.keepers.clear()
            for entry in (one for entries in self.entries.values() for one in entries.values()):
                entry.stale = True
        for owner in OWNERS:
            if self.now >= self.stored_until[owner]:
                self.stored[owner].clear()

    def of(self, digest: str) -> Iterator[Job]:
        return (job for job in self.jobs.values() if job.record.digest == digest)

    def pending(self, digest: str) -> Counter[str]:
        """Return the number of pending pictures by owner."""
        counts: Counter[str] = Counter()
        for job in self.of(digest):
            counts[job.record.owner] += len(job.pending)
        return counts

    def wanted(self) -> set[str]:
        stale = {digest for digest, entries in self.entries.items() if any(one.stale for one in entries.values())}
        return stale | {digest for digest in DIGESTS if self.pending(digest).total()}

    def full(self, owner: str, digest: str, n: int) -> str:
        """Return what is full for a new job; "" if it fits. Forgets expired hours as `create` does."""
        pending = self.pending(digest)
        share = LIMITS["max_queued_pictures_per_owner"]
        queued = len(self.entries[digest]) + sum(min(count, share) for count in pending.values())
        if queued and queued + n > LIMITS["max_queued_pictures"]:
            return "queue"
        if pending[owner] and pending[owner] + n > share:
            return "owner"
        oldest = (self.clock - LIFETIME_S) // 3600
        self.stored[owner] = {hour: count for hour, count in self.stored[owner].items() if hour >= oldest}
        taken = sum(self.stored[owner].values())
        return "stored" if taken > 0 and taken + n > LIMITS["max_stored_pictures_per_owner"] else ""

    def known(self, request: IdempotentRequest) -> str | None:
        """Return the job that the same request created. KeyReuse if the key's job, of another request, exists."""
        known = self.keys.get((request.owner, request.key))
        if known is None or self.now >= known[2] + IDEMPOTENT_S or not self.exists(known[1]):
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

    def check_nothing_is_lost(self) -> None:
        """Every picture of an open job is stored, or pending, or in the stream; a grid is there once all are stored."""
        for job in filter(lambda job: job.is_open, self.jobs.values()):
            indices = [one.index for one in self.entries[job.record.digest].values() if one.job == job.record.id]
            assert {*job.stored, *job.pending, *indices} - {None} == set(range(job.record.total))
            assert indices.count(None) == job.is_complete
