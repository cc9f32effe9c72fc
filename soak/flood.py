"""`make flood`: sends the worst of each route in parallel, from one key, to a service of this machine.

Prints the most memory that the API and the worker took until all jobs had ended, and fails if one took more than
MOST_MIB, or if an upload or a large job was not accepted.
"""

import argparse
import asyncio
import contextlib
import io
import json
import os
import re
import subprocess
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final

import httpx
import numpy as np

from faults.harness import ROOT, start
from iclevr.labels import ICLEVR
from service.api.access.api_keys import hash_of, new_key
from service.contract.recipe import KEYWORD, example
from service.local.demo import free_port
from shared.edits import MAX_EDITS
from shared.options import LIMITS
from shared.pictures import png_bytes
from tests.service.api.uploads.zips import chunk

MOST_MIB: Final = {"api": 400, "worker": 3584}
READY_S, EACH_S, WORK_S = 120, 240.0, 900.0
UNREAD_S: Final = 30.0
JOBS: Final = "work:"  # begins the names of requests that must be accepted
KEY: Final = new_key()
HEADERS: Final = {"authorization": f"Bearer {KEY}"}
ASYNC: Final = {"prefer": "respond-async"}
JSON: Final = {"content-type": "application/json"}
LISTS: Final = [["red cube"]] * LIMITS.max_pictures_per_request
LABELS: Final = {"emoji-64": ["dark skin", "woman", "surfing"]}  # of models that do not know a red cube
PROMPT: Final = {"prompt": "red cube", "steps": 1}
ENVIRONMENT: Final = {
    "LABELGRID_API_KEYS": f"flood:{hash_of(KEY)}",
    "LABELGRID_RATE_LIMIT": "none",
    "LABELGRID_MAX_QUEUED_PICTURES": "1000000",
    "LABELGRID_MAX_QUEUED_PICTURES_PER_OWNER": "1000000",
    "LABELGRID_MAX_STORED_PICTURES_PER_OWNER": "1000000",
}
LISTED: Final = 100  # large jobs in the list of jobs, which is as long as a page
PLACED: Final = {
    "labels": [ICLEVR.names[:10]] * LIMITS.max_pictures_per_request,
    "layouts": [[{"x": 0.15 + 0.08 * i, "y": 0.45} for i in range(10)]] * LIMITS.max_pictures_per_request,
}
# Few pictures of one step are exact, so that most are drawn as often as may be.
UNTIL: Final = {"until": "exact", "attempts": LIMITS.max_attempts, "steps": 1}
SMALL: Final = {"model": "iclevr-64"}  # draws fast
STAGES: Final = {"steps": 31, "trajectory": 32}
EDITS: Final = [{"move": {"label": "red cube", "x": 0.4 + 0.003 * i, "y": 0.5}} for i in range(MAX_EDITS)]

Request = Callable[[httpx.AsyncClient], Awaitable[str]]


def packed_recipe() -> bytes:
    """Return a PNG of few bytes whose recipe has as many parts as fit into a megabyte."""
    text = json.dumps({**example(), "verdicts": [[]] * 300_000}).encode()
    png = png_bytes(np.zeros((4, 4, 3), np.uint8))
    end = chunk(b"IEND")
    return png.removesuffix(end) + chunk(b"zTXt", KEYWORD.encode() + b"\0\0" + zlib.compress(text, 9)) + end


def large_zip(side: int, noise: bool) -> bytes:
    """Return a zip of as many pictures as may be, of `side` pixels: of noise it is long, else it unpacks to much."""
    pixels = np.zeros((side, side, 3), np.uint8)
    if noise:
        pixels = np.random.default_rng(0).integers(0, 256, pixels.shape, dtype=np.uint8)
    png, out = png_bytes(pixels), io.BytesIO()
    count = min(LIMITS.max_pictures_per_request, (64 << 20) // pixels.nbytes, (31 << 20) // len(png))
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for i in range(count):
            archive.writestr(f"{i}.png", png)
    return out.getvalue()


def post(path: str, **options: object) -> Request:
    async def send(client: httpx.AsyncClient) -> str:
        return str((await client.post(path, **options)).status_code)  # type: ignore[arg-type]

    return send


def patient(path: str, **options: object) -> Request:
    """Send a request until there is room for it: one owner may not upload everything at the same time."""

    async def send(client: httpx.AsyncClient) -> str:
        while (answer := await client.post(path, headers=ASYNC, **options)).status_code == 429:  # type: ignore[arg-type]
            await asyncio.sleep(float(answer.headers["retry-after"]))
        return str(answer.status_code)

    return send


def get(path: str) -> Request:
    async def send(client: httpx.AsyncClient) -> str:
        return str((await client.get(path)).status_code)

    return send


def unread(line: str, body: bytes = b"", announced: int = 0) -> Request:
    """Send a request, perhaps only a part of the body that is announced, and read nothing for a while."""

    async def send(client: httpx.AsyncClient) -> str:
        _, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port, limit=1)
        length = f"Content-Length: {announced or len(body)}\r\nContent-Type: application/json\r\n" if body else ""
        head = f"{line} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n{length}\r\n"
        writer.write(head.encode() + body)
        await asyncio.sleep(UNREAD_S)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        return "unread"

    return send


def requests(job: str, models: list[str]) -> dict[str, tuple[int, Request]]:
    """Return how often each request is sent, by what it is. `job`: one of many pictures that has finished."""
    empty = b'{"labels": [' + b"[]," * 350_000 + b"[]]}"
    flat = json.dumps({"labels": [["x" * 1_000_000]]}).encode()
    generation = json.dumps({**PROMPT, "n": 10}).encode()
    noise, unpacked = large_zip(512, noise=True), large_zip(512, noise=False)
    count = len(zipfile.ZipFile(io.BytesIO(noise)).namelist())
    many = len(zipfile.ZipFile(io.BytesIO(unpacked)).namelist())
    recipe = packed_recipe()

    def scored(pictures: bytes, pictures_count: int) -> dict[str, object]:
        return {"files": {"file": json.dumps(LISTS[:pictures_count]).encode(), "pictures": ("x.zip", pictures)}}

    def every_model(**options: object) -> dict[str, tuple[int, Request]]:
        asked = {name: {"labels": [LABELS.get(name, LISTS[0])] * len(LISTS), "model": name} for name in models}
        return {f"{JOBS} {name}": (1, patient("/generate", json={**body, **options})) for name, body in asked.items()}

    return {
        "/v1/images/generations, ten": (12, post("/v1/images/generations", content=generation, headers=JSON)),
        "the same, unread": (12, unread("POST /v1/images/generations", generation)),
        "/generate, empty lists": (40, post("/generate", content=empty, headers=JSON)),
        "/generate, a long label": (40, post("/generate", content=flat, headers=JSON)),
        "/generate, half a body": (40, unread("POST /generate", flat[:900_000], len(flat))),
        "/generate, a packed recipe": (40, post("/generate/png", files={"file": recipe})),
        "/generate, a long PNG": (24, patient("/generate/png", files={"file": recipe + bytes(31 << 20)})),
        **every_model(steps=1),
        f"{JOBS} until exact": (1, patient("/generate", json={"labels": [ICLEVR.names[:10]] * 32, **SMALL, **UNTIL})),
        f"{JOBS} edits": (2, patient("/generate", json={"labels": LISTS, "edits": EDITS, "steps": 1, **SMALL})),
        f"{JOBS} an edit": (40, patient(f"/jobs/{job}/images/0/edit", json={"edits": EDITS})),
        "/generate, a deadline": (40, post("/generate", json={"labels": LISTS, "deadline_s": 0.001}, headers=ASYNC)),
        f"{JOBS} trajectories": (4, patient("/generate", json={"labels": LISTS[:32], **STAGES, **SMALL})),
        f"{JOBS} a long zip": (12, patient("/score", **scored(noise, count))),
        f"{JOBS} a zip of many pixels": (12, patient("/score", **scored(unpacked, many))),
        "/jobs": (80, get("/jobs?limit=100")),
        "/jobs/ID": (40, get(f"/jobs/{job}")),
        "/jobs/ID/events, unread": (100, unread(f"GET /jobs/{job}/events")),
        "/jobs/ID/grid.png, unread": (100, unread(f"GET /jobs/{job}/grid.png")),
        "/jobs/ID/pictures.zip, unread": (40, unread(f"GET /jobs/{job}/pictures.zip")),
        "/models, unread": (100, unread("GET /models")),
    }  # fmt: skip


@contextlib.contextmanager
def service(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run `python -m service` on the shipped models, with one key."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("LABELGRID_", "REDIS_"))}
    environment = {**ours, **ENVIRONMENT, "LABELGRID_CACHE": str(folder / "cache")}
    command = ["service", "--port", str(port), "--storage", str(ROOT / "models")]
    process = start(command, environment, folder / "log")
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)


def peaks(parent: int) -> dict[str, int]:
    """Return the most resident memory, in MiB, that each of a process's children has taken, by its command."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            status = (entry / "status").read_text()
            arguments = (entry / "cmdline").read_text().split("\0")
            if re.search(rf"^PPid:\t{parent}$", status, re.MULTILINE) and "service" in arguments:
                peak = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
                found[arguments[arguments.index("service") + 1]] = int(peak[1]) >> 10 if peak else 0
    return found


async def ready(client: httpx.AsyncClient) -> str:
    """Wait for the service, and return a finished job with many pictures, each with many verdicts."""
    deadline = time.monotonic() + READY_S
    while True:
        with contextlib.suppress(httpx.TransportError):
            if (await client.get("/readyz")).status_code == 200:
                break
        if time.monotonic() > deadline:
            raise SystemExit("the service has not started")
        await asyncio.sleep(0.2)
    body = {"labels": LISTS[:64], **UNTIL, "attempts": 2}
    answer = await client.post("/generate", json=body, timeout=WORK_S)
    return str(answer.raise_for_status().json()["id"])


async def fill_list(client: httpx.AsyncClient) -> None:
    """Create a page of the largest jobs, and cancel each: no worker shall take them."""
    for _ in range(LISTED):
        answer = (await client.post("/generate", json=PLACED, headers=ASYNC)).raise_for_status()
        (await client.post(f"/jobs/{answer.json()['id']}/cancel")).raise_for_status()


@contextlib.asynccontextmanager
async def local_client(port: int) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    base = f"http://127.0.0.1:{port}"
    async with httpx.AsyncClient(base_url=base, headers=HEADERS, limits=limits, timeout=EACH_S) as client:
        yield client


async def all_ended(client: httpx.AsyncClient) -> bool:
    """Wait until all jobs have ended. Whether they have in time."""
    deadline = time.monotonic() + WORK_S
    while time.monotonic() < deadline:
        jobs = (await client.get("/jobs?limit=100")).raise_for_status().json()["jobs"]
        if all(job["status"] not in ("queued", "running") for job in jobs):
            return True
        await asyncio.sleep(1)
    return False


async def flood(process: subprocess.Popen[bytes], port: int, only: str) -> tuple[dict[str, int], list[str]]:
    """Send everything at once, print how each was answered, and return the peaks of memory, and what went wrong."""
    async with local_client(port) as client:
        job = await ready(client)
        await fill_list(client)
        before = peaks(process.pid)
        print("before, MiB:", before)
        answers: dict[str, Counter[str]] = {}

        async def send(name: str, request: Request) -> None:
            try:
                answer = await asyncio.wait_for(request(client), WORK_S if name.startswith(JOBS) else EACH_S)
            except (httpx.HTTPError, OSError, TimeoutError) as error:
                answer = type(error).__name__
            answers.setdefault(name, Counter())[answer] += 1

        models = [model["name"] for model in (await client.get("/models")).json()["models"]]
        wanted = {name: one for name, one in requests(job, models).items() if only in name}
        await asyncio.gather(*(send(name, request) for name, (n, request) in wanted.items() for _ in range(n)))
        for name, statuses in sorted(answers.items()):
            print(f"{name:40} {', '.join(f'{n} x {status}' for status, n in sorted(statuses.items()))}")
        refused = {name: found for name, found in answers.items() if name.startswith(JOBS) and set(found) != {"202"}}
        problems = [f"{name}: not all were accepted" for name in refused]
        if not await all_ended(client):
            problems.append(f"jobs go on after {WORK_S:.0f} s")
        return peaks(process.pid), problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="send only the requests whose name has this text")
    only = parser.parse_args().only
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="lg-flood-") as folder, service(Path(folder), port) as process:
        after, problems = asyncio.run(flood(process, port, only))
    print("at most, MiB:", after)
    problems += [
        f"the {name} took {after[name]} MiB; {most} are allowed"
        for name, most in MOST_MIB.items()
        if after[name] > most
    ]
    if problems:
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    main()
