"""`python -m service` runs everything in one go; with a role, `api` or `worker`, it runs that part alone."""

import argparse
import os
import socket
import sys
import tempfile
from pathlib import Path

from pydantic import ValidationError
from redis.exceptions import RedisError

from service import logs, tracing
from service.settings import Settings
from shared.checkpoint import CheckpointError, resolve

DESCRIPTION = """\
Serves pictures from labels. Without a role it runs a Redis server, one worker and the API on this machine, on
loopback only, until Ctrl-C. Settings come from the environment (LABELGRID_..., see service/settings.py)."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m service", description=DESCRIPTION)
    parser.add_argument(
        "role",
        nargs="?",
        choices=["all", "api", "worker", "webhooks", "check"],
        default="all",
        help="what to run (default: all); `check` succeeds if a worker of this host lives, for containers",
    )
    parser.add_argument("--port", type=int, default=8000, help="port of the API (default: 8000)")
    parser.add_argument("--host", help="address that `api` listens on (default: 127.0.0.1); `all` is loopback only")
    parser.add_argument("--storage", help="folder or address of the checkpoints (default: LABELGRID_STORAGE or models)")
    parser.add_argument(
        "--state", type=Path, help="folder for Redis's data, kept across runs (default: a temporary one); for `all`"
    )
    return parser


def _run_all(port: int, state: Path | None, settings: Settings) -> None:
    from service.supervisor import Supervisor

    for kind in ("denoiser", "evaluator"):  # before anything is started: the worker could not
        resolve(settings.storage, None, kind)
    redis_url = settings.redis_url if "redis_url" in settings.model_fields_set else None
    with tempfile.TemporaryDirectory(prefix="labelgrid-") as temporary:
        supervisor = Supervisor(
            port=port,
            state=(state or Path(temporary)).absolute(),
            redis_url=redis_url,
            webhooks=settings.webhook_secret is not None,
        )
        supervisor.run(lambda address: print(f"labelgrid is ready: {address} (docs at {address}/docs)", flush=True))


def _run_api(host: str, port: int, settings: Settings) -> None:
    from service.app import create_app
    from service.guard import check_listening
    from service.server import Server

    check_listening(settings, host)
    server = Server(create_app(settings), host=host, port=port)
    server.run()
    if not server.started:
        raise RuntimeError("the API did not start; the log says why")


def _worker_lives(settings: Settings) -> bool:
    from rq import Worker

    from service.jobs import JobStore, connect

    store = JobStore(connect(settings.redis_url), settings)
    hosts = [about["host"] for about in store.workers()]
    return socket.gethostname() in hosts + [worker.hostname for worker in Worker.all(queue=store.webhooks)]


def main() -> int:
    parser = _parser()
    args = parser.parse_args()
    if args.host and args.role != "api":
        parser.error("--host is for the role api; `all` listens on loopback only")
    if args.storage:
        os.environ["LABELGRID_STORAGE"] = args.storage  # for the processes that we start, too
    try:
        settings = Settings()
        logs.configure(settings, args.role)
        if args.role in ("api", "worker", "webhooks"):
            tracing.start(settings, args.role)
        if args.role == "api":
            _run_api(args.host or "127.0.0.1", args.port, settings)
        elif args.role == "worker":
            from service.worker import main as work

            work(settings)
        elif args.role == "webhooks":
            from service.webhooks.worker import main as send

            send(settings)
        elif args.role == "check":
            return 0 if _worker_lives(settings) else 1
        else:
            _run_all(args.port, args.state, settings)
    except (CheckpointError, RuntimeError, OSError, RedisError, ValidationError) as error:
        print(f"labelgrid: {error}", file=sys.stderr)
        return 1
    finally:
        tracing.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
