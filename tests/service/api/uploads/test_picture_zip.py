"""Pictures that are sent to be scored: zips good, bad and made to harm, and the way of a good one through the queue."""

import io
import json
import struct
import tracemalloc
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from redis import Redis
from typer.testing import CliRunner

from service.api.uploads.picture_zip import SubmissionError, read_submission
from service.api.uploads.png import PngError, check_picture
from service.client import Client
from service.client.__main__ import app
from service.settings import Settings
from service.store.connection import text
from service.store.jobs import JobStore
from service.store.keys import png_key
from service.worker.runner import Runner
from shared.evaluator import as_input
from shared.pictures import RIGHT, WRONG, marked_grid, read_png, to_images
from tests.service.api.answers import nothing_is_queued, problem

LISTS = [["red cube", "blue sphere"], ["gray cylinder"], ["cyan cube"]]
TEST_FILE = ("test.json", json.dumps(LISTS))
BOUNDS = Settings(zip_entries=40, zip_unpacked_bytes=1 << 16, picture_side=64)


def png(seed: int = 0, size: tuple[int, int] = (16, 16), mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def zipped(files: Mapping[str, bytes] | Sequence[tuple[str, bytes]], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in files.items() if isinstance(files, Mapping) else files:
            archive.writestr(name, content)
    return buffer.getvalue()


GOOD = {f"{i}.png": png(i) for i in range(3)}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_pictures_come_by_their_number_whatever_the_zips_order(method: int) -> None:
    numbers = [10, 2, 0, 1, 3, 4, 5, 9, 8, 7, 6]
    content = zipped({f"{i}.png": png(i) for i in numbers}, method)
    assert read_submission(content, 11, BOUNDS) == [png(i) for i in range(11)]


def test_one_folder_and_what_a_mac_adds_are_passed_over() -> None:
    files = {"images/": b"", **{f"images/test/{name}": content for name, content in GOOD.items()}}
    hidden = {"__MACOSX/images/test/._0.png": b"x", "images/test/.DS_Store": b"x", "images/test/._1.png": b"x"}
    assert read_submission(zipped({**files, **hidden}), 3, BOUNDS) == list(GOOD.values())


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "LA"])
def test_pngs_of_every_kind_are_pictures(mode: str) -> None:
    assert check_picture(png(mode=mode, size=(20, 10)), 20) == (20, 10)


def test_sixteen_bits_are_refused_rather_than_clipped() -> None:
    buffer = io.BytesIO()
    Image.new("I;16", (8, 8), 40000).save(buffer, "PNG")
    with pytest.raises(PngError, match="more than 8 bits a channel; save it with 8"):
        check_picture(buffer.getvalue(), 8)


def without(name: str) -> dict[str, bytes]:
    return {key: value for key, value in GOOD.items() if key != name}


def lying(content: bytes, size: int) -> bytes:
    """A zip of one entry whose headers say that it unpacks to `size` bytes."""
    local, central = content.index(b"PK\x03\x04"), content.index(b"PK\x01\x02")
    told = struct.pack("<I", size)
    content = content[: local + 22] + told + content[local + 26 :]
    return content[: central + 24] + told + content[central + 28 :]


def two_headers(content: bytes, other: bytes) -> bytes:
    """A PNG with the header of another before its own."""
    signature, header = 8, 25
    return other[: signature + header] + content[signature:]


def encrypted(content: bytes) -> bytes:
    central = content.index(b"PK\x01\x02")
    return content[: central + 8] + b"\x01" + content[central + 9 :]


BAD: list[tuple[bytes, list[tuple[str | None, str]]]] = [
    (b"", [(None, "not a zip")]),
    (b"PK", [(None, "not a zip")]),
    (png(), [(None, "not a zip")]),
    (zipped(GOOD)[:-30], [(None, "not a zip")]),
    (zipped({}), [("0.png", "is missing"), ("1.png", "is missing"), ("2.png", "is missing")]),
    (zipped(without("1.png")), [("1.png", "is missing")]),
    (zipped({**GOOD, "3.png": png()}), [("3.png", "3 label lists; their last picture is 2.png")]),
    (zipped({**without("0.png"), "00.png": png()}), [("00.png", "not one of the names"), ("0.png", "is missing")]),
    (zipped({**GOOD, "labels.json": b"[]"}), [("labels.json", "not one of the names 0.png to 2.png")]),
    (zipped({**GOOD, "a\n" + "b" * 300: b""}), [("a\N{REPLACEMENT CHARACTER}" + "b" * 78 + "...", "not one of")]),
    (zipped({**without("2.png"), "a/2.png": png()}), [(None, "several folders (no folder, a)")]),
    (zipped({**GOOD, "1.png": b"GIF89a" + b"\0" * 40}), [("1.png", "not a PNG")]),
    (zipped({**GOOD, "1.png": b""}), [("1.png", "not a PNG")]),
    (zipped({**GOOD, "1.png": GOOD["1.png"][:20]}), [("1.png", "cut short")]),
    (zipped({**GOOD, "1.png": GOOD["1.png"][:200]}), [("1.png", "a PNG that cannot be used")]),
    (zipped({**GOOD, "0.png": b"x" * 40, "2.png": b""}), [("0.png", "not a PNG"), ("2.png", "not a PNG")]),
    (zipped({**GOOD, "1.png": png(size=(65, 1))}), [("1.png", "65x1 pixels; at most 64x64 are allowed")]),
    (zipped({**GOOD, "1.png": two_headers(png(size=(65, 1)), png())}), [("1.png", "16x16, another 65x1")]),
    (zipped({**GOOD, "1.png": png(size=(16, 8))}), [("1.png", "16x8 pixels, where 0.png has 16x16")]),
    (zipped({f"{i}.png": png(size=(64, 64), mode="1") for i in range(3)} | {"x": b""}), [("x", "not one of")]),
    (zipped(GOOD, zipfile.ZIP_BZIP2), [("0.png", "compression 12")]),
    (zipped(GOOD, zipfile.ZIP_LZMA), [("0.png", "compression 14")]),
    (encrypted(zipped(GOOD)), [("0.png", "is encrypted")]),
    (zipped({f"{i}.png": b"" for i in range(41)}), [(None, "more than 40 entries")]),
    (zipped({**GOOD, "1.png": b"\0" * (1 << 16)}), [("1.png", "unpacks to more than 65536 bytes")]),
    (lying(zipped({"0.png": b"\0" * 5000}), 10), [("1.png", "is missing"), ("2.png", "is missing")]),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_is_there_twice() -> None:
    with pytest.raises(SubmissionError) as caught:
        read_submission(zipped([*GOOD.items(), ("1.png", png(9))]), 3, BOUNDS)
    assert [(fault.entry, fault.message) for fault in caught.value.faults] == [("1.png", "is there twice")]


@pytest.mark.parametrize(("content", "faults"), BAD)
def test_everything_that_is_wrong_is_named(content: bytes, faults: list[tuple[str | None, str]]) -> None:
    with pytest.raises(SubmissionError) as caught:
        read_submission(content, 3, BOUNDS)
    found = caught.value.faults
    assert [fault.entry for fault in found] == [entry for entry, _ in faults]
    for fault, (_, words) in zip(found, faults, strict=True):
        assert words in fault.message


def test_pixels_count_too() -> None:
    tight = BOUNDS.model_copy(update={"zip_unpacked_bytes": 2 * 3 * 64 * 64})
    content = zipped({f"{i}.png": png(size=(64, 64), mode="1") for i in range(3)})
    with pytest.raises(SubmissionError, match=r"2\.png: with it the pictures have more than 24576 bytes"):
        read_submission(content, 3, tight)
    assert len(read_submission(content, 3, BOUNDS)) == 3


@pytest.mark.parametrize("told", [None, 10])
def test_a_bomb_is_stopped_while_it_unpacks_whatever_its_headers_say(told: int | None) -> None:
    bomb = zipped({"0.png": b"\0" * (64 << 20)})
    content = bomb if told is None else lying(bomb, told)
    tracemalloc.start()
    with pytest.raises(SubmissionError, match=r"0\.png: "):
        read_submission(content, 1, BOUNDS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20


@given(st.binary(max_size=300))
@example(b"PK\x05\x06" + b"\0" * 18)
@example(b"PK\x05\x06" + b"\xff" * 18)
def test_random_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(SubmissionError):
        read_submission(content, 2, BOUNDS)


WHOLE = zipped({"0.png": png(0), "1.png": png(1)}, zipfile.ZIP_STORED)


@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=6), st.integers(0, 40))
def test_damaged_zips_are_read_or_refused(changes: list[tuple[int, int]], cut: int) -> None:
    content = bytearray(WHOLE[: len(WHOLE) - cut])
    for at, byte in changes:
        if at < len(content):
            content[at] = byte
    try:
        pngs = read_submission(bytes(content), 2, BOUNDS)
    except SubmissionError:
        return
    assert [check_picture(one, BOUNDS.picture_side) for one in pngs] == [(16, 16)] * 2


@given(st.lists(st.tuples(st.integers(0, len(GOOD["0.png"]) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_damaged_pngs_are_read_or_refused(changes: list[tuple[int, int]]) -> None:
    content = bytearray(GOOD["0.png"])
    for at, byte in changes:
        content[at] = byte
    try:
        size = check_picture(bytes(content), 64)
    except PngError:
        return
    assert read_png(bytes(content)).shape == (size[1], size[0], 3)


NAMES = "0.png 1.png 2.png 00.png a/0.png a/1.png b/1.png a/ / /0.png ../0.png 0.PNG __MACOSX/0.png .0.png 1.png/"
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
def test_any_entries_are_taken_whole_or_refused(files: list[tuple[str, bytes]], method: int) -> None:
    try:
        pngs = read_submission(zipped(files, method).replace(b"NUL!", b"\0\0\0\0"), 2, BOUNDS)
    except SubmissionError:
        return
    seen = {name.partition("NUL!")[0]: content for name, content in files if "__MACOSX" not in name}
    found = {name.rpartition("/")[2]: content for name, content in seen.items() if "/." not in f"/{name}"}
    assert pngs == [found["0.png"], found["1.png"]]


def test_an_entry_without_a_name_is_refused() -> None:
    content = zipped({**GOOD, "NUL!": b""}).replace(b"NUL!", b"\0\0\0\0")
    with pytest.raises(SubmissionError, match=r"not one of the names"):
        read_submission(content, 3, BOUNDS)


# --- through the service ---


def send(client: httpx.Client, pictures: bytes, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    files = {"file": TEST_FILE, "pictures": ("submission.zip", pictures)}
    return client.post("/score", files=files, data=fields, headers=headers)


def test_sampled_pictures_sent_back_have_the_same_scores(client: httpx.Client, working: Runner) -> None:
    body = {"conditions": LISTS, "repeats": 1, "steps": 3, "seed": 5}
    sampled = client.post("/score", json=body).json()["result"]
    pngs = [client.get(picture["url"]).content for picture in sampled["pictures"]]
    response = send(client, zipped({f"out/{i}.png": one for i, one in enumerate(pngs)}), columns=2)
    assert response.status_code == 200, response.text
    job = response.json()
    assert (job["kind"], job["status"], job["seed"], job["options"]) == ("score", "finished", None, None)
    assert (job["model"], job["progress"]) == ("toy-evaluator", {"done": 3, "total": 3})
    result = job["result"]
    assert result["repeats"] == [{**sampled["repeats"][0], "seed": None}]
    for name in ("accuracy", "exact_match", "f1"):
        assert result[name] == sampled[name]
    for one, other, content in zip(result["pictures"], sampled["pictures"], pngs, strict=True):
        assert (one["labels"], one["accuracy"], one["exact"]) == (other["labels"], other["accuracy"], other["exact"])
        assert one["seed"] is None
        for label, p in one["scores"].items():  # judged from 8 bits, not from what the network gave
            assert p == pytest.approx(other["scores"].get(label, p), abs=0.02)
        assert client.get(one["url"]).content == content
    sheet = marked_grid(np.stack([read_png(one) for one in pngs]), [one["exact"] for one in result["pictures"]], 2)
    assert np.array_equal(read_png(client.get(result["grid_url"]).content), sheet)
    assert client.get("/jobs").json()["jobs"][0]["id"] == job["id"]


def test_pictures_of_any_size_are_judged_as_the_evaluator_judges_them(client: httpx.Client, working: Runner) -> None:
    pngs = [png(i, size=(40, 24)) for i in range(3)]
    result = send(client, zipped({f"{i}.png": one for i, one in enumerate(pngs)})).json()["result"]
    images = to_images(np.stack([read_png(one) for one in pngs]))
    expected = working.judge.probabilities(images)
    names = working.judge.vocabulary.names
    for picture, probabilities in zip(result["pictures"], expected.tolist(), strict=True):
        for label, p in picture["scores"].items():
            assert p == pytest.approx(probabilities[names.index(label)], abs=1e-5)


def test_jobs_of_several_sizes_share_a_batch(client: httpx.Client, alive: JobStore, settings: Settings) -> None:
    later = {"prefer": "respond-async"}
    ids = []
    for size in ((16, 16), (40, 24)):
        pictures = zipped({f"{i}.png": png(i, size=size) for i in range(3)})
        ids.append(send(client, pictures, later).json()["id"])
    runner = Runner(alive.connection, settings, "w")
    judge = runner._lane_of(alive.record(ids[0]))  # type: ignore[arg-type]
    assert judge is not None
    runner.turn(judge)
    assert [client.get(f"/jobs/{job_id}").json()["status"] for job_id in ids] == ["finished", "finished"]
    assert not judge.engine.busy
    assert runner.rate.pictures == 0  # it says how fast pictures are made


def test_a_model_stays_loaded_beside_the_evaluator(connection: Redis, settings: Settings) -> None:
    runner = Runner(connection, settings.model_copy(update={"loaded_models": 1}), "w")
    toy = runner.lane()
    assert runner.judged_by is not None
    judge = runner._add(runner.loader.load_judge(runner.judged_by.name, runner.judged_by.digest))
    assert list(runner.lanes.values()) == [toy, judge]
    assert judge.engine.judge is runner.judge
    runner._let_go()
    assert list(runner.lanes.values()) == [toy, judge]


def test_it_waits_like_any_job_and_can_be_cancelled(client: httpx.Client, alive: JobStore) -> None:
    response = send(client, zipped(GOOD), {"prefer": "respond-async"})
    assert response.status_code == 202
    job = response.json()
    assert (job["status"], job["progress"], job["labels"]) == ("queued", {"done": 0, "total": 3}, LISTS)
    assert 'labelgrid_waiting_pictures{model="toy-evaluator"} 3.0' in client.get("/metrics").text
    assert client.delete(f"/jobs/{job['id']}").json()["status"] == "cancelled"
    assert 'labelgrid_waiting_pictures{model="toy-evaluator"} 0.0' in client.get("/metrics").text


def test_an_idempotency_key_knows_the_pictures(client: httpx.Client, alive: JobStore) -> None:
    headers = {"prefer": "respond-async", "idempotency-key": "mine"}
    first = send(client, zipped(GOOD), headers).json()["id"]
    again = zipped({f"other/{name}": content for name, content in GOOD.items()}, zipfile.ZIP_STORED)
    assert send(client, again, headers).json()["id"] == first
    problem(send(client, zipped({**GOOD, "1.png": png(9)}), headers), 422, "idempotency-key-reused")
    problem(client.post("/score", files={"file": TEST_FILE}, headers=headers), 422, "idempotency-key-reused")


def test_pictures_that_are_gone_fail_the_job(client: httpx.Client, alive: JobStore, settings: Settings) -> None:
    job_id = send(client, zipped(GOOD), {"prefer": "respond-async"}).json()["id"]
    alive.connection.hdel(png_key(job_id), "1")
    Runner(alive.connection, settings, "w").run(job_id)
    job = client.get(f"/jobs/{job_id}").json()
    assert (job["status"], job["error"]) == (
        "failed",
        "picture 1: LookupError: the picture that was sent is no longer there",
    )


def test_a_bad_zip_is_a_problem_that_names_every_entry(client: httpx.Client, alive: JobStore) -> None:
    body = problem(send(client, zipped({"0.png": b"x", "2.png": GOOD["2.png"]})), 422, "invalid-request")
    assert body["detail"] == "pictures.1.png: is missing"
    body = problem(send(client, zipped({**GOOD, "0.png": b"x", "2.png": b""})), 422, "invalid-request")
    assert [error["loc"] for error in body["errors"]] == [["body", "pictures", "0.png"], ["body", "pictures", "2.png"]]
    assert body["detail"] == "pictures.0.png: not a PNG"
    problem(send(client, b"no zip"), 422, "invalid-request")
    assert nothing_is_queued(alive.connection)


@given(st.one_of(st.binary(max_size=200), st.integers(0, len(WHOLE)).map(lambda n: WHOLE[:n] + WHOLE[n + 3 :])))
def test_no_zip_is_an_error_of_the_service(session_client: httpx.Client, content: bytes) -> None:
    """Without a worker a good one is 503."""
    assert send(session_client, content).status_code in (422, 503)


@pytest.mark.parametrize(
    "fields", [{"steps": "3"}, {"repeats": "2"}, {"seed": "1"}, {"model": "toy"}, {"repeats": "x"}]
)
def test_options_of_sampling_are_of_no_use(client: httpx.Client, alive: JobStore, fields: dict[str, str]) -> None:
    body = problem(send(client, zipped(GOOD), **fields), 422, "invalid-request")
    assert body["errors"][0]["loc"] == ["body", next(iter(fields))]
    assert nothing_is_queued(alive.connection)


def test_pictures_without_a_test_file(client: httpx.Client, alive: JobStore) -> None:
    body = problem(client.post("/score", files={"pictures": ("a.zip", zipped(GOOD))}), 422, "invalid-request")
    assert body["detail"] == "file: Field required"


# --- the client ---


def test_the_client_sends_a_zip_or_a_folder(client: httpx.Client, working: Runner, tmp_path: Path) -> None:
    for name, content in GOOD.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "notes.txt").write_text("not sent")
    archive = tmp_path / "submission.zip"
    archive.write_bytes(zipped(GOOD))
    with Client(str(client.base_url)) as caller:
        jobs = [caller.score(LISTS, pictures=given) for given in (zipped(GOOD), archive, tmp_path, str(archive))]
    assert all(job.seed is None for job in jobs)
    accuracies = [job.result.accuracy for job in jobs if job.result is not None]
    assert accuracies == accuracies[:1] * 4
    assert [text(raw) for raw in working.connection.smembers("labelgrid:open")] == []


def test_the_command_line_sends_pictures(client: httpx.Client, working: Runner, tmp_path: Path) -> None:
    file, archive, grid = tmp_path / "test.json", tmp_path / "submission.zip", tmp_path / "grid.png"
    file.write_text(TEST_FILE[1])
    archive.write_bytes(zipped(GOOD))
    line = ["score", str(file), "--pictures", str(archive), "-o", str(grid), "--url", str(client.base_url)]
    done = CliRunner().invoke(app, line, env={"COLUMNS": "200"})
    assert (done.exit_code, done.stderr) == (0, "")
    assert "judged by toy-evaluator" in done.stdout
    assert "gray cylinder (0." in done.stdout
    assert check_picture(grid.read_bytes(), 512)
    archive.write_bytes(zipped(without("1.png")))
    done = CliRunner().invoke(app, line, env={"COLUMNS": "200"})
    assert (done.exit_code, done.stderr) == (1, "labelgrid: pictures.1.png: is missing\n")


# --- the grid ---


def test_the_grid_marks_by_colour_and_by_shape() -> None:
    pictures = np.zeros((3, 64, 64, 3), np.uint8)
    sheet = marked_grid(pictures, [True, False, True], columns=2, gap=2)[2:, 2:]
    h, w = sheet.shape[0] // 2, sheet.shape[1] // 2
    cells = [sheet[y : y + h, x : x + w] for y, x in ((0, 0), (0, w), (h, 0), (h, w))]
    marks = []
    for cell, colour in zip(cells, (RIGHT, WRONG, RIGHT), strict=False):
        assert (cell == colour).all(axis=2).sum() > 500
        assert (cell == (WRONG if colour == RIGHT else RIGHT)).all(axis=2).sum() == 0
        marks.append((cell == 255).all(axis=2))
        assert marks[-1].sum() > 20
    assert not cells[3].any()  # nothing is there
    assert np.array_equal(marks[0], marks[2])
    assert (marks[0] != marks[1]).sum() > 20
    inside = to_images(pictures)
    assert torch.equal(as_input(inside), inside)
