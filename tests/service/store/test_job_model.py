"""The life of jobs: clients, workers and time in random order, on a real Redis and on a model in memory.

Each rule is one call of the store, or of storage, so that workers die between any two. Redis's clock jumps, and Redis
comes back from an older snapshot. After every step all that Redis holds must equal the model, and no picture of an open
job may be lost or stored twice; at the end nothing may be left of any job. `make fuzz` takes HISTORIES histories.
"""

import copy
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from redis import Redis

from service.contract.errors import KeyReuse
from service.contract.records import JobResult, new_job_id
from service.settings import Settings
from service.store import keys, workers
from service.store.async_jobs import IdempotentRequest, NoRoom
from service.store.claims import BegunClaim, Claim, PictureStream
from service.store.functions import SOURCE
from service.store.jobs import JobStore
from tests.service.store.ageing import age
from tests.service.store.helpers import RESULT, add_job, done, record
from tests.service.store.job_comparison import check_jobs, check_queues, check_work
from tests.service.store.job_model import DIGESTS, LAST_TRY, LIMITS, OWNERS, Entry, Model, T

WORKERS = 2
GRID = None  # in place of a picture's index
CLOCK_KEY = "clock"
WITH_CLOCK = SOURCE.replace("redis.call('TIME')", f"{{redis.call('GET', '{CLOCK_KEY}'), 0}}")

any_job = st.integers(0, 4)  # its position; the older ones were new once, too
any_worker = st.integers(0, WORKERS - 1)
any_digest = st.sampled_from(DIGESTS[:1] * 4 + DIGESTS[1:])


class Stream(PictureStream):
    """A view of a stream that keeps what it `read` last."""

    def read(self, leased: Sequence[Any]) -> list[Claim]:
        self.last = super().read(leased)
        return self.last


class Worker:
    """A logical worker: its views of the streams, and its claims, with those whose files it has written."""

    def __init__(self, connection: Redis, settings: Settings, name: str) -> None:
        self.name = name
        self.streams = {digest: Stream(connection, settings, digest, name) for digest in DIGESTS}
        self.held: dict[str, dict[str, BegunClaim]] = {digest: {} for digest in DIGESTS}
        self.written: set[BegunClaim] = set()

    def pop(self, digest: str, grids: bool) -> list[BegunClaim]:
        """Take out the claims whose files are written."""
        held = self.held[digest]
        found = [claim for claim in held.values() if claim in self.written and (claim.index is None) == grids]
        for claim in found:
            del held[claim.entry]
        return found


def is_fair(taken: Counter[str], left: Counter[str]) -> bool:
    """Whether nobody got two more than another one who has pictures left."""
    return all(taken[a] + 1 >= taken[b] for a in left if left[a] for b in taken)


class JobMachine(RuleBasedStateMachine):
    """See the module. The fixture sets `connection` and `settings`."""

    connection: Redis
    settings: Settings
    seen: Counter[str]  # how often what should happen did

    def __init__(self) -> None:
        super().__init__()
        self.connection.flushall()
        self.store = JobStore(self.connection, self.settings)
        self.model = Model()
        self.connection.set(CLOCK_KEY, self.model.clock)
        self.names = (f"w{number}" for number in count())
        self.workers = [Worker(self.connection, self.settings, next(self.names)) for _ in range(WORKERS)]
        self.files: set[tuple[str, int | None]] = set()
        self.removed: set[str] = set()  # jobs whose files a client removed
        self.save_snapshot()

    def holding(self) -> Iterator[tuple[Worker, str]]:
        """Yield the workers that hold claims, each with a digest of some."""
        return ((worker, digest) for worker in self.workers for digest in DIGESTS if worker.held[digest])

    def holder(self, which: int) -> tuple[Worker, str]:
        found = list(self.holding())
        return found[which % len(found)]

    # --- clients ---

    @rule(
        owner=st.sampled_from(OWNERS),
        digest=any_digest,
        n=st.integers(1, 4),
        key=st.sampled_from(["", "", "k1", "k2"]),
        request=st.sampled_from(["this", "this", "that"]),
        ahead=st.sampled_from([0, 0, 0, 1, -1]),
    )
    def asks(self, owner: str, digest: str, n: int, key: str = "", request: str = "this", ahead: int = 0) -> None:
        """`ahead`: by how many ticks the clock of the API is."""
        job = record(n, owner, digest=digest, id=new_job_id(self.model.clock + ahead * T))
        asked = IdempotentRequest(owner, key, request) if key else None
        try:
            existing = self.model.known(asked) if asked else None
        except KeyReuse:
            with pytest.raises(KeyReuse):
                add_job(self.store, job, asked)
            return
        if existing is not None:
            assert add_job(self.store, job, asked) == existing
        elif full := self.model.full(owner, digest, n):
            with pytest.raises(NoRoom) as refused:
                add_job(self.store, job, asked)
            assert refused.value.what == full
        else:
            assert add_job(self.store, job, asked) == job.id
            self.model.add(job)
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
        ended = self.model.exists(job.record.id) and not job.is_open
        assert self.store.delete(job.record.id) == ended
        if ended:
            self.model.delete(job)
            self.removed.add(job.record.id)
            self.remove_files(job.record.id)

    def remove_files(self, job_id: str) -> None:
        self.files = {name for name in self.files if name[0] != job_id}

    # --- workers ---

    @rule(who=any_worker, digest=any_digest, room=st.integers(1, 6))
    def claims(self, who: int, digest: str, room: int) -> None:
        """As the runner does: stale claims first, then new ones; those that nobody needs are discarded."""
        worker = self.workers[who]
        taken, hopeless = self.model.take_stale(worker.name, digest, room, worker.held[digest])
        entries = dict(self.model.entries[digest])
        begun = self.store.take_over(worker.streams[digest], room, may_be_alone=True)
        for name in hopeless:
            if job := self.model.open_job(entries[name].job):
                self.model.end_early(job, "failed")
        self.left(digest, hopeless)
        self.begin(worker, digest, {name: entries[name] for name in taken}, begun)
        assert [claim.alone for claim in begun] == [taken[claim.entry] for claim in begun]
        if room > len(begun) and not any(taken.values()):
            self.claim_new(worker, digest, room - len(begun))

    def claim_new(self, worker: Worker, digest: str, room: int) -> None:
        before = self.model.pending(digest)
        begun = self.store.claim_new(worker.streams[digest], room)
        new = worker.streams[digest].last
        assert len(new) == min(room, before.total())
        by_owner: Counter[str] = Counter()
        by_job: dict[str, Counter[str]] = {owner: Counter() for owner in OWNERS}
        for claim in new:
            job = self.model.jobs[claim.job]
            job.pending.remove(claim.index)  # so nobody has claimed it before
            self.model.entries[digest][claim.entry] = Entry(claim.job, claim.index)
            by_owner[job.record.owner] += 1
            by_job[job.record.owner][job.record.id] += 1
        assert is_fair(by_owner, self.model.pending(digest))
        for owner, taken in by_job.items():
            own = (job for job in self.model.of(digest) if job.record.owner == owner)
            assert is_fair(taken, Counter({job.record.id: len(job.pending) for job in own}))
        self.begin(worker, digest, {claim.entry: self.model.entries[digest][claim.entry] for claim in new}, begun)

    def begin(self, worker: Worker, digest: str, taken: Mapping[str, Entry], begun: Sequence[BegunClaim]) -> None:
        """Begin the jobs of entries in the model, and compare what it wants of them with what the store began."""
        for entry in taken.values():
            if self.model.jobs[entry.job].status == "queued":
                self.model.jobs[entry.job].move("running", self.model.now)
        of_open = [(name, entry.index, job) for name, entry in taken.items() if (job := self.model.open_job(entry.job))]
        wanted = {name: job.record for name, index, job in of_open if index not in job.stored}
        assert {claim.entry: claim.record for claim in begun} == wanted
        self.left(digest, taken.keys() - wanted.keys())
        worker.held[digest] |= {claim.entry: claim for claim in begun}

    def fail(self, job_id: str, reason: str) -> None:
        job = self.model.open_job(job_id)
        assert self.store.fail(job_id, reason) == (job is not None)
        if job is not None:
            self.model.end_early(job, "failed")

    def discard(self, stream: PictureStream, names: Iterable[str]) -> None:
        if names:
            stream.discard(list(names))
        self.left(stream.digest, names)

    def left(self, digest: str, names: Iterable[str]) -> None:
        for name in names:
            self.model.entries[digest].pop(name, None)

    @precondition(lambda self: any(self.holding()))
    @rule(which=any_job, n=st.integers(1, 6))
    def writes(self, which: int, n: int) -> None:
        self.write(*self.holder(which), n)

    def write(self, worker: Worker, digest: str, n: int = 6) -> None:
        """Write files of finished pictures, and those of grids whose pictures are all there."""
        for claim in [claim for claim in worker.held[digest].values() if claim not in worker.written][:n]:
            if claim.index is not GRID or self.is_composed(worker, digest, claim):
                self.files.add((claim.job, claim.index))
                worker.written.add(claim)

    def is_composed(self, worker: Worker, digest: str, grid: BegunClaim) -> bool:
        found, job = self.store.verdicts(grid.job, grid.record.total), self.model.open_job(grid.job)
        assert (found is not None) == (job is not None and job.is_complete)
        if found is not None:
            assert {verdict.index for verdict in found} == job.stored
            if {(grid.job, index) for index in job.stored} <= self.files:
                return True
            assert grid.job in self.removed  # its client deleted it, and Redis has lost that
            self.fail(grid.job, "a picture is no longer in storage")
        del worker.held[digest][grid.entry]
        self.end_grids(worker.streams[digest], {grid: None})
        return False

    @precondition(lambda self: any(self.holding()))
    @rule(which=any_job, at_once=st.booleans(), is_told=st.booleans())
    def commits(self, which: int, at_once: bool, is_told: bool) -> None:
        self.commit(*self.holder(which), at_once, is_told)

    def commit(self, worker: Worker, digest: str, at_once: bool, is_told: bool = True) -> None:
        """`at_once`: jobs of one picture end as it is stored. A worker that is not told of the answer tries again."""
        made = [done(claim) for claim in worker.pop(digest, grids=False)]
        if not made:
            return
        results = {claim.job: RESULT for claim, _ in made if at_once and claim.record.total == 1}
        grids, gone = self.store.commit(worker.streams[digest], made, results)
        complete = []
        for _, one in made:
            job_id, index = one.picture.key
            job = self.model.open_job(job_id)
            self.seen["stored again"] += job is not None and index in job.stored
            if job is not None and index not in job.stored:
                job.stored.add(index)
                if job_id in results:
                    job.move("finished", self.model.now)
                    self.files.add((job_id, GRID))  # the picture is its grid
                elif job.is_complete:
                    complete.append(job_id)
        self.left(digest, [claim.entry for claim, _ in made])
        assert [(claim.job, claim.index) for claim in grids] == [(job_id, GRID) for job_id in complete]
        for claim in grids:  # each is composed from what its worker has just stored, or from what Redis has
            at_hand = [verdict.index for verdict in claim.verdicts]
            assert at_hand in ([], sorted(self.model.jobs[claim.job].stored))
            self.seen["verdicts at hand"] += bool(claim.verdicts)
        self.model.entries[digest] |= {claim.entry: Entry(claim.job, GRID) for claim in grids}
        if is_told:
            worker.held[digest] |= {claim.entry: claim for claim in grids}
        else:
            worker.streams[digest].leased -= {claim.entry for claim in grids}
            assert self.store.commit(worker.streams[digest], made, results) == ([], gone)
        assert gone == {one.picture.job for _, one in made if not self.model.exists(one.picture.job)}
        for job_id in gone:
            self.remove_files(job_id)

    @precondition(lambda self: any(self.holding()))
    @rule(which=any_job)
    def finishes(self, which: int) -> None:
        self.finish(*self.holder(which))

    def finish(self, worker: Worker, digest: str) -> None:
        grids = worker.pop(digest, grids=True)
        for claim in grids:
            if job := self.model.open_job(claim.job):
                self.seen["lacked pictures"] += not job.is_complete
                if job.is_complete:
                    job.move("finished", self.model.now)
        self.end_grids(worker.streams[digest], dict.fromkeys(grids, RESULT))

    def end_grids(self, stream: PictureStream, results: Mapping[BegunClaim, JobResult | None]) -> None:
        gone = self.store.finish(stream, list(results.items()))
        assert gone == {claim.job for claim in results if not self.model.exists(claim.job)}
        for job_id in gone:
            self.remove_files(job_id)
        self.left(stream.digest, [claim.entry for claim in results])

    @precondition(lambda self: any(self.holding()))
    @rule(which=any_job)
    def fails_a_picture(self, which: int) -> None:
        worker, digest = self.holder(which)
        name, claim = worker.held[digest].popitem()
        self.fail(claim.job, "poison")
        self.discard(worker.streams[digest], [name])

    @rule(who=any_worker)
    def drops_what_has_ended(self, who: int) -> None:
        worker = self.workers[who]
        for digest, held in worker.held.items():
            jobs = {claim.job for claim in held.values()}
            ended = self.store.ended(jobs)
            assert ended == {job_id for job_id in jobs if self.model.open_job(job_id) is None}
            names = [name for name, claim in held.items() if claim.job in ended]
            self.discard(worker.streams[digest], names)
            for name in names:
                del held[name]

    @rule(who=any_worker)
    def beats(self, who: int) -> None:
        worker = self.workers[who]
        workers.announce(self.connection, worker.name, {}, LIMITS["lease_s"])
        for digest, held in worker.held.items():
            worker.streams[digest].renew()
            for name in held.keys() & self.model.entries[digest].keys():
                self.model.entries[digest][name].stale = False

    @rule(who=any_worker)
    def releases(self, who: int) -> None:
        worker = self.workers[who]
        for digest, held in worker.held.items():
            worker.streams[digest].release(list(held))
            for name in held.keys() & self.model.entries[digest].keys():
                self.model.entries[digest][name].stale, self.model.entries[digest][name].deliveries = True, 0
            held.clear()

    @rule(who=any_worker)
    def dies(self, who: int) -> None:
        self.workers[who] = Worker(self.connection, self.settings, next(self.names))

    @rule()
    def fails_overdue_jobs(self) -> None:
        self.store.fail_overdue()
        for job in self.model.jobs.values():
            if job.is_open and self.model.clock >= job.overdue_at:
                self.model.end_early(job, "failed")

    # --- what happens together more often than by chance ---

    @rule(who=any_worker, digest=any_digest, at_once=st.booleans())
    def works(self, who: int, digest: str, at_once: bool) -> None:
        worker = self.workers[who]
        self.write(worker, digest)
        self.commit(worker, digest, at_once)
        self.write(worker, digest)
        self.finish(worker, digest)

    @rule(who=any_worker, digest=any_digest, owner=st.sampled_from(OWNERS), n=st.integers(1, 4))
    def is_slow(self, who: int, digest: str, owner: str, n: int) -> None:
        """Another worker takes over what this one goes on with."""
        self.asks(owner, digest, n)
        self.claims(who, digest, 6)
        self.time_passes(1)
        self.claims(1 - who, digest, 6)
        for one in (who, 1 - who):
            self.write(self.workers[one], digest)
            self.commit(self.workers[one], digest, at_once=False)

    @rule(who=any_worker, digest=any_digest, owner=st.sampled_from(OWNERS), n=st.integers(1, 4))
    def redis_loses_what_is_stored(self, who: int, digest: str, owner: str, n: int) -> None:
        """While the worker composes the grid."""
        self.asks(owner, digest, n)
        self.claims(who, digest, 6)
        self.save_snapshot()
        self.write(self.workers[who], digest)
        self.commit(self.workers[who], digest, at_once=False)
        self.write(self.workers[who], digest)
        self.redis_comes_back_from_the_snapshot()
        self.finish(self.workers[who], digest)

    @rule(who=any_worker, digest=any_digest, n=st.integers(1, 4), room=st.integers(1, 6), at_once=st.booleans())
    def redis_loses_what_is_claimed(self, who: int, digest: str, n: int, room: int, at_once: bool) -> None:
        """The worker stores pictures that are pending again."""
        self.asks(OWNERS[0], digest, n)
        self.save_snapshot()
        self.claims(who, digest, room)
        self.redis_comes_back_from_the_snapshot()
        self.works(who, digest, at_once)

    # --- time, and Redis itself ---

    @rule(ticks=st.sampled_from([1, 1, 1, 2, 5]))
    def time_passes(self, ticks: int) -> None:
        age(self.connection, ticks * T)
        self.model.time_passes(ticks)
        self.clock_jumps(ticks)

    @rule(ticks=st.sampled_from([-20, -3, -1, 1, 3, 20]))
    def clock_jumps(self, ticks: int) -> None:
        self.model.clock += ticks * T
        self.connection.set(CLOCK_KEY, self.model.clock)

    @rule()
    def save_snapshot(self) -> None:
        names = list(self.connection.scan_iter(count=1000))
        with self.connection.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.pttl(name)
                pipe.dump(name)
            found = pipe.execute()
        self.snapshot = list(zip(names, found[::2], found[1::2], strict=True)), copy.deepcopy(self.model)

    @rule()
    def redis_comes_back_from_the_snapshot(self) -> None:
        """It has lost its last writes. Workers go on with what they hold, and files stay."""
        dumped, model = self.snapshot
        now, clock, self.model = self.model.now, self.model.clock, copy.deepcopy(model)
        self.connection.flushall()
        time.sleep(0.002)  # no entry of a stream gets the name of a lost one
        with self.connection.pipeline(transaction=False) as pipe:
            for name, ttl_ms, content in dumped:
                pipe.restore(name, max(0, ttl_ms), content)
            pipe.execute()
        ticks = (now - self.model.now) // T
        age(self.connection, ticks * T)
        self.model.time_passes(ticks)
        self.model.clock = clock
        self.connection.set(CLOCK_KEY, clock)

    # --- what must hold after every step ---

    @invariant()
    def redis_equals_the_model(self) -> None:
        self.seen["steps"] += 1
        check_jobs(self.connection, self.model)
        check_queues(self.connection, self.model)
        check_work(self.store, self.model)

    @invariant()
    def workers_know_what_they_hold(self) -> None:
        for worker in self.workers:
            assert {digest: stream.leased for digest, stream in worker.streams.items()} == {
                digest: set(held) for digest, held in worker.held.items()
            }

    @invariant()
    def nothing_is_lost(self) -> None:
        self.model.check_nothing_is_lost()
        for job_id, job in self.model.jobs.items():
            if self.model.exists(job_id) and job_id not in self.removed:
                needed = {*job.stored, GRID} if job.status == "finished" else job.stored
                assert {(job_id, index) for index in needed} <= self.files

    # --- the end ---

    def teardown(self) -> None:
        """One worker that lives ends every job; later nothing of them is left."""
        for who in range(WORKERS):
            self.dies(who)
        self.time_passes(1)
        for _ in range(100):
            self.beats(0)
            self.fails_overdue_jobs()
            for digest in DIGESTS:
                self.claims(0, digest, 6)
                self.works(0, digest, at_once=False)
            if not self.model.wanted() and not any(self.model.entries.values()):
                break
        assert [job for job in self.model.jobs.values() if job.is_open] == []
        self.redis_equals_the_model()
        self.time_passes(20)
        lasting = {keys.pictures(digest) for digest in DIGESTS} | {keys.turns(digest) for digest in DIGESTS}
        lasting |= {keys.OLD_WORKERS, CLOCK_KEY}
        left = {key for key in self.connection.scan_iter(count=1000) if not key.startswith("rq:")}
        assert left <= lasting
        self.seen["jobs that ended"] += len(self.model.jobs)
        super().teardown()


@pytest.mark.hypothesis
def test_redis_equals_a_model_of_all_jobs(
    connection: Redis, settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert WITH_CLOCK != SOURCE
    connection.function_load(WITH_CLOCK, replace=True)  # with a clock that a rule sets
    monkeypatch.setattr("service.store.claims.MAX_DELIVERIES", LAST_TRY + 1)
    limited = settings.model_copy(update={**LIMITS, "api_keys": "ann:0 bob:0"})
    for name, value in (("connection", connection), ("settings", limited), ("seen", Counter())):
        monkeypatch.setattr(JobMachine, name, value, raising=False)
    long = hypothesis_settings.get_current_profile_name() == "long"
    examples, steps = (int(os.environ.get("HISTORIES", "300")), 50) if long else (25, 30)
    # Without `long`, the first history that fails is shown as it is: to shorten it takes minutes.
    phases = [phase for phase in Phase if long or phase not in (Phase.shrink, Phase.explain)]
    bounds = hypothesis_settings(
        max_examples=examples, stateful_step_count=steps, phases=phases, suppress_health_check=list(HealthCheck)
    )
    try:
        run_state_machine_as_test(JobMachine, settings=bounds)
    finally:
        connection.function_load(SOURCE, replace=True)
    if long:
        with capsys.disabled():
            print(f"\n{examples} histories of jobs:", dict(JobMachine.seen))
    least = {"steps": 300, "jobs that ended": 20, "stored again": 10, "lacked pictures": 5, "verdicts at hand": 20}
    for what, times in least.items():
        assert JobMachine.seen[what] >= times * (examples // 9 if long else 1), what
