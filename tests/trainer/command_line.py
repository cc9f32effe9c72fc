"""What tests of the trainer's command line share: types, options of a tiny network, and checks of results."""

import json
import re
from collections.abc import Callable

from tests.trainer_fixtures import NETWORK

Result = tuple[int, str, str]  # exit code, stdout, stderr
Command = Callable[..., Result]
TINY = ["--set", "image_size=16", "--set", "batch=8", "--set", "layout_steps=2"]
for field, value in NETWORK.items():
    TINY += ["--set", f"network.{field}={json.dumps(value)}"]


def succeeded(result: Result) -> str:
    """Check the exit code; return stdout."""
    code, out, err = result
    assert code == 0, err
    return out


def refused(result: Result, message: str, code: int = 1) -> None:
    """Check the exit code, an empty stdout, and one line on stderr with the error, after at most one note."""
    got, out, err = result
    err = re.sub("^note: .*\n", "", err)
    assert got == code, err
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert re.search(message, err), err
