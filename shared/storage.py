"""Storage for checkpoints: a local folder, or any address that fsspec opens (s3://bucket/path, memory://...).

Imports no torch. Must not know what is in the files. Errors of any file system are raised as OSError.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeAlias, cast
from urllib.parse import unquote
from uuid import uuid4

if TYPE_CHECKING:
    from upath import UPath

Location: TypeAlias = "Path | UPath"  # a folder or a file: local if it is a Path, else remote

LOCAL = ("file", "local")
HEADER_BLOCK, WHOLE_BLOCK = 1 << 16, 1 << 23  # bytes fetched by one request to a remote file system


def open_storage(address: "str | Location") -> Location:
    """Return the storage at a folder's path or at `protocol://...`. ValueError if no installed driver can open it.

    Credentials and endpoints come from the protocol's own settings, such as AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL.
    """
    if not isinstance(address, str):
        return address
    protocol, has_protocol, rest = address.partition("://")
    if not has_protocol:
        return Path(address)
    if protocol in LOCAL:
        host, _, path = rest.partition("/")
        if host not in ("", "localhost"):  # else file://models would be the working directory
            raise ValueError(f"{address}: cannot be opened as storage: begin with {protocol}:/// and the whole path")
        return Path(unquote(f"/{path}"))
    try:
        from upath import UPath

        found = UPath(address, use_listings_cache=False)  # else fsspec caches a listing for ever
        _ = found.fs  # opened now, so that a missing driver is noticed at start-up
    except Exception as error:  # each driver has its own kinds
        raise ValueError(f"{address}: cannot be opened as storage: {error}") from error
    return found


def versions(folder: Location) -> dict[str, str]:
    """Return the folder's files as name -> a text that changes with the file. Reads no file. Empty if it is absent."""
    with _errors():
        try:
            if isinstance(folder, Path):
                seen = [(entry.name, _status(entry, stat.S_ISREG)) for entry in os.scandir(folder)]
                return {name: f"{s.st_mtime_ns}-{s.st_size}-{s.st_ino}" for name, s in seen if s is not None}
            found = [entry for entry in folder.fs.ls(folder.path, detail=True) if entry["type"] == "file"]
        except FileNotFoundError:
            return {}
        return {entry["name"].rpartition("/")[2]: str(sorted(entry.items(), key=str)) for entry in found}


def _status(path: "os.DirEntry[str]", is_kind: Callable[[int], bool]) -> os.stat_result | None:
    """Return the status of an entry of this kind, such as `stat.S_ISREG`.

    None for anything else, and for what has no status: it has just been removed, or is a link that leads to itself.
    """
    try:
        found = path.stat()
    except OSError:
        return None
    return found if is_kind(found.st_mode) else None


def folders(folder: Location) -> list[str]:
    """Return the names of the folders in a folder. Empty if it is absent."""
    with _errors():
        try:
            if isinstance(folder, Path):
                return [entry.name for entry in os.scandir(folder) if _status(entry, stat.S_ISDIR) is not None]
            found = folder.fs.ls(folder.path, detail=True)
        except FileNotFoundError:
            return []
        return [entry["name"].rstrip("/").rpartition("/")[2] for entry in found if entry["type"] == "directory"]


def remove_folder(folder: Location) -> None:
    """Remove a folder with all that is in it, if it is there. Of a symbolic link, only the link is removed."""
    with _errors():
        if isinstance(folder, Path) and folder.is_symlink():  # which rmtree refuses
            folder.unlink(missing_ok=True)
        elif isinstance(folder, Path):
            while folder.exists():  # another process may remove it as well, or still write: rmtree ends there
                try:
                    shutil.rmtree(folder)
                except FileNotFoundError:
                    continue
                except OSError as error:
                    if error.errno != errno.ENOTEMPTY:
                        raise
        else:
            with contextlib.suppress(FileNotFoundError):
                folder.fs.rm(folder.path, recursive=True)


@contextlib.contextmanager
def reading(path: Location, *, block: int = WHOLE_BLOCK, follow: bool = True) -> Iterator[BinaryIO]:
    """Open a file for reading. Of a remote file, only what is read is fetched, in blocks of `block` bytes.

    A local file that is not a regular one raises an OSError: a read of a FIFO may hang. So does a symbolic link without
    `follow`.
    """
    with _errors():
        if isinstance(path, Path):
            with open(path, "rb", opener=partial(_open_regular, follow=follow)) as file:
                yield file
        else:
            with path.fs.open(path.path, "rb", block_size=block, cache_type="readahead") as remote:
                yield cast(BinaryIO, remote)


def _open_regular(path: str, flags: int, follow: bool) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is not a regular file", path)
    return descriptor


def read(path: Location, start: int = 0, end: int | None = None) -> bytes:
    """Return the whole file, or its bytes from `start` to `end`, from a single read: it may be replaced between two."""
    if isinstance(path, Path):
        with reading(path) as file:
            file.seek(start)
            return file.read() if end is None else file.read(end - start)
    part = {} if end is None and not start else {"start": start, "end": end}  # without a start, s3fs reads the end
    with _errors():
        return cast(bytes, path.fs.cat_file(path.path, **part))


def size(path: Location) -> int:
    """Return how many bytes a file has."""
    with _errors():
        return path.stat().st_size if isinstance(path, Path) else cast(int, path.fs.size(path.path))


def write(path: Location, *parts: "bytes | memoryview") -> None:
    """Write a file atomically: readers see the old file or the new one, also after a crash at any moment.

    Locally by a rename over the old file; object stores publish an object only when it is complete.
    """
    if not isinstance(path, Path):
        with _errors():
            path.fs.pipe_file(path.path, b"".join(parts))
        return
    with replacing(path) as file:
        for part in parts:
            file.write(part)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a new local file for writing, which atomically takes the place of `path` at the end of the block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # a random name, not the process id: in containers every trainer is process 1
    temporary = path.parent / f".{path.name}.{uuid4().hex}.tmp"
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:  # as of a full disk
            error.filename = str(path)
        raise
    with _opened_folder(path.parent) as folder:
        os.fsync(folder)  # the rename itself must survive a power cut


@contextlib.contextmanager
def locked(folder: Location) -> Iterator[None]:
    """Hold a local folder's advisory lock, so that concurrent updates of one file do not overwrite each other.

    Object stores have no lock, nor have some file systems, such as Lustre by default; there the last writer wins.
    """
    if isinstance(folder, Path):
        with _opened_folder(folder) as descriptor:
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
    else:
        yield


@contextlib.contextmanager
def _opened_folder(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Raise a driver's errors, such as botocore's, as OSError. CheckpointError, a ValueError, passes through."""
    try:
        yield
    except (OSError, ValueError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
