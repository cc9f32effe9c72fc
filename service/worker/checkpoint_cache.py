"""Keeps checkpoints on this machine's disk by digest, so that jobs can use theirs after storage has changed.

The files are CACHE/DIGEST/NAME.safetensors; an adapter's folder also holds its base. Knows files, no networks.
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

IN_USE_S = 60.0  # another worker may still be reading a checkpoint that it fetched less than this ago


class CheckpointCache:
    """Copies of checkpoints in `storage`, about `max_bytes` at most. Several workers may share `folder`."""

    def __init__(self, folder: Path, storage: Location, max_bytes: int) -> None:
        self.folder, self.storage, self.max_bytes = folder.expanduser(), storage, max_bytes

    def fetch(self, name: str | None, digest: str | None = None, kind: CheckpointKind = "denoiser") -> Location:
        """Return a verified file with checkpoint `name`, or the promoted one, and its base beside it.

        With `digest` it has that digest: it comes from storage, or from the cache if storage has another one now.
        CheckpointError if it is in neither. If the disk cannot be written, return the file in storage.
        """
        try:
            source = resolve(self.storage, name, kind)
            info = read_info(source)
            if digest not in (None, info.digest):
                raise CheckpointError(source.name, "is no longer the checkpoint that the job was accepted with")
            return self._keep(source, info)
        except CheckpointError:
            kept = self.folder / (digest or "") / f"{name}{SUFFIX}"
            if name is None or digest is None or not kept.exists():
                raise
            return kept
        except OSError as error:
            log.warning(
                "checkpoint cannot be cached", checkpoint=source.name, cache=str(self.folder), reason=str(error)
            )
            return source

    def forget(self, path: Location) -> None:
        """Remove a checkpoint that cannot be used."""
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
        """Remove the least recently fetched checkpoints until the rest fits."""
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
        return read_info(kept) == info
    except CheckpointError:
        return False
