"""How cost grows with size: `python -m benchmarks.sections.growth`.

The cost of a long queue and of many stored results for worker, API and Redis; many open event streams.
"""

import asyncio
import time
from collections.abc import Callable, Sequence

import httpx
from redis import Redis

from benchmarks import subject
from benchmarks.document import Piece, Table, number
from benchmarks.results import Data, main, say
from benchmarks.sections.service import saturate
from benchmarks.stack import Stack, memory_mib, stack, until
from benchmarks.timing import Deadline, figure, percentile, seconds
from service import pictures
from service.contract.records import FinishedPicture, JobRecord, JobResult, Scores, Verdict, new_job_id
from service.pictures import PictureFiles
from service.settings import Settings
from service.store import keys
from service.store.claims import PictureStream
from service.store.connection import connect
from service.store.jobs import JobStore
from shared.checkpoint import read_info
from shared.diffusion.denoise import sample
from shared.options import SamplingOptions
from shared.pictures import png_bytes, to_uint8
from shared.registry import resolve
from tests.service.store.helpers import add_job

LIMIT_S = 220.0  # of the section
STORE_S = 60.0  # of that, for stored results; the queue is measured last and takes the rest
LOT = 500  # jobs created between looks at the clock


class Filler:
    """Fills a Redis with jobs through the service's JobStore."""

    def __init__(self, connection: Redis, settings: Settings) -> None:
        self.connection, self.settings = connection, settings
        self.store = JobStore(connection, settings)
        self.files = PictureFiles(settings.pictures)
        self.info = read_info(resolve(settings.storage, None, "denoiser"))
        self.options = self.info.sampling
        self.finished = 0

    @property
    def queued(self) -> int:
        return self.connection.zcard(keys.OPEN)

    def record(self, pictures: int) -> JobRecord:
        labels, now = subject.label_lists(pictures), time.time()
        about = {"model": self.info.name, "digest": self.info.digest, "columns": 8, "options": self.options}
        return JobRecord(id=new_job_id(now), kind="generate", created_at=now, labels=labels, seed=1, **about)

    def queue_until(self, jobs: int, deadline: Deadline) -> tuple[str, float, float]:
        """Queue one-picture jobs until there are `jobs`, or the deadline.

        Returns the last job's id, and the seconds and bytes per job.
        """
        job_id, count, begun, held = "", 0, deadline.spent, self.memory()
        while (lacking := jobs - self.queued) > 0 and (not job_id or deadline.allows(0)):
            for _ in range(min(LOT, lacking)):
                job_id = add_job(self.store, self.record(1))
                count += 1
        return job_id, (deadline.spent - begun) / count, (self.memory() - held) / count

    def finish_until(self, jobs: int, png: bytes, deadline: Deadline) -> tuple[str, float]:
        """Store finished one-picture jobs as a worker does until there are `jobs`, or the deadline.

        Returns the last job's id, and the bytes per job.
        """
        job_id, before, held = "", self.finished, self.memory()
        while self.finished < jobs and (not job_id or deadline.allows(0)):
            job_id = self.finish(min(LOT, jobs - self.finished), png)
        return job_id, (self.memory() - held) / (self.finished - before)

    def finish(self, jobs: int, png: bytes) -> str:
        probabilities = dict.fromkeys(self.info.vocabulary, 0.5)
        result = JobResult(repeats=[Scores(accuracy=1, exact_match=1, f1=1)], best=0)
        job_id = ""
        stream = PictureStream(self.connection, self.settings, self.info.digest, "benchmark")
        for _ in range(jobs):
            job_id = add_job(self.store, self.record(1))
            (claim,) = self.store.begin(stream, stream.claim_new(1))
            about = {"index": 0, "labels": claim.picture.labels, "seed": claim.picture.seed}
            verdict = Verdict(**about, accuracy=1, f1=1, exact=True, probabilities=probabilities)
            made = FinishedPicture(claim.picture, verdict, png)
            self.store.commit(stream, [(claim, made)], results={job_id: result})
        self.files.write(job_id, pictures.picture(0), png)  # of the one that is read
        self.finished += jobs
        return job_id

    def memory(self) -> int:
        return int(self.connection.info("memory")["used_memory"])


def latencies_ms(running: Stack, path: str, count: int) -> list[float]:
    with running.client() as client:
        client.get(path).raise_for_status()
        return [1000 * seconds(lambda: client.get(path).raise_for_status()) for _ in range(count)]


def rate_of_queue(filler: Filler, pictures: int) -> float:
    """Return the pictures/s while workers finish `pictures` one-picture jobs of the queue."""
    begun, queued = time.perf_counter(), filler.queued
    until(lambda: queued - filler.queued >= pictures, "pictures of the queue")
    return (queued - filler.queued) / (time.perf_counter() - begun)


def pace(running: Stack, rate: Callable[[int], float], pictures: int) -> Data:
    """Return a worker's pictures/s, measured three times by `rate(pictures)`, and its memory in MiB."""
    running.start_workers(1)
    rate(pictures // 2)  # warm
    found = {"pictures_per_s": figure(rate(pictures) for _ in range(3))}
    found["worker_mib"] = memory_mib(running.workers[0])
    running.stop_workers()
    return found


def queue_growth(sizes: Sequence[int], looks: int, pictures: int, deadline: Deadline) -> list[Data]:
    """For each number of queued jobs, measure one more job, the API's latency, Redis's memory, a look and pictures/s.

    Jobs are created by the API's own call. When time runs out, the queue stays as long as it is.
    """
    found = list[Data]()
    with stack(workers=0) as running:
        # no client waits and no worker runs, so that only the queue is measured
        settings = Settings(redis_url=running.redis.url, job_timeout_s=10**6)
        connection = connect(running.redis.url, timeout_s=120)
        filler = Filler(connection, settings)
        for size in sizes:
            job_id, create_s, bytes_per_job = filler.queue_until(size, deadline)
            queued = filler.queued
            read = latencies_ms(running, f"/jobs/{job_id}", looks)
            listed = latencies_ms(running, "/jobs?limit=20", looks)
            about = {
                "queued": queued,
                "create_ms": create_s * 1000,
                "read_ms": percentile(read, 0.5),
                "read_p95_ms": percentile(read, 0.95),
                "list_ms": percentile(listed, 0.5),
                "bytes_per_job": bytes_per_job,
                "sweep_s": seconds(filler.store.fail_overdue),
            }
            found.append(about | pace(running, lambda n: rate_of_queue(filler, n), pictures))
            say(f"  {queued} jobs queued, {deadline.spent:.0f} s")
            if not deadline.allows(0):
                break
    return found


def store_growth(sizes: Sequence[int], looks: int, pictures: int, png: bytes) -> list[Data]:
    """For each number of finished jobs, measure the API's latency, Redis's memory and pictures/s."""
    found, deadline = list[Data](), Deadline(STORE_S)
    with stack(workers=0) as running:
        connection = connect(running.redis.url, timeout_s=120)
        filler = Filler(
            connection, Settings(redis_url=running.redis.url, pictures=running.environment["LABELGRID_PICTURES"])
        )
        for size in sizes:
            job_id, bytes_per_job = filler.finish_until(size, png, deadline)
            read = latencies_ms(running, f"/jobs/{job_id}", looks)
            image = latencies_ms(running, f"/jobs/{job_id}/images/0.png", looks)
            about = {"read_ms": percentile(read, 0.5), "image_ms": percentile(image, 0.5)}
            about |= {"finished": filler.finished, "bytes_per_job": bytes_per_job}
            found.append(about | pace(running, lambda n: saturate(running.port, n), pictures))
            say(f"  {filler.finished} jobs finished, {deadline.spent:.0f} s")
            if not deadline.allows(0):
                break
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
        (await client.delete(f"/jobs/{job_id}")).raise_for_status()
        await asyncio.wait_for(asyncio.gather(*tasks), 60)
    to_end = [at - cancelled for at in ended]
    about = {"streams": streams, "open_s": open_s, "ended": len(ended)}
    return {**about, "read_ms": percentile(taken, 0.5), "read_p95_ms": percentile(taken, 0.95), "end_s": max(to_end)}


def stream_growth(sizes: Sequence[int], looks: int) -> list[Data]:
    found = []
    for size in sizes:
        with stack(workers=0) as running:
            filler = Filler(connect(running.redis.url), Settings(redis_url=running.redis.url))
            job_id = add_job(filler.store, filler.record(1))
            about = asyncio.run(_with_streams(running.address, job_id, size, looks))
            assert running.api is not None
            found.append({**about, "api_mib": memory_mib(running.api)})
            say(f"  {size} event streams open")
    return found


def measure(quick: bool) -> Data:
    queued, finished = ([100], [50]) if quick else ([1000, 10_000], [1000, 10_000])
    streams, looks, pictures = ([50], 10, 8) if quick else ([100, 1000], 100, 32)
    deadline, ours = Deadline(LIMIT_S), subject.denoiser()
    stepper = ours.stepper()
    picture = sample(stepper, subject.multi_hot([["red cube"]], ours.vocabulary), SamplingOptions(steps=4), [1])
    png = png_bytes(to_uint8(picture)[0])
    watched = stream_growth(streams, looks)
    store = store_growth(finished, looks, pictures, png)
    say(f"  streams and store, {deadline.spent:.0f} s")
    queue = queue_growth(queued, looks, pictures, deadline)
    return {
        "figures": {
            "growth.read_ms_with_most_streams": figure([watched[-1]["read_ms"]]),
            "growth.read_ms_with_most_queued": figure([queue[-1]["read_ms"]]),
            "growth.bytes_per_queued_job": figure(one["bytes_per_job"] for one in queue),
            "growth.bytes_per_finished_picture": figure(one["bytes_per_job"] for one in store),
        },
        "pictures": pictures,
        "png_bytes": len(png),
        "served_rows": subject.network_rows(stepper, ours.options),
        "queue": queue,
        "store": store,
        "streams": watched,
    }


def report(data: Data) -> list[Piece]:
    queue = Table(["queued jobs", "one more, ms", "GET job, ms", "p95", "GET /jobs, ms", "bytes per job", "look, s"])
    for one in data["queue"]:
        fields = ("create_ms", "read_ms", "read_p95_ms", "list_ms", "bytes_per_job", "sweep_s")
        queue.add(f"{one['queued']:,}", *(number(one[field]) for field in fields))
    store = Table(["finished jobs of one picture", "GET job, ms", "GET picture, ms", "bytes per job in Redis"])
    for one in data["store"]:
        cells = (number(one[key]) for key in ("read_ms", "image_ms", "bytes_per_job"))
        store.add(f"{one['finished']:,}", *cells)
    held = {f"{one['queued']:,} queued jobs": one for one in data["queue"]}
    held |= {f"{one['finished']:,} finished jobs": one for one in data["store"]}
    rates = ", ".join(f"{number(one['pictures_per_s']['median'])} with {what}" for what, one in held.items())
    streams = Table(
        ["open event streams", "opening all, s", "GET job, ms", "p95", "end reaches the last, s", "API, MiB"]
    )
    fields = ("open_s", "read_ms", "read_p95_ms", "end_s", "api_mib")
    for one in data["streams"]:
        streams.add(one["streams"], *(number(one[field]) for field in fields))
    return [
        "*Queued jobs* of one picture, without a worker. The last column is a worker's look for overdue jobs, each "
        "second.",
        queue,
        f"*Finished jobs.* A PNG has {data['png_bytes']:,} bytes.",
        store,
        f"Meanwhile a worker samples, in pictures/s: {rates}.",
        "*Event streams* of one job:",
        streams,
    ]


if __name__ == "__main__":
    main("growth", __doc__, measure)
