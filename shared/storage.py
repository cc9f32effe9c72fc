"""Where checkpoints lie: a folder of this machine, or any address that fsspec opens (s3://bucket/path, memory://...).

Imports no torch. Knows files, not what is in them. Whatever a file system raises comes out as OSError.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeAlias, cast
from urllib.parse import unquote, urlsplit
from uuid import uuid4

if TYPE_CHECKING:
    from upath import UPath

Location: TypeAlias = "Path | UPath"  # a folder or a file; what is a Path is on this machine

LOCAL = ("file", "local")
HEADER_BLOCK, WHOLE_BLOCK = 1 << 16, 1 << 23  # bytes that one request to a remote file system asks for


def open_storage(address: "str | Location") -> Location:
    """The storage at a folder's path or at `protocol://...`. ValueError for an address that nothing here can open.

    Credentials and endpoints are the protocol's own affair: AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL and the like.
    """
    if not isinstance(address, str):
        return address
    if "://" not in address:
        return Path(address)
    if address.partition("://")[0] in LOCAL:
        return Path(unquote(urlsplit(address).path))
    try:
        from upath import UPath

        found = UPath(address, use_listings_cache=False)  # fsspec would else remember a listing for ever
        _ = found.fs  # made here, so that a missing driver is noticed at the entry
    except Exception as error:  # each driver has its own
        raise ValueError(f"{address}: no storage that can be opened here: {error}") from error
    return found


def versions(folder: Location) -> dict[str, str]:
    """The folder's files: name -> a text that changes when the file does. Reads no file. Empty where nothing is."""
    with _errors():
        try:
            if isinstance(folder, Path):
                return {entry.name: _version(entry.stat()) for entry in os.scandir(folder) if entry.is_file()}
            found = [entry for entry in folder.fs.ls(folder.path, detail=True) if entry["type"] == "file"]
        except FileNotFoundError:
            return {}
        return {entry["name"].rpartition("/")[2]: str(sorted(entry.items(), key=str)) for entry in found}


def _version(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns}-{status.st_size}-{status.st_ino}"


@contextlib.contextmanager
def reading(path: Location, *, block: int = WHOLE_BLOCK) -> Iterator[BinaryIO]:
    """The file, opened to be read. Of a remote one no more is fetched than is read, rounded up to `block` bytes."""
    with _errors():
        if isinstance(path, Path):
            with path.open("rb") as file:
                yield file
        else:
            with path.fs.open(path.path, "rb", block_size=block, cache_type="readahead") as remote:
                yield cast(BinaryIO, remote)


def read(path: Location) -> bytes:
    """The whole file, in one piece: it may be replaced between two reads."""
    with _errors():
        return path.read_bytes() if isinstance(path, Path) else cast(bytes, path.fs.cat_file(path.path))


def exists(path: Location) -> bool:
    with _errors():
        return path.exists()


def is_there(folder: Location) -> bool:
    """Whether a storage is there. An address always is: object stores know no empty folders."""
    return not isinstance(folder, Path) or folder.is_dir()


def write(path: Location, *parts: "bytes | memoryview") -> None:
    """Write the file whole or not at all: a reader, or a crash at any moment, finds the old file or the new one.

    On this machine by a rename over it; object stores show an object only once all of it is there.
    """
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_and_rename(path, parts)
    else:
        with _errors():
            path.fs.pipe_file(path.path, b"".join(parts))


def _write_and_rename(path: Path, parts: "tuple[bytes | memoryview, ...]") -> None:
    # a random name, not one by process id: in containers every trainer is process 1
    temporary = path.parent / f".{path.name}.{uuid4().hex}.tmp"
    try:
        with temporary.open("xb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with _opened_folder(path.parent) as folder:
        os.fsync(folder)  # the rename itself must survive a power cut


@contextlib.contextmanager
def locked(folder: Location) -> Iterator[None]:
    """Hold a local folder's advisory lock: two who change one file at once must not undo one another.

    Object stores have none; there the last one to write wins.
    """
    if isinstance(folder, Path):
        with _opened_folder(folder) as descriptor:
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
    """What a driver raises, such as botocore's errors, as OSError; ours, which pass through a reader, as they are."""
    try:
        yield
    except (OSError, ValueError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
