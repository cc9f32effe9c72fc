"""Other servers of the same checkpoint, each as a process: `python -m benchmarks.baselines.servers NAME`.

- `naive`: FastAPI and one RQ job a request, sampled one job after the other by one worker (`naive-worker`).
- `diffusers`: diffusers' pipeline behind FastAPI, one request after the other.

They and `litserve_server.py` answer `POST /generate` with {"labels", "seed", "steps", "guidance"} by the grid as PNG,
and judge every picture, as ours does. The naive one and LitServe sample with our loop: what differs is how requests
reach it.
"""

import argparse
import asyncio
import os
import threading
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Response
from pydantic import BaseModel
from torch import Tensor

from benchmarks import subject
from benchmarks.baselines.samplers import pipeline
from shared.device import autocast_dtype
from shared.diffusion.denoise import sample
from shared.options import SamplingOptions
from shared.pictures import grid, png_bytes

QUEUE = "naive"
JOB = "benchmarks.baselines.servers.draw"  # by name, since this module runs as `__main__`
WAIT_S = 0.01  # of the naive API, before it asks for the job again


class Request(BaseModel):
    """A request's body; without options, those of the checkpoint."""

    labels: list[list[str]]
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None


class Drawing:
    """Samples, judges and encodes the pictures of requests, all of them in one batch, by our loop."""

    def __init__(self) -> None:
        self.denoiser, self.judge = subject.denoiser(), subject.evaluator()
        self.stepper = self.denoiser.stepper(max_rows=subject.batch_sizes(self.denoiser).rows)

    def options(self, request: Request) -> SamplingOptions:
        changed = {key: value for key in ("steps", "guidance") if (value := getattr(request, key)) is not None}
        return self.denoiser.options.model_copy(update=changed)

    def sample(self, requests: Sequence[Request]) -> Tensor:
        """Return the pictures of all requests, (N, 3, H, W)."""
        lists = [labels for request in requests for labels in request.labels]
        options = [self.options(request) for request in requests for _ in request.labels]
        seeds = [seed for request in requests for seed in subject.seeds(len(request.labels), request.seed)]
        return sample(self.stepper, subject.multi_hot(lists, self.denoiser.vocabulary), options, seeds)

    def __call__(self, requests: Sequence[Request]) -> list[bytes]:
        """Return a PNG grid for each request."""
        images = self.sample(requests)
        self.judge.probabilities(images)
        return [png_bytes(grid(part)) for part in images.split([len(request.labels) for request in requests])]


class DiffusersDrawing(Drawing):
    """The same by diffusers' DPM-Solver++, with positions and upsampler of ours, which diffusers does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.pipeline = pipeline(self.denoiser, "DPM-Solver++", autocast_dtype(torch.device("cpu")) or torch.float32)

    def __call__(self, requests: Sequence[Request]) -> list[bytes]:
        (request,) = requests
        options, generator = self.options(request), torch.Generator().manual_seed(request.seed)
        labels = subject.network_labels(self.denoiser, request.labels)
        how = {"steps": options.steps, "guidance": options.guidance, "interval": options.guidance_interval}
        images = self._enlarged(self.pipeline(labels, generator=generator, **how))
        self.judge.probabilities(images)
        return [png_bytes(grid(images))]

    @torch.inference_mode()
    def _enlarged(self, images: Tensor) -> Tensor:
        upsampler = self.stepper.upsampler
        if upsampler is None:
            return images
        with torch.autocast("cpu", self.stepper.dtype, enabled=self.stepper.dtype is not None):
            return torch.cat([upsampler(image[None]).float() for image in images])


@cache
def drawing() -> Drawing:
    """Return this process's drawing; loads the checkpoints at the first call."""
    return Drawing()


def draw(body: dict[str, Any]) -> bytes:
    """The naive server's RQ job."""
    return drawing()([Request.model_validate(body)])[0]


def serve_naive(port: int) -> None:
    from rq import Queue

    from service.store.connection import connect

    app, queue = FastAPI(), Queue(QUEUE, connection=connect(os.environ["LABELGRID_REDIS_URL"]))

    @app.post("/generate")
    async def generate(request: Request) -> Response:
        job = await asyncio.to_thread(queue.enqueue, JOB, request.model_dump())
        while await asyncio.to_thread(job.get_status, refresh=True) not in ("finished", "failed"):
            await asyncio.sleep(WAIT_S)
        return Response(await asyncio.to_thread(job.return_value), media_type="image/png")

    run(app, port)


def work_naive(_: int) -> None:
    from rq import SimpleWorker

    from service.store.connection import connect

    import_module(JOB.rpartition(".")[0]).drawing()  # before the first job, as the others load it
    SimpleWorker([QUEUE], connection=connect(os.environ["LABELGRID_REDIS_URL"])).work(logging_level="ERROR")


def serve_diffusers(port: int) -> None:
    app, made, one_at_a_time = FastAPI(), DiffusersDrawing(), threading.Lock()

    @app.post("/generate")
    def generate(request: Request) -> Response:
        with one_at_a_time:
            return Response(made([request])[0], media_type="image/png")

    run(app, port)


def run(app: FastAPI, port: int) -> None:
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")


SERVERS = {
    "naive": serve_naive,
    "naive-worker": work_naive,
    "diffusers": serve_diffusers,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m benchmarks.baselines.servers", description=__doc__)
    parser.add_argument("server", choices=SERVERS)
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    SERVERS[arguments.server](arguments.port)
