"""The checkpoints that a worker has in memory. Threads fetch their files; networks are built between two steps.

Knows no jobs.
"""

import math
import time
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Protocol
from weakref import WeakValueDictionary

import torch
from redis import Redis

from service.contract import recipe
from service.contract.recipe import MadeWith
from service.contract.records import ModelName, Picture
from service.files import StorageThreads
from service.settings import Settings
from service.store import workers
from service.store.claims import MAX_DELIVERIES, BegunClaim, PictureStream
from service.store.connection import concerns_all
from service.store.forecast import Rate
from service.telemetry.boundary import confined
from service.telemetry.logs import get_logger
from service.worker.checkpoint_cache import CheckpointCache
from service.worker.engine import BatchSizes, Engine
from service.worker.job_files import JobFiles
from service.worker.judge import Outcome, PictureKey, Uploads
from shared.checkpoint import CheckpointError, CheckpointInfo, read_info
from shared.device import lost
from shared.diffusion.denoise import Stepper
from shared.diffusion.model import Denoiser, load_denoiser
from shared.evaluator import Evaluator, cropping_judge, load_evaluator
from shared.registry import resolve_evaluator
from shared.storage import Location

log = get_logger(__name__)

TURN_S = 5.0  # if more models are wanted than may be loaded: how long one keeps its place, at least
FETCHES_AT_ONCE = 8
IDLE_MODEL_S = 600.0  # after which a model that nobody uses is unloaded


# Rows/s hardly grow beyond 8 rows, so that larger batches only make each step longer (docs/dev/decisions.md).
ON_CPU: Final = BatchSizes(pictures=16, rows=64, efficient_rows=8, late_pictures=16)
ON_GPU: Final = BatchSizes(pictures=64, rows=256, efficient_rows=64, late_pictures=64)  # not measured


def batch_sizes(settings: Settings, device: torch.device) -> BatchSizes:
    """Return the device's sizes, with those that are set in their place."""
    default = ON_CPU if device.type == "cpu" else ON_GPU
    if settings.batch_pictures is not None:
        return BatchSizes(settings.batch_pictures, default.rows)
    return default


class PictureEngine(Protocol):
    """What works on the pictures of one model. `Engine` samples them, `Uploads` judges those that clients uploaded.

    Called by one thread. `admit`, `step` and `wait` raise an error only if the device itself has failed.
    `max_pictures`: in progress or being stored, without those that are drawn and not yet judged. `judged_at`: begin and
    end of the last judging, in seconds since 1970.
    """

    max_pictures: int
    judged_at: tuple[float, float]

    @property
    def room(self) -> int:
        """How many more pictures may be admitted now."""

    def admit(self, pictures: Sequence[Picture]) -> None:
        """Begin to work on pictures."""

    def step(self) -> list[Outcome]:
        """Begin to advance the pictures. Return those that ended, with their verdicts or with why there are none."""

    def wait(self) -> None:
        """Wait until the pictures have advanced."""

    def drop(self, keys: Container[PictureKey]) -> None:
        """Forget pictures; those that are unknown have no effect."""


@dataclass(eq=False, kw_only=True)
class Loaded:
    """A checkpoint in memory: its stream, what works on its pictures, and the claims of those in progress."""

    name: str
    digest: str
    judged_by: MadeWith | None
    stream: PictureStream
    engine: PictureEngine
    claims: dict[PictureKey, BegunClaim] = field(default_factory=dict)
    used_at: float = field(default_factory=time.monotonic)
    took_over_at: float = -math.inf  # last look for pictures of dead workers, in monotonic seconds
    rate: Rate = field(default_factory=Rate)
    stepped_at: float | None = None  # end of the last step, if it left pictures

    def take_out(self, keys: Container[PictureKey]) -> list[str]:
        """Remove pictures; return their stream entries, which the stream still holds."""
        self.engine.drop(keys)
        return [self.claims.pop(key).entry for key in list(self.claims) if key in keys]


@dataclass(frozen=True)
class Fetched:
    """The files of a checkpoint and of the evaluator that judges its pictures, which may be the same."""

    path: Location
    judge: Location


class LoadedModels:
    """What is loaded, longest loaded first. Only iterating over it is safe in another thread.

    Pictures are claimed as `consumer`.
    """

    def __init__(
        self,
        connection: Redis,
        settings: Settings,
        device: torch.device,
        cache: CheckpointCache,
        files: JobFiles,
        consumer: str,
    ) -> None:
        self.connection, self.settings, self.consumer = connection, settings, consumer
        self.device, self.cache, self.files = device, cache, files
        self._by_digest: dict[str, Loaded] = {}
        self._judges = WeakValueDictionary[str, Evaluator]()  # of the loaded models, by digest
        self._threads = StorageThreads(FETCHES_AT_ONCE)
        self._own_judge: Location | None = None  # the evaluator that was promoted when this worker began
        self.fetches = dict[ModelName, tuple[Future[Fetched], float]]()  # with when each began
        self._loaded_at = -TURN_S

    def __iter__(self) -> Iterator[Loaded]:
        return iter(list(self._by_digest.values()))

    def denoisers(self) -> list[tuple[Loaded, Engine]]:
        return [(loaded, loaded.engine) for loaded in self if isinstance(loaded.engine, Engine)]

    def get(self, digest: str) -> Loaded | None:
        return self._by_digest.get(digest)

    def claiming(self) -> list[Loaded]:
        """Return what may claim pictures: evaluators, and as many busy denoisers as may be loaded, latest loaded first.

        The others finish the pictures that they have, so that every model gets its turn.
        """
        places, early = self.settings.loaded_models, list[Loaded]()
        for loaded, _ in reversed(self.denoisers()):
            if places <= 0:
                early.append(loaded)
            places -= bool(loaded.claims)
        return [loaded for loaded in self if loaded not in early]

    def load(self) -> Loaded:
        """Load the promoted model, and wait for it. CheckpointError if it cannot be used."""

        def fetch() -> tuple[ModelName, Fetched]:
            info = self.cache.promoted()
            model = ModelName(name=info.name, digest=info.digest)
            return model, self._fetch(model)

        try:
            model, fetched = self._threads.submit(fetch).result(self.settings.storage_timeout_s)
        except TimeoutError as error:
            raise self._no_answer() from error
        return self._build(model, fetched)

    def _no_answer(self) -> CheckpointError:
        reason = f"has not answered within {self.settings.storage_timeout_s:g} s"
        return CheckpointError(str(self.settings.storage), reason)

    def want(self, model: ModelName) -> None:
        """Begin to fetch a model, unless it is loaded, or all places are taken since less than `TURN_S`."""
        if self.get(model.digest) is not None or any(one.digest == model.digest for one in self.fetches):
            return
        coming = sum(not one.is_evaluator for one in self.fetches)
        places = self.settings.loaded_models - coming - sum(bool(loaded.claims) for loaded, _ in self.denoisers())
        is_its_turn = not coming and time.monotonic() - self._loaded_at >= TURN_S
        if places > 0 or model.is_evaluator or is_its_turn:
            log.info("loading a model", model=model.name, digest=model.digest)
            self.fetches[model] = self._threads.submit(partial(self._fetch, model)), time.monotonic()

    def _fetch(self, model: ModelName) -> Fetched:
        path = self.cache.fetch(model.name, model.digest, "evaluator" if model.is_evaluator else "denoiser")
        return Fetched(path, path if model.is_evaluator else self._fetch_judge(read_info(path)))

    def _fetch_judge(self, info: CheckpointInfo) -> Location:
        """Fetch the evaluator of a denoiser: this worker's own, or one that knows its labels."""
        if self._own_judge is None:
            own = self.cache.promoted("evaluator")
            self._own_judge = self.cache.fetch(own.name, own.digest, "evaluator")
        if set(info.vocabulary).issubset(read_info(self._own_judge).vocabulary):
            return self._own_judge
        other = read_info(resolve_evaluator(self.cache.storage, info))
        return self.cache.fetch(other.name, other.digest, "evaluator")

    def follow(self, give_up: Callable[[ModelName, float, str], object]) -> None:
        """Build a fetched model: one at a time, because pictures in progress wait for it.

        If it cannot be used, call `give_up` with it, how long it was awaited, and why. RedisError if Redis is away.
        """
        for model, (fetch, begun_at) in self.fetches.items():
            awaited_s = time.monotonic() - begun_at
            if fetch.done() or awaited_s >= self.settings.storage_timeout_s:
                del self.fetches[model]
                end = partial(give_up, model, awaited_s)
                with confined("model", end, self.passes, model=model.name, digest=model.digest):
                    try:
                        if not fetch.done():
                            fetch.cancel()  # if no thread was free for it
                            raise self._no_answer()
                        self._build(model, fetch.result())
                    except CheckpointError as error:
                        end(str(error))
                break

    def passes(self, error: Exception) -> bool:
        """Whether an error concerns all models: the device or Redis has failed."""
        return concerns_all(error) or lost(error, self.device)

    def forget(self, loaded: Loaded) -> None:
        """Drop a model, also with pictures in progress."""
        self._by_digest.pop(loaded.digest, None)

    def _build(self, model: ModelName, fetched: Fetched) -> Loaded:
        """Build a network. CheckpointError if that seems to kill the workers that do, as one too large for memory."""
        deaths = workers.died_loading(self.connection, model.digest)
        if deaths >= MAX_DELIVERIES:
            raise CheckpointError(model.name, f"workers died {deaths} times while they loaded it")
        workers.begin_loading(self.connection, model.digest, self.consumer)
        try:
            loaded = self._load(model, fetched)
        except Exception as error:
            if not lost(error, self.device):  # of which this worker dies
                workers.end_loading(self.connection, model.digest, self.consumer)
            raise
        workers.end_loading(self.connection, model.digest, self.consumer)
        self._loaded_at = time.monotonic()
        self._by_digest[loaded.digest] = loaded
        self.unload(keep=loaded)
        return loaded

    def _load(self, model: ModelName, fetched: Fetched) -> Loaded:
        with ThreadPoolExecutor(1) as beside:  # a worker starts sooner
            loading = beside.submit(self._evaluator, fetched.judge)
            sampling = None if model.is_evaluator else self._sampling(fetched)
        judge = loading.result()
        judged_by = MadeWith(name=judge.info.name, digest=judge.info.digest) if judge.info else None
        engine: PictureEngine
        if sampling is None:
            engine = Uploads(judge, self.files, self.device)
        else:
            denoiser, stepper = sampling
            made_with = MadeWith(name=denoiser.info.name, digest=denoiser.info.digest)
            engine = Engine(
                stepper,
                denoiser.vocabulary,
                cropping_judge(judge, denoiser.aspect),
                batch_sizes(self.settings, self.device),
                recipe=partial(recipe.of_picture, model=made_with, evaluator=judged_by),
            )
        stream = PictureStream(self.connection, self.settings, model.digest, self.consumer)
        return Loaded(name=model.name, digest=model.digest, judged_by=judged_by, stream=stream, engine=engine)

    def _sampling(self, fetched: Fetched) -> tuple[Denoiser, Stepper]:
        denoiser = load_denoiser(fetched.path, device=self.device)
        rows, kept = batch_sizes(self.settings, self.device).rows, self.cache.folder_of(fetched.path)
        return denoiser, denoiser.stepper(max_rows=rows, engine=self.settings.engine, kept=kept)

    def _evaluator(self, path: Location) -> Evaluator:
        """Return the evaluator of a file, which models share."""
        digest = read_info(path).digest
        judge = self._judges.get(digest) or load_evaluator(
            path, device=self.device, engine=self.settings.engine, kept=self.cache.folder_of(path)
        )
        self._judges[digest] = judge
        return judge

    def unload(self, keep: Loaded | None = None) -> None:
        """Unload models beyond `loaded_models`, least recently used first, and those unused for `IDLE_MODEL_S`.

        A model with pictures in progress stays, because they are finished with the weights that they began with. So
        does the denoiser that was used last, however long ago.
        """
        last = max((loaded.used_at for loaded, _ in self.denoisers()), default=0.0)
        for loaded in sorted(self, key=lambda one: one.used_at):
            unused = time.monotonic() - loaded.used_at > IDLE_MODEL_S and loaded.used_at != last
            too_many = isinstance(loaded.engine, Engine) and len(self.denoisers()) > self.settings.loaded_models
            if (unused or too_many) and not (loaded.claims or loaded is keep):
                log.info("model unloaded", model=loaded.name, digest=loaded.digest)
                del self._by_digest[loaded.digest]
