"""Keeps checkpoints on this machine's disk by digest, so that jobs can use theirs after storage has changed.

The files are CACHE/DIGEST/NAME.safetensors; an adapter's folder also holds its base. Knows files, no networks. All
calls may hang while storage does.
"""

import contextlib
import os
import re
import shutil
import time
from pathlib import Path

from service.settings import StartError
from service.telemetry.logs import get_logger
from shared import storage as files
from shared.checkpoint import DIGEST, SUFFIX, CheckpointError, CheckpointInfo, CheckpointKind, read_info, verify
from shared.registry import resolve
from shared.storage import Location

log = get_logger(__name__)

IN_USE_S = 60.0  # another worker may still be reading a checkpoint that it fetched less than this ago


class CheckpointCache:
    """Copies of checkpoints in `storage`, about `max_bytes` at most. Several workers may share `folder`."""

    def __init__(self, folder: Path, storage: Location, max_bytes: int) -> None:
        self.storage, self.max_bytes = storage, max_bytes
        try:
            self.folder = folder.expanduser()
        except RuntimeError as error:
            raise StartError(f"LABELGRID_CACHE={folder}: this user has no home folder; name another one") from error

    def promoted(self, kind: CheckpointKind = "denoiser") -> CheckpointInfo:
        """Read which checkpoint is promoted. CheckpointError if none can be used."""
        return read_info(resolve(self.storage, None, kind))

    def fetch(self, name: str, digest: str, kind: CheckpointKind = "denoiser") -> Location:
        """Return a whole file with this checkpoint, and its base beside it: a copy, which storage is not asked for.

        CheckpointError if there is none, and storage has another one now. If the disk cannot be written, return the
        file in storage.
        """
        kept = self.folder / digest / f"{name}{SUFFIX}"
        if not _is_whole(kept):
            source = resolve(self.storage, name, kind)
            info = read_info(source)
            if info.digest != digest:
                raise CheckpointError(source.name, "is no longer the checkpoint that the job was accepted with")
            try:
                self._copy(source, kept, info)
            except OSError as error:
                log.warning("checkpoint cannot be cached", checkpoint=name, cache=str(self.folder), reason=str(error))
                return source
        with contextlib.suppress(OSError):
            os.utime(kept.parent)  # it is in use: others go first
        return kept

    def _copy(self, source: Location, kept: Path, info: CheckpointInfo) -> None:
        if base := info.config.get("base"):
            beside = kept.with_name(base["name"] + SUFFIX)
            try:
                files.write(beside, files.read(self.fetch(base["name"], base["digest"])))
            except CheckpointError as error:
                raise CheckpointError(beside.name, f"is the base of an adapter, and {error.reason}") from error
        files.write(kept, files.read(source))
        if verify(kept).digest != info.digest:
            raise CheckpointError(source.name, "changed while it was read")
        try:
            self._prune()
        except OSError as error:  # such as another worker that removes the same ones
            log.warning("cached checkpoints cannot be removed", cache=str(self.folder), reason=str(error))

    def folder_of(self, path: Location) -> Path | None:
        """Return the folder that holds only this checkpoint's files, which is removed with it; None if in storage."""
        return path.parent if isinstance(path, Path) and path.parent.parent == self.folder else None

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


def _is_whole(kept: Path) -> bool:
    """Whether a copy, and its base beside it, have the digests that they should have."""
    try:
        info = verify(kept)
        base = info.config.get("base")
        whole = base is None or verify(kept.with_name(base["name"] + SUFFIX)).digest == base["digest"]
    except CheckpointError:
        return False
    return whole and info.digest == kept.parent.name
