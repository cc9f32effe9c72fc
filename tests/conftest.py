"""A real Redis, emptied around each case, and a checkpoint small enough that a worker makes a picture in milliseconds."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from service.jobs import connect
from service.redis_server import RedisServer
from service.settings import Settings
from tests.toy_checkpoint import publish_toys


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    with tempfile.TemporaryDirectory(prefix="lg-") as folder:  # a short path: a unix socket's has 108 bytes at most
        server = RedisServer(Path(folder))
        server.start()
        yield server
        server.stop()


@pytest.fixture
def connection(redis_server: RedisServer) -> Iterator[Redis]:
    client = connect(redis_server.url)
    client.flushall()
    yield client
    client.flushall()
    client.close()


@pytest.fixture(scope="session")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage folder with the promoted denoiser `toy`, another one, `other`, and an evaluator."""
    folder = tmp_path_factory.mktemp("storage")
    publish_toys(folder)
    return folder


@pytest.fixture(scope="session")
def settings(redis_server: RedisServer, storage: Path) -> Settings:
    """Settings with a short lease, so that a dead worker is noticed within a test's patience."""
    return Settings(
        storage=storage, redis_url=redis_server.url, device="cpu", lease_s=1.5, heartbeat_s=0.3, batch_pictures=8
    )
