"""Two live workers' views of one stream, and a dead one's."""

import pytest
from redis import Redis

from service.settings import Settings
from service.store.claims import PictureStream
from tests.service.store.helpers import DIGEST


@pytest.fixture
def a(connection: Redis, settings: Settings) -> PictureStream:
    return PictureStream(connection, settings, DIGEST, "a")


@pytest.fixture
def dead(connection: Redis, settings: Settings) -> PictureStream:
    return PictureStream(connection, settings, DIGEST, "dead")


@pytest.fixture
def b(connection: Redis, settings: Settings) -> PictureStream:
    return PictureStream(connection, settings, DIGEST, "b")
