"""A real S3 server, moto's, in a process of its own; `conftest.py` has its fixture."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.local.demo import free_port
from shared.storage import open_storage
from tests.service.processes import until_it_answers

BUCKET = "labelgrid-test"


@contextlib.contextmanager
def serve_s3() -> Iterator[str]:
    """Run the server with a bucket and the environment variables for it; give its address."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    line = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    variables = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        until_it_answers(process, address, lambda answer: answer)
        remote = open_storage(f"s3://{BUCKET}/")
        assert not isinstance(remote, Path)
        remote.fs.mkdir(BUCKET)
        yield address
    process.kill()
    process.wait()
