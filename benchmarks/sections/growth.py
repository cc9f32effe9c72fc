"""How cost grows with size: `python -m benchmarks.sections.growth`.

What a long queue and many finished jobs cost API and Redis, and many open event streams. The jobs are a toy network's,
since how long its pictures take does not matter here.
"""

import asyncio
import time
from collections.abc import Sequence
from http.client import HTTPConnection

import httpx

from benchmarks import subject
from benchmarks.clients import Body, generate, send_all
from benchmarks.document import Piece, Table, number
from benchmarks.results import Data, main, say
from benchmarks.sections.scaling import toy_service, used_bytes
from benchmarks.sections.service import CLIENTS, saturate
from benchmarks.stack import Stack, memory_mib
from benchmarks.timing import figure, percentile, seconds
from shared.diffusion.denoise import sample
from shared.pictures import png_bytes, to_uint8

ANY_NUMBER = {
    "LABELGRID_ACCEPT_WITHOUT_WORKERS": "true",
    "LABELGRID_MAX_QUEUED_PICTURES": "1000000",
}


def post(connection: HTTPConnection, body: Body) -> None:
    """Send a request and do not wait for its pictures. RuntimeError if it is not accepted."""
    generate(connection, body, {"Prefer": "respond-async"}, 202)


def queue(port: int, jobs: int) -> None:
    """Queue so many one-picture jobs."""
    lists = subject.label_lists(jobs)
    send_all(port, [{"labels": [labels], "seed": i} for i, labels in enumerate(lists)], CLIENTS, post)


def newest_job(running: Stack) -> str:
    with running.client() as client:
        return str(client.get("/jobs?limit=1").raise_for_status().json()["jobs"][0]["id"])


def latencies_ms(running: Stack, path: str, count: int) -> list[float]:
    with running.client() as client:
        client.get(path).raise_for_status()
        return [1000 * seconds(lambda: client.get(path).raise_for_status()) for _ in range(count)]


def queue_growth(sizes: Sequence[int], looks: int) -> list[Data]:
    """For each number of queued jobs, measure the API's latency and Redis's memory."""
    found, queued = list[Data](), CLIENTS
    with toy_service(0, **ANY_NUMBER) as (running, redis):
        queue(running.port, queued)  # warm
        for size in sizes:
            held = used_bytes(redis)
            queue(running.port, size - queued)
            bytes_per_job, queued = (used_bytes(redis) - held) / (size - queued), size
            read = latencies_ms(running, f"/jobs/{newest_job(running)}", looks)
            about = {"read_ms": percentile(read, 0.5), "read_p95_ms": percentile(read, 0.95)}
            about["list_ms"] = percentile(latencies_ms(running, "/jobs?limit=20", looks), 0.5)
            found.append({**about, "queued": size, "bytes_per_job": bytes_per_job})
            say(f"  {size} jobs queued")
    return found


def store_growth(sizes: Sequence[int], looks: int) -> list[Data]:
    """For each number of finished jobs, measure the API's latency and Redis's memory."""
    found, finished = list[Data](), CLIENTS
    with toy_service() as (running, redis):
        saturate(running.port, finished)  # warm
        for size in sizes:
            held = used_bytes(redis)
            saturate(running.port, size - finished)
            bytes_per_job, finished = (used_bytes(redis) - held) / (size - finished), size
            job = f"/jobs/{newest_job(running)}"
            about = {"read_ms": percentile(latencies_ms(running, job, looks), 0.5)}
            about["image_ms"] = percentile(latencies_ms(running, f"{job}/images/0.png", looks), 0.5)
            found.append({**about, "finished": size, "bytes_per_job": bytes_per_job})
            say(f"  {size} jobs finished")
    return found


async def _with_streams(address: str, job_id: str, streams: int, looks: int) -> Data:
    """Measure GET /jobs/{id} while `streams` event streams are open, and how long the job's end takes to reach them.

    The streams are bare sockets: httpx scans all its connections whenever one closes, 5 s of work for a thousand.
    """
    host, _, port = address.removeprefix("http://").partition(":")
    ended: list[float] = []
    async with httpx.AsyncClient(base_url=address, timeout=120) as client:
        opened = asyncio.Semaphore(0)

        async def watch() -> None:
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(f"GET /jobs/{job_id}/events HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
            async for line in reader:
                if line.startswith(b"event: job"):
                    opened.release()
                if line.startswith(b"event: end"):
                    ended.append(time.perf_counter())
            writer.close()

        start = time.perf_counter()
        tasks = [asyncio.create_task(watch()) for _ in range(streams)]
        for _ in range(streams):
            await asyncio.wait_for(opened.acquire(), 60)
        open_s = time.perf_counter() - start
        taken = []
        for _ in range(looks):
            begun = time.perf_counter()
            (await client.get(f"/jobs/{job_id}")).raise_for_status()
            taken.append(1000 * (time.perf_counter() - begun))
        cancelled = time.perf_counter()
        (await client.post(f"/jobs/{job_id}/cancel")).raise_for_status()
        await asyncio.wait_for(asyncio.gather(*tasks), 60)
    to_end = [at - cancelled for at in ended]
    about = {"streams": streams, "open_s": open_s, "ended": len(ended)}
    return {**about, "read_ms": percentile(taken, 0.5), "read_p95_ms": percentile(taken, 0.95), "end_s": max(to_end)}


def stream_growth(sizes: Sequence[int], looks: int) -> list[Data]:
    found = []
    for size in sizes:
        with toy_service(0, **ANY_NUMBER) as (running, _):
            queue(running.port, 1)
            about = asyncio.run(_with_streams(running.address, newest_job(running), size, looks))
            assert running.api is not None
            found.append({**about, "api_mib": memory_mib(running.api)})
            say(f"  {size} event streams open")
    return found


def measure(quick: bool) -> Data:
    jobs, streams, looks = ([100], [50], 10) if quick else ([1000, 10_000], [100, 1000], 100)
    ours = subject.promoted()
    picture = sample(ours.stepper(), subject.multi_hot([["red cube"]], ours.vocabulary), ours.options, [1])
    watched, finished, queued = stream_growth(streams, looks), store_growth(jobs, looks), queue_growth(jobs, looks)
    return {
        "figures": {
            "growth.read_ms_with_most_streams": figure([watched[-1]["read_ms"]]),
            "growth.read_ms_with_most_queued": figure([queued[-1]["read_ms"]]),
            "growth.bytes_per_queued_job": figure(one["bytes_per_job"] for one in queued),
            "growth.bytes_per_finished_picture": figure(one["bytes_per_job"] for one in finished),
        },
        "png_bytes": len(png_bytes(to_uint8(picture)[0])),
        "queue": queued,
        "store": finished,
        "streams": watched,
    }


def report(data: Data) -> list[Piece]:
    queued = Table(["queued jobs of one picture", "GET job, ms", "p95", "GET /jobs, ms", "bytes per job in Redis"])
    for one in data["queue"]:
        fields = ("read_ms", "read_p95_ms", "list_ms", "bytes_per_job")
        queued.add(f"{one['queued']:,}", *(number(one[field]) for field in fields))
    finished = Table(["finished jobs of one picture", "GET job, ms", "GET picture, ms", "bytes per job in Redis"])
    for one in data["store"]:
        cells = (number(one[key]) for key in ("read_ms", "image_ms", "bytes_per_job"))
        finished.add(f"{one['finished']:,}", *cells)
    streams = Table(
        ["open event streams", "opening all, s", "GET job, ms", "p95", "end reaches the last, s", "API, MiB"]
    )
    fields = ("open_s", "read_ms", "read_p95_ms", "end_s", "api_mib")
    for one in data["streams"]:
        streams.add(one["streams"], *(number(one[field]) for field in fields))
    return ["Latencies of the API, and memory, by the number of jobs and of open streams.", queued, finished, streams]


if __name__ == "__main__":
    main("growth", __doc__, measure)
