"""The checkpoints that a worker has in memory. They load in a thread, so that pictures in progress continue meanwhile.

Knows neither jobs nor RQ.
"""

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TypeVar, cast
from weakref import WeakValueDictionary

import torch
from redis import Redis
from redis.exceptions import RedisError

from service.contract import recipe
from service.contract.recipe import MadeWith
from service.settings import Settings
from service.store import workers
from service.store.claims import Claim, PictureStream
from service.telemetry.logs import get_logger
from service.worker import batch_size
from service.worker.checkpoint_cache import CheckpointCache, in_thread, wait_for_threads
from service.worker.engine import Engine, Key
from service.worker.uploaded import JUDGED_TOGETHER
from shared.checkpoint import CheckpointError, CheckpointInfo
from shared.device import lost
from shared.diffusion.denoise import Stepper
from shared.diffusion.model import Denoiser, load_denoiser
from shared.evaluator import Evaluator, Judge, cropping_judge, load_evaluator
from shared.storage import Location

log = get_logger(__name__)


@dataclass(eq=False, kw_only=True)
class Loaded:
    """A checkpoint in memory: its stream, and the claims of its pictures: in progress, then being stored."""

    name: str
    digest: str
    judged_by: MadeWith | None
    stream: PictureStream
    claims: dict[Key, Claim] = field(default_factory=dict)
    storing: dict[Key, Claim] = field(default_factory=dict)
    used_at: float = field(default_factory=time.monotonic)

    @property
    def busy(self) -> bool:
        return bool(self.claims or self.storing)

    @property
    def held(self) -> list[Claim]:
        """All claims whose leases this worker renews. Safe in another thread."""
        return [*self.claims.values(), *self.storing.values()]

    def admit(self, claims: Sequence[Claim]) -> None:
        """Take up the pictures of claims."""
        self.claims |= {claim.picture.key: claim for claim in claims}

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
        """How many pictures may be claimed now: none while as many wait for slow storage."""
        return max(0, min(self.engine.room, self.max_pictures - len(self.storing)))

    def admit(self, claims: Sequence[Claim]) -> None:
        super().admit(claims)
        self.engine.admit([claim.picture for claim in claims])

    def take_out(self, keys: Container[Key]) -> list[str]:
        self.engine.drop(lambda picture: picture.key in keys)
        return super().take_out(keys)


@dataclass(eq=False, kw_only=True)
class LoadedEvaluator(Loaded):
    """An evaluator for uploaded pictures. Those that are claimed are judged together, before others are claimed."""

    judge: Judge

    max_pictures = JUDGED_TOGETHER

    @property
    def room(self) -> int:
        """How many pictures may be claimed now."""
        return 0 if self.busy else self.max_pictures


AnyLoaded = LoadedModel | LoadedEvaluator
L = TypeVar("L", bound=AnyLoaded)


class LoadedModels:
    """What is loaded, least recently used first. Only iterating over it is safe in another thread.

    Pictures are claimed as `consumer`.
    """

    def __init__(
        self,
        connection: Redis,
        settings: Settings,
        device: torch.device,
        cache: CheckpointCache,
        consumer: str,
    ) -> None:
        self.connection, self.settings, self.consumer = connection, settings, consumer
        self.device, self.cache = device, cache
        self._judged = in_thread(self._load_promoted_judge)  # while the first model loads
        self.promoted: str | None = None  # digest, when last checked
        self._by_digest: OrderedDict[str, AnyLoaded] = OrderedDict()
        self._judges: dict[str, tuple[Judge, MadeWith]] = {}  # those of other vocabularies, by digest
        self._sizes = batch_size.choose(settings, device)
        self._building = threading.Lock()  # one network at a time, since each is large; storage may hang outside
        self._check: Future[tuple[str, AnyLoaded | None]] | None = None
        self._checked_at = time.monotonic()
        self._reading = WeakValueDictionary[str, Future[AnyLoaded]]()  # by digest, while somebody waits for it
        self._loading = set[str]()  # digests
        self._warning = ""  # the last one, which is not repeated

    @cached_property
    def judge(self) -> Judge:
        """The evaluator that was promoted when this worker began. CheckpointError if there is none."""
        return self._judged.result()[0]

    @cached_property
    def judged_by(self) -> MadeWith | None:
        """Its name and digest."""
        return self._judged.result()[1]

    def __iter__(self) -> Iterator[AnyLoaded]:
        return iter(list(self._by_digest.values()))

    def denoisers(self) -> list[LoadedModel]:
        return [loaded for loaded in self if isinstance(loaded, LoadedModel)]

    @property
    def has_place(self) -> bool:
        """Whether another denoiser can be loaded without another one having to end its pictures."""
        return sum(loaded.busy for loaded in self.denoisers()) < self.settings.loaded_models

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

    def get(self, digest: str) -> AnyLoaded | None:
        return self._by_digest.get(digest)

    @property
    def busy(self) -> bool:
        return any(loaded.busy for loaded in self)

    def load(self, name: str | None = None) -> LoadedModel:
        """Load a model and wait for it; the promoted one without `name`. CheckpointError if it cannot be used."""
        loaded = self.read_model(name)
        if name is None:
            self.promoted = loaded.digest
        return self.use(loaded)

    def use(self, loaded: L) -> L:
        """Note that a checkpoint is used; return the copy that stays loaded, which may be an earlier one."""
        loaded = cast(L, self._by_digest.setdefault(loaded.digest, loaded))
        self._by_digest.move_to_end(loaded.digest)
        loaded.used_at = time.monotonic()
        self._unload(keep=loaded)
        return loaded

    def start_loading(self, name: str, digest: str, *, is_evaluator: bool) -> Future[AnyLoaded]:
        """Begin to read a checkpoint in a thread, unless that has begun already; give the result to `use`."""
        begun = self._reading.get(digest)
        if begun is None or (begun.done() and begun.exception() is not None):
            read = partial(self.read_evaluator if is_evaluator else self.read_model, name, digest)
            self._reading[digest] = begun = in_thread(partial(self._attempt, name, digest, read))
        return begun

    def _attempt(self, name: str, digest: str, read: Callable[[], AnyLoaded]) -> AnyLoaded:
        """Read a checkpoint. CheckpointError if it seems to kill the workers that do, as one too large for memory."""
        deaths = workers.died_loading(self.connection, digest)
        if deaths >= self.settings.max_deliveries:
            raise CheckpointError(name, f"workers died {deaths} times while they loaded it")
        workers.begin_loading(self.connection, digest, self.consumer)
        self._loading.add(digest)
        try:
            loaded = read()
        except Exception as error:
            if not lost(error, self.device):  # of which this worker dies
                self._end_loading(digest)
            raise
        self._end_loading(digest)
        return loaded

    def _end_loading(self, digest: str) -> None:
        self._loading.discard(digest)
        workers.end_loading(self.connection, digest, self.consumer)

    def read_model(self, name: str | None, digest: str | None = None) -> LoadedModel:
        """Read denoiser `name`, or the promoted one. CheckpointError if it cannot be used."""
        path = self.cache.fetch(name, digest)
        with self._building:
            denoiser, stepper = self._build(path)
        info, sizes = denoiser.info, self._sizes
        judge, judged_by = self._judge_for(info)
        made_with = MadeWith(name=info.name, digest=info.digest)
        engine = Engine(
            stepper,
            denoiser.vocabulary,
            cropping_judge(judge, denoiser.aspect),
            max_pictures=sizes.pictures,
            late_pictures=sizes.late_pictures,
            efficient_rows=sizes.efficient_rows,
            recipe=partial(recipe.of_picture, model=made_with, evaluator=judged_by),
        )
        stream = PictureStream(self.connection, self.settings, info.digest, self.consumer)
        return LoadedModel(
            name=info.name, digest=info.digest, judged_by=judged_by, stepper=stepper, engine=engine, stream=stream
        )

    def _build(self, path: Location) -> tuple[Denoiser, Stepper]:
        try:
            denoiser = load_denoiser(path, device=self.device)
        except CheckpointError:
            self.cache.forget(path)
            raise
        kept = self.cache.folder_of(path)
        return denoiser, denoiser.stepper(max_rows=self._sizes.rows, engine=self.settings.engine, kept=kept)

    def _judge_for(self, info: CheckpointInfo) -> tuple[Judge, MadeWith | None]:
        """Return this worker's evaluator if it knows a denoiser's labels, else the one in storage that does.

        CheckpointError if there is none. Of the latter, those that no loaded model uses are forgotten.
        """
        if set(info.vocabulary).issubset(self.judge.vocabulary.names):
            return self.judge, self.judged_by
        found = self.cache.evaluator_for(info)
        if (known := self._judges.get(found.digest)) is None:
            known = self._load_judge(found.name, found.digest), MadeWith(name=found.name, digest=found.digest)
        in_use = {loaded.judged_by.digest for loaded in self if loaded.judged_by is not None}
        judges = {digest: one for digest, one in self._judges.items() if digest in in_use}
        self._judges = {**judges, found.digest: known}
        return known

    def _load_promoted_judge(self) -> tuple[Judge, MadeWith | None]:
        judge = self._load_judge()
        return judge, MadeWith(name=judge.info.name, digest=judge.info.digest) if judge.info else None

    def _load_judge(self, name: str | None = None, digest: str | None = None) -> Evaluator:
        path = self.cache.fetch(name, digest, "evaluator")
        return load_evaluator(path, self.device, self.settings.engine, self.cache.folder_of(path))

    def read_evaluator(self, name: str, digest: str) -> LoadedEvaluator:
        """Return evaluator `name`: this worker's own, or another. CheckpointError if it cannot be used."""
        judge = self.judge
        if self.judged_by is None or self.judged_by.digest != digest:
            judge = self._load_judge(name, digest)
        stream = PictureStream(self.connection, self.settings, digest, self.consumer)
        judged_by = MadeWith(name=name, digest=digest)
        return LoadedEvaluator(name=name, digest=digest, judged_by=judged_by, judge=judge, stream=stream)

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

        If the promoted checkpoint cannot be used, one warning says so, and the loaded models stay in use.
        """
        if self._check is None and time.monotonic() - self._checked_at >= self.settings.storage_every_s:
            self._unload()
            self._checked_at = time.monotonic()
            self._check = in_thread(self._read_promoted)
        if self._check is None or not self._check.done():
            return
        check, self._check = self._check, None
        try:
            self.promoted, loaded = check.result()
        except Exception as error:  # of any kind: the loaded models must stay in use
            if str(error) != self._warning:
                log.warning("promoted model cannot be loaded", reason=str(error))
            self._warning = str(error)
        else:
            self._warning = ""
            if loaded is not None:
                log.info("promoted model loaded", model=loaded.name, digest=loaded.digest)
                self.use(loaded)

    def close(self, within_s: float) -> None:
        """Wait up to `within_s` for the threads that load."""
        wait_for_threads(within_s)
        with contextlib.suppress(RedisError):
            for digest in list(self._loading):
                self._end_loading(digest)  # this process does not die of it

    def _read_promoted(self) -> tuple[str, AnyLoaded | None]:
        """Return the promoted digest, and its model if that is new."""
        found = self.cache.promoted()
        is_known = found.digest == self.promoted or found.digest in self._by_digest
        if is_known:
            return found.digest, None
        return found.digest, self.start_loading(found.name, found.digest, is_evaluator=False).result()
