"""What the other servers draw with: our engine, or diffusers' pipeline. Both judge every picture and encode a grid."""

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Protocol

import torch
from pydantic import BaseModel
from torch import Tensor

from benchmarks import subject
from benchmarks.baselines.samplers import pipeline
from shared.device import autocast_dtype
from shared.diffusion.denoise import sample
from shared.evaluator import Judge
from shared.options import SamplingOptions
from shared.pictures import grid, png_bytes

ENGINE, DIFFUSERS, DIFFUSERS_DEFAULTS = "engine", "diffusers", "diffusers-defaults"
DEFAULT_STEPS = 50  # of diffusers' conditional pipelines


class Request(BaseModel):
    """A request's body; without options, those of the checkpoint."""

    labels: list[list[str]]
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None


class Drawing(Protocol):
    """Draws requests, each of which becomes a grid as PNG."""

    def __call__(self, requests: Sequence[Request]) -> list[bytes]: ...


class EngineDrawing:
    """All requests in one batch of our loop, with mixed options."""

    def __init__(self) -> None:
        self.denoiser, self.judge = subject.in_steps(), subject.evaluator()
        self.stepper = self.denoiser.stepper()

    def __call__(self, requests: Sequence[Request]) -> list[bytes]:
        lists = [labels for request in requests for labels in request.labels]
        options = [chosen(request, self.denoiser.options) for request in requests for _ in request.labels]
        seeds = [seed for request in requests for seed in subject.seeds(len(request.labels), request.seed)]
        images = sample(self.stepper, subject.multi_hot(lists, self.denoiser.vocabulary), options, seeds)
        return answers(self.judge, requests, images)


class DiffusersDrawing:
    """The same network and weights as a diffusers model, in its loop with its DPM-Solver++.

    Fair to diffusers: each request has the steps, the guidance and the interval of guidance that our engine gives it,
    so both compute the same network rows, since how few are enough is a matter of the checkpoint, not of the library.
    It runs in bfloat16 where the CPU multiplies it. With `defaults` it is what its documentation leads to: float32, 50
    steps, and guidance in all of them. A call of a pipeline has one number of steps, so requests with other options
    need another call. Positions and upsampler, which diffusers does not have, are ours.
    """

    def __init__(self, *, defaults: bool = False) -> None:
        self.denoiser, self.judge = subject.in_steps(), subject.evaluator()
        self.positions, self.default = self.denoiser.stepper(engine="torch"), self.denoiser.options
        self.dtype = None if defaults else autocast_dtype(torch.device("cpu"))
        if defaults:
            of_pipelines = {"steps": DEFAULT_STEPS, "guidance_interval": (0.0, 1.0)}
            self.default = self.default.model_copy(update=of_pipelines)
        self.pipeline = pipeline(self.denoiser, "DPM-Solver++", self.dtype or torch.float32)

    def __call__(self, requests: Sequence[Request]) -> list[bytes]:
        drawn: dict[int, bytes] = {}
        for options, numbers in alike([chosen(request, self.default) for request in requests]):
            together = [requests[number] for number in numbers]
            pngs = answers(self.judge, together, self.images(together, options))
            drawn |= dict(zip(numbers, pngs, strict=True))
        return [drawn[number] for number in range(len(requests))]

    def images(self, requests: Sequence[Request], options: SamplingOptions) -> Tensor:
        """Return the pictures of all requests, (N, 3, H, W), drawn with the same options."""
        lists = [labels for request in requests for labels in request.labels]
        labels = subject.network_labels(self.positions, subject.multi_hot(lists, self.denoiser.vocabulary))
        generator = torch.Generator().manual_seed(requests[0].seed)
        how = {"steps": options.steps, "guidance": options.guidance, "interval": options.guidance_interval}
        return self.enlarged(self.pipeline(labels, generator=generator, **how))

    @torch.inference_mode()
    def enlarged(self, images: Tensor) -> Tensor:
        upsampler = self.denoiser.upsampler
        if upsampler is None:
            return images
        with torch.autocast("cpu", self.dtype, enabled=self.dtype is not None):
            return upsampler(images).float()


DRAWINGS: dict[str, Callable[[], Drawing]] = {
    ENGINE: EngineDrawing,
    DIFFUSERS: DiffusersDrawing,
    DIFFUSERS_DEFAULTS: lambda: DiffusersDrawing(defaults=True),
}


def chosen(request: Request, default: SamplingOptions) -> SamplingOptions:
    """Return the options of a request."""
    changed = {key: value for key in ("steps", "guidance") if (value := getattr(request, key)) is not None}
    return default.model_copy(update=changed)


def alike(options: Sequence[SamplingOptions]) -> Iterable[tuple[SamplingOptions, list[int]]]:
    """Yield each of the options once, with the numbers of those that are equal to it."""

    def key(number: int) -> str:
        return options[number].model_dump_json()

    for _, group in groupby(sorted(range(len(options)), key=key), key):
        numbers = list(group)
        yield options[numbers[0]], numbers


def answers(judge: Judge, requests: Sequence[Request], images: Tensor) -> list[bytes]:
    """Judge the pictures of all requests, (N, 3, H, W), and return each request's grid as PNG."""
    judge.probabilities(images)
    return [png_bytes(grid(part)) for part in images.split([len(request.labels) for request in requests])]
