"""The checkpoints that a worker has in memory. A thread fetches their files; networks are built between two steps.

Knows neither jobs nor RQ.
"""

import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TypeVar

import torch
from redis import Redis
from redis.exceptions import RedisError

from service import pictures
from service.contract import recipe
from service.contract.recipe import MadeWith
from service.contract.records import Picture
from service.pictures import PictureFiles
from service.settings import Settings
from service.storage_threads import StorageThreads
from service.store import workers
from service.store.claims import Claim, PictureStream
from service.store.doorbell import ModelName
from service.telemetry.logs import get_logger
from service.worker import batch_size
from service.worker.checkpoint_cache import CheckpointCache, in_thread, wait_for_threads
from service.worker.engine import Engine, Key, Outcome
from service.worker.uploaded import JUDGED_TOGETHER, judge_uploaded
from shared.checkpoint import CheckpointError, CheckpointInfo, read_info
from shared.device import lost
from shared.diffusion.denoise import Stepper
from shared.diffusion.model import load_denoiser
from shared.evaluator import Evaluator, Judge, cropping_judge, load_evaluator
from shared.storage import Location

log = get_logger(__name__)

READ_WAIT_S = 0.02  # for uploaded pictures, before others get their turn
READ_AGAIN_S = 1.0  # an uploaded picture, while storage fails
TURN_S = 5.0  # if more models are wanted than may be loaded: how long one keeps its place, at least

T = TypeVar("T")


@dataclass(eq=False, kw_only=True)
class Loaded:
    """A checkpoint in memory: its stream, and the claims of its pictures in progress."""

    name: str
    digest: str
    judged_by: MadeWith | None
    stream: PictureStream
    claims: dict[Key, Claim] = field(default_factory=dict)
    used_at: float = field(default_factory=time.monotonic)

    @property
    def busy(self) -> bool:
        return bool(self.claims)

    def jobs(self) -> set[str]:
        return {claim.job for claim in self.claims.values()}

    def renew(self) -> None:
        """Renew the leases of the pictures in progress. Safe in another thread."""
        self.stream.renew([claim.entry for claim in list(self.claims.values())])

    def admit(self, claims: Sequence[tuple[Picture, Claim]]) -> None:
        """Take up pictures."""
        self.claims |= {picture.key: claim for picture, claim in claims}

    def take_out(self, keys: Container[Key]) -> list[str]:
        """Remove pictures; return their stream entries, which this worker still holds."""
        return [self.claims.pop(key).entry for key in list(self.claims) if key in keys]


@dataclass(eq=False, kw_only=True)
class LoadedModel(Loaded):
    """A denoiser with its engine."""

    stepper: Stepper
    engine: Engine

    @property
    def max_pictures(self) -> int:
        return self.engine.max_pictures + self.engine.late_pictures

    @property
    def room(self) -> int:
        """How many pictures may join now."""
        return self.engine.room

    def admit(self, claims: Sequence[tuple[Picture, Claim]]) -> None:
        super().admit(claims)
        self.engine.admit([picture for picture, _ in claims])

    def take_out(self, keys: Container[Key]) -> list[str]:
        self.engine.drop(lambda picture: picture.key in keys)
        return super().take_out(keys)


@dataclass(eq=False, kw_only=True)
class LoadedEvaluator(Loaded):
    """An evaluator for uploaded pictures. Those that are claimed are judged before others are claimed."""

    judge: Judge
    files: PictureFiles
    device: torch.device
    max_pictures = JUDGED_TOGETHER
    _threads: StorageThreads = field(default_factory=StorageThreads)
    _reads: dict[Key, tuple[Picture, Future[bytes]]] = field(default_factory=dict)

    @property
    def room(self) -> int:
        """How many pictures may be claimed now."""
        return 0 if self.busy else self.max_pictures

    def admit(self, claims: Sequence[tuple[Picture, Claim]]) -> None:
        super().admit(claims)
        for picture, _ in claims:
            self._reads[picture.key] = picture, self._threads.submit(partial(self._read, picture))

    def take_out(self, keys: Container[Key]) -> list[str]:
        self._reads = {key: read for key, read in self._reads.items() if key not in keys}
        return super().take_out(keys)

    def _read(self, picture: Picture) -> bytes:
        """Read a picture from storage; again, while storage fails and somebody waits for it."""
        while True:
            try:
                return self.files.read(picture.job, pictures.picture(picture.index))
            except FileNotFoundError:
                raise
            except OSError as error:
                if picture.key not in self.claims:
                    raise
                log.warning("uploaded picture cannot be read; retrying", job_id=picture.job, reason=str(error))
                time.sleep(READ_AGAIN_S)

    def judge_read(self) -> list[Outcome]:
        """Judge the pictures that have been read."""
        wait([read for _, read in self._reads.values()], READ_WAIT_S)
        found = list[tuple[Picture, bytes | Exception]]()
        for key, (picture, read) in list(self._reads.items()):
            if read.done():
                del self._reads[key]
                error = read.exception()
                found.append((picture, error if isinstance(error, Exception) else read.result()))
        return judge_uploaded(self.judge, found, self.device)


AnyLoaded = LoadedModel | LoadedEvaluator


@dataclass(frozen=True)
class _Fetched:
    """The file of a checkpoint, and of the evaluator that judges it if that is not this worker's own."""

    path: Location
    info: CheckpointInfo
    judge: "Location | None" = None


class Models:
    """What is loaded, least recently used first. Only iterating over it is safe in another thread.

    Pictures are claimed as `consumer`.
    """

    def __init__(
        self,
        connection: Redis,
        settings: Settings,
        device: torch.device,
        cache: CheckpointCache,
        files: PictureFiles,
        consumer: str,
    ) -> None:
        self.connection, self.settings, self.consumer = connection, settings, consumer
        self.device, self.cache, self.files = device, cache, files
        self._own_judge = in_thread(self._load_judge)  # while the first model loads
        self.promoted: str | None = None  # digest, when last checked
        self._is_new = False  # the promoted model is to be loaded, and has found no place yet
        self._by_digest: OrderedDict[str, AnyLoaded] = OrderedDict()
        self._judges: dict[str, Evaluator] = {}  # those of other vocabularies, by digest
        self._sizes = batch_size.choose(settings, device)
        self._fetches = dict[ModelName, Future[_Fetched]]()
        self._loaded_at = -TURN_S
        self._loading = ""  # digest
        self._check: Future[CheckpointInfo] | None = None
        self._checked_at = time.monotonic()
        self._warning = ""  # the last one, which is not repeated

    @cached_property
    def judge(self) -> Evaluator:
        """The evaluator that was promoted when this worker began. CheckpointError if there is none."""
        return self._own_judge.result()

    def __iter__(self) -> Iterator[AnyLoaded]:
        return iter(list(self._by_digest.values()))

    def denoisers(self) -> list[LoadedModel]:
        return [loaded for loaded in self if isinstance(loaded, LoadedModel)]

    def get(self, digest: str) -> AnyLoaded | None:
        return self._by_digest.get(digest)

    @property
    def busy(self) -> bool:
        return any(loaded.busy for loaded in self)

    def claiming(self) -> list[AnyLoaded]:
        """Return what may claim pictures: evaluators, and as many busy denoisers as may be loaded, latest used first.

        The others finish the pictures that they have, so that every model gets its turn.
        """
        places, early = self.settings.loaded_models, list[LoadedModel]()
        for loaded in reversed(self.denoisers()):
            if places <= 0:
                early.append(loaded)
            places -= loaded.busy
        return [loaded for loaded in self if loaded not in early]

    # --- loading ---

    def load(self) -> AnyLoaded:
        """Load the promoted model, and wait for it. CheckpointError if it cannot be used."""
        path = self.cache.fetch(None)
        info = read_info(path)
        self.promoted = info.digest
        model = ModelName(name=info.name, digest=info.digest)
        return self._build(model, self._fetch_judge(path, info))

    def want(self, model: ModelName) -> bool:
        """Begin to fetch a model, unless it is loaded. False if all places are taken, since less than `TURN_S`."""
        if self.get(model.digest) is not None or any(one.digest == model.digest for one in self._fetches):
            return True
        coming = sum(not one.is_evaluator for one in self._fetches)
        places = self.settings.loaded_models - coming - sum(loaded.busy for loaded in self.denoisers())
        is_its_turn = not coming and time.monotonic() - self._loaded_at >= TURN_S
        if not (places > 0 or model.is_evaluator or is_its_turn):
            return False
        log.info("loading a model", model=model.name, digest=model.digest)
        self._fetches[model] = in_thread(partial(self._fetch, model))
        return True

    def follow(self) -> list[tuple[ModelName, Exception]]:
        """Build a model that has been fetched, and return those that cannot be used, with the reason."""
        failed = list[tuple[ModelName, Exception]]()
        for model, fetch in list(self._fetches.items()):
            if fetch.done():
                del self._fetches[model]
                try:
                    self._build(model, fetch.result())
                except Exception as error:
                    if lost(error, self.device):
                        raise
                    failed.append((model, error))
                break  # one for each iteration: pictures in progress wait for it
        return failed

    def _fetch(self, model: ModelName) -> _Fetched:
        path = self.cache.fetch(model.name, model.digest, "evaluator" if model.is_evaluator else "denoiser")
        info = read_info(path)
        return _Fetched(path, info) if model.is_evaluator else self._fetch_judge(path, info)

    def _fetch_judge(self, path: Location, info: CheckpointInfo) -> _Fetched:
        """Fetch the evaluator of a denoiser too, if this worker's own does not know the denoiser's labels."""
        if set(info.vocabulary).issubset(self.judge.vocabulary.names):
            return _Fetched(path, info)
        found = self.cache.evaluator_for(info)
        return _Fetched(path, info, self.cache.fetch(found.name, found.digest, "evaluator"))

    def _build(self, model: ModelName, fetched: _Fetched) -> AnyLoaded:
        """Build a network. CheckpointError if that seems to kill the workers that do, as one too large for memory."""
        deaths = workers.died_loading(self.connection, model.digest)
        if deaths >= self.settings.max_deliveries:
            raise CheckpointError(model.name, f"workers died {deaths} times while they loaded it")
        workers.begin_loading(self.connection, model.digest, self.consumer)
        self._loading = model.digest
        try:
            loaded = self._evaluator(model, fetched) if model.is_evaluator else self._denoiser(fetched)
        except Exception as error:
            if not lost(error, self.device):  # of which this worker dies
                self._end_loading()
            raise
        self._end_loading()
        self._loaded_at = time.monotonic()
        return self.use(loaded)

    def _end_loading(self) -> None:
        if self._loading:
            workers.end_loading(self.connection, self._loading, self.consumer)
        self._loading = ""

    def _denoiser(self, fetched: _Fetched) -> LoadedModel:
        info, sizes, kept = fetched.info, self._sizes, self.cache.folder_of(fetched.path)
        denoiser = self._read(fetched.path, partial(load_denoiser, device=self.device))
        judge = self._judge_of(fetched)
        judged_by = _made_with(judge)
        stepper = denoiser.stepper(max_rows=sizes.rows, engine=self.settings.engine, kept=kept)
        engine = Engine(
            stepper,
            denoiser.vocabulary,
            cropping_judge(judge, denoiser.aspect),
            max_pictures=sizes.pictures,
            late_pictures=sizes.late_pictures,
            efficient_rows=sizes.efficient_rows,
            recipe=partial(recipe.of_picture, model=MadeWith(name=info.name, digest=info.digest), evaluator=judged_by),
        )
        stream = PictureStream(self.connection, self.settings, info.digest, self.consumer)
        return LoadedModel(
            name=info.name, digest=info.digest, judged_by=judged_by, stepper=stepper, engine=engine, stream=stream
        )

    def _evaluator(self, model: ModelName, fetched: _Fetched) -> LoadedEvaluator:
        is_own = self.judge.info is not None and self.judge.info.digest == model.digest
        judge = self.judge if is_own else self._read_evaluator(fetched.path)
        return LoadedEvaluator(
            name=model.name,
            digest=model.digest,
            judged_by=MadeWith(name=model.name, digest=model.digest),
            stream=PictureStream(self.connection, self.settings, model.digest, self.consumer),
            judge=judge,
            files=self.files,
            device=self.device,
        )

    def _judge_of(self, fetched: _Fetched) -> Evaluator:
        """Return the evaluator that judges a denoiser. Of others than this worker's own, forget those in no use."""
        if fetched.judge is None:
            return self.judge
        digest = read_info(fetched.judge).digest
        judge = self._judges.get(digest) or self._read_evaluator(fetched.judge)
        in_use = {loaded.judged_by.digest for loaded in self if loaded.judged_by is not None}
        self._judges = {**{one: self._judges[one] for one in self._judges.keys() & in_use}, digest: judge}
        return judge

    def _load_judge(self) -> Evaluator:
        return self._read_evaluator(self.cache.fetch(None, kind="evaluator"))

    def _read_evaluator(self, path: Location) -> Evaluator:
        load = partial(load_evaluator, device=self.device, engine=self.settings.engine, kept=self.cache.folder_of(path))
        return self._read(path, load)

    def _read(self, path: Location, load: Callable[[Location], T]) -> T:
        """Load a checkpoint's file; a copy that cannot be used is forgotten, so that it is fetched again."""
        try:
            return load(path)
        except CheckpointError:
            self.cache.forget(path)
            raise

    # --- what stays loaded ---

    def use(self, loaded: AnyLoaded) -> AnyLoaded:
        """Note that a checkpoint is used, and keep it loaded."""
        self._by_digest[loaded.digest] = loaded
        self._by_digest.move_to_end(loaded.digest)
        loaded.used_at = time.monotonic()
        self._unload(keep=loaded)
        return loaded

    def _unload(self, keep: AnyLoaded | None = None) -> None:
        """Unload models beyond the setting `loaded_models`, and those unused for `idle_model_s`.

        A model with pictures in progress stays, because they are finished with the weights that they began with. So
        does the promoted one, however long it is unused.
        """
        for loaded in self:
            unused = time.monotonic() - loaded.used_at > self.settings.idle_model_s and loaded.digest != self.promoted
            too_many = isinstance(loaded, LoadedModel) and len(self.denoisers()) > self.settings.loaded_models
            if (unused or too_many) and not (loaded.busy or loaded is keep):
                log.info("model unloaded", model=loaded.name, digest=loaded.digest)
                del self._by_digest[loaded.digest]

    def follow_storage(self) -> None:
        """Every `storage_every_s`, unload unused models, and load a newly promoted one before it is needed.

        If the promoted checkpoint cannot be read, one warning says so, and the loaded models stay in use.
        """
        if self._check is None and time.monotonic() - self._checked_at >= self.settings.storage_every_s:
            self._unload()
            self._checked_at = time.monotonic()
            self._check = in_thread(self.cache.promoted)
        if self._check is None or not self._check.done():
            return
        check, self._check = self._check, None
        try:
            found = check.result()
        except Exception as error:  # of any kind: the loaded models must stay in use
            self.warn(str(error))
        else:
            if found.digest != self.promoted:
                self._warning = ""
                self.promoted, self._is_new = found.digest, True
            if self._is_new:
                self._is_new = not self.want(ModelName(name=found.name, digest=found.digest))

    def warn(self, reason: str) -> None:
        """Log why a promoted model cannot be used, once."""
        if reason != self._warning:
            log.warning("promoted model cannot be loaded", reason=reason)
        self._warning = reason

    def close(self, within_s: float) -> None:
        """Wait up to `within_s` for the threads that load."""
        wait_for_threads(within_s)
        with contextlib.suppress(RedisError):
            self._end_loading()  # this process does not die of it


def _made_with(judge: Evaluator) -> MadeWith | None:
    return MadeWith(name=judge.info.name, digest=judge.info.digest) if judge.info else None
