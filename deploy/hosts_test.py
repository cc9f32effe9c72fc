"""Workers on two hosts with Redis and storage on a third: TLS, a password, s3://, and a cut network cable.

`make scaling-out-test`. The hosts are network namespaces on this machine: the tests run in one of their own, the first
host, which has Redis, the storage and the API; each worker's host has a network card, a name and a cache of its own,
and a cable to the first host alone. Needs Linux, `ip`, `unshare`, `nsenter`, and a redis-server built with TLS,
such as Debian's.
"""

import contextlib
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import trustme
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError
from redis.retry import Retry

from service.api.access.api_keys import hash_of, new_key
from service.client import Client
from service.contract.schemas import Job
from service.settings import Settings
from service.store import keys, workers
from service.store.claims import GROUP
from service.store.connection import connect
from service.store.jobs import JobStore
from shared.storage import open_storage
from tests.service.processes import until
from tests.toy_checkpoint import publish_toys

ROOT = Path(__file__).parents[1]
FIRST = "10.77.0.1"
REDIS_PORT, S3_PORT, API_PORT = 6380, 5000, 8000
BUCKET = "models"
LABELS = [["red cube"], ["blue sphere", "gray cube"]] * 16


def run(*command: str) -> None:
    subprocess.run(command, check=True)


@dataclass
class Host:
    """A host with one worker: a network namespace that lives as long as `process`."""

    name: str
    process: subprocess.Popen[str]
    cable: str  # its end at the first host
    env: dict[str, str]
    worker: subprocess.Popen[bytes] = field(init=False)

    def start_worker(self) -> None:
        inside = ["nsenter", "--target", str(self.process.pid), "--net", "--uts", "--"]
        self.worker = subprocess.Popen([*inside, sys.executable, "-m", "service", "worker"], cwd=ROOT, env=self.env)

    def pull_the_cable(self) -> None:
        run("ip", "link", "set", self.cable, "down")

    def put_it_back(self) -> None:
        run("ip", "link", "set", self.cable, "up")


@contextlib.contextmanager
def host(name: str, number: int, env: dict[str, str]) -> Iterator[Host]:
    line = ["unshare", "--net", "--uts", "sh", "-c", f"hostname {name} && echo there && exec sleep infinity"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        cable = f"cable-{number}"
        run("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", str(process.pid))
        run("ip", "address", "add", f"10.77.{number}.1/24", "dev", cable)
        run("ip", "link", "set", cable, "up")
        there = ["nsenter", "--target", str(process.pid), "--net", "--"]
        run(*there, "ip", "address", "add", f"10.77.{number}.2/24", "dev", "eth0")
        run(*there, "ip", "link", "set", "eth0", "up")
        run(*there, "ip", "route", "add", "default", "via", f"10.77.{number}.1")
        one = Host(name, process, cable, env)
        one.start_worker()
        try:
            yield one
        finally:
            one.worker.kill()
            one.worker.wait()
            process.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cards = subprocess.run(["ip", "-oneline", "link"], check=True, capture_output=True, text=True).stdout.splitlines()
    assert len(cards) == 1, "run it as `make scaling-out-test` does: in a network namespace of its own"
    run("ip", "address", "add", f"{FIRST}/32", "dev", "lo")
    run("ip", "link", "set", "lo", "up")
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def redis_url(folder: Path) -> Iterator[str]:
    """A Redis with a password and TLS only; its URL names the certificate authority."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "authority.pem")
    authority.issue_cert(FIRST).private_key_and_cert_chain_pem.write_to_path(folder / "redis.pem")
    password = secrets.token_hex(32)
    lines = {
        "bind": FIRST,
        "port": "0",
        "tls-port": str(REDIS_PORT),
        "tls-cert-file": f"{folder}/redis.pem",
        "tls-key-file": f"{folder}/redis.pem",
        "tls-ca-cert-file": f"{folder}/authority.pem",
        "tls-auth-clients": "no",
        "requirepass": password,
        "appendonly": "yes",
        "dir": str(folder),
        "logfile": f"{folder}/redis.log",
    }
    url = f"rediss://:{password}@{FIRST}:{REDIS_PORT}/0?ssl_ca_certs={folder}/authority.pem"
    with subprocess.Popen(["redis-server", "-"], stdin=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        process.stdin.write("".join(f"{name} {value}\n" for name, value in lines.items()))
        process.stdin.close()

        def answers() -> bool:
            assert process.poll() is None, (folder / "redis.log").read_text()
            with contextlib.suppress(RedisError), connect(url) as connection:
                return bool(connection.ping())
            return False

        try:
            until(answers)
            yield url
        finally:
            process.kill()


FOLDERS = {"LABELGRID_STORAGE": "labelgrid", "LABELGRID_PICTURES": "pictures"}


@pytest.fixture(scope="module")
def storage(folder: Path) -> Iterator[dict[str, str]]:
    """An S3 server with toy checkpoints, as environment variables that point to it."""
    variables = {
        "AWS_ENDPOINT_URL": f"http://{FIRST}:{S3_PORT}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    line = [sys.executable, "-m", "moto.server", "-H", FIRST, "-p", str(S3_PORT)]

    def answers() -> bool:
        assert process.poll() is None
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(variables["AWS_ENDPOINT_URL"], timeout=5).status_code < 500
        return False

    with (
        pytest.MonkeyPatch.context() as patch,
        subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process,
    ):
        try:
            until(answers)
            for name, value in variables.items():
                patch.setenv(name, value)
            remote = open_storage(f"s3://{BUCKET}/labelgrid")
            remote.fs.mkdir(BUCKET)  # type: ignore[union-attr]
            publish_toys(remote)
            own = {name: f"s3://{BUCKET}/{folder}" for name, folder in FOLDERS.items()}
            yield {**variables, **own}
        finally:
            process.kill()


@dataclass(frozen=True)
class Deployment:
    client: Client
    store: JobStore
    hosts: dict[str, Host]

    def at_work(self, job: Job) -> set[str]:
        """The hosts whose workers are alive and have claimed pictures."""
        connection = self.store.connection
        consumers = connection.xpending(keys.pictures(job.digest), GROUP)["consumers"]
        abouts = [connection.hget(keys.worker(one["name"]), workers.ABOUT) for one in consumers]
        return {json.loads(about)["host"] for about in abouts if about}

    def reported(self, job: Job) -> list[int]:
        """The pictures named in the job's events."""
        return [event.data.index for event in self.client.events(job.id) if event.name == "picture"]  # type: ignore[union-attr]

    def pictures(self, job: Job) -> list[bytes]:
        return [self.client.image(job.id, i) for i in range(job.progress.total)]


@pytest.fixture(scope="module")
def deployment(folder: Path, redis_url: str, storage: dict[str, str]) -> Iterator[Deployment]:
    key = new_key()
    env = {
        **os.environ,
        **storage,
        "LABELGRID_REDIS_URL": redis_url,
        "LABELGRID_API_KEYS": f"tester:{hash_of(key)}",
        "LABELGRID_DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",  # threads of two workers on the same cores spin while they wait for each other
        "LABELGRID_BATCH_PICTURES": "8",
        "LABELGRID_LEASE_S": "4",
    }
    line = [sys.executable, "-m", "service", "api", "--host", FIRST, "--port", str(API_PORT)]
    with contextlib.ExitStack() as stack:
        api = stack.enter_context(subprocess.Popen(line, cwd=ROOT, env=env))
        stack.callback(api.kill)
        connection = stack.enter_context(connect(redis_url))
        hosts = {
            name: stack.enter_context(host(name, number, {**env, "LABELGRID_CACHE": str(folder / name)}))
            for number, name in enumerate(("host-a", "host-b"), start=1)
        }
        client = stack.enter_context(Client(f"http://{FIRST}:{API_PORT}", key))
        one = Deployment(client, JobStore(connection, Settings()), hosts)
        until(lambda: {about["host"] for about in workers.list_live(one.store.connection)} == set(hosts))
        yield one


def test_hosts_share_a_job_and_fetch_its_model_for_themselves(deployment: Deployment, folder: Path) -> None:
    job = deployment.client.generate(LABELS, seed=3, steps=1000, wait=False)
    until(lambda: deployment.at_work(job) == {"host-a", "host-b"})
    assert deployment.client.wait(job.id).status == "finished"
    assert sorted(deployment.reported(job)) == list(range(len(LABELS)))
    for name in deployment.hosts:
        assert list((folder / name).rglob("*.safetensors"))


def test_a_host_is_cut_off_while_it_works_and_every_picture_is_there_once(deployment: Deployment) -> None:
    undisturbed = deployment.client.generate(LABELS, seed=4, steps=1000)
    job = deployment.client.generate(LABELS, seed=4, steps=1000, wait=False)
    until(lambda: deployment.at_work(job) == {"host-a", "host-b"})
    lost = deployment.hosts["host-a"]
    lost.pull_the_cable()
    assert deployment.store.connection.hget(keys.job(job.id), "status") == "running"
    ended = deployment.client.wait(job.id)
    assert ended.status == "finished"
    assert deployment.client.ready().workers == 1
    assert sorted(deployment.reported(job)) == list(range(len(LABELS)))
    assert deployment.pictures(ended) == deployment.pictures(undisturbed)

    # The worker that lost Redis continues once Redis is back.
    lost.put_it_back()
    until(lambda: deployment.client.ready().workers == 2)
    assert lost.worker.poll() is None


def test_redis_talks_to_those_alone_who_know_its_password_and_by_tls(redis_url: str) -> None:
    def ping(url: str) -> None:
        with Redis.from_url(url, socket_timeout=5, retry=Retry(NoBackoff(), 0)) as client:
            client.ping()

    ping(redis_url)
    with pytest.raises(RedisError, match=r"Connection (closed|reset)"):
        ping(redis_url.replace("rediss:", "redis:").partition("?")[0])
    with pytest.raises(RedisError, match="certificate verify failed"):
        ping(redis_url.partition("?")[0])
    address = redis_url.partition("@")[2]
    with pytest.raises(AuthenticationError):
        ping(f"rediss://{address}")
    with pytest.raises(AuthenticationError):
        ping(f"rediss://:labelgrid@{address}")


def test_workers_that_are_told_to_end_say_goodbye(deployment: Deployment) -> None:
    for one in deployment.hosts.values():
        one.worker.terminate()
    assert [one.worker.wait(timeout=60) for one in deployment.hosts.values()] == [0, 0]
    assert workers.list_live(deployment.store.connection) == []
