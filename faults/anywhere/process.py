"""`python -m faults.anywhere.process worker`: a process of the service whose boundaries fail as they are ordered.

The variable ANYWHERE names the folder of orders. Waits that are long by design are short here, so that a trial takes
seconds.
"""

import importlib
import os
import sys
from pathlib import Path

from faults.anywhere import lines
from faults.anywhere.boundaries import Boundaries
from faults.anywhere.orders import OrderBook

FOLDER = "ANYWHERE"
LINES = ("service.worker.runner", "service.worker.storer", "service.worker.process", "service.store.hub")
SHORTENED = {
    "service.store.claims": {"UNREADABLE_S": 2.0},
    "service.store.hub": {"RECONNECT_S": 0.2},
    "service.webhooks.worker": {"LEASE_S": 3.0, "LOOK_S": 0.2},
    "service.worker.judge": {"READ_AGAIN_S": 0.2},
    "service.worker.process": {"PRUNE_EVERY_S": 0.5},
    "service.worker.runner": {"CHECK_EVERY_S": 0.2, "OTHERS_FIRST_S": 0.1, "RETRY_S": 1.0},
    "service.worker.storer": {"RETRY_S": 0.2},
}
VICTIMS = {"victim": "beefbeef", "upload": "feedfeed"}  # request id -> the end of the job's id


def mark_ids() -> None:
    """End the ids of a trial's victims in a mark, by which every call that concerns them is known."""
    submit = importlib.import_module("service.api.submit")
    new_job_id, request_id = submit.new_job_id, submit.request_id

    def marked(created_at: float) -> str:
        found: str = new_job_id(created_at)
        mark = VICTIMS.get(request_id(), "")
        return found[: len(found) - len(mark)] + mark

    submit.new_job_id = marked


def main() -> None:
    role = sys.argv[1]
    boundaries = Boundaries(OrderBook(Path(os.environ[FOLDER])), role)
    lines.watch(LINES, boundaries.line)
    boundaries.wrap_all()
    for module, values in SHORTENED.items():
        if role == "worker" or ".worker." not in module:  # the others do not load torch
            found = importlib.import_module(module)
            for name, value in values.items():
                if not hasattr(found, name):
                    raise AttributeError(f"{module} has no {name} any more")
                setattr(found, name, value)
    if role == "api":
        mark_ids()
    from service.__main__ import main as serve

    serve()


if __name__ == "__main__":
    main()
