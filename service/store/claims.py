"""Claims: workers lease pictures, and grids, of a checkpoint from a Redis stream with one consumer group.

A worker renews its leases while it lives; another one takes over a lease that is `lease_s` old. Delivery is at least
once. Knows no HTTP and no torch.
"""

import time
from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from redis import Redis
from redis.exceptions import ResponseError

from service.contract.records import JobRecord, Picture
from service.settings import Settings
from service.store import keys
from service.store.connection import best_effort
from service.store.functions import call
from service.telemetry.logs import get_logger

log = get_logger(__name__)

GROUP = "workers"  # as in `jobs.lua`
MAX_DELIVERIES = 4  # of a picture whose workers died, before its job fails; also of a model that they loaded
IN_BATCHES = 2  # deaths before a picture is suspected; until then it is sampled in a batch
UNREADABLE_S = 120.0  # how long a job that this worker cannot read waits for one that can: a rolling upgrade


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
    """A claim on a job that is running, with the job's record."""

    record: JobRecord = field(compare=False, repr=False)

    @property
    def picture(self) -> Picture:
        assert self.index is not None
        return self.record.picture(self.index)


class PictureStream:
    """One worker's view of the stream of one checkpoint. `held`: entries leased to it, also those being stored."""

    def __init__(self, connection: Redis, settings: Settings, digest: str, consumer: str) -> None:
        self.connection, self.settings, self.consumer = connection, settings, consumer
        self.digest, self.key, self.lease_ms = digest, keys.stream(digest), int(settings.lease_s * 1000)
        self.held = set[str]()
        self.suspects = 0  # pictures that nobody has claimed and that must be sampled alone, when last looked
        self._left: dict[str, tuple[Claim, float]] = {}  # by entry; and when it was left to other workers
        call(connection, "open_stream", digest, self.lease_ms)

    def claim_new(self, room: int) -> list[Claim]:
        """Claim up to `room` pending pictures, in the fair queue's order."""
        return self.read(call(self.connection, "claim", self.digest, self.consumer, room))

    def claim_stale(self, room: int, *, may_be_alone: bool) -> tuple[list[Claim], list[tuple[Claim, str]]]:
        """Take over expired leases: up to `room` claims to sample, and hopeless ones, each with why its job must fail.

        Those that this worker holds itself look expired if the process was paused; they stay as they are.

        A picture whose workers died twice may be what killed them: it is claimed alone, by a worker that samples
        nothing (`may_be_alone`). One worker does so, and the others go on with other pictures. One that was delivered
        `MAX_DELIVERIES` times is hopeless, and so is one that this worker has left to others and none has taken within
        `UNREADABLE_S`.
        """
        most = MAX_DELIVERIES
        in_batches = min(IN_BATCHES, most - 1)
        most_seen = 100 + len(self._left)  # which must not hide the entries behind them
        try:
            late: Any = self.connection.xpending_range(self.key, GROUP, "-", "+", count=most_seen, idle=self.lease_ms)
        except ResponseError:  # NOGROUP: somebody emptied Redis
            late = []
        if not late:
            self.suspects = 0
            self._left.clear()
            return [], []
        stale = [(one["message_id"], one["times_delivered"]) for one in late]
        gone = self._untaken(dict(stale))
        pending = [(entry, count) for entry, count in stale if entry not in self.held and entry not in self._left]
        for claim in self._take_over([entry for entry, count in pending if count >= most]):
            gone.append((claim, f"workers died {most} times while {claim.what}"))
        suspect = [entry for entry, count in pending if in_batches <= count < most]
        if not (suspect and self._keeps_suspects()):
            self.suspects = 0
            return self._take_over([entry for entry, count in pending if count < in_batches][:room]), gone
        alone = self._take_over(suspect[:1]) if may_be_alone else []
        self.suspects = len(suspect) - len(alone)
        return [replace(claim, alone=True) for claim in alone], gone

    def _keeps_suspects(self) -> bool:
        """Whether this worker is the one that samples suspects. It stops being so if it does not ask for `lease_s`."""
        key = keys.suspects_keeper(self.digest)
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

        What is neither a picture nor a grid is left to workers of another version.
        """
        claims, unknown = list[Claim](), list[Claim]()
        for entry, pairs in leased:
            fields = dict(zip(pairs[::2], pairs[1::2], strict=True))
            try:
                index = int(fields["index"]) if "index" in fields else None
                claims.append(Claim(entry, fields["job"], index))
            except (KeyError, ValueError):
                log.warning("entry cannot be read; left to other workers", entry=entry, stream=self.key)
                unknown.append(Claim(entry, job=""))
        self.held.update(claim.entry for claim in claims)
        if unknown:
            self.leave(unknown)
        return claims

    def leave(self, claims: Sequence[Claim]) -> None:
        """Release claims that this version of the service cannot read, for workers of another one."""
        self._left |= {claim.entry: (claim, time.monotonic()) for claim in claims}
        self.release([claim.entry for claim in claims])

    def _untaken(self, stale: Container[str]) -> list[tuple[Claim, str]]:
        """Return the entries left to other workers that none took in time; forget those that one did."""
        self._left = {entry: about for entry, about in self._left.items() if entry in stale}
        reason = "no running worker can read the job; it is of another version of the service"
        oldest = time.monotonic() - UNREADABLE_S
        return [(claim, reason) for claim, since in self._left.values() if since < oldest]

    def renew(self) -> None:
        """Renew all leases: reset their idle time without counting a delivery. Safe in another thread."""
        self._reset(list(self.held))

    def release(self, entries: Sequence[str]) -> None:
        """Return claims as if they had never been delivered, for another worker to take at once."""
        self._reset(entries, idle=self.lease_ms + 1, retrycount=0)
        self.held.difference_update(entries)

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
        self.held.difference_update(entries)
