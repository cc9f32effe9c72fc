"""Zips of pictures: good ones are read in order, bad ones are refused with every fault, malicious ones do no harm."""

import hashlib
import io
import tracemalloc
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api import uploads
from service.api.uploads import check_picture, read_submission
from service.contract.errors import BadRequest
from tests.service.api.uploads.zips import GOOD, chunk, encrypted, lying, png, with_chunks, without, zipped


@pytest.fixture(autouse=True)
def _low_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, limit in {"ZIP_ENTRIES": 40, "ZIP_UNPACKED_BYTES": 1 << 16, "PICTURE_SIDE": 64}.items():
        monkeypatch.setattr(uploads, name, limit)


def read(content: bytes, count: int) -> list[bytes]:
    pictures = read_submission(io.BytesIO(content), count)
    pngs = [picture.read() for picture in pictures]
    assert [picture.digest for picture in pictures] == [hashlib.sha256(png).hexdigest() for png in pngs]
    return pngs


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_pictures_are_ordered_by_number_whatever_their_order_in_the_zip(method: int) -> None:
    numbers = [10, 2, 0, 1, 3, 4, 5, 9, 8, 7, 6]
    content = zipped({f"{i}.png": png(i) for i in numbers}, method)
    assert read(content, 11) == [png(i) for i in range(11)]


@pytest.mark.parametrize("folders", [("./", "", "./"), ("./images/", "images/", "images/")])
def test_a_name_may_begin_with_a_dot_and_a_slash(folders: Sequence[str]) -> None:
    files = {folder + name: content for folder, (name, content) in zip(folders, GOOD.items(), strict=True)}
    hidden = {"./": b"", "./.DS_Store": b"x"}
    assert read(zipped({**hidden, **files}), 3) == list(GOOD.values())


def test_a_folder_and_the_files_that_macos_adds_are_ignored() -> None:
    files = {"images/": b"", **{f"images/test/{name}": content for name, content in GOOD.items()}}
    hidden = {"__MACOSX/images/test/._0.png": b"x", "images/test/.DS_Store": b"x", "images/test/._1.png": b"x"}
    assert read(zipped({**files, **hidden}), 3) == list(GOOD.values())


def test_only_pixels_are_kept_of_a_picture() -> None:
    more = {name: with_chunks(content, chunk(b"eXIf", b"x" * 5000)) for name, content in GOOD.items()}
    assert read(zipped(more), 3) == list(GOOD.values())


LONG = b"x" * 9000 + b"?"

BAD: list[tuple[bytes, list[tuple[str | None, str]]]] = [
    (b"", [(None, "not a zip")]),
    (zipped(GOOD)[:-30], [(None, "not a zip")]),
    (zipped({}), [("0.png", "is missing"), ("1.png", "is missing"), ("2.png", "is missing")]),
    (zipped({**GOOD, "3.png": png()}), [("3.png", "3 label lists; their last picture is 2.png")]),
    (zipped({**without("0.png"), "00.png": png()}), [("00.png", "not one of the names"), ("0.png", "is missing")]),
    (zipped({**GOOD, "a\n" + "b" * 300: b""}), [("a\N{REPLACEMENT CHARACTER}" + "b" * 78 + "...", "not one of")]),
    (zipped({**without("2.png"), "a/2.png": png()}), [(None, "several folders (no folder, a)")]),
    (zipped({**GOOD, "1.png": GOOD["1.png"][:200]}), [("1.png", "a PNG that cannot be used")]),
    (zipped({**GOOD, "0.png": b"x" * 40, "2.png": b""}), [("0.png", "not a PNG"), ("2.png", "not a PNG")]),
    (zipped({**GOOD, "1.png": png(size=(65, 1))}), [("1.png", "65x1 pixels; at most 64x64 are allowed")]),
    (zipped({**GOOD, "1.png": with_chunks(png(), chunk(b"teXt") * 63)}), [("1.png", "too many chunks")]),
    (zipped({**GOOD, "1.png": png(size=(16, 8))}), [("1.png", "16x8 pixels, but 0.png has 16x16")]),
    (zipped(GOOD, zipfile.ZIP_BZIP2), [(name, "compression 12") for name in GOOD]),
    (encrypted(zipped(GOOD)), [("0.png", "is encrypted")]),
    (zipped({**GOOD, "1.png": png(1) + LONG}, zipfile.ZIP_STORED).replace(LONG, LONG[::-1]), [("1.png", "Bad CRC-32")]),
    (zipped({f"{i}.png": b"" for i in range(41)}), [(None, "more than 40 entries")]),
    (zipped({**GOOD, "1.png": b"\0" * (1 << 16)}), [("1.png", "unpacks to more than 65536 bytes")]),
    (lying(zipped({"0.png": b"\0" * 5000}), 10), [("1.png", "is missing"), ("2.png", "is missing")]),
]  # fmt: skip


# Numbered, because a zip holds the time, and workers that name tests differently run none.
@pytest.mark.parametrize(("content", "faults"), BAD, ids=range(len(BAD)))
def test_every_fault_is_named(content: bytes, faults: list[tuple[str | None, str]]) -> None:
    with pytest.raises(BadRequest) as caught:
        read(content, 3)
    found = caught.value.members["errors"]
    assert [tuple(fault["loc"][2:]) for fault in found] == [() if entry is None else (entry,) for entry, _ in faults]
    for fault, (_, words) in zip(found, faults, strict=True):
        assert words in fault["msg"]


def test_decoded_pixels_count_towards_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    content = zipped({f"{i}.png": png(size=(64, 64), mode="1") for i in range(3)})
    assert len(read(content, 3)) == 3
    monkeypatch.setattr(uploads, "ZIP_UNPACKED_BYTES", 2 * 3 * 64 * 64)
    with pytest.raises(BadRequest, match=r"2\.png: with it the pictures have more than 24576 bytes"):
        read(content, 3)


@pytest.mark.parametrize("claimed", [None, 10])
def test_a_zip_bomb_is_stopped_while_it_unpacks_whatever_its_headers_claim(claimed: int | None) -> None:
    bomb = zipped({"0.png": b"\0" * (64 << 20)})
    content = bomb if claimed is None else lying(bomb, claimed)
    tracemalloc.start()
    with pytest.raises(BadRequest, match=r"0\.png: "):
        read(content, 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20


def test_one_picture_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "PICTURE_SIDE", 128)
    monkeypatch.setattr(uploads, "ZIP_UNPACKED_BYTES", 64 << 20)
    large = png(size=(128, 128))
    (tmp_path / "pictures.zip").write_bytes(zipped({f"{i}.png": large for i in range(40)}, zipfile.ZIP_STORED))
    with (tmp_path / "pictures.zip").open("rb") as file:
        tracemalloc.start()
        pictures = read_submission(file, 40)
        assert all(picture.read() == large for picture in pictures)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 10 * len(large)


ZIP = zipped({"0.png": png(0), "1.png": png(1)}, zipfile.ZIP_STORED)


@given(st.lists(st.tuples(st.integers(0, len(ZIP) - 1), st.integers(0, 255)), max_size=6), st.integers(0, 40))
def test_damaged_zips_are_read_right_or_refused(changes: list[tuple[int, int]], cut: int) -> None:
    content = bytearray(ZIP[: len(ZIP) - cut])
    for at, byte in changes:
        if at < len(content):
            content[at] = byte
    try:
        pngs = read(bytes(content), 2)
    except BadRequest:
        return
    assert [check_picture(one, 64) for one in pngs] == [(16, 16)] * 2


NAMES = (
    "0.png ./1.png 1.png 2.png 00.png a/0.png a/1.png b/1.png a/ / /0.png ../0.png 0.PNG __MACOSX/0.png .0.png 1.png/"
)
ODD_NAMES = ("0.png\n", " 1.png", "NUL!", "NUL!0.png", "0.pngNUL!", "1.NUL!png", "a\\0.png")
names = st.sampled_from([*NAMES.split(), *ODD_NAMES]) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=8
)
contents = st.sampled_from([png(0), png(1), png(2, (8, 8)), png(3, (65, 1)), b"", b"PK\x01\x02", b"x" * (1 << 17)])
methods = st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])


@pytest.mark.filterwarnings("ignore:Duplicate name")
@given(
    st.lists(st.tuples(names, contents), max_size=5) | st.permutations([*GOOD.items()]).map(lambda g: g[:2]), methods
)
def test_any_entries_are_accepted_whole_or_refused(files: list[tuple[str, bytes]], method: int) -> None:
    try:
        pngs = read(zipped(files, method).replace(b"NUL!", b"\0\0\0\0"), 2)
    except BadRequest:
        return
    seen = {name.partition("NUL!")[0].removeprefix("./"): content for name, content in files if "__MACOSX" not in name}
    found = {name.rpartition("/")[2]: content for name, content in seen.items() if "/." not in f"/{name}"}
    assert pngs == [found["0.png"], found["1.png"]]
