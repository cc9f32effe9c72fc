"""The loaded models of a worker: a lane for each digest, loaded in a thread so that pictures in work go on meanwhile.

Knows neither jobs nor RQ.
"""

import time
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import torch
from redis import Redis

from service.contract import recipe
from service.contract.recipe import MadeWith
from service.settings import Settings
from service.store.claims import Claim, PictureStream
from service.worker.batch_size import FEWEST, BatchLimit, Sizes
from service.worker.checkpoint_cache import CheckpointCache
from service.worker.engine import Engine
from service.worker.uploaded import JUDGED_TOGETHER, Sent
from shared.checkpoint import CheckpointError, CheckpointKind, read_info
from shared.diffusion.denoise import Stepper
from shared.diffusion.model import load_denoiser
from shared.evaluator import Judge, judge_of, load_evaluator
from shared.registry import resolve


@dataclass(eq=False)
class Lane:
    """One loaded model: its engine, its stream, and the stream entries of the pictures in the engine.

    An evaluator has one, too, for pictures that are sent to be judged.
    """

    name: str
    digest: str
    stepper: Stepper | Sent
    engine: Engine
    stream: PictureStream
    limit: BatchLimit | None = None
    claims: dict[tuple[str, int], Claim] = field(default_factory=dict)
    used_at: float = field(default_factory=time.monotonic)

    @property
    def makes(self) -> bool:
        """Whether its pictures are made, and not sent."""
        return isinstance(self.stepper, Stepper)

    @property
    def idle(self) -> bool:
        return not (self.engine.busy or self.claims)


class Loader:
    """Makes lanes out of checkpoints, one at a time. `begin` and `look` return at once, `load` when it is done."""

    def __init__(
        self,
        connection: Redis,
        settings: Settings,
        device: torch.device,
        cache: CheckpointCache,
        consumer: str,
        judge: Judge,
        judged_by: MadeWith | None,
    ) -> None:
        self.connection, self.settings, self.consumer = connection, settings, consumer
        self.device, self.cache, self.judge, self.judged_by = device, cache, judge, judged_by
        self.limits: dict[str, Sizes] = {}  # as measured on this device by this process, by digest
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")

    def load(self, name: str | None, digest: str | None) -> Lane:
        """A new lane for denoiser `name`, or for the promoted one. CheckpointError if it cannot be used."""
        path = self.cache.fetch(name, digest)
        try:
            denoiser = load_denoiser(path, device=self.device)
        except CheckpointError:
            self.cache.forget(path)
            raise
        info, stepper = denoiser.info, denoiser.stepper()
        made_with = MadeWith(name=info.name, digest=info.digest)
        try:
            engine = Engine(
                stepper,
                denoiser.vocabulary,
                judge_of(self.judge, denoiser.aspect),
                max_pictures=FEWEST,
                recipe=partial(recipe.of_picture, model=made_with, evaluator=self.judged_by),
                device=self.device,
            )
        except ValueError as error:
            raise CheckpointError(path.name, str(error)) from error
        stream = PictureStream(self.connection, self.settings, info.digest, self.consumer)
        limit = BatchLimit(self.settings, stepper, engine, info.digest, self.limits)
        return Lane(info.name, info.digest, stepper, engine, stream, limit)

    def load_judge(self, name: str, digest: str) -> Lane:
        """A new lane for evaluator `name`: that of this worker, or another. CheckpointError if it cannot be used."""
        judge = self.judge
        if self.judged_by is None or self.judged_by.digest != digest:
            judge = load_evaluator(self.cache.fetch(name, digest, "evaluator"), self.device)
        engine = Engine(Sent(), judge.vocabulary, judge, max_pictures=JUDGED_TOGETHER, device=self.device)
        stream = PictureStream(self.connection, self.settings, digest, self.consumer)
        return Lane(name, digest, Sent(), engine, stream)

    def begin(self, name: str, digest: str, kind: CheckpointKind = "denoiser") -> Future[Lane]:
        return self._thread.submit(self.load_judge if kind == "evaluator" else self.load, name, digest)

    def look(self, known: Collection[str]) -> Future[tuple[str, Lane | None]]:
        """Looks at what is promoted: its digest, and a lane for it unless that is among `known` ones."""
        return self._thread.submit(self._look, known)

    def _look(self, known: Collection[str]) -> tuple[str, Lane | None]:
        found = read_info(resolve(self.settings.storage, None, "denoiser"))
        return found.digest, None if found.digest in known else self.load(found.name, found.digest)
