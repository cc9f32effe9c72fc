"""Local storage: its addresses, and listings while others write to it."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from shared import storage


@pytest.mark.parametrize("address", ["file:///a b/c#d?e", "file://localhost/a%20b/c%23d?e", "local:///a b/c%23d%3Fe"])
def test_a_local_address_is_a_whole_path(address: str) -> None:
    assert storage.open_storage(address) == Path("/a b/c#d?e")


@pytest.mark.parametrize("address", ["file://models", "file://./models", "file://host/models", "local://models"])
def test_a_local_address_without_a_whole_path_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match=rf"{address}: cannot be opened as storage: begin with \w+:/// and the whole"):
        storage.open_storage(address)


def test_an_address_that_no_driver_opens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"quux://x: cannot be opened as storage: Unsupported filesystem"):
        storage.open_storage("quux://x")


def test_versions_of_files_change_with_them(tmp_path: Path) -> None:
    for name in ("a", "b"):
        storage.write(tmp_path / name, b"content")
    before = storage.versions(tmp_path)
    storage.write(tmp_path / "a", b"other content")
    after = storage.versions(tmp_path)
    assert before.keys() == after.keys() == {"a", "b"}
    assert before["a"] != after["a"]
    assert before["b"] == after["b"]
    assert storage.versions(tmp_path / "absent") == {}


def test_a_folder_is_removed_also_while_another_process_removes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        storage.write(tmp_path / "removed" / name, b"content")
    unlink, calls = os.unlink, list[str]()

    def gone(path: str, **options: Any) -> None:
        unlink(path, **options)
        calls.append(path)
        if len(calls) == 1:
            raise FileNotFoundError(path)

    monkeypatch.setattr(os, "unlink", gone)
    storage.remove_folder(tmp_path / "removed")
    assert (os.listdir(tmp_path), sorted(calls)) == ([], ["a", "b", "c"])


def test_a_folder_is_removed_also_while_another_process_writes_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write(tmp_path / "removed" / "a", b"content")
    rmdir, calls = os.rmdir, list[str]()

    def late(path: str, **options: Any) -> None:
        calls.append(path)
        if len(calls) == 1:
            storage.write(tmp_path / "removed" / "b", b"content")
        rmdir(path, **options)

    monkeypatch.setattr(os, "rmdir", late)
    storage.remove_folder(tmp_path / "removed")
    assert (os.listdir(tmp_path), len(calls)) == ([], 2)


def test_what_is_no_regular_file_is_not_read(tmp_path: Path) -> None:
    """A read of a FIFO waits for a writer."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "link", "folder"):
        with pytest.raises(OSError, match="is not a regular file"):
            storage.read(tmp_path / name)
        with pytest.raises(OSError, match="is not a regular file"), storage.reading(tmp_path / name):
            pass


def test_a_file_that_vanishes_during_a_listing_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", ".c.tmp"):
        storage.write(tmp_path / name, b"content")
    entries = list(os.scandir(tmp_path))
    (tmp_path / ".c.tmp").unlink()  # as a rename does when a write is complete
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", lambda _: entries)
        assert storage.versions(tmp_path).keys() == {"a", "b"}


def test_a_link_that_leads_to_itself_hides_no_other_file_and_no_folder(tmp_path: Path) -> None:
    storage.write(tmp_path / "a", b"content")
    storage.write(tmp_path / "folder" / "b", b"content")
    (tmp_path / "loop").symlink_to(tmp_path / "pool")
    (tmp_path / "pool").symlink_to(tmp_path / "loop")
    assert storage.versions(tmp_path).keys() == {"a"}
    assert storage.folders(tmp_path) == ["folder"]


def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_the_former_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    storage.write(tmp_path / "a", b"former")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/a'"):
        storage.write(tmp_path / "a", b"content")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"former")]
