"""Claims: workers lease pictures, and grids, of a checkpoint from a Redis stream with one consumer group.

A worker renews its leases while it lives; another one takes over a lease that is `lease_s` old. Delivery is at least
once. Knows no HTTP and no torch.
"""

import json
import time
from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from redis import Redis
from redis.exceptions import ResponseError

from service.contract.records import Picture
from service.settings import Settings
from service.store import functions, keys
from service.store.connection import best_effort, text
from service.telemetry.logs import get_logger

log = get_logger(__name__)

GROUP = "workers"  # as in `jobs.lua`
IN_BATCHES = 2  # deaths before a picture is suspected; until then it is sampled in a batch
UNREADABLE_S = 120.0  # how long a picture that this worker cannot read waits for one that can: a rolling upgrade


@dataclass(frozen=True)
class Claim:
    """A picture to sample or judge, leased to this worker as stream entry `entry`; or a job's grid to compose.

    `picture`: None for a grid. `asked_at`: when the picture's job was created, Unix seconds. `alone`: it may have
    killed workers, so nothing else may be in this process. `claimed_at`: Unix seconds.
    """

    entry: str
    job: str
    picture: Picture | None = None
    asked_at: float = 0.0
    alone: bool = False
    claimed_at: float = field(default_factory=time.time, compare=False)

    @property
    def what(self) -> str:
        return "composing the grid" if self.picture is None else f"sampling picture {self.picture.index}"


@dataclass(frozen=True)
class Hopeless:
    """An entry whose job must fail, and why."""

    entry: str
    job: str
    reason: str


class PictureStream:
    """One worker's view of the stream of one checkpoint."""

    def __init__(self, connection: Redis, settings: Settings, digest: str, consumer: str) -> None:
        self.connection, self.settings, self.consumer = connection, settings, consumer
        self.digest, self.key, self.lease_ms = digest, keys.stream(digest), int(settings.lease_s * 1000)
        self.suspects = 0  # pictures that nobody has claimed and that must be sampled alone, when last looked
        self._unreadable: dict[str, tuple[str, float]] = {}  # entry -> its job, and when it was first seen
        functions.call(connection, "open_stream", digest)
        functions.call(connection, "drop_consumers", digest, self.lease_ms)

    def claim_new(self, room: int) -> list[Claim]:
        """Claim up to `room` pending pictures, in the fair queue's order."""
        return self.read(functions.call(self.connection, "claim", self.digest, self.consumer, room))

    def claim_stale(
        self, room: int, *, may_be_alone: bool, held: Container[str] = ()
    ) -> tuple[list[Claim], list[Hopeless]]:
        """Take over expired leases: up to `room` claims to sample, and hopeless ones to fail.

        A picture whose workers died twice may be what killed them: it is claimed alone, by a worker that samples
        nothing (`may_be_alone`). One worker does so, and the others go on with other pictures. One that was delivered
        `max_deliveries` times is hopeless, and so is one that this worker cannot read and no other has taken within
        `UNREADABLE_S`.

        `held`: entries that this worker is sampling, which look stale if the process was paused.
        """
        most = self.settings.max_deliveries
        in_batches = min(IN_BATCHES, most - 1)
        most_seen = 100 + len(self._unreadable)  # which must not hide the entries behind them
        try:
            late: Any = self.connection.xpending_range(self.key, GROUP, "-", "+", count=most_seen, idle=self.lease_ms)
        except ResponseError:  # NOGROUP: somebody emptied Redis
            late = []
        if not late:
            self.suspects = 0
            self._unreadable.clear()
            return [], []
        stale = [(text(one["message_id"]), one["times_delivered"]) for one in late]
        gone = self._unread(dict(stale))
        pending = [(entry, count) for entry, count in stale if entry not in held and entry not in self._unreadable]
        for claim in self._take_over([entry for entry, count in pending if count >= most]):
            gone.append(Hopeless(claim.entry, claim.job, f"workers died {most} times while {claim.what}"))
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
        if text(self.connection.get(key) or b"") != self.consumer:
            return False
        self.connection.pexpire(key, self.lease_ms)
        return True

    def _take_over(self, entries: Sequence[str]) -> list[Claim]:
        """Claim entries unless another worker was faster: XCLAIM takes only those that are still idle."""
        if not entries:
            return []
        found: Any = self.connection.xclaim(self.key, GROUP, self.consumer, self.lease_ms, list(entries))
        return self.read([(entry, functions.flat(fields)) for entry, fields in found])

    def read(self, leased: Sequence[Any]) -> list[Claim]:
        """Parse entries that were leased to this worker, each with its fields and values in turn.

        One that this version of the service cannot read is left to other workers.
        """
        claims = []
        for entry, pairs in leased:
            fields = dict(zip(pairs[::2], pairs[1::2], strict=True))
            try:
                if b"job" in fields:
                    claims.append(Claim(text(entry), text(fields[b"job"])))
                else:
                    picture = Picture.read(fields[b"picture"])
                    claims.append(Claim(text(entry), picture.job, picture, float(fields[b"asked_at"])))
            except (KeyError, TypeError, ValueError) as error:
                self._leave(text(entry), fields, error)
        return claims

    def _leave(self, entry: str, fields: Any, error: Exception) -> None:
        """Release an entry for a worker of another version, or discard it if it names no job."""
        try:
            job = str(json.loads(fields[b"picture"])["job"])
        except (KeyError, TypeError, ValueError):
            log.exception("entry is not a picture", entry=entry, stream=self.key)
            self.discard([entry])
        else:
            log.warning("picture of another version; left to other workers", job_id=job, reason=str(error))
            self._unreadable[entry] = job, time.monotonic()
            self.release([entry])

    def _unread(self, stale: Container[str]) -> list[Hopeless]:
        """Return the unreadable entries that nobody took in time; forget those that somebody did."""
        self._unreadable = {entry: about for entry, about in self._unreadable.items() if entry in stale}
        reason = "the picture has options that no running worker knows; they are of another version of the service"
        oldest = time.monotonic() - UNREADABLE_S
        return [Hopeless(entry, job, reason) for entry, (job, since) in self._unreadable.items() if since < oldest]

    def renew(self, entries: Sequence[str]) -> None:
        """Renew leases: reset their idle time without counting a delivery."""
        self._reset(entries)

    def release(self, entries: Sequence[str]) -> None:
        """Return claims as if they had never been delivered, for another worker to take at once."""
        self._reset(entries, idle=self.lease_ms + 1, retrycount=0)

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
        """Delete entries whose pictures are not needed."""
        if entries:
            functions.call(self.connection, "discard", self.digest, *entries)
