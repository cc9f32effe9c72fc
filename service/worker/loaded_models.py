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
from functools import partial
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
from service.worker.batch_size import BatchSizes, LaterSizes
from service.worker.checkpoint_cache import CheckpointCache, in_thread, wait_for_threads
from service.worker.engine import Engine, Key
from service.worker.uploaded import JUDGED_TOGETHER
from shared.checkpoint import CheckpointError, CheckpointInfo
from shared.device import lost
from shared.diffusion import same_bits
from shared.diffusion.denoise import Stepper
from shared.diffusion.model import Denoiser, load_denoiser
from shared.diffusion.unet import NetworkConfig
from shared.evaluator import Judge, cropping_judge, load_evaluator
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

    `judge` is the promoted evaluator, `judged_by`; pictures are claimed as `consumer`.
    """

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
        self.promoted: str | None = None  # digest, when last checked
        self._by_digest: OrderedDict[str, AnyLoaded] = OrderedDict()
        self._judges: dict[str, tuple[Judge, MadeWith]] = {}  # those of other vocabularies, by digest
        self._sizes: dict[NetworkConfig, BatchSizes] = {}  # weights do not matter: like networks take equally long
        self._building = threading.Lock()  # one network at a time, for its size is measured; storage may hang outside
        self._later: tuple[LoadedModel, NetworkConfig, LaterSizes] | None = None  # serves before it is measured
        self._measuring: Future[BatchSizes] | None = None  # of `_later`, if it is late
        self._closed = False
        self._check: Future[tuple[str, AnyLoaded | None]] | None = None
        self._checked_at = time.monotonic()
        self._reading = WeakValueDictionary[str, Future[AnyLoaded]]()  # by digest, while somebody waits for it
        self._loading = set[str]()  # digests
        self._warning = ""  # the last one, which is not repeated

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

    @property
    def is_measuring(self) -> bool:
        """Whether the next iteration without pictures measures the sizes of a model's batch."""
        return self._later is not None and self._measuring is None and self._later[-1].is_due(busy=self.busy)

    def load(self, name: str | None = None, *, measure_later: bool = False) -> LoadedModel:
        """Load a model and wait for it; the promoted one without `name`. CheckpointError if it cannot be used.

        `measure_later`: where it does not change pictures, measure its batch only when the worker is idle.
        """
        loaded = self.read_model(name, measure_later=measure_later)
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

    def read_model(self, name: str | None, digest: str | None = None, *, measure_later: bool = False) -> LoadedModel:
        """Read denoiser `name`, or the promoted one, and size its batch. CheckpointError if it cannot be used."""
        path = self.cache.fetch(name, digest)
        with self._building:
            denoiser, stepper, sizes = self._build(path, measure_later)
        info = denoiser.info
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
        loaded = LoadedModel(
            name=info.name, digest=info.digest, judged_by=judged_by, stepper=stepper, engine=engine, stream=stream
        )
        if denoiser.network.config not in self._sizes:
            self._later = loaded, denoiser.network.config, LaterSizes(self.settings, info.name, denoiser.stepper())
        return loaded

    def _build(self, path: Location, measure_later: bool) -> tuple[Denoiser, Stepper, BatchSizes]:
        """Read a network and measure how it is batched best, or leave that for later."""
        try:
            denoiser = load_denoiser(path, device=self.device)
        except CheckpointError:
            self.cache.forget(path)
            raise
        stepper, config = denoiser.stepper(), denoiser.network.config
        if measure_later and config not in self._sizes and same_bits.keeps_one_row(stepper):
            stepper.bound(1)
            return denoiser, stepper, batch_size.early(self.settings)
        if config not in self._sizes:
            self._sizes[config] = batch_size.choose(self.settings, stepper)
        sizes = self._sizes[config]
        if stepper.device.type == "cuda":
            stepper.bound(sizes.rows, padded_sizes(sizes.rows))
        else:
            same = same_bits.bound(stepper, sizes.rows)
            if len(same) < sizes.rows:
                log.info("network calls have sizes that give the same bits", model=path.stem, sizes=same)
        return denoiser, stepper, sizes

    def _judge_for(self, info: CheckpointInfo) -> tuple[Judge, MadeWith | None]:
        """Return this worker's evaluator if it knows a denoiser's labels, else the one in storage that does.

        CheckpointError if there is none. Of the latter, those that no loaded model uses are forgotten.
        """
        if set(info.vocabulary).issubset(self.judge.vocabulary.names):
            return self.judge, self.judged_by
        found = self.cache.evaluator_for(info)
        if (known := self._judges.get(found.digest)) is None:
            judge = load_evaluator(self.cache.fetch(found.name, found.digest, "evaluator"), self.device)
            known = judge, MadeWith(name=found.name, digest=found.digest)
        in_use = {loaded.judged_by.digest for loaded in self if loaded.judged_by is not None}
        judges = {digest: one for digest, one in self._judges.items() if digest in in_use}
        self._judges = {**judges, found.digest: known}
        return known

    def read_evaluator(self, name: str, digest: str) -> LoadedEvaluator:
        """Return evaluator `name`: this worker's own, or another. CheckpointError if it cannot be used."""
        judge = self.judge
        if self.judged_by is None or self.judged_by.digest != digest:
            judge = load_evaluator(self.cache.fetch(name, digest, "evaluator"), self.device)
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
        self._measure_later()
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

    def _measure_later(self) -> None:
        """Make the next call that measures a model which already serves, if this worker is idle."""
        if self._later is None:
            return
        model, _, sizes = self._later
        try:
            if self._measuring is not None:
                if self._measuring.done():
                    self._set_sizes(self._measuring.result())
            elif sizes.is_due(busy=self.busy) and self._building.acquire(blocking=False):
                try:
                    next(sizes.work)
                finally:
                    self._building.release()
            elif sizes.is_late:
                self._measuring = in_thread(partial(self._finish, sizes))
        except StopIteration as end:
            self._set_sizes(end.value)
        except Exception:  # of any kind: the model serves with the sizes that it has
            log.exception("batch size cannot be measured", model=model.name)
            self._later = self._measuring = None

    def _finish(self, sizes: LaterSizes) -> BatchSizes:
        with self._building:
            return same_bits.without_pauses(sizes.work, lambda: self._closed)

    def close(self, within_s: float) -> None:
        """Stop measuring, and wait up to `within_s` for the threads that load or measure."""
        self._closed = True
        wait_for_threads(within_s)
        with contextlib.suppress(RedisError):
            for digest in list(self._loading):
                self._end_loading(digest)  # this process does not die of it

    def _set_sizes(self, sizes: BatchSizes) -> None:
        assert self._later is not None
        (model, config, later), self._later, self._measuring = self._later, None, None
        self._sizes[config], spare = sizes, later.spare
        model.stepper.bound(spare.max_rows, spare.pad_to or None, spare.most_padding)
        engine = model.engine
        engine.max_pictures, engine.late_pictures = sizes.pictures, sizes.late_pictures
        engine.efficient_rows = sizes.efficient_rows

    def _read_promoted(self) -> tuple[str, AnyLoaded | None]:
        """Return the promoted digest, and its model if that is new."""
        found = self.cache.promoted()
        is_known = found.digest == self.promoted or found.digest in self._by_digest
        if is_known:
            return found.digest, None
        return found.digest, self.start_loading(found.name, found.digest, is_evaluator=False).result()


def padded_sizes(rows: int) -> list[int]:
    """Return the sizes that a GPU's network calls of up to `rows` are padded to: a few, since it prepares each."""
    return sorted({size for size in (1, 2, 4, *range(8, rows, 8)) if size < rows} | {rows})
