"""Files of results, in a folder and on an object store."""

from pathlib import Path
from uuid import uuid4

import pytest

from service.results.files import ResultFiles
from shared.storage import open_storage


@pytest.fixture(params=["folder", "memory"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> ResultFiles:
    return ResultFiles(tmp_path if request.param == "folder" else open_storage(f"memory://{uuid4().hex}/results"))
