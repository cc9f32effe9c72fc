"""Two workers' views of one stream."""

import pytest
from redis import Redis

from service.settings import Settings
from service.store.claims import PictureStream
from tests.service.store.helpers import DIGEST


@pytest.fixture
def a(connection: Redis, settings: Settings) -> PictureStream:
    return PictureStream(connection, settings, DIGEST, "a")


@pytest.fixture
def b(connection: Redis, settings: Settings) -> PictureStream:
    return PictureStream(connection, settings, DIGEST, "b")
