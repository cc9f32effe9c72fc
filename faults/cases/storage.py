"""An object store that hangs or is slow, behind a proxy."""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx

from faults.disk import fill_up, small_file_system
from faults.gate import Gate, gate
from faults.harness import Stack, expect, start, until
from faults.trial import BODIES, LARGE, SMALL, Trial
from service.files import PictureFiles
from service.local.demo import free_port
from shared.checkpoint import METADATA_KEY

BUCKET = "models"
KEY, REGION = "test", "us-east-1"
TIMEOUT_S = 10
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": KEY,
    "AWS_SECRET_ACCESS_KEY": KEY,
    "AWS_DEFAULT_REGION": REGION,
    "LABELGRID_STORAGE": f"s3://{BUCKET}",
    "LABELGRID_STORAGE_TIMEOUT_S": str(TIMEOUT_S),
}
SLOW_S = 1.0
FULL_S = 15.0  # longer than a lease


@contextlib.contextmanager
def object_store(stack: Stack) -> Iterator[Gate]:
    """Serve the stack's checkpoints from moto's S3 server, behind a gate."""
    import boto3  # type: ignore[import-untyped]

    port = free_port()
    server = start(["moto.server", "-H", "127.0.0.1", "-p", str(port)], os.environ, stack.folder / "s3.log")
    address = f"http://127.0.0.1:{port}"
    until(lambda: _answers(address), "the object store")
    client = boto3.client(
        "s3", endpoint_url=address, region_name=REGION, aws_access_key_id=KEY, aws_secret_access_key=KEY
    )
    client.create_bucket(Bucket=BUCKET)
    for file in (stack.folder / "storage").iterdir():
        client.upload_file(str(file), BUCKET, file.name)
    with gate(port) as one:
        stack.environment["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{one.port}"
        yield one
    server.kill()
    server.wait()


def _answers(address: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return bool(httpx.get(address, timeout=5).status_code)
    return False


def _make_known(trial: Trial, model: str) -> None:
    """Have the API read a model that no worker has: it refuses the request only afterwards."""
    body = {"model": model, "labels": [["nothing"]]}
    expect(httpx.post(f"{trial.stack.address}/generate", json=body, timeout=60), 422)


def storage_hangs(trial: Trial) -> None:
    """storage hangs: loaded models are served; another one's job fails after `storage_timeout_s` = 10, or finishes if
    storage answers in time"""
    _make_known(trial, "other")
    other = {**BODIES[SMALL], "model": "other"}
    failing: list[str] = []
    trial.begin()

    def hang() -> None:
        trial.stack.beside.close()
        failing.append(trial.submit_failing(other["labels"], f"has not answered within {TIMEOUT_S} s", model="other"))

    trial.strike(hang)
    trial.wait(failing)
    job = trial.post(BODIES[SMALL])  # of a loaded model, while storage hangs
    trial.jobs[job["id"]] = SMALL
    saved = trial.post(other, Prefer="respond-async")["id"]
    trial.must_finish(saved)
    time.sleep(TIMEOUT_S / 4)
    trial.end(trial.stack.beside.open)
    trial.recover()
    trial.wait([saved])
    trial.recovery_s = max(trial.recovery_s, time.monotonic() - trial.struck_at)


def storage_is_slow(trial: Trial) -> None:
    """storage takes a second longer for each request: loaded models are served as before, another one is loaded"""
    trial.begin()
    trial.strike(partial(setattr, trial.stack.beside, "delay_s", SLOW_S))
    trial.must_finish(trial.post({**BODIES[SMALL], "model": "other"})["id"])
    trial.recover()


def foreign_model(trial: Trial) -> None:
    """a checkpoint whose description is no JSON (`Infinity`) is put among the models: only requests that name it are
    refused"""
    storage = trial.stack.folder / "storage"
    file = storage / "foreign.safetensors"

    def listed() -> dict[str, str]:
        answer = expect(httpx.get(f"{trial.stack.address}/models", timeout=30), 200)
        found: dict[str, str] = answer.json()["problems"]
        return found

    def put() -> None:
        content = (storage / "other.safetensors").read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        description = json.loads(header["__metadata__"][METADATA_KEY])
        description["config"]["timesteps"] = math.inf
        header["__metadata__"][METADATA_KEY] = json.dumps(description)
        encoded = json.dumps(header).encode()
        file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[end:])
        until(listed, "the API to find the checkpoint")
        for path in ("/readyz", "/labels", "/metrics"):
            expect(httpx.get(trial.stack.address + path, timeout=30), 200)
        foreign = {**BODIES[SMALL], "model": "foreign"}
        expect(httpx.post(f"{trial.stack.address}/generate", json=foreign, timeout=30), 422)

    trial.begin()
    trial.strike(put)
    trial.recover()
    file.unlink()
    until(lambda: not listed(), "the API to forget the checkpoint")


@contextlib.contextmanager
def small_pictures(stack: Stack) -> Iterator[Path]:
    """Give the pictures a file system of their own."""
    with small_file_system(stack.folder / "pictures") as folder:
        yield folder


def storage_full(trial: Trial) -> None:
    """the storage of pictures is full for 15 s: jobs wait, say why, and lose nothing"""
    filler: Path = trial.stack.beside / "filler"
    ids = trial.submit(*LARGE)
    trial.begin()
    trial.strike(partial(fill_up, filler))
    until(lambda: _delay(trial, ids[-1]), "a job that says why it waits")
    until(lambda: httpx.get(f"{trial.stack.address}/readyz", timeout=30).status_code == 503, "readiness to say so")
    time.sleep(FULL_S)
    trial.end(filler.unlink)
    trial.recover()


def _delay(trial: Trial, job_id: str) -> str | None:
    """Return why an open job waits, as its clients read it."""
    answer = httpx.get(f"{trial.stack.address}/jobs/{job_id}", timeout=30).raise_for_status()
    found: str | None = answer.json()["delay"]
    return found


@contextlib.contextmanager
def breakable(stack: Stack) -> Iterator[Path]:
    """Let a file name whose storage is broken."""
    named = stack.folder / "broken"
    named.touch()
    stack.environment["BREAKS_STORAGE"] = str(named)
    yield named


def unforeseen_while_stored(trial: Trial) -> None:
    """a picture that cannot be stored for a reason that nobody foresaw: only its job fails, and no worker dies"""
    trial.begin()

    def poison() -> None:
        trial.stack.beside.write_text(trial.submit_failing([["red cube"]], "picture 0: ValueError: poison", steps=300))

    trial.strike(poison)
    trial.recover()
    if trial.stack.deaths:
        raise RuntimeError(f"workers died: {trial.stack.deaths}")


def job_folder_is_a_file(trial: Trial) -> None:
    """a file stands where the folder of a job belongs: only its job fails"""
    trial.begin()
    files = PictureFiles(trial.stack.folder / "pictures")
    failing: list[str] = []

    def stand() -> None:
        failing.append(trial.submit_failing([["red cube"]], "picture 0: FileExistsError", steps=300))
        folder = files.folder(failing[0])
        assert isinstance(folder, Path)
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.touch()

    trial.strike(stand)
    trial.recover()
    trial.wait(failing)


def one_storage_broken(trial: Trial) -> None:
    """one of two workers can no longer write pictures: it claims nothing more, and the other one does its work"""
    victim = trial.begin()

    def break_storage() -> None:
        trial.stack.beside.write_text(str(trial.stack.children[victim].process.pid))

    trial.strike(break_storage)
    until(lambda: _ready(trial) == (2, 1), "readiness to say so")
    trial.recover()
    trial.stack.beside.write_text("")
    until(lambda: _ready(trial) == (2, 2), "its storage to work again")


def _ready(trial: Trial) -> tuple[int, int]:
    """Return how many workers there are, and how many can store pictures."""
    found = httpx.get(f"{trial.stack.address}/readyz", timeout=30).raise_for_status().json()
    return found["workers"], found["storing"]
