"""`python -m service` runs everything in one go; with a role, `api` or `worker`, it runs that part alone."""

import argparse
import os
import socket
import sys
import tempfile
from pathlib import Path

from redis.exceptions import RedisError

from service.settings import SettingError, Settings, read_settings, unknown_variables
from service.telemetry import logs, tracing
from service.telemetry.logs import get_logger
from shared.checkpoint import CheckpointError
from shared.registry import resolve

log = get_logger(__name__)

DESCRIPTION = """\
Serves pictures from labels. Without a role it runs a Redis server, one worker and the API on this machine, on
loopback only, until Ctrl-C. Settings come from the environment (LABELGRID_..., see service/settings.py)."""


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; wanted 1 to 65535")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m service", description=DESCRIPTION)
    parser.add_argument(
        "role",
        nargs="?",
        choices=["all", "api", "worker", "webhooks", "check"],
        default="all",
        help="what to run (default: all); `check` succeeds if a worker of this host lives, for containers",
    )
    parser.add_argument("--port", type=_port, default=8000, help="port of the API, 1 to 65535 (default: 8000)")
    parser.add_argument("--host", help="address that `api` listens on (default: 127.0.0.1); `all` is loopback only")
    parser.add_argument("--storage", help="folder or address of the checkpoints (default: LABELGRID_STORAGE or models)")
    parser.add_argument(
        "--state", type=Path, help="folder for Redis's data, kept across runs (default: a temporary one); for `all`"
    )
    return parser


def _run_all(port: int, state: Path | None, settings: Settings) -> None:
    from service.local.supervisor import Supervisor

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
    from service.api.access.guard import check_listening
    from service.api.app import create_app
    from service.api.server import Server

    check_listening(settings, host)
    server = Server(create_app(settings), host=host, port=port)
    server.run()
    if not server.started:
        raise RuntimeError("the API did not start; the log says why")


def _warn_of_unknown_variables() -> None:
    """One line about LABELGRID_ variables that nothing reads; they are taken away, so that no part says it again."""
    if unknown := unknown_variables():
        names = [f"{name} (did you mean {nearest}?)" if nearest else name for name, nearest in unknown.items()]
        log.warning("no setting has this name", variables=", ".join(names))
    for name in unknown:
        del os.environ[name]


def _worker_lives(settings: Settings) -> bool:
    from rq import Worker

    from service.store import workers
    from service.store.connection import connect
    from service.store.jobs import JobStore

    store = JobStore(connect(settings.redis_url), settings)
    hosts = [about["host"] for about in workers.list_live(store.connection)]
    return socket.gethostname() in hosts + [worker.hostname for worker in Worker.all(queue=store.webhooks)]


def main() -> int:
    parser = _parser()
    args = parser.parse_args()
    if args.host and args.role != "api":
        parser.error("--host is for the role api; `all` listens on loopback only")
    if args.storage:
        os.environ["LABELGRID_STORAGE"] = args.storage  # for the processes that we start, too
    try:
        settings = read_settings()
        logs.configure(settings, args.role)
        if args.role != "check":  # which is asked every few seconds
            _warn_of_unknown_variables()
        if args.role in ("api", "worker", "webhooks"):
            tracing.start(settings, args.role)
        if args.role == "api":
            _run_api(args.host or "127.0.0.1", args.port, settings)
        elif args.role == "worker":
            from service.worker.process import main as work

            work(settings)
        elif args.role == "webhooks":
            from service.webhooks.worker import main as send

            send(settings)
        elif args.role == "check":
            return 0 if _worker_lives(settings) else 1
        else:
            _run_all(args.port, args.state, settings)
    except KeyboardInterrupt:  # uvicorn raises it anew once the API has shut down
        return 0
    except (CheckpointError, SettingError, RuntimeError, OSError, RedisError) as error:
        print(f"labelgrid: {error}", file=sys.stderr)
        return 1
    finally:
        tracing.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
