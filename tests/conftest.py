"""A real Redis, flushed around each test; toy checkpoints; the API as a real server."""

import contextlib
import functools
import gc
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import hypothesis
import pytest
from redis import Redis

# Set before torch is loaded, here and in the processes that tests start: toy networks gain nothing from more threads,
# and on a busy machine threads wait for each other. numba would give torch as many as it has itself.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

from service.api import app as api_app
from service.api.app import create_app
from service.api.openapi import DocumentedAPI
from service.api.server import Server
from service.local.redis_server import RedisServer
from service.openai.routes import mount
from service.settings import Settings
from service.store import workers
from service.store.connection import connect
from service.store.functions import call
from service.store.jobs import JobStore
from tests.documented import Documented
from tests.s3 import serve_s3
from tests.toy_checkpoint import publish_toy_denoiser, publish_toys

if TYPE_CHECKING:
    from service.worker.runner import Runner


# The same examples in every run; `make fuzz` draws new and many more ones. No deadlines: the machine may be busy.
hypothesis.settings.register_profile("quick", max_examples=50, derandomize=True, deadline=None, database=None)
hypothesis.settings.register_profile("long", max_examples=2000, deadline=None, print_blob=True)
hypothesis.settings.load_profile("quick")


# what takes longest: files of 15 s and more, since no two processes share a file, then folders
FIRST = (
    "tests/trainer/test_export",
    "tests/shared/test_openvino",
    "tests/test_shipped",
    "tests/test_fuzz_api",
    "tests/trainer/",
    "tests/iclevr/",
    "tests/service/",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest tests, lest at the end one process runs them and the others have nothing left."""
    items.sort(key=lambda item: [not item.nodeid.startswith(path) for path in FIRST])


def pytest_collection_finish() -> None:
    """Keep the modules of all tests out of the garbage collector's way: each of its full runs would look at them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def denormals() -> Iterator[None]:
    """Keep denormals, which hypothesis draws: the trainer's commands, run in this process, count them as zero."""
    yield
    if torch := sys.modules.get("torch"):
        torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    with tempfile.TemporaryDirectory(prefix="lg-") as folder:  # a unix socket's path has at most 108 bytes
        server = RedisServer(Path(folder))
        server.start()
        yield server
        server.stop()


@pytest.fixture(scope="session", autouse=True)
def _workers_and_jobs_are_not_remembered() -> None:
    """Let the API ask each time which workers and jobs there are: tests empty Redis while it runs."""
    workers.FRESH_S = 0.0


@pytest.fixture
def connection(redis_server: RedisServer) -> Iterator[Redis]:
    client = connect(redis_server.url)
    client.flushall()
    call(client, "live_workers")  # loads them, lest it be the first call of a test that counts commands
    yield client
    client.flushall()
    client.close()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an S3 server with the bucket BUCKET of `tests/s3.py`."""
    with serve_s3() as address:
        yield address


@pytest.fixture(scope="session")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage folder with the promoted denoiser `toy`, another one, `other`, and an evaluator."""
    folder = tmp_path_factory.mktemp("storage")
    publish_toys(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _shared_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Share between this process's runners what takes long to load.

    That is the evaluator, since a ResNet is the one part that has no toy size. Also gives this test run, and the
    processes it starts, a checkpoint cache of its own.
    """
    import service.worker.models
    from tests.shared_evaluators import load_once

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LABELGRID_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(service.worker.models, "load_evaluator", load_once)
        yield


def application(settings: Settings) -> DocumentedAPI:
    """Return the API with its dialect, as `python -m service api` serves it."""
    app = create_app(settings)
    mount(app)
    return app


@functools.cache
def documented() -> Documented:
    """Return the check against the OpenAPI document, which does not depend on the settings."""
    return Documented(application(Settings()).openapi())


@pytest.fixture(scope="session")
def settings(redis_server: RedisServer, storage: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings with a short lease, so that tests notice a dead worker soon, and a fixed batch size."""
    return Settings(
        storage=storage,
        pictures=tmp_path_factory.mktemp("pictures"),
        redis_url=redis_server.url,
        device="cpu",
        lease_s=2.5,
        batch_pictures=8,
    )


@pytest.fixture(scope="module")
def placed(storage: Path, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings with one more model, `placed`, which knows positions and rotations."""
    folder = shutil.copytree(storage, tmp_path_factory.mktemp("placed") / "storage")
    publish_toy_denoiser(folder, "placed", 3, positions=True, rotations=True)
    return settings.model_copy(update={"storage": folder})


@contextlib.contextmanager
def api_server(settings: Settings) -> Iterator[Server]:
    """Run the API as a real server on a free port, in a thread; `should_exit` stops it as SIGTERM does.

    It sees a changed model at once, not two seconds later.
    """
    api_app.STORAGE_EVERY_S = 0.0
    server = Server(application(settings), host="127.0.0.1", port=0)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join()


def client_of(server: Server) -> httpx.Client:
    """A client that checks that the OpenAPI document describes every answer."""
    port = server.servers[0].sockets[0].getsockname()[1]
    hooks = {"response": [documented()]}
    return httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, event_hooks=hooks)


@contextlib.contextmanager
def serving(settings: Settings) -> Iterator[httpx.Client]:
    """A client of the API as a real server."""
    with api_server(settings) as server, client_of(server) as client:
        yield client


@pytest.fixture(scope="session")
def session_client(settings: Settings) -> Iterator[httpx.Client]:
    with serving(settings) as client:
        yield client


@pytest.fixture
def client(session_client: httpx.Client, connection: Redis) -> httpx.Client:
    """A client of an API without workers, on an empty Redis."""
    return session_client


@pytest.fixture
def alive(connection: Redis, settings: Settings) -> JobStore:
    """A worker that is announced but does nothing: jobs stay queued."""
    store = JobStore(connection, settings.model_copy(update={"lease_s": 60}))
    workers.announce(store.connection, "w", {}, store.settings.lease_s)
    return store


@contextlib.contextmanager
def running(connection: Redis, settings: Settings) -> "Iterator[Runner]":
    """Run a worker's loop in a thread of this process."""
    from service.worker.runner import Runner

    runner = Runner(connection, settings, "w")
    runner.models.load()

    def work() -> None:
        while not runner.stopping:
            runner.run_once()
            time.sleep(0.01 if runner.idle else 0)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield runner
    finally:
        runner.stopping = True
        thread.join()


@pytest.fixture
def working(connection: Redis, settings: Settings, alive: JobStore) -> "Iterator[Runner]":
    with running(connection, settings) as runner:
        yield runner
