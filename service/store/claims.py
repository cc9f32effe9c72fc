"""Hands pictures of one checkpoint to workers, through a Redis stream with one consumer group.

A claim is a lease: renewed while the worker lives, taken over by another when it is `lease_s` old. Delivery is at least
once. Knows no HTTP and no torch.
"""

import contextlib
import time
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from typing import Any

from redis import Redis
from redis.exceptions import ResponseError

from service.contract.records import Picture
from service.settings import Settings
from service.store import fair_queue as shares
from service.store.connection import entries_of, text
from service.store.keys import stream_key
from service.telemetry.logs import get_logger

log = get_logger(__name__)

GROUP = "workers"

# Consumers that have nothing and have asked for nothing for long are of workers that ended, or let go of the model; one
# that asks again is there again. KEYS: stream. ARGV: group, how long in ms. What Redis refuses can wait.
_DROP_CONSUMERS = """
local consumers = redis.pcall('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])
for _, one in ipairs(consumers) do
  local name, pending, idle_ms = one[2], one[4], one[6]
  if pending == 0 and idle_ms > tonumber(ARGV[2]) then
    redis.pcall('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], name)
  end
end
"""


@dataclass(frozen=True)
class Claim:
    """A picture that is ours to make. `entry`: its stream entry. `alone`: it must not share a batch.

    `asked_at`: when its job was created, in seconds since 1970.
    """

    entry: str
    picture: Picture
    asked_at: float
    alone: bool = False


class PictureStream:
    """One worker's end of the stream of one checkpoint."""

    def __init__(self, connection: Redis, settings: Settings, digest: str, consumer: str) -> None:
        self.connection, self.settings, self.consumer = connection, settings, consumer
        self.digest, self.key = digest, stream_key(digest)
        self._looked_at, self._more_suspects = 0.0, False
        self._ensure_group()

    def _ensure_group(self) -> None:
        with contextlib.suppress(ResponseError):  # BUSYGROUP: it is there
            self.connection.xgroup_create(self.key, GROUP, id="0", mkstream=True)

    def claim_new(self, room: int) -> list[Claim]:
        """Up to `room` pictures that nobody has had yet, by owners' and jobs' turns."""
        try:
            with self.connection.pipeline(transaction=False) as pipe:  # a full Redis takes no MULTI
                shares.deal(pipe, self.digest, self.key, room)
                pipe.xreadgroup(GROUP, self.consumer, {self.key: ">"}, count=room)
                _, answer = pipe.execute()
        except ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            self._ensure_group()  # somebody emptied this Redis; what was dealt is read the next time
            return []
        return self._claims(entries_of(answer))

    def claim_stale(
        self, room: int, *, may_be_alone: bool, held: Container[str] = ()
    ) -> tuple[list[Claim], list[Claim]]:
        """Pictures of workers that died: (to make, hopeless). Looks no more than four times in a lease, or at once when
        a suspect can be made and there are more.

        `held`: the entries of pictures that we are making; they may look stale after we were paused.

        A picture that was in two workers when they died is suspected of killing them: with `may_be_alone` one such
        is claimed to be made alone. One at `max_deliveries` is hopeless. The rest are made as any.
        """
        early = time.monotonic() - self._looked_at < self.settings.lease_s / 4
        if early and not (self._more_suspects and may_be_alone):
            return [], []
        self._looked_at = time.monotonic()
        last_try = self.settings.max_deliveries - 1
        lease_ms = int(self.settings.lease_s * 1000)
        self.connection.eval(_DROP_CONSUMERS, 1, self.key, GROUP, lease_ms)
        pending = [(entry, count) for entry, count in self._pending(lease_ms) if entry not in held]
        innocent = [entry for entry, count in pending if count < last_try]
        suspect = [entry for entry, count in pending if count == last_try]
        hopeless = [entry for entry, count in pending if count > last_try]
        gone = self._take_over(hopeless, lease_ms)
        self._more_suspects = len(suspect) > 1
        if suspect and may_be_alone and (claims := self._take_over(suspect[:1], lease_ms)):
            return [replace(claim, alone=True) for claim in claims], gone
        return self._take_over(innocent[:room], lease_ms), gone

    def _pending(self, idle_ms: int) -> list[tuple[str, int]]:
        """Entries claimed and not renewed for `idle_ms`, with how often they were delivered."""
        try:
            found: Any = self.connection.xpending_range(self.key, GROUP, "-", "+", count=100, idle=idle_ms)
        except ResponseError:
            return []
        return [(text(one["message_id"]), one["times_delivered"]) for one in found]

    def _take_over(self, entries: Sequence[str], idle_ms: int) -> list[Claim]:
        """Makes entries ours unless somebody was faster: XCLAIM takes only what is still idle."""
        if not entries:
            return []
        return self._claims(self.connection.xclaim(self.key, GROUP, self.consumer, idle_ms, list(entries)))

    def _claims(self, entries: Sequence[Any]) -> list[Claim]:
        """Entries that were delivered to us, read. One that is no picture of ours would stop every worker: it goes."""
        claims = []
        for entry, fields in entries:
            try:
                picture = Picture.model_validate_json(fields[b"picture"])
                claims.append(Claim(text(entry), picture, float(fields[b"asked_at"] or 0)))
            except (KeyError, TypeError, ValueError):
                log.exception("entry is not a picture", entry=text(entry), stream=self.key)
                self.discard([entry])
        return claims

    def renew(self, entries: Sequence[str]) -> None:
        """Keeps claims: sets their idle time to 0 and does not count it as a delivery."""
        if entries:
            self.connection.xclaim(self.key, GROUP, self.consumer, 0, list(entries), justid=True)

    def release(self, entries: Sequence[str]) -> None:
        """Gives claims back as if never delivered, for another worker to take at once."""
        if entries:
            idle_ms = int(self.settings.lease_s * 1000) + 1
            self.connection.xclaim(
                self.key, GROUP, self.consumer, 0, list(entries), idle=idle_ms, retrycount=0, justid=True
            )

    def discard(self, entries: Sequence[str]) -> None:
        """Takes entries off the stream: nobody needs these pictures any more."""
        if entries:
            with self.connection.pipeline(transaction=False) as pipe:  # a full Redis takes no MULTI
                pipe.xack(self.key, GROUP, *entries)
                pipe.xdel(self.key, *entries)
                pipe.execute()
