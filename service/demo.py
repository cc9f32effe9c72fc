"""`python -m service.demo`: starts everything, has eight label lists drawn and judged, saves the grid, stops it all.

A client like any other: it talks HTTP to the service that it started. Knows nothing of the service's inside.
"""

import argparse
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from service.supervisor import Supervisor

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


def verdicts(job: dict[str, Any]) -> Table:
    """What the evaluator says of every picture of a finished job."""
    result = job["result"]
    title = f"accuracy {result['accuracy']:.3f}, exact match {result['exact_match']:.3f}, model {job['model']}"
    table = Table("picture", "asked (probability)", "verdict", title=title)
    for i, picture in enumerate(result["pictures"]):
        asked = ", ".join(f"{label} ({picture['scores'][label]:.2f})" for label in picture["labels"])
        extra = [name for name, p in picture["scores"].items() if p > 0.5 and name not in picture["labels"]]
        hits = f"{picture['accuracy'] * len(picture['labels']):.0f} of {len(picture['labels'])}"
        verdict = (
            "[green]as asked[/]"
            if picture["exact"]
            else f"[yellow]{hits}" + (f", also {', '.join(extra)}" if extra else "")
        )
        table.add_row(str(i), asked, verdict)
    return table


def draw(address: str, seed: int, grid: Path, console: Console) -> None:
    """One POST /generate and the grid it leads to."""
    with httpx.Client(base_url=address, timeout=300) as client, console.status("sampling"):
        start = time.monotonic()
        answer = client.post(
            "/generate", json={"labels": LABELS, "seed": seed, "columns": 4}, headers={"Prefer": "wait=280"}
        )
        answer.raise_for_status()
        job = answer.json()
        grid.write_bytes(client.get(job["result"]["grid_url"]).raise_for_status().content)
    console.print(verdicts(job))
    console.print(f"{len(LABELS)} pictures in {time.monotonic() - start:.1f} s; the grid is in {grid}")


def main() -> int:
    parser = argparse.ArgumentParser("python -m service.demo", description=__doc__)
    parser.add_argument("--seed", type=int, default=7, help="the same seed gives the same pictures (default: 7)")
    parser.add_argument("--grid", type=Path, default=Path("grid.png"), help="where the grid goes (default: grid.png)")
    args = parser.parse_args()
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
        except (RuntimeError, OSError, httpx.HTTPError) as error:
            print(f"labelgrid: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
