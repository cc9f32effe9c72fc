"""Other work on the machine: processes that only compute, beside which something is measured."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator

from service.local.redis_server import die_with_parent

LIFETIME_S = 3600  # in case this process is killed where a child does not die with its parent
PROGRAM = f"""
import time
end = time.monotonic() + {LIFETIME_S}
while time.monotonic() < end:
    sum(range(10_000))
"""


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Run `count` processes, each of which keeps a core busy at the priority of this process."""
    processes = [subprocess.Popen([sys.executable, "-c", PROGRAM], preexec_fn=die_with_parent) for _ in range(count)]
    try:
        yield
        if ended := [process for process in processes if process.poll() is not None]:
            raise RuntimeError(f"{len(ended)} of {count} busy processes ended before the measurement did")
    finally:
        for process in processes:
            process.kill()
            process.wait()
