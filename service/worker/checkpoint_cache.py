"""Checkpoints kept on this machine's disk, by digest: what a job was accepted for can be made after storage changed.

CACHE/DIGEST/NAME.safetensors; beside an adapter lies the checkpoint that it changes. Knows files, no network.
"""

import os
import shutil
import time
from pathlib import Path

from service.telemetry.logs import get_logger
from shared import storage as files
from shared.checkpoint import SUFFIX, CheckpointError, CheckpointInfo, CheckpointKind, read_info, verify
from shared.registry import resolve
from shared.storage import Location

log = get_logger(__name__)

IN_USE_S = 60.0  # what another worker asked for so recently, it may be reading


class CheckpointCache:
    """The checkpoints of `storage`, of which up to about `max_bytes` are kept in `folder`; workers may share it."""

    def __init__(self, folder: Path, storage: Location, max_bytes: int) -> None:
        self.folder, self.storage, self.max_bytes = folder.expanduser(), storage, max_bytes

    def fetch(self, name: str | None, digest: str | None = None, kind: CheckpointKind = "denoiser") -> Location:
        """A file with checkpoint `name`, or the promoted one, with its base beside it, whole when it was fetched.

        With `digest` it is the one with that digest: from storage, or where another is there now, from the cache.
        CheckpointError if it is in neither. Where the disk takes no file, the one in storage.
        """
        try:
            source = resolve(self.storage, name, kind)
            info = read_info(source)
            if digest not in (None, info.digest):
                raise CheckpointError(source.name, "is no longer the checkpoint that the job was accepted for")
            return self._keep(source, info)
        except CheckpointError:
            kept = self.folder / (digest or "") / f"{name}{SUFFIX}"
            if name is None or digest is None or not kept.exists():
                raise
            return kept
        except OSError as error:
            log.warning("checkpoint cannot be kept", checkpoint=source.name, folder=str(self.folder), reason=str(error))
            return source

    def forget(self, path: Location) -> None:
        """Removes a checkpoint that turned out to be of no use."""
        if isinstance(path, Path) and path.parent.parent == self.folder:
            shutil.rmtree(path.parent, ignore_errors=True)

    def _keep(self, source: Location, info: CheckpointInfo) -> Path:
        kept = self.folder / info.digest / source.name
        if base := info.config.get("base"):
            self._keep_base(kept.with_name(base["name"] + SUFFIX), base["digest"])
        if not _holds(kept, info):
            self._copy(source, kept, info.digest)
        os.utime(kept.parent)
        self._prune()
        return kept

    def _keep_base(self, kept: Path, digest: str) -> None:
        try:
            if kept.exists() and read_info(kept).digest == digest:
                return
            self._copy(self.fetch(kept.stem, digest), kept, digest)
        except CheckpointError as error:
            raise CheckpointError(kept.name, f"is what an adapter changes, and {error.reason}") from error

    def _copy(self, source: Location, kept: Path, digest: str) -> None:
        files.write(kept, files.read(source))
        try:
            if verify(kept).digest != digest:
                raise CheckpointError(source.name, "changed while it was read")
        except CheckpointError:
            kept.unlink(missing_ok=True)
            raise

    def _prune(self) -> None:
        """Removes what was not asked for for longest, until the rest fits."""
        kept = sorted((folder.stat().st_mtime, folder) for folder in self.folder.iterdir() if folder.is_dir())
        sizes = {folder: sum(file.stat().st_size for file in folder.iterdir()) for _, folder in kept}
        total = sum(sizes.values())
        for used_at, folder in kept:
            if total <= self.max_bytes or time.time() - used_at < IN_USE_S:
                return
            shutil.rmtree(folder, ignore_errors=True)
            total -= sizes[folder]


def _holds(kept: Path, info: CheckpointInfo) -> bool:
    try:
        return kept.exists() and read_info(kept) == info
    except CheckpointError:
        return False
