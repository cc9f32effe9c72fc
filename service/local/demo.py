"""`python -m service demo`: the whole service, started for one request of a client."""

import os
import socket
import tempfile
import time
from pathlib import Path

from rich.console import Console

from service.client import Client, display
from service.local.supervisor import Supervisor

LABELS = [
    ["red cube"],
    ["blue sphere"],
    ["gray cylinder"],
    ["green cube", "yellow sphere"],
    ["purple cylinder", "cyan sphere"],
    ["brown cube", "red cylinder"],
    ["yellow cube", "blue cylinder", "gray sphere"],
    ["cyan cube", "purple sphere", "green cylinder"],
]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def run(seed: int, grid: Path) -> bool:
    """Start everything, generate and score a picture for each of LABELS, save their grid, and stop everything.

    Returns whether there is a grid; Ctrl-C or SIGTERM may come first. Raises RuntimeError, OSError and ClientError.
    """
    if not grid.parent.is_dir():  # before the work rather than after it
        raise FileNotFoundError(f"{grid}: there is no folder {grid.parent}")
    drawn = False
    for name in ("LABELGRID_API_KEYS", "LABELGRID_API_KEYS_FILE"):  # for another service; this one answers only itself
        os.environ.pop(name, None)
    os.environ.setdefault("LABELGRID_LOG_LEVEL", "warning")  # of the processes it starts: the output is a table
    console = Console()
    console.print("starting Redis, a worker and the API")

    def generate(address: str) -> None:
        nonlocal drawn
        start = time.monotonic()
        with Client(address) as client, display.JobProgress() as progress:
            job = client.generate(LABELS, seed=seed, columns=4, on_event=progress.on_event)
            grid.write_bytes(client.grid(job.id))
        display.result(job, console)
        console.print(f"{len(LABELS)} pictures in {time.monotonic() - start:.1f} s; the grid is in {grid}")
        drawn = supervisor.stopping = True

    with tempfile.TemporaryDirectory(prefix="labelgrid-") as state:
        supervisor = Supervisor(port=free_port(), state=Path(state), redis_url=None)
        supervisor.run(generate)
    return drawn
