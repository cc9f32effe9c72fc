"""Claims: workers lease pictures, and grids, of a checkpoint from a Redis stream with one consumer group.

A worker renews its leases while it lives; another one takes over a lease that is `lease_s` old. Delivery is at least
once. `jobs.py` begins the jobs of what is claimed. Knows no HTTP and no torch.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from redis import Redis
from redis.exceptions import ResponseError

from service.contract.records import JobRecord, Verdict
from service.settings import Settings
from service.store import keys
from service.store.connection import best_effort
from service.store.functions import call
from service.telemetry.logs import get_logger

log = get_logger(__name__)

GROUP = "workers"  # as in `jobs.lua`
MAX_DELIVERIES = 4  # of a picture whose workers died, before its job fails; also of a model that they loaded
IN_BATCHES = 2  # deaths before a picture is suspected; until then it is sampled in a batch
MOST_SEEN = 100  # expired leases


@dataclass(frozen=True)
class Claim:
    """A picture to sample or judge, leased to this worker as stream entry `entry`; or a job's grid to compose.

    `index`: None for a grid. `alone`: it may have killed workers, so nothing else may be in this process. `claimed_at`:
    Unix seconds.
    """

    entry: str
    job: str
    index: int | None = None
    alone: bool = False
    claimed_at: float = field(default_factory=time.time, compare=False)

    @property
    def what(self) -> str:
        return "composing the grid" if self.index is None else f"sampling picture {self.index}"


@dataclass(frozen=True, kw_only=True)
class BegunClaim(Claim):
    """A claim on a job that is running, with the job's record.

    `verdicts`: of a grid, those on all pictures of its job, by index, if its worker has just stored them.
    """

    record: JobRecord = field(compare=False, repr=False)
    verdicts: list[Verdict] = field(default_factory=list, compare=False, repr=False)


@dataclass(frozen=True)
class Triage:
    """Expired leases, by entry: to `take` over in batches, to sample `alone`, one at a time, and `hopeless` ones."""

    take: list[str]
    alone: list[str]
    hopeless: list[str]


def triage(pending: Iterable[tuple[str, int]], max_deliveries: int) -> Triage:
    """Sort expired leases, each with the number of its deliveries: after each its worker died, or gave up the model.

    A picture whose workers died twice may be what killed them. One that was delivered `max_deliveries` times is given
    up.
    """
    in_batches = min(IN_BATCHES, max_deliveries - 1)
    found = Triage([], [], [])
    for entry, deliveries in pending:
        if deliveries >= max_deliveries:
            found.hopeless.append(entry)
        elif deliveries >= in_batches:
            found.alone.append(entry)
        else:
            found.take.append(entry)
    return found


class PictureStream:
    """One worker's view of the stream of one checkpoint. `leased`: its entries, also those being stored."""

    def __init__(self, connection: Redis, settings: Settings, digest: str, consumer: str) -> None:
        self.connection, self.settings, self.consumer = connection, settings, consumer
        self.digest, self.key, self.lease_ms = digest, keys.pictures(digest), int(settings.lease_s * 1000)
        self.leased = set[str]()
        self.suspects = 0  # pictures that nobody has claimed and that must be sampled alone, when last looked
        call(connection, "open_stream", digest, self.lease_ms)

    def claim_stale(self, room: int, *, may_be_alone: bool) -> tuple[list[Claim], list[tuple[Claim, str]]]:
        """Take over expired leases: up to `room` claims to sample, and hopeless ones, each with why its job must fail.

        Those that this worker holds itself look expired if the process was paused; they stay as they are.

        A picture that may have killed workers is claimed alone, by a worker that samples nothing (`may_be_alone`). One
        worker does so, and the others go on with other pictures.
        """
        try:
            late: Any = self.connection.xpending_range(self.key, GROUP, "-", "+", count=MOST_SEEN, idle=self.lease_ms)
        except ResponseError:  # NOGROUP: somebody emptied Redis
            late = []
        pending = [(one["message_id"], one["times_delivered"]) for one in late if one["message_id"] not in self.leased]
        found = triage(pending, MAX_DELIVERIES)
        reason = f"workers died or failed {MAX_DELIVERIES} times while "
        hopeless = [(claim, reason + claim.what) for claim in self._take_over(found.hopeless)]
        if not (found.alone and self._keeps_suspects()):
            self.suspects = 0
            return self._take_over(found.take[:room]), hopeless
        alone = self._take_over(found.alone[:1]) if may_be_alone else []
        self.suspects = len(found.alone) - len(alone)
        return [replace(claim, alone=True) for claim in alone], hopeless

    def _keeps_suspects(self) -> bool:
        """Whether this worker is the one that samples suspects. It stops being so if it does not ask for `lease_s`."""
        key = keys.suspects(self.digest)
        with best_effort():  # while Redis is full, nobody becomes it: the other pictures must go on
            self.connection.set(key, self.consumer, nx=True, px=self.lease_ms)
        if self.connection.get(key) != self.consumer:
            return False
        self.connection.pexpire(key, self.lease_ms)
        return True

    def _take_over(self, entries: Sequence[str]) -> list[Claim]:
        """Claim entries unless another worker was faster: XCLAIM takes only those that are still idle."""
        if not entries:
            return []
        found: Any = self.connection.xclaim(self.key, GROUP, self.consumer, self.lease_ms, list(entries))
        return self.read([(entry, [part for pair in fields.items() for part in pair]) for entry, fields in found])

    def read(self, leased: Sequence[Any]) -> list[Claim]:
        """Parse entries that were leased to this worker, each with its fields and values in turn.

        What is neither a picture nor a grid is removed; the job that it belongs to, if any, fails once it is overdue.
        """
        claims, unknown = list[Claim](), list[str]()
        for entry, pairs in leased:
            fields = dict(zip(pairs[::2], pairs[1::2], strict=True))
            try:
                index = int(fields["index"]) if "index" in fields else None
                claims.append(Claim(entry, fields["job"], index))
            except (KeyError, ValueError):
                log.error("entry cannot be read and is removed", entry=entry, stream=self.key, fields=fields)
                unknown.append(entry)
        self.leased.update(claim.entry for claim in claims)
        if unknown:
            self.discard(unknown)
        return claims

    def renew(self) -> None:
        """Renew all leases: reset their idle time without counting a delivery. Safe in another thread."""
        self._reset(list(self.leased))

    def release(self, entries: Sequence[str]) -> None:
        """Return claims as if they had never been delivered, for another worker to take at once."""
        self._reset(entries, idle=self.lease_ms + 1, retrycount=0)
        self.leased.difference_update(entries)

    def _reset(self, entries: Sequence[str], **leases: Any) -> None:
        """Claim entries again. Does nothing if Redis has lost the stream: the next claim creates it."""
        if not entries:
            return
        try:
            self.connection.xclaim(self.key, GROUP, self.consumer, 0, list(entries), justid=True, **leases)
        except ResponseError as error:
            if not str(error).startswith("NOGROUP"):
                raise

    def discard(self, entries: Sequence[str]) -> None:
        """Delete entries whose pictures are not needed; at least one."""
        with self.connection.pipeline() as pipe:  # one that is in the stream and not pending would stay for ever
            pipe.xack(self.key, GROUP, *entries)
            pipe.xdel(self.key, *entries)
            pipe.execute()
        self.leased.difference_update(entries)
