"""What a worker does with a job: claim pictures, step the batch, store what is finished, until the job has ended.

The one place where engine and Redis meet. Knows neither HTTP nor RQ, so that a test can drive it.
"""

import contextlib
import math
import os
import time
from collections import OrderedDict
from collections.abc import Collection, Container, Iterator, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace

import numpy as np
from redis import Redis
from redis.exceptions import RedisError

from service.contract import recipe
from service.contract.recipe import MadeWith
from service.contract.records import ACTIVE, FinishedPicture, JobRecord, JobResult, Picture, Scores, Verdict
from service.settings import Settings
from service.store.claims import Claim
from service.store.connection import best_effort
from service.store.jobs import JobStore
from service.store.keys import png_key
from service.store.sweep import Sweeper
from service.telemetry import tracing
from service.telemetry.logs import get_logger
from service.telemetry.metrics import PICTURES, one_step, waited
from service.worker.checkpoint_cache import CheckpointCache
from service.worker.engine import DeviceLost, Key, Made, Outcome
from service.worker.loaded_models import Lane, Loader
from service.worker.previews import Live
from shared.checkpoint import CheckpointError
from shared.device import lost, pick_device
from shared.evaluator import Judge, load_evaluator
from shared.pictures import marked_grid, png_bytes, read_png, sheet

log = get_logger(__name__)

RATE_OVER_S = 60.0
IDLE_WAIT_S = 0.02  # between two looks for new pictures of a job that waits for its own in other workers
DEVICE_LOST = 70  # exit status: EX_SOFTWARE of sysexits.h
end_process = os._exit  # RQ would take an exception for the job's own
LOOK_S = 1  # between two looks for what others, RQ among them, have left undone


@dataclass
class Rate:
    """Pictures made per second of work; idle time does not count, and what is long ago counts ever less."""

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
    """The models of one worker process and the pictures it is making. Not thread-safe but for `keep_claims`."""

    def __init__(self, connection: Redis, settings: Settings, name: str) -> None:
        self.connection, self.settings, self.name = connection, settings, name
        self.store = JobStore(connection, settings)
        self.sweeper = Sweeper(self.store)
        self.device = pick_device(settings.device)
        cache = CheckpointCache(settings.cache, settings.storage, settings.cache_bytes)
        judge = load_evaluator(cache.fetch(None, kind="evaluator"), self.device)
        self.judge: Judge = judge
        self.judged_by = MadeWith(name=judge.info.name, digest=judge.info.digest) if judge.info else None
        self.loader = Loader(connection, settings, self.device, cache, name, judge, self.judged_by)
        self.lanes: OrderedDict[str, Lane] = OrderedDict()
        self.promoted: str | None = None  # the digest that was promoted when we last looked
        self._current: Lane | None = None  # the lane that a job waits for
        self._look: Future[tuple[str, Lane | None]] | None = None
        self._looked_at = self._swept_at = time.monotonic()
        self._complaint = ""
        self.rate = Rate()
        self.live = Live(connection, settings.live_every_s)
        self.spans = tracing.BatchSpans(self._traceparent)
        self.stopping = False  # set by a signal's handler, in which an Event's lock could deadlock
        self.leave_by = math.inf  # in monotonic seconds
        self.turn_s = 0.0  # how long a turn with steps takes
        self.moved_at = time.monotonic()  # when the loop last moved

    def _traceparent(self, job_id: str) -> str:
        record = self.store.record(job_id)
        return record.traceparent if record else ""

    def stop(self, within_s: float) -> None:
        """From now on no picture is taken up, and `drain` has so long. For signals' handlers."""
        self.stopping, self.leave_by = True, time.monotonic() + within_s

    @property
    def busy(self) -> bool:
        return any(lane.engine.busy for lane in self.lanes.values())

    @property
    def measuring(self) -> bool:
        """Whether an idle turn has something to measure."""
        return any(lane.limit is not None and lane.limit.measuring for lane in self.lanes.values())

    @property
    def stalled(self) -> bool:
        """Whether the loop has pictures in work and has not moved for too long."""
        return self.busy and time.monotonic() - self.moved_at > self.settings.stalled_after_s

    def lane(self, name: str | None = None, digest: str | None = None) -> Lane:
        """The lane of a checkpoint, loaded if need be; of the promoted one if `name` is None.

        CheckpointError if it is not in storage, or is no longer the one with `digest`.
        """
        lane = self.lanes.get(digest or "") or self.loader.load(name, digest)
        if name is None:
            self.promoted = lane.digest
        return self._add(lane)

    def _add(self, lane: Lane) -> Lane:
        """Takes up a lane as the one last used, unless its model has one."""
        lane = self.lanes.setdefault(lane.digest, lane)
        self.lanes.move_to_end(lane.digest)
        lane.used_at = time.monotonic()
        self._let_go(keep=lane)
        return lane

    def _let_go(self, keep: Lane | None = None) -> None:
        """Unloads models beyond `loaded_models`, the longest idle first, and those unused for `idle_model_s`.

        None with pictures in work: they are finished on what they were begun with. Nor the promoted one for its age.
        """
        for lane in list(self.lanes.values()):
            unused = time.monotonic() - lane.used_at > self.settings.idle_model_s and lane.digest != self.promoted
            too_many = lane.makes and sum(one.makes for one in self.lanes.values()) > self.settings.loaded_models
            if lane.idle and lane not in (keep, self._current) and (unused or too_many):
                log.info("model unloaded", model=lane.name, digest=lane.digest)
                del self.lanes[lane.digest]

    def look_at_storage(self) -> None:
        """Every `storage_every_s`: lets go of unused models, and has a newly promoted one loaded before it is needed.

        A promoted checkpoint that cannot be used is complained of once, and those that are loaded serve on.
        """
        if self._look is None and time.monotonic() - self._looked_at >= self.settings.storage_every_s:
            self._let_go()
            self._looked_at = time.monotonic()
            self._look = self.loader.look({*self.lanes, self.promoted or ""})
        if self._look is None or not self._look.done():
            return
        look, self._look = self._look, None
        try:
            self.promoted, lane = look.result()
        except Exception as error:  # whatever it is, what is loaded serves on
            if str(error) != self._complaint:
                log.warning("promoted model cannot be loaded", reason=str(error))
            self._complaint = str(error)
        else:
            self._complaint = ""
            if lane is not None:
                log.info("promoted model loaded", model=lane.name, digest=lane.digest)
                self._add(lane)

    def _lane_of(self, record: JobRecord) -> Lane | None:
        """The lane of a job, as soon as it is loaded; other pictures go on meanwhile. None if we are to stop."""
        if record.digest not in self.lanes:
            with tracing.span("load", record.traceparent, {"job_id": record.id, "model": record.model}):
                loading = self.loader.begin(record.model, record.digest, "evaluator" if record.sent else "denoiser")
                while not loading.done():
                    if self.stopping:
                        return None
                    if self.busy:
                        self.turn()
                    else:
                        wait([loading], timeout=IDLE_WAIT_S)
                with self._ends_if_lost():
                    self._add(loading.result())
        return self.lane(record.model, record.digest)

    def run(self, job_id: str) -> None:
        """Works until the job has ended, by this worker or another. Pictures of other jobs may then be in the batch.

        Returns early, with the job queued again, when `stopping` is set.
        """
        standing = self.store.open_record(job_id)
        if standing is None:
            return
        record, done = standing
        try:
            lane = self._lane_of(record)
        except CheckpointError as error:
            self.store.fail(job_id, f"the model cannot be loaded: {error}")
            return
        if lane is None:
            self.store.requeue(job_id)
            return
        self.store.begin(job_id)
        looked_at = time.monotonic()
        while not self.stopping:
            if done >= record.total:  # whoever made the last picture died before the grid
                self._complete([job_id])
            if not self.turn(lane, job_id):
                return
            if time.monotonic() - looked_at >= LOOK_S:
                looked_at, done = time.monotonic(), self.store.done_count(job_id)
        if self.store.is_open(job_id):
            self.store.requeue(job_id)

    def turn(self, current: Lane | None = None, job_id: str | None = None) -> bool:
        """Takes up pictures of every loaded model and steps those that have some; waits a little where none has.

        `current`, the lane that job `job_id` waits for, stays loaded. Does nothing, and returns False, if that job has
        ended.
        """
        with self._ends_if_lost():
            return self._turn(current, job_id)

    def _turn(self, current: Lane | None, job_id: str | None) -> bool:
        self._current = current
        if job_id in self._drop_ended(job_id):
            return False
        if not self.stopping:
            self._sweep()
            self.look_at_storage()
            for lane in list(self.lanes.values()):
                self._claim(lane)
        worked, turn_begun = False, time.monotonic()
        for lane in list(self.lanes.values()):
            if lane is current or lane.engine.busy:
                lane.used_at = time.monotonic()
            if lane.engine.busy:
                worked = True
                begun = time.monotonic()
                with one_step(lane.name, len(lane.engine.rows()), lane.stepper):
                    outcomes = lane.engine.step()
                self._store(lane, outcomes)
                if lane.makes:
                    self.rate.add(len(outcomes), time.monotonic() - begun)
        if worked:
            turn_s = time.monotonic() - turn_begun
            self.turn_s = 0.8 * self.turn_s + 0.2 * turn_s if self.turn_s else turn_s
        if not (self._measure(worked) or worked):
            time.sleep(IDLE_WAIT_S)
        self.spans.keep(self._jobs())
        self.live.tell([pair for lane in self.lanes.values() for pair in lane.engine.rows()])
        self.moved_at = time.monotonic()
        return True

    @contextlib.contextmanager
    def _ends_if_lost(self) -> Iterator[None]:
        """Where the device is lost the process ends at once, as if it were killed.

        So its pictures count as of a worker that died: others take them up, and one that kills again is given up.
        """
        try:
            yield
        except Exception as error:
            if isinstance(error, DeviceLost) or lost(error, self.device):
                log.critical("the device has failed; this worker ends", exc_info=True)
                end_process(DEVICE_LOST)
            raise

    def _sweep(self) -> None:
        if time.monotonic() - self._swept_at >= LOOK_S:
            self._swept_at = time.monotonic()
            with best_effort():  # what it cannot put right now, the next one does
                self.sweeper.sweep()

    def _measure(self, worked: bool) -> bool:
        """Times a call of a model whose limit is not known, when there is no work, or more than its batch takes."""
        if self.stopping:
            return False
        for lane in self.lanes.values():
            if lane.limit is not None and (not worked or not lane.engine.room) and lane.limit.advance():
                return True
        return False

    def _claim(self, lane: Lane) -> None:
        engine = lane.engine
        held = {claim.entry for claim in lane.claims.values()}
        claims, hopeless = lane.stream.claim_stale(engine.room, may_be_alone=engine.room > 0, held=held)
        for claim in hopeless:
            reason = (
                f"workers died {self.settings.max_deliveries} times while picture {claim.picture.index} was in work"
            )
            self.store.fail(claim.picture.job, reason)
        lane.stream.discard([claim.entry for claim in hopeless])
        room = engine.room - len(claims)
        if room > 0 and not any(claim.alone for claim in claims):
            claims += lane.stream.claim_new(room)
        # A large job that was cancelled leaves many entries: they must not keep places from those behind them.
        while claims and self._admit(lane, claims) < len(claims) and engine.room > 0:
            claims = lane.stream.claim_new(engine.room)

    def _admit(self, lane: Lane, claims: list[Claim]) -> int:
        """Takes up claims whose job is open and that are not done yet, says how many, and discards the others."""
        progress = self.store.progress({claim.picture.job for claim in claims})
        wanted = []
        for claim in claims:
            status, done = progress[claim.picture.job]
            if status in ACTIVE and claim.picture.index not in done:
                wanted.append(claim)
        lane.stream.discard([claim.entry for claim in claims if claim not in wanted])
        self.store.begin(*{claim.picture.job for claim in wanted if progress[claim.picture.job][0] == "queued"})
        if not lane.makes:
            wanted = [replace(claim, picture=self._with_png(claim.picture)) for claim in wanted]
        for claim in wanted:
            lane.claims[claim.picture.key] = claim
            waited(lane.name, claim.asked_at)
            if claim.alone:
                lane.engine.admit_alone(claim.picture)
        lane.engine.admit([claim.picture for claim in wanted if not claim.alone])
        self.spans.join(claim.picture.job for claim in wanted)
        return len(wanted)

    def _with_png(self, picture: Picture) -> Picture:
        """A picture that was sent, as it was sent; where that is gone, the engine will say so."""
        return picture.model_copy(update={"png": self.connection.hget(png_key(picture.job), str(picture.index))})

    def _store(self, lane: Lane, outcomes: list[Outcome]) -> None:
        """Commits what is finished, completes jobs that have all of their pictures, fails jobs that cannot."""
        done, failed = [], []
        for outcome in outcomes:
            entry = lane.claims.pop(outcome.picture.key).entry
            PICTURES.labels(lane.name, "made" if isinstance(outcome, Made) else "failed").inc()
            if isinstance(outcome, Made):
                done.append(FinishedPicture(entry, outcome.picture, outcome.verdict, outcome.png, outcome.strip))
            else:
                failed.append(entry)
                self.store.fail(outcome.picture.job, f"picture {outcome.picture.index}: {outcome.reason}")
        lane.stream.discard(failed)
        if done:
            begun_at = time.time()
            complete = self.store.commit(lane.stream.key, done)
            self._trace(lane, {one.picture.job for one in done}, begun_at)
            self._complete(complete, {one.picture.key: one.png for one in done})

    def _trace(self, lane: Lane, job_ids: set[str], begun_at: float) -> None:
        """Spans of jobs of which pictures were judged, and stored from `begun_at` to now."""
        judged_at, judged_by = lane.engine.judged
        self.spans.record("judge", job_ids, judged_at, judged_by)
        self.spans.record("store", job_ids, begun_at, time.time())
        self.spans.keep(self._jobs(), judged_at)

    def _jobs(self) -> set[str]:
        """The jobs that have pictures in work."""
        return {job_id for lane in self.lanes.values() for job_id, _ in lane.claims}

    def _complete(self, job_ids: Collection[str], made: Mapping[Key, bytes] | None = None) -> None:
        """All pictures of these jobs are there: scores, grids, and they are finished. Any worker may do it, also twice.

        `made`: PNGs that need not be fetched, by picture.
        """
        finished = {}
        for record, verdicts in self.store.open_verdicts(job_ids):
            try:
                with tracing.span("compose", record.traceparent, {"job_id": record.id}):
                    result = score(verdicts, record)
                    finished[record.id] = result, self._grid(record, result, verdicts, made or {})
            except RedisError:
                raise  # another worker may have more luck
            except Exception as error:
                log.exception("result cannot be composed", **record.log_ids)
                self.store.fail(record.id, f"the result cannot be composed: {type(error).__name__}: {error}")
        self.store.finish_all(finished)

    def _grid(self, record: JobRecord, result: JobResult, verdicts: list[Verdict], made: Mapping[Key, bytes]) -> bytes:
        """The PNG of the best repeat's pictures, for a single one its index; those that were sent are marked as right
        or wrong."""
        n = len(record.labels)
        shown = [verdicts[result.best * n + i] for i in range(n)]
        if n == 1 and not record.sent:
            return str(shown[0].index).encode()
        pngs = [made[key] for verdict in shown if (key := (record.id, verdict.index)) in made]
        if len(pngs) < n:
            pngs = self.store.pngs(record.id, [verdict.index for verdict in shown])
        pictures = np.stack([read_png(png) for png in pngs])  # (n, H, W, 3)
        columns = min(record.columns, n)
        if record.sent:
            return png_bytes(marked_grid(pictures, [verdict.exact for verdict in shown], columns))
        made_by = recipe.of_grid(record, result.best, shown, self.judged_by)
        return png_bytes(sheet(pictures, columns), made_by.text())

    def _drop_ended(self, waited_for: str | None = None) -> set[str]:
        """Takes pictures out of the batches whose job was ended elsewhere. Returns the jobs that have ended, of those
        with pictures in work and the one that is `waited_for`."""
        statuses = self.store.statuses(self._jobs() | ({waited_for} if waited_for else set()))
        ended = {job_id for job_id, status in statuses.items() if status not in ACTIVE}
        if ended:
            for lane in self.lanes.values():
                lane.stream.discard(_take_out(lane, {key for key in lane.claims if key[0] in ended}))
        return ended

    def keep_claims(self) -> None:
        """Renews the leases of the pictures in work, unless the loop hangs. Called from the heartbeat's thread."""
        if self.stalled:
            return
        for lane in list(self.lanes.values()):
            lane.stream.renew([claim.entry for claim in list(lane.claims.values())])

    def drain(self) -> None:
        """After `stop`: finishes the pictures in work for which there is time, and leaves the others at once."""
        log.info("draining", pictures=sum(len(lane.claims) for lane in self.lanes.values()))
        for lane in self.lanes.values():
            lane.engine.few = None  # all step in each turn, so that what will be done in time can be told
        while self.busy and (left_s := self.leave_by - time.monotonic()) > 0:
            for lane in self.lanes.values():
                fit = {p.key for p, row in lane.engine.rows() if (len(row.table) - row.step) * self.turn_s <= left_s}
                lane.stream.release(_take_out(lane, lane.claims.keys() - fit))
            if self.busy:
                self.turn()
        self.give_back()

    def give_back(self) -> None:
        """Leaves all pictures in work to other workers, at once."""
        for lane in self.lanes.values():
            lane.stream.release(_take_out(lane, set(lane.claims)))
        self.spans.keep(())


def _take_out(lane: Lane, keys: Container[tuple[str, int]]) -> list[str]:
    """Pictures leave the batch; returns their stream entries, which are still ours."""
    lane.engine.drop(lambda picture: picture.key in keys)
    return [lane.claims.pop(key).entry for key in list(lane.claims) if key in keys]


def score(verdicts: list[Verdict], record: JobRecord) -> JobResult:
    """Scores of each repeat, as `trainer score` counts them; the best has the highest accuracy, then exact match."""
    n = len(record.labels)
    repeats = []
    for r in range(record.repeats):
        part = verdicts[r * n : (r + 1) * n]
        asked = [len(set(verdict.labels)) for verdict in part]
        hits = sum(round(verdict.accuracy * k) for verdict, k in zip(part, asked, strict=True))
        exact, f1 = sum(verdict.exact for verdict in part), sum(verdict.f1 for verdict in part)
        repeats.append(Scores(accuracy=hits / sum(asked), exact_match=exact / n, f1=f1 / n))
    best = max(range(record.repeats), key=lambda r: (repeats[r].accuracy, repeats[r].exact_match, -r))
    return JobResult(repeats=repeats, best=best)
