"""`docker compose up --build` as users run it, what they do with it, and what can go wrong.

`make compose-test`. The tests run in this order over one deployment. The last ones are the drill of docs/operations.md:
they break the deployment, type the commands of that page, and find that as much is lost as it says. A Docker engine is
needed; where none answers and there is a `../shared/tools/container-lab`, that is started, and stopped at the end.
"""

import contextlib
import io
import json
import os
import re
import secrets
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from service.api.access.api_keys import hash_of, new_key
from service.client import ApiError, Client, JobUnfinished
from service.contract.records import hour_of
from service.contract.schemas import Job
from service.local.demo import free_port
from tests.service.processes import until

ROOT = Path(__file__).parents[1]
LAB = ROOT.parent / "shared" / "tools" / "container-lab"
PROJECT = "labelgrid-test"
STARTED_WITHIN_S = 180

IN_STEPS = "iclevr-320x240"  # a model that takes time, unlike the default one, of a single call
SLOW = {"model": IN_STEPS, "steps": 1000}
LABELS = [["red cube", "blue sphere"], ["gray cylinder"], ["green sphere"], ["yellow cube", "purple cylinder"]]

# A receiver of webhooks that prints them.
RECEIVER = """
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        print(self.headers["webhook-signature"], body.decode(), flush=True)
        self.send_response(204)
        self.end_headers()
    def log_message(self, *arguments):
        pass
http.server.HTTPServer(("", 9000), Handler).serve_forever()
"""


def docker(*arguments: str, check: bool = True, env: dict[str, str] | None = None, stdin: str | None = None) -> str:
    """Run a docker command and return its output, errors included."""
    done = subprocess.run(
        ["docker", *arguments],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        input=stdin,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert not check or done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@dataclass(frozen=True)
class Deployment:
    env: dict[str, str]
    client: Client
    url: str
    key: str

    def compose(self, *arguments: str, check: bool = True) -> str:
        return docker("compose", "--project-name", PROJECT, *arguments, check=check, env=self.env)

    def inside(self, service: str, *command: str, check: bool = True) -> str:
        return self.compose("exec", "--no-TTY", service, *command, check=check)

    @property
    def authorization(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"}

    def containers(self, service: str) -> list[str]:
        return self.compose("ps", "--quiet", service).split()

    def scale(self, workers: int) -> None:
        """Wait until the wanted workers are healthy and the others are gone."""
        self.compose("up", "--detach", "--wait", "--no-recreate", "--scale", f"worker={workers}", "worker")

    def redis(self, *command: str) -> Any:
        return json.loads(self.inside("redis", "redis-cli", "--json", *command))

    def in_work(self, job: Job) -> dict[str, int]:
        """The number of pictures that each live worker has claimed, by its container's id."""
        held = {}
        for consumer in self.redis("XINFO", "CONSUMERS", f"labelgrid:pictures:{job.digest}", "workers"):
            about = self.redis("GET", f"labelgrid:worker:{consumer['name']}")
            if about is not None and consumer["pending"]:
                held[json.loads(about)["host"]] = consumer["pending"]
        return held

    def pictures(self, job: Job) -> list[bytes]:
        return [self.client.image(job.id, i) for i in range(job.progress.total)]

    def typed(self, heading: str, folder: Path, block: int = 0) -> str:
        """Run a block of commands under a heading of docs/operations.md, and return their output."""
        section = (ROOT / "docs" / "operations.md").read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
        lines = re.findall(r"(?:^    .+\n)+", section, re.MULTILINE)[block]
        env = {
            **os.environ,
            **self.env,
            "COMPOSE_PROJECT_NAME": PROJECT,
            "COMPOSE_FILE": str(ROOT / "docker-compose.yml"),
        }
        done = subprocess.run(["sh", "-ec", lines], cwd=folder, env=env, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    def error_of(self, job_id: str) -> tuple[int, str]:
        """Return the error of a job's first picture."""
        with pytest.raises(ApiError) as error:
            self.client.image(job_id, 0)
        return error.value.status, error.value.slug

    def file(self, job: Job) -> str:
        """Return the path of a job's first picture in the containers."""
        return f"/pictures/{hour_of(job.id)}/{job.id}/0.png"

    def reported(self, job: Job) -> list[int]:
        """The pictures named in the job's events."""
        return [event.data.index for event in self.client.events(job.id) if event.name == "picture"]  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def engine() -> Iterator[None]:
    """A Docker engine, and a redis:8 image whose /data belongs to the user redis, as in the official one."""
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        if subprocess.run(["sh", "-c", "docker info"], capture_output=True).returncode != 0:
            if not LAB.exists():
                pytest.fail("no Docker engine answers; start one, or see `docker info`")
            subprocess.run([LAB, "up"], check=True, stdout=subprocess.DEVNULL)
            stack.callback(subprocess.run, [LAB, "down"], check=True)
            line = subprocess.run([LAB, "env"], check=True, stdout=subprocess.PIPE, text=True).stdout
            patch.setenv("DOCKER_HOST", line.strip().partition("=")[2])
        writable = ["run", "--rm", "--user", "redis", "--entrypoint", "test", "redis:8", "-w", "/data"]
        if subprocess.run(["docker", *writable], env=os.environ).returncode != 0:  # container-lab's stand-in
            docker("build", "--tag", "redis:8", "-", stdin="FROM redis:8\nRUN chown redis: /data\n")
        yield


@pytest.fixture(scope="module")
def deployment(engine: None) -> Iterator[Deployment]:
    key, port = new_key(), free_port()
    env = {
        "PORT": str(port),
        "REDIS_PASSWORD": secrets.token_hex(16),
        "LABELGRID_API_KEYS": f"tester:{hash_of(key)}",
        "LABELGRID_WEBHOOK_SECRET": secrets.token_hex(32),
        "WEBHOOK_ALLOW_PRIVATE": "1",
        "LABELGRID_BATCH_PICTURES": "16",  # of 24, so that two workers share the job
    }
    url = f"http://127.0.0.1:{port}"
    with Client(url, key) as client:
        one = Deployment(env, client, url, key)
        try:
            one.compose("up", "--build", "--detach", "--wait", "--wait-timeout", str(STARTED_WITHIN_S))
            yield one
        except BaseException:
            print(one.compose("logs", "--tail", "50", check=False))
            raise
        finally:
            one.compose("--profile", "train", "down", "--volumes", "--remove-orphans", "--timeout", "5", check=False)


def test_generate(deployment: Deployment) -> None:
    job = deployment.client.generate(LABELS, seed=7)
    assert job.status == "finished"
    assert job.result is not None
    pictures = [Image.open(io.BytesIO(png)) for png in deployment.pictures(job)]
    size = deployment.client.labels().picture
    assert size is not None
    assert [picture.size for picture in pictures] == [size] * len(LABELS)
    assert Image.open(io.BytesIO(deployment.client.grid(job.id))).size > size
    assert deployment.client.generate(LABELS, seed=7).result.accuracy == job.result.accuracy  # type: ignore[union-attr]


def test_nothing_without_a_key(deployment: Deployment) -> None:
    assert httpx.post(f"{deployment.url}/generate", json={"labels": LABELS}).status_code == 401
    assert httpx.get(f"{deployment.url}/readyz").json()["workers"] == 1


def test_score(deployment: Deployment, tmp_path: Path) -> None:
    file = tmp_path / "test.json"
    file.write_text(json.dumps(LABELS))
    job = deployment.client.score(file, repeats=2, seed=0)
    assert job.status == "finished"
    result: Any = job.result
    assert [repeat.seed for repeat in result.repeats] == [0, 1]
    assert result.accuracy.mean > 0.5  # chance finds one in sixteen of 24 labels
    assert sorted(deployment.reported(job)) == list(range(2 * len(LABELS)))


def test_cancel(deployment: Deployment) -> None:
    job = deployment.client.generate(LABELS * 16, **SLOW, wait=False)
    until(lambda: deployment.client.job(job.id).status == "running")
    assert deployment.client.cancel(job.id).status == "cancelled"
    assert deployment.client.generate(LABELS[:1]).status == "finished"  # the worker is available again
    ended = deployment.client.job(job.id)
    assert ended.status == "cancelled"
    assert ended.progress.done < ended.progress.total


def test_webhooks_are_sent(deployment: Deployment) -> None:
    receiver = f"{PROJECT}-receiver"
    deployment.compose("run", "--detach", "--no-deps", "--name", receiver, "api", "python", "-c", RECEIVER)
    try:
        job = deployment.client.generate(LABELS[:1], webhook=f"http://{receiver}:9000/")  # type: ignore[call-arg]
        signature, _, body = until(lambda: docker("logs", receiver).strip().rpartition("\n")[2]).partition(" ")
        assert signature.startswith("v1,")
        message = json.loads(body)
        assert (message["type"], message["data"]["id"]) == ("job.finished", job.id)
    finally:
        docker("rm", "--force", receiver)


@pytest.mark.parametrize("service", ["api", "worker", "redis"])
def test_a_container_may_do_nothing_but_its_work(deployment: Deployment, service: str) -> None:
    status = dict(line.split(":\t", 1) for line in deployment.inside(service, "cat", "/proc/1/status").splitlines())
    assert "0" not in status["Uid"].split()
    assert {name: int(bits, 16) for name, bits in status.items() if name.startswith("Cap")} == dict.fromkeys(
        ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), 0
    )
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert "Read-only file system" in deployment.inside(service, "touch", "/x", check=False)
    deployment.inside(service, "touch", "/tmp/x")


def test_redis_wants_its_password_and_keeps_what_it_accepted(deployment: Deployment) -> None:
    bare = ("env", "-u", "REDISCLI_AUTH", "redis-cli")
    assert "NOAUTH" in deployment.inside("redis", *bare, "ping")
    assert "WRONGPASS" in deployment.inside("redis", *bare, "-a", "labelgrid", "ping")
    assert deployment.redis("CONFIG", "GET", "appendonly") == {"appendonly": "yes"}
    assert deployment.redis("CONFIG", "GET", "maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    assert deployment.redis("CONFIG", "GET", "hash-max-listpack-value") == {"hash-max-listpack-value": "1024"}


def test_one_port_is_published_and_workers_have_no_way_out(deployment: Deployment) -> None:
    published = {}
    for service in ("api", "worker", "redis"):
        (container,) = deployment.containers(service)
        ports = json.loads(docker("inspect", "--format", "{{json .NetworkSettings.Ports}}", container))
        published[service] = [(at["HostIp"], at["HostPort"]) for some in ports.values() for at in some or []]
    assert published == {"api": [("127.0.0.1", deployment.env["PORT"])], "worker": [], "redis": []}
    ways_out = {}
    for service in published:
        routes = deployment.inside(service, "cat", "/proc/net/route").splitlines()[1:]
        ways_out[service] = any(route.split()[1] == "00000000" for route in routes)
    assert ways_out == {"api": True, "worker": False, "redis": False}


def test_one_of_two_workers_is_killed_and_every_picture_is_there_once(deployment: Deployment) -> None:
    deployment.scale(2)
    until(lambda: deployment.client.ready().workers == 2)
    labels, options = LABELS * 6, {"seed": 5, "model": IN_STEPS, "steps": 50}

    undisturbed = deployment.client.generate(labels, **options)  # type: ignore[arg-type]
    job = deployment.client.generate(labels, wait=False, **options)  # type: ignore[arg-type]
    until(lambda: len(deployment.in_work(job)) == 2)
    victim = deployment.containers("worker")[0]
    docker("kill", "--signal", "KILL", victim)
    killed = json.loads(docker("inspect", "--format", "{{json .State}}", victim))
    assert (killed["Running"], killed["ExitCode"]) == (False, 137)
    assert deployment.client.job(job.id).progress.done < len(labels)

    ended = deployment.client.wait(job.id)
    assert ended.status == "finished"
    assert deployment.client.ready().workers == 1
    assert sorted(deployment.reported(job)) == list(range(len(labels)))
    assert deployment.pictures(ended) == deployment.pictures(undisturbed)


def test_a_worker_is_taken_away_while_it_works_and_nothing_is_lost(deployment: Deployment) -> None:
    deployment.scale(2)
    labels = LABELS * 6
    job = deployment.client.generate(labels, model=IN_STEPS, seed=5, steps=50, wait=False)
    until(lambda: len(deployment.in_work(job)) == 2)
    deployment.scale(1)
    assert deployment.client.wait(job.id).status == "finished"
    assert sorted(deployment.reported(job)) == list(range(len(labels)))
    assert deployment.client.ready().workers == 1


def test_results_are_there_after_all_containers_were_replaced(deployment: Deployment) -> None:
    """Pictures lie in a volume that workers write and the API reads, both as a user without rights."""
    job = deployment.client.generate(LABELS, seed=7)
    pictures, grid = deployment.pictures(job), deployment.client.grid(job.id)
    deployment.compose("down", "--timeout", "30")
    deployment.compose("up", "--detach", "--wait", "--wait-timeout", str(STARTED_WITHIN_S))
    assert deployment.client.job(job.id).result == job.result
    assert deployment.pictures(job) == pictures
    assert deployment.client.grid(job.id) == grid


def test_the_trainer_has_an_image_of_its_own(deployment: Deployment) -> None:
    output = deployment.compose("run", "--rm", "trainer", "render", "/runs/data", "--scenes", "1")
    assert "/runs/data" in output


def test_a_lost_redis_costs_all_jobs_but_no_picture(deployment: Deployment, tmp_path: Path) -> None:
    ended = deployment.client.generate(LABELS, seed=7)
    picture = deployment.client.image(ended.id, 0)
    opened = deployment.client.generate(LABELS * 16, **SLOW, wait=False)
    until(lambda: deployment.client.job(opened.id).status == "running")
    deployment.compose("rm", "--stop", "--force", "redis")
    docker("volume", "rm", f"{PROJECT}_redis-data")

    deployment.typed("Redis and its disk are lost", tmp_path)
    until(lambda: deployment.client.ready().workers == 1)
    assert deployment.client.jobs().jobs == []
    for job in (ended, opened):
        assert deployment.error_of(job.id) == (404, "unknown-job")
    deployment.inside("worker", "test", "-f", deployment.file(ended))
    assert deployment.pictures(deployment.client.generate(LABELS, seed=7))[0] == picture
    with httpx.Client(base_url=deployment.url, headers=deployment.authorization, timeout=120) as http:
        again = http.post("/generate/png", files={"file": picture}, headers={"prefer": "wait=60"}).raise_for_status()
    assert deployment.client.image(again.json()["id"], 0) == picture


def test_restored_storage_lacks_the_pictures_since_its_copy(deployment: Deployment, tmp_path: Path) -> None:
    heading = "Storage is restored from a day ago"
    old = deployment.client.generate(LABELS, seed=7)
    pictures, grid = deployment.pictures(old), deployment.client.grid(old.id)
    deployment.typed(heading, tmp_path)
    new = deployment.client.generate(LABELS, seed=8)
    lost = deployment.pictures(new)
    begun = deployment.client.generate(LABELS * 12, model=IN_STEPS, seed=9, steps=20, wait=False)
    until(lambda: deployment.client.job(begun.id).progress.done)

    deployment.typed(heading, tmp_path, block=1)
    assert (deployment.pictures(old), deployment.client.grid(old.id)) == (pictures, grid)
    assert deployment.client.job(new.id).result == new.result
    assert deployment.error_of(new.id) == (410, "expired-job")
    assert deployment.pictures(deployment.client.generate(LABELS, seed=8)) == lost
    with pytest.raises(JobUnfinished, match=r"picture 0: .*no longer in storage"):
        deployment.client.wait(begun.id)
    assert deployment.client.retry(begun.id).status == "finished"


def test_jobs_wait_for_another_host_after_the_only_workers_is_gone(deployment: Deployment, tmp_path: Path) -> None:
    labels, options = LABELS * 6, {"seed": 5, "model": IN_STEPS, "steps": 50}
    undisturbed = deployment.client.generate(labels, **options)  # type: ignore[arg-type]
    job = deployment.client.generate(labels, wait=False, **options)  # type: ignore[arg-type]
    until(lambda: deployment.in_work(job))
    docker("rm", "--force", *deployment.containers("worker"))
    until(lambda: httpx.get(f"{deployment.url}/readyz").status_code == 503)
    refused = httpx.post(f"{deployment.url}/generate", json={"labels": LABELS}, headers=deployment.authorization)
    assert (refused.status_code, refused.json()["type"].rpartition(":")[2]) == (503, "no-worker")
    assert deployment.client.job(job.id).status == "running"

    deployment.typed("A worker's host is gone", tmp_path)
    assert deployment.client.wait(job.id).status == "finished"
    assert sorted(deployment.reported(job)) == list(range(len(labels)))
    assert deployment.pictures(job) == deployment.pictures(undisturbed)


def test_a_leaked_key_is_replaced_by_one_that_has_its_owners_jobs(deployment: Deployment, tmp_path: Path) -> None:
    job = deployment.client.generate(LABELS[:1])
    output = deployment.typed("A key leaked", tmp_path)
    entry = re.search(r"tester:[0-9a-f]{64}", output)
    key = next(word for word in output.split() if entry and hash_of(word) == entry[0].partition(":")[2])
    deployment.env["LABELGRID_API_KEYS"] = entry[0] if entry else ""

    deployment.typed("A key leaked", tmp_path, block=1)
    assert deployment.error_of(job.id)[0] == 401
    with Client(deployment.url, key) as client:
        assert client.job(job.id).result == job.result
        assert client.generate(LABELS[:1]).status == "finished"
    line = r'"owner": ?"tester"'
    assert re.search(line, deployment.compose("logs", "api"))
