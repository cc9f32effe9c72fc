"""The models in a storage, for tests that look at each change."""

from service.api.catalog import Models, look
from shared.checkpoint import CheckpointInfo
from shared.registry import Registry
from shared.storage import Location


class Fresh:
    """Looks at storage before each question."""

    def __init__(self, storage: Location) -> None:
        self.found = Models(Registry(storage))

    def __call__(self) -> Models:
        self.found = look(self.found)
        return self.found

    def find(self, name: str | None) -> CheckpointInfo:
        return self().find(name)
