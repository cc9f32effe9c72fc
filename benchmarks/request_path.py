"""`python -m benchmarks.request_path`: how many of our functions one request runs through, by a profiler.

A POST of two label lists, until its PNG is there, with an API and an RQ worker in this process. What is done once,
such as loading the models, and what runs every so often, such as heartbeats, does not count. Prints functions and files
of each package, and with --list the functions themselves.
"""

import argparse
import importlib
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import httpx

from benchmarks.stack import redis_server
from faults.harness import until
from service.api.app import create_app
from service.api.server import Server
from service.settings import Settings
from service.worker.process import Worker
from shared.openvino import LOADER

ROOT = Path(__file__).parents[1]
PACKAGES = ("service", "shared")
BODY = {"labels": [["red cube", "blue sphere"], ["gray cylinder"]], "seed": 1}
PNG = {"Accept": "image/png"}
NEVER_AGAIN = {  # how often things are done beside requests, by module
    "service.api.app": ("STORAGE_EVERY_S",),
    "service.store.workers": ("FRESH_S",),
    "service.worker.process": ("CLEAN_EVERY_S",),
    "service.worker.runner": ("CHECK_EVERY_S", "LIVE_EVERY_S"),
}
BESIDE = {"heartbeat", "removing old pictures", LOADER}  # threads that do nothing for requests


class Profile:
    """The functions of our packages that any thread has called while it is on. Set it before the threads start."""

    def __init__(self) -> None:
        self.is_on = False
        self.called = set[tuple[str, str]]()  # file and function

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if not (self.is_on and event == "call") or threading.current_thread().name in BESIDE:
            return
        if code.co_filename.startswith(str(ROOT)):
            file = str(Path(code.co_filename).relative_to(ROOT))
            if file.split("/")[0] in PACKAGES and not code.co_qualname.rpartition(".")[2].startswith("<"):
                self.called.add((file, code.co_qualname))


def traced(settings: Settings) -> set[tuple[str, str]]:
    """Return the functions, by file and name, that run from the request to its answer."""
    for module, names in NEVER_AGAIN.items():
        for name in names:
            setattr(importlib.import_module(module), name, 86_400)
    profile = Profile()
    threading.setprofile(profile)
    sys.setprofile(profile)
    worker = Worker(settings=settings)
    server = Server(create_app(settings), host="127.0.0.1", port=0)

    def ask() -> None:
        try:
            until(lambda: worker.runner is not None and not worker.runner.loading and server.started, "API and worker")
            port = server.servers[0].sockets[0].getsockname()[1]
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300, headers=PNG) as client:
                client.post("/generate", json=BODY).raise_for_status()  # what is done once, is done
                until(lambda: worker.runner is not None and worker.runner.idle, "the first job")
                profile.is_on = True
                client.post("/generate", json=BODY).raise_for_status()
                profile.is_on = False
        finally:
            server.should_exit = True
            worker.request_stop(0, None)

    threads = [threading.Thread(target=work) for work in (server.run, ask)]
    for thread in threads:
        thread.start()
    worker.work(logging_level="WARNING")  # RQ handles signals, so it runs in the main thread
    for thread in threads:
        thread.join()
    return profile.called


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.request_path", description=__doc__)
    parser.add_argument("--list", action="store_true", help="print each function")
    wants_list = parser.parse_args().list
    with redis_server() as redis, tempfile.TemporaryDirectory() as pictures:
        called = traced(Settings(redis_url=redis.url, pictures=pictures, log_level="error"))
    if wants_list:
        for file, function in sorted(called):
            print(file, function)
    files = {file for file, _ in called}
    functions = Counter("/".join(file.split("/")[:2]) for file, _ in called)
    for part, count in functions.most_common():
        print(f"{count:4} functions in {len([one for one in files if one.startswith(part)]):2} files: {part}")
    print(f"{len(called):4} functions in {len(files):2} files")


if __name__ == "__main__":
    sys.exit(main())
