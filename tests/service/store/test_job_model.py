"""The life of jobs: clients, workers, sweeps and time in random order, on a real Redis and on a model in memory.

Each rule does what one process does in one go, to the store and to the model. After every step all that Redis holds
must equal the model; after the last one nothing may be left of any job. `make fuzz` takes more than 10,000 steps.
"""

import math
from collections import Counter
from collections.abc import Iterable
from itertools import count

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from redis import Redis
from rq import Queue
from rq.job import Job as RqJob
from rq.serializers import JSONSerializer

from service.contract.errors import KeyReuse
from service.contract.records import ACTIVE
from service.settings import Settings
from service.store import keys, workers
from service.store.admission import NoRoom
from service.store.claims import Claim, PictureStream
from service.store.connection import text
from service.store.idempotency import IdempotentRequest
from service.store.jobs import JobStore
from service.store.sweep import Sweeper
from tests.service.store.ageing import age
from tests.service.store.helpers import RESULT, done, record
from tests.service.store.job_comparison import check_bytes, check_jobs, check_queues
from tests.service.store.job_model import DIGESTS, EXPECTED_BYTES, LIMITS, OWNERS, Entry, Job, Model, T

WORKERS = 2

any_job = st.integers(0, 4)  # its position; the older ones were new once, too
any_worker = st.integers(0, WORKERS - 1)
any_digest = st.sampled_from(DIGESTS[:1] * 4 + DIGESTS[1:])


class Worker:
    """A logical worker: its views of the streams, the claims that it holds and the jobs that RQ gave it."""

    def __init__(self, connection: Redis, settings: Settings, name: str) -> None:
        self.name = name
        self.streams = {digest: PictureStream(connection, settings, digest, name) for digest in DIGESTS}
        self.sweeper = Sweeper(JobStore(connection, settings))
        self.held: dict[str, dict[str, Claim]] = {digest: {} for digest in DIGESTS}
        self.running: dict[str, RqJob] = {}


def is_fair(taken: Counter[str], left: Counter[str]) -> bool:
    """Whether nobody got two more than another one who has pictures left."""
    return all(taken[a] + 1 >= taken[b] for a in left if left[a] for b in taken)


class JobMachine(RuleBasedStateMachine):
    """See the module. The fixture sets `connection` and `settings`."""

    connection: Redis
    settings: Settings
    steps = ended = 0

    def __init__(self) -> None:
        super().__init__()
        self.connection.flushall()
        self.store = JobStore(self.connection, self.settings)
        self.model = Model()
        self.names = (f"w{number}" for number in count())
        self.workers = [Worker(self.connection, self.settings, next(self.names)) for _ in range(WORKERS)]
        self.lost_rq_jobs: list[RqJob] = []

    @property
    def holding(self) -> list[tuple[int, str]]:
        """Return the workers that hold claims, each with a digest of some."""
        return [(i, digest) for i, worker in enumerate(self.workers) for digest in DIGESTS if worker.held[digest]]

    # --- clients ---

    @rule(
        owner=st.sampled_from(OWNERS),
        digest=any_digest,
        n=st.integers(1, 4),
        key=st.sampled_from(["", "", "k1", "k2"]),
        request=st.sampled_from(["this", "this", "that"]),
    )
    def asks(self, owner: str, digest: str, n: int, key: str = "", request: str = "this") -> None:
        job = record(n, owner, digest=digest)
        asked = IdempotentRequest(owner, key, request) if key else None
        full = self.model.full(owner, digest, n)
        try:
            existing = self.model.existing(asked) if asked else None
        except KeyReuse:
            with pytest.raises(KeyReuse):
                self.store.create(job, asked, expected_bytes=EXPECTED_BYTES * n)
            return
        created, why = None, ""
        try:
            created = self.store.create(job, asked, expected_bytes=EXPECTED_BYTES * n)
        except NoRoom as error:
            why = error.full.what
        if existing is not None:
            assert created == existing
            return
        assert why in full
        if created is not None:
            assert created == job.id
            self.model.jobs[job.id] = Job(job, self.model.now, set(range(n)))
            if asked:
                self.model.keys[owner, key] = request, job.id, self.model.now

    @rule(owner=st.sampled_from(OWNERS), n=st.integers(1, 4))
    def asks_as_usual(self, owner: str, n: int) -> None:
        self.asks(owner, DIGESTS[0], n)

    @precondition(lambda self: self.model.jobs)
    @rule(which=any_job)
    def cancels(self, which: int) -> None:
        job = self.model.job(which)
        assert self.store.cancel(job.record.id) == job.is_open
        if job.is_open:
            self.model.end_early(job, "cancelled")

    @precondition(lambda self: self.model.jobs)
    @rule(which=any_job)
    def deletes(self, which: int) -> None:
        job = self.model.job(which)
        ended = self.model.exists(job) and not job.is_open
        assert self.store.delete(job.record.id) == ended
        job.is_deleted |= ended

    # --- workers ---

    @rule(who=any_worker, digest=any_digest, room=st.integers(1, 6))
    def claims(self, who: int, digest: str, room: int) -> None:
        """As the runner does: stale claims first, then new ones; those that nobody needs are discarded."""
        worker = self.workers[who]
        stream = worker.streams[digest]
        stream._looked_at = -math.inf  # it does not look at every call
        taken, hopeless = stream.claim_stale(room, may_be_alone=True, held=worker.held[digest])
        expected_taken, expected_hopeless = self.model.take_stale(worker.name, digest, room, worker.held[digest])
        assert {claim.entry: claim.alone for claim in taken} == expected_taken
        assert {one.entry for one in hopeless} == expected_hopeless
        for one in hopeless:
            self.fail(one.job, one.reason)
        self.discard(stream, expected_hopeless)
        if room > len(taken) and not any(expected_taken.values()):
            taken += self.claim_new(stream, room - len(taken))
        self.admit(worker, digest, taken)

    def claim_new(self, stream: PictureStream, room: int) -> list[Claim]:
        before = self.model.pending(stream.digest)
        new = stream.claim_new(room)
        assert len(new) == min(room, before.total())
        by_owner: Counter[str] = Counter()
        by_job: dict[str, Counter[str]] = {owner: Counter() for owner in OWNERS}
        for claim in new:
            job = self.model.jobs[claim.picture.job]
            job.pending.remove(claim.picture.index)  # so nobody has claimed it before
            self.model.entries[stream.digest][claim.entry] = Entry(*claim.picture.key)
            by_owner[job.record.owner] += 1
            by_job[job.record.owner][job.record.id] += 1
        assert is_fair(by_owner, self.model.pending(stream.digest))
        for owner, taken in by_job.items():
            left = {
                job.record.id: len(job.pending) for job in self.model.of(stream.digest) if job.record.owner == owner
            }
            assert is_fair(taken, Counter(left))
        return new

    def admit(self, worker: Worker, digest: str, claims: list[Claim]) -> None:
        job_ids = {claim.picture.job for claim in claims}
        unfinished = self.store.unfinished(claim.picture.key for claim in claims)
        for job_id in job_ids:
            if (job := self.model.jobs[job_id]).status == "queued":
                job.move("running", self.model.now)
        of_open = [claim for claim in claims if self.model.jobs[claim.picture.job].is_open]
        wanted = [one for one in of_open if one.picture.index not in self.model.jobs[one.picture.job].stored]
        assert unfinished == {claim.picture.key for claim in wanted}
        unwanted = {claim.entry for claim in claims} - {claim.entry for claim in wanted}
        self.discard(worker.streams[digest], unwanted)
        worker.held[digest] |= {claim.entry: claim for claim in wanted}

    def begin(self, job_ids: Iterable[str]) -> None:
        queued = [self.model.jobs[job_id] for job_id in job_ids if self.model.jobs[job_id].status == "queued"]
        assert self.store.begin(*job_ids) == bool(queued)
        for job in queued:
            job.move("running", self.model.now)

    def fail(self, job_id: str, reason: str) -> None:
        job = self.model.jobs[job_id]
        assert self.store.fail(job_id, reason) == job.is_open
        if job.is_open:
            self.model.end_early(job, "failed")

    def discard(self, stream: PictureStream, names: Iterable[str]) -> None:
        stream.discard(list(names))
        for name in names:
            self.model.entries[stream.digest].pop(name, None)

    @precondition(lambda self: self.holding)
    @rule(which=any_job, n=st.integers(1, 6), dies=st.sampled_from([False, False, False, True]), at_once=st.booleans())
    def stores(self, which: int, n: int, dies: bool, at_once: bool) -> None:
        """Store finished pictures and finish the jobs that have all of theirs, unless the worker dies in between.

        `at_once`: those of one picture end as it is stored.
        """
        who, digest = self.holding[which % len(self.holding)]
        worker, held = self.workers[who], self.workers[who].held[digest]
        made = [done(held.pop(name), f"{worker.name} made {name}".encode()) for name in list(held)[:n]]
        results = {one.picture.key: RESULT for _, one in made} if at_once else None
        complete = self.store.commit(worker.streams[digest].key, made, results=results)
        touched = set[str]()
        for name, one in made:
            self.model.entries[digest].pop(name, None)
            job = self.model.jobs[one.picture.job]
            touched |= {job.record.id} if self.model.exists(job) else set()
            if job.is_open and one.picture.index not in job.stored:
                job.stored[one.picture.index] = one.png
                job.bytes += len(one.png) + len(one.verdict.write())
                if at_once and job.record.total == 1:
                    job.bytes += len(b"0")
                    job.move("finished", self.model.now)
                    touched.remove(job.record.id)
        assert complete == {i for i in touched if len(self.model.jobs[i].stored) == self.model.jobs[i].record.total}
        if dies:
            self.dies(who)
        else:
            self.finish(complete)

    def finish(self, job_ids: Iterable[str]) -> None:
        found = [job.id for job, _ in self.store.open_verdicts(job_ids)]
        assert set(found) == {job_id for job_id in job_ids if self.model.jobs[job_id].is_open}
        assert self.store.finish(dict.fromkeys(job_ids, (RESULT, b"grid"))) == bool(found)
        for job_id in found:
            self.model.jobs[job_id].bytes += len(b"grid")
            self.model.jobs[job_id].move("finished", self.model.now)

    @precondition(lambda self: self.holding)
    @rule(which=any_job)
    def fails_a_picture(self, which: int) -> None:
        who, digest = self.holding[which % len(self.holding)]
        worker = self.workers[who]
        name, claim = worker.held[digest].popitem()
        self.fail(claim.picture.job, "poison")
        self.discard(worker.streams[digest], [name])

    @precondition(lambda self: self.holding)
    @rule(who=any_worker)
    def drops_what_has_ended(self, who: int) -> None:
        worker = self.workers[who]
        for digest, held in worker.held.items():
            statuses = self.store.statuses({claim.picture.job for claim in held.values()})
            ended = [name for name, claim in held.items() if statuses[claim.picture.job] not in ACTIVE]
            self.discard(worker.streams[digest], ended)
            for name in ended:
                del held[name]

    @rule(who=any_worker)
    def beats(self, who: int) -> None:
        worker = self.workers[who]
        workers.announce(self.connection, worker.name, {}, LIMITS["lease_s"])
        for digest, held in worker.held.items():
            worker.streams[digest].renew(list(held))
            for name in held.keys() & self.model.entries[digest].keys():
                self.model.entries[digest][name].stale = False

    @precondition(lambda self: self.holding)
    @rule(which=any_job)
    def releases(self, which: int) -> None:
        self.release(*self.holding[which % len(self.holding)])

    def release(self, who: int, digest: str) -> None:
        worker = self.workers[who]
        worker.streams[digest].release(list(worker.held[digest]))
        for name in worker.held[digest].keys() & self.model.entries[digest].keys():
            self.model.entries[digest][name].stale, self.model.entries[digest][name].deliveries = True, 0
        worker.held[digest].clear()

    @rule(who=any_worker)
    def dies(self, who: int) -> None:
        self.lost_rq_jobs += self.workers[who].running.values()
        self.workers[who] = Worker(self.connection, self.settings, next(self.names))

    # --- RQ and sweeps ---

    @rule(who=any_worker)
    def takes_an_rq_job(self, who: int) -> None:
        worker = self.workers[who]
        found = Queue.dequeue_any([self.store.queue], None, self.connection, serializer=JSONSerializer)
        if found is None:
            return
        rq_job, (job_id,) = found[0], found[0].args
        self.connection.lrem(self.store.queue.intermediate_queue_key, 1, rq_job.id)  # as RQ's worker does next
        if not self.store.is_open(job_id):
            rq_job.delete()
            return
        self.connection.hset(rq_job.key, mapping={"status": "started", "worker_name": worker.name})
        if job_id in worker.running:
            self.lost_rq_jobs.append(worker.running[job_id])
        worker.running[job_id] = rq_job
        self.begin([job_id])

    @precondition(lambda self: any(worker.running for worker in self.workers))
    @rule(who=any_worker)
    def looks_at_its_rq_jobs(self, who: int) -> None:
        """Finish a job whose last worker died before it could, and let go of those that have ended."""
        worker = self.workers[who]
        for job_id, rq_job in list(worker.running.items()):
            if self.store.done_count(job_id) >= self.model.jobs[job_id].record.total:
                self.finish([job_id])
            if not self.store.is_open(job_id):
                rq_job.delete()
                del worker.running[job_id]

    @precondition(lambda self: any(worker.running for worker in self.workers))
    @rule(who=any_worker)
    def stops(self, who: int) -> None:
        """A worker that shuts down queues its RQ jobs again."""
        worker = self.workers[who]
        for job_id, rq_job in worker.running.items():
            if self.store.is_open(job_id):
                self.store.requeue(job_id)
            rq_job.delete()
        worker.running.clear()
        for digest in DIGESTS:
            self.release(who, digest)

    @rule(who=any_worker)
    def sweeps(self, who: int) -> None:
        self.workers[who].sweeper.sweep()
        for job in self.model.jobs.values():
            if job.is_open and self.model.now >= job.created + LIMITS["job_timeout_s"]:
                self.model.end_early(job, "failed")

    @rule(ticks=st.sampled_from([1, 1, 1, 2, 5]))
    def time_passes(self, ticks: int) -> None:
        age(self.connection, ticks * T)
        self.model.now += ticks * T
        self.model.keepers.clear()
        for entries in self.model.entries.values():
            for entry in entries.values():
                entry.stale = True

    # --- what must hold after every step ---

    @invariant()
    def redis_equals_the_model(self) -> None:
        type(self).steps += 1
        check_jobs(self.connection, self.model)
        check_queues(self.connection, self.model)
        check_bytes(self.connection, self.model)

    # --- the end ---

    def teardown(self) -> None:
        """One worker that lives ends every job; later nothing of them is left."""
        for who in range(WORKERS):
            self.dies(who)
        self.time_passes(1)
        for _ in range(100):
            self.beats(0)
            self.sweeps(0)
            self.takes_an_rq_job(0)
            for digest in DIGESTS:
                self.claims(0, digest, 6)
            for which, _ in enumerate(self.holding):
                self.stores(which, 6, dies=False, at_once=which % 2 == 0)
            self.looks_at_its_rq_jobs(0)
            if not self.model.open_jobs() and not any(self.model.entries.values()):
                break
        assert self.model.open_jobs() == []
        self.redis_equals_the_model()
        for rq_job in self.lost_rq_jobs:  # RQ's own maintenance removes them
            rq_job.delete()
        assert self.store.queue.get_job_ids() == []
        self.time_passes(20)
        lasting = {keys.stream(digest) for digest in DIGESTS} | {keys.owners(digest) for digest in DIGESTS}
        lasting |= {keys.WORKERS, keys.ENDED, "rq:queues"}
        assert {text(key) for key in self.connection.scan_iter(count=1000)} <= lasting
        type(self).ended += len(self.model.jobs)
        super().teardown()


@pytest.mark.hypothesis
def test_redis_equals_a_model_of_all_jobs(
    connection: Redis, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(JobMachine, "connection", connection, raising=False)
    monkeypatch.setattr(
        JobMachine, "settings", settings.model_copy(update={**LIMITS, "api_keys": "ann:0 bob:0"}), raising=False
    )
    monkeypatch.setattr(JobMachine, "steps", 0)
    monkeypatch.setattr(JobMachine, "ended", 0)
    long = hypothesis_settings.get_current_profile_name() == "long"
    examples, steps = (400, 50) if long else (12, 30)
    run_state_machine_as_test(
        JobMachine,
        settings=hypothesis_settings(
            max_examples=examples, stateful_step_count=steps, suppress_health_check=list(HealthCheck)
        ),
    )
    assert JobMachine.steps > (10_000 if long else 100)
    assert JobMachine.ended > (1_000 if long else 10)
