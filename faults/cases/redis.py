"""Redis: killed, away, full, damaged, or another server."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.parse import quote

import httpx
from redis import Redis
from redis.exceptions import OutOfMemoryError

from faults import history
from faults.disk import fill_up, small_file_system
from faults.gate import Gate, gate
from faults.harness import Stack, expect, until
from faults.trial import BODIES, LABELS, LARGE, SMALL, Trial
from service.local.demo import free_port
from service.local.redis_server import RedisServer
from service.store import keys
from service.store.connection import connect

FULL_S = 15.0  # how long Redis stays full: longer than a lease
FILLER = "filler"
AWAY_S, PROBE_EVERY_S = 180.0, 10.0
STORED = b"\r\n$6\r\nHSETNX\r\n"  # the function that stores a picture


def redis_killed(trial: Trial) -> None:
    """`kill -9` of Redis, which restarts from its append-only file"""
    trial.begin()
    trial.strike(partial(trial.stack.signal, "redis", signal.SIGKILL))
    trial.recover()


def redis_full(trial: Trial) -> None:
    """Redis at its memory limit for 15 s"""
    connection = trial.stack.connection

    def limit() -> None:
        connection.config_set("maxmemory", connection.info("memory")["used_memory"] + (8 << 20))
        fill()

    def fill() -> None:
        with contextlib.suppress(OutOfMemoryError):
            while True:
                connection.rpush(FILLER, b"x" * (1 << 16))

    def is_refused() -> bool:
        fill()  # again, since jobs that end free memory
        return _is_refused(trial)

    ids = trial.submit(*LARGE)
    trial.begin()
    trial.strike(limit)
    until(is_refused, "a request that a full Redis refuses")
    _check_reads(trial, ids[0])
    time.sleep(FULL_S)
    trial.end(lambda: connection.delete(FILLER))
    trial.recover()


def _is_refused(trial: Trial) -> bool:
    """Whether a full Redis refuses a new job."""
    headers = {"Prefer": "respond-async"}  # one that is accepted at the last moment waits until Redis takes writes
    answer = httpx.post(f"{trial.stack.address}/generate", json=BODIES[SMALL], headers=headers, timeout=30)
    if expect(answer, 202, 503).status_code == 503:
        return True
    trial.jobs[answer.json()["id"]] = SMALL
    return False


def _check_reads(trial: Trial, job_id: str) -> None:
    expect(httpx.get(f"{trial.stack.address}/jobs/{job_id}", timeout=30), 200)


@contextlib.contextmanager
def small_disk(stack: Stack) -> Iterator[Path]:
    """Give Redis a file system of its own; needs root."""
    with small_file_system(stack.redis.folder) as folder:
        yield folder


def disk_full(trial: Trial) -> None:
    """the disk under Redis is full for 15 s: Redis refuses writes (`MISCONF`)"""
    filler: Path = trial.stack.beside / FILLER
    ids = trial.submit(*LARGE)
    trial.begin()
    trial.strike(partial(fill_up, filler))
    until(lambda: _is_refused(trial), "a request that a full Redis refuses")
    _check_reads(trial, ids[0])
    time.sleep(FULL_S)
    trial.end(filler.unlink)
    trial.recover()


def redis_away(trial: Trial) -> None:
    """Redis away for three minutes: readiness probes fail, the API's liveness probe does not, nothing is restarted"""
    trial.begin()
    trial.stack.held.add("redis")
    trial.strike(partial(trial.stack.signal, "redis", signal.SIGKILL))
    while time.monotonic() - trial.struck_at < AWAY_S:
        begun = time.monotonic()
        _probe(trial)
        time.sleep(max(0.0, PROBE_EVERY_S - (time.monotonic() - begun)))
    trial.end(lambda: trial.stack.held.discard("redis"))
    trial.recover()
    if deaths := [name for name, _ in trial.stack.deaths if name != "redis"]:
        raise RuntimeError(f"{', '.join(deaths)} ended while Redis was away")


def _probe(trial: Trial) -> None:
    """RuntimeError if a probe does not say that the API lives and nothing is ready."""
    statuses = {path: httpx.get(trial.stack.address + path, timeout=30).status_code for path in ("/healthz", "/readyz")}
    found = {**statuses, "check": trial.stack.check()}
    wanted = {"/healthz": 200, "/readyz": 503, "check": 1}
    if found != wanted:
        raise RuntimeError(f"while Redis is away, the probes found {found}; wanted {wanted}")


def truncated_append_only_file(trial: Trial) -> None:
    """`kill -9` of Redis, whose append-only file then ends in the middle of a picture"""
    trial.begin()

    def truncate() -> None:
        trial.stack.signal("api", signal.SIGSTOP)
        time.sleep(0.5)  # until Redis has run what the API had sent
        file = history.files(trial.stack.redis.folder)[-1]
        before = file.stat().st_size
        until(lambda: STORED in file.read_bytes()[before:], "a picture to be stored")
        trial.stack.held.add("redis")
        trial.stack.signal("redis", signal.SIGKILL)
        trial.stack.children["redis"].process.wait()
        content = file.read_bytes()
        kept = content.rindex(STORED) + len(STORED)
        os.truncate(file, kept)
        trial.stack.held.discard("redis")
        trial.stack.signal("api", signal.SIGCONT)

    trial.strike(truncate)
    trial.recover()


@contextlib.contextmanager
def replica(stack: Stack) -> Iterator[tuple[RedisServer, Path]]:
    """Prepare a second Redis, and a link that leads API and workers to the first."""
    second, link = RedisServer(stack.folder / "replica"), stack.folder / "redis.sock"
    second.password = stack.redis.password
    link.symlink_to(stack.redis.socket)
    stack.environment["LABELGRID_REDIS_URL"] = stack.redis.url.replace(quote(str(stack.redis.socket)), quote(str(link)))
    yield second, link
    second.stop()


def failover(trial: Trial) -> None:
    """Redis fails over to its replica (`FAILOVER`); connections to the former primary stay open"""
    second, link = trial.stack.beside
    first = trial.stack.connection
    second.start()
    other = connect(second.url)
    for one in (first, other):
        one.config_set("bind", "127.0.0.1")
        one.config_set("masterauth", second.password)
        one.config_set("port", free_port())
    other.replicaof("127.0.0.1", first.config_get("port")["port"])
    until(lambda: other.info("replication").get("master_link_status") == "up", "the replica")
    trial.begin()

    def fail_over() -> None:
        first.execute_command(  # type: ignore[no-untyped-call]
            "FAILOVER", "TO", "127.0.0.1", other.config_get("port")["port"]
        )
        until(lambda: other.info("replication")["role"] == "master", "the failover")
        following = link.with_suffix(".new")
        following.symlink_to(second.socket)
        following.rename(link)

    trial.strike(fail_over)
    trial.recover()
    # The first one's append-only file has the whole history only if it has followed the second since.
    until(lambda: _offset(first) == _offset(other), "the former primary to have everything")
    if "full resync" in (trial.stack.redis.folder / "redis.log").read_text().lower().split("failover")[-1]:
        raise RuntimeError("the former primary needed a full synchronization: its history is incomplete")


def _offset(connection: Redis) -> int:
    about = connection.info("replication")
    return int(about["slave_repl_offset" if about["role"] == "slave" else "master_repl_offset"])


@contextlib.contextmanager
def network(stack: Stack) -> Iterator[Gate]:
    """Put a gate between Redis and API and workers."""
    with gate(stack.redis.socket) as one:
        stack.environment["LABELGRID_REDIS_URL"] = f"redis://:{stack.redis.password}@127.0.0.1:{one.port}/0"
        yield one


def silent_connections(trial: Trial) -> None:
    """all connections to Redis fall silent without being closed, as behind a NAT that forgot them; new ones work"""
    trial.begin()
    trial.strike(trial.stack.beside.freeze)
    trial.recover()


def unreadable_record(trial: Trial) -> None:
    """the record of a job is damaged: reading it is a 503, and it fails as a worker claims its pictures"""
    trial.begin()
    damaged: list[str] = []

    def damage() -> None:
        # More pictures than two workers take at once: they read the record again for the others.
        damaged.append(trial.submit_failing(LABELS * 32, "a worker cannot read the job", steps=500))
        trial.stack.connection.hset(keys.job(damaged[0]), "record", '{"id": 1}')

    trial.strike(damage)
    one = httpx.get(f"{trial.stack.address}/jobs/{damaged[0]}", timeout=30)
    listed = httpx.get(f"{trial.stack.address}/jobs", timeout=30).raise_for_status().json()["jobs"]
    if one.status_code != 503 or damaged[0] not in [job["id"] for job in listed]:
        raise RuntimeError(f"a damaged record: GET returned {one.text}; the list has {len(listed)} jobs")
    trial.recover()
    trial.wait(damaged)
