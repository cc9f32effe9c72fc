"""A flood: ten thousand requests of one owner, as fast as the API answers."""

import asyncio
import json

from faults.harness import until
from faults.trial import BODIES, SMALL, Trial
from service.api.access.api_keys import hash_of, new_key
from service.store import keys

REQUESTS, AT_A_TIME = 10_000, 200
FLOODING, OTHER = new_key(), new_key()
ENVIRONMENT = {
    "LABELGRID_API_KEYS": f"flooding:{hash_of(FLOODING)} other:{hash_of(OTHER)}",
    "LABELGRID_RATE_LIMIT": "none",  # it would refuse most requests, but the queue is to be flooded
    "LABELGRID_MAX_QUEUED_PICTURES_PER_OWNER": "500",  # so that it fills: toys are sampled very fast
}
HEADERS = {"Authorization": f"Bearer {OTHER}"}


async def _answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """Return the status, headers and body of the next response on a kept-alive connection."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:])}
    return int(head[0].split()[1]), headers, await reader.readexactly(int(headers["content-length"]))


async def _pour(port: int) -> tuple[list[str], int]:
    """Return the accepted jobs' ids and the number of refused requests. RuntimeError for any other response.

    Speaks HTTP itself, since a client library takes as long for a request as the API does.
    """
    ids: list[str] = []
    refused = 0
    left = iter(range(REQUESTS))
    body = json.dumps(BODIES[SMALL])
    head = (
        f"POST /generate HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {FLOODING}\r\nPrefer: respond-async\r\n"
    )
    request = f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()

    async def pour() -> None:
        nonlocal refused
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in left:
            writer.write(request)
            status, headers, answer = await _answer(reader)
            if status in (200, 202):
                ids.append(json.loads(answer)["id"])
            elif status == 429 and int(headers["retry-after"]) > 0:
                refused += 1
            else:
                raise RuntimeError(f"POST /generate returned {status}: {answer[:300]!r}")
        writer.close()

    await asyncio.gather(*(pour() for _ in range(AT_A_TIME)))
    return ids, refused


def flood(trial: Trial) -> None:
    """10,000 requests of one owner, 200 at a time: finished, or refused with 429 and `Retry-After`; recovery and wait
    are another owner's"""
    trial.begin()

    def pour() -> None:
        ids, refused = asyncio.run(_pour(trial.stack.port))
        if len(ids) + refused != REQUESTS or not refused:
            raise RuntimeError(f"{len(ids)} accepted and {refused} refused of {REQUESTS}: the trial shows nothing")
        trial.jobs |= dict.fromkeys(ids, SMALL)
        trial.say(f"{len(ids)} accepted, {refused} refused")

    trial.strike(pour)
    trial.end()
    trial.recover()
    until(lambda: trial.stack.connection.zcard(keys.DEADLINES) < 5, "the flood's jobs")
