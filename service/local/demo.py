"""`python -m service.local.demo`: starts everything, has eight label lists drawn and judged, saves the grid, stops it all.

A client like any other: it talks to the service that it started. Knows nothing of the service's inside.
"""

import argparse
import os
import socket
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from service.client import Client, ClientError, display
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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def draw(address: str, seed: int, grid: Path, console: Console) -> None:
    """One POST /generate and the grid it leads to."""
    start = time.monotonic()
    with Client(address) as client, display.JobProgress(console) as progress:
        job = client.generate(LABELS, seed=seed, columns=4, on_event=progress.on_event)
        grid.write_bytes(client.grid(job.id))
    display.result(job, console)
    console.print(f"{len(LABELS)} pictures in {time.monotonic() - start:.1f} s; the grid is in {grid}")


def main() -> int:
    parser = argparse.ArgumentParser("python -m service.local.demo", description=__doc__)
    parser.add_argument("--seed", type=int, default=7, help="the same seed gives the same pictures (default: 7)")
    parser.add_argument("--grid", type=Path, default=Path("grid.png"), help="where the grid goes (default: grid.png)")
    args = parser.parse_args()
    os.environ.setdefault("LABELGRID_LOG_LEVEL", "warning")  # of the parts: a table is to be read here, not their logs
    console = Console()
    with tempfile.TemporaryDirectory(prefix="labelgrid-") as state:
        supervisor = Supervisor(port=free_port(), state=Path(state), redis_url=None)

        def on_ready(address: str) -> None:
            try:
                draw(address, args.seed, args.grid, console)
            finally:
                supervisor.stopping = True

        try:
            with console.status("starting Redis, a worker and the API"):
                supervisor.run(on_ready)
        except (RuntimeError, OSError, ClientError) as error:
            print(f"labelgrid: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
