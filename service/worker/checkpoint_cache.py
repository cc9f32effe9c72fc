"""Keeps checkpoints on this machine's disk by digest, so that jobs can use theirs after storage has changed.

The files are CACHE/DIGEST/NAME.safetensors; an adapter's folder also holds its base. Knows files, no networks.
"""

import contextlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from service.settings import StartError
from service.storage_threads import StorageThreads, settle
from service.telemetry.logs import get_logger
from shared import storage as files
from shared.checkpoint import DIGEST, SUFFIX, CheckpointError, CheckpointInfo, CheckpointKind, read_info, verify
from shared.registry import resolve, resolve_evaluator
from shared.storage import Location

log = get_logger(__name__)

T = TypeVar("T")

PATIENCE_S = 5.0  # how long to wait for storage if this machine has a copy, or the loaded models will do
READS_AT_ONCE = 8  # more than there are: a read of an adapter waits for that of its base
LOADER: Final = "loader"  # name of the threads that load
IN_USE_S = 60.0  # another worker may still be reading a checkpoint that it fetched less than this ago


def in_thread(work: Callable[[], T]) -> Future[T]:
    """Run `work`, which must end, in a thread of its own; a daemon, lest it keep a process that is to end at once."""
    future: Future[T] = Future()
    threading.Thread(target=settle, args=(future, work), name=LOADER, daemon=True).start()
    return future


def wait_for_threads(within_s: float) -> None:
    """Wait for the work of `in_thread`. A daemon thread that is in torch while Python ends would abort the process."""
    deadline = time.monotonic() + within_s
    for thread in threading.enumerate():
        if thread.name == LOADER:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))


class CheckpointCache:
    """Copies of checkpoints in `storage`, about `max_bytes` at most. Several workers may share `folder`.

    Waits for storage for `timeout_s` at most.
    """

    def __init__(self, folder: Path, storage: Location, max_bytes: int, timeout_s: float = 120.0) -> None:
        self.storage, self.max_bytes, self.timeout_s = storage, max_bytes, timeout_s
        try:
            self.folder = folder.expanduser()
        except RuntimeError as error:
            raise StartError(f"LABELGRID_CACHE={folder}: this user has no home folder; name another one") from error
        self._threads = StorageThreads(READS_AT_ONCE)

    def fetch(self, name: str | None, digest: str | None = None, kind: CheckpointKind = "denoiser") -> Location:
        """Return a verified file with checkpoint `name`, or the promoted one, and its base beside it.

        With `digest` it has that digest: it comes from storage, or from the cache if storage has another one now or
        hangs. CheckpointError if it is in neither. If the disk cannot be written, return the file in storage.
        """
        kept = self.folder / (digest or "") / f"{name}{SUFFIX}"
        has_copy = name is not None and digest is not None and kept.exists()
        try:
            return self._within(PATIENCE_S if has_copy else self.timeout_s, partial(self._fetch, name, digest, kind))
        except CheckpointError:
            if not has_copy:
                raise
            with contextlib.suppress(OSError):
                os.utime(kept.parent)  # it is in use: others go first
            return kept

    def promoted(self) -> CheckpointInfo:
        """Read which denoiser is promoted. CheckpointError if none can be used, or storage hangs."""
        return self._within(PATIENCE_S, lambda: read_info(resolve(self.storage, None, "denoiser")))

    def evaluator_for(self, info: CheckpointInfo) -> CheckpointInfo:
        """Read which evaluator judges a denoiser. CheckpointError if there is none, or storage hangs."""
        return self._within(self.timeout_s, lambda: read_info(resolve_evaluator(self.storage, info)))

    def _within(self, seconds: float, work: Callable[[], T]) -> T:
        """Return what `work` returns. CheckpointError if storage does not answer in time."""
        future = self._threads.submit(work)
        try:
            return future.result(seconds)
        except TimeoutError as error:
            future.cancel()  # if no thread was free
            raise CheckpointError(str(self.storage), f"has not answered within {seconds:g} s") from error

    def _fetch(self, name: str | None, digest: str | None, kind: CheckpointKind) -> Location:
        source = resolve(self.storage, name, kind)
        info = read_info(source)
        if digest not in (None, info.digest):
            raise CheckpointError(source.name, "is no longer the checkpoint that the job was accepted with")
        try:
            return self._keep(source, info)
        except OSError as error:
            log.warning(
                "checkpoint cannot be cached", checkpoint=source.name, cache=str(self.folder), reason=str(error)
            )
            return source

    def folder_of(self, path: Location) -> Path | None:
        """Return the folder that holds only this checkpoint's files, which is removed with it; None if in storage."""
        return path.parent if isinstance(path, Path) and path.parent.parent == self.folder else None

    def forget(self, path: Location) -> None:
        """Remove a checkpoint that cannot be used."""
        if folder := self.folder_of(path):
            shutil.rmtree(folder, ignore_errors=True)

    def _keep(self, source: Location, info: CheckpointInfo) -> Path:
        kept = self.folder / info.digest / source.name
        if base := info.config.get("base"):
            self._keep_base(kept.with_name(base["name"] + SUFFIX), base["digest"])
        if not _holds(kept, info):
            self._copy(source, kept, info.digest)
        os.utime(kept.parent)
        try:
            self._prune()
        except OSError as error:  # such as another worker that removes the same ones
            log.warning("cached checkpoints cannot be removed", cache=str(self.folder), reason=str(error))
        return kept

    def _keep_base(self, kept: Path, digest: str) -> None:
        try:
            if kept.exists() and verify(kept).digest == digest:
                return
            self._copy(self.fetch(kept.stem, digest), kept, digest)
        except CheckpointError as error:
            raise CheckpointError(kept.name, f"is the base of an adapter, and {error.reason}") from error

    def _copy(self, source: Location, kept: Path, digest: str) -> None:
        files.write(kept, files.read(source))
        try:
            if verify(kept).digest != digest:
                raise CheckpointError(source.name, "changed while it was read")
        except CheckpointError:
            kept.unlink(missing_ok=True)
            raise

    def _prune(self) -> None:
        """Remove the least recently fetched checkpoints until the rest fits. The folder may hold others' files, too."""
        ours = [folder for folder in self.folder.iterdir() if re.fullmatch(DIGEST, folder.name)]
        kept = sorted((folder.stat().st_mtime, folder) for folder in ours)
        sizes = {folder: sum(file.stat().st_size for file in folder.iterdir()) for _, folder in kept}
        total = sum(sizes.values())
        for used_at, folder in kept:
            if total <= self.max_bytes or time.time() - used_at < IN_USE_S:
                return
            shutil.rmtree(folder, ignore_errors=True)
            total -= sizes[folder]


def _holds(kept: Path, info: CheckpointInfo) -> bool:
    """Whether the copy is whole. That takes tens of milliseconds: a damaged one would be loaded in vain, each time."""
    try:
        return verify(kept) == info
    except CheckpointError:
        return False
