"""`python -m service`: the command line for all processes of the service, and for its keys, secrets and settings.

Each command imports what it needs itself: `check` runs every few seconds, and the API must not load torch.
"""

import contextlib
import gc
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from redis.exceptions import RedisError

from service.settings import SettingError, Settings, StartError
from service.start import read, read_to_serve, warn_of_unknown
from service.store.connection import check_version
from service.telemetry import tracing
from shared.checkpoint import CheckpointError
from shared.registry import resolve

INTERRUPTED = 130  # the exit code after Ctrl-C, as shells have it
MOST_WORKERS = 64  # of `serve`
COLLECT_AFTER = 2_000  # new objects in the API; each request leaves some twenty in cycles

HELP = """Generates pictures from labels.

Without a command it runs `all`, and takes its options --port, --storage, --state and --workers. docs/settings.md lists
the environment variables that set everything else.
"""

app = typer.Typer(help=HELP, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

Port = Annotated[int, typer.Option(min=1, max=65535, help="port of the API")]
Storage = Annotated[
    str | None, typer.Option(help="folder or address of the checkpoints (default: LABELGRID_STORAGE or models)")
]


@contextlib.contextmanager
def _one_line(*others: type[Exception]) -> Iterator[None]:
    """Let an expected error, also one of `others`, exit with one line and status 1. Any other shows its traceback."""
    expected: tuple[type[Exception], ...] = (CheckpointError, SettingError, StartError, RedisError, *others)
    try:
        yield
    except KeyboardInterrupt:  # while it starts; and uvicorn raises it again once the API has shut down
        pass
    except expected as error:
        print(f"labelgrid: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    finally:
        tracing.stop()


def _use(storage: str | None) -> None:
    """Set the storage for this process and those that it starts."""
    if storage:
        os.environ["LABELGRID_STORAGE"] = storage


def _read(role: str) -> Settings:
    settings = read(role)
    warn_of_unknown()
    return settings


@app.command("serve", hidden=True)  # its name in `labelgrid serve`
@app.command("all")
def run_all(
    port: Port = 8000,
    storage: Storage = None,
    state: Annotated[
        Path | None, typer.Option(help="folder for Redis's data, kept across runs (default: a temporary one)")
    ] = None,
    workers: Annotated[
        str, typer.Option(help="number of workers, or auto: one for each GPU, else one with all cores")
    ] = "auto",
) -> None:
    """Run a Redis server, workers and the API on this machine, on loopback only, until Ctrl-C (the default)."""
    from service.local.supervisor import DRAIN_S, Supervisor, worker_environments

    if workers != "auto" and not (workers.isdecimal() and 0 < int(workers) <= MOST_WORKERS):
        raise typer.BadParameter(f"--workers {workers}: wanted auto, or 1 to {MOST_WORKERS}")

    with _one_line(OSError), tempfile.TemporaryDirectory(prefix="labelgrid-") as temporary:
        _use(storage)
        settings = _read("all")
        has_redis = "redis_url" in settings.model_fields_set
        if has_redis:
            check_version(settings.redis_url)
        for kind in ("denoiser", "evaluator"):  # reports a missing checkpoint before anything is started
            resolve(settings.storage, None, kind)
        supervisor = Supervisor(
            port=port,
            state=(state or Path(temporary)).absolute(),
            redis_url=settings.redis_url if has_redis else None,
            drain_s=settings.drain_s if "drain_s" in settings.model_fields_set else DRAIN_S,
            workers=worker_environments(None if workers == "auto" else int(workers), settings.device),
        )
        supervisor.run(lambda address: print(f"labelgrid is ready: {address} (docs at {address}/docs)", flush=True))


@app.command()
def api(
    port: Port = 8000,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    storage: Storage = None,
) -> None:
    """Run the API."""
    with _one_line():
        _use(storage)
        settings = read_to_serve("api")
        from service.api.access.guard import check_listening
        from service.api.app import create_app
        from service.api.server import Server
        from service.openai.routes import mount

        check_listening(settings, host)
        application = create_app(settings)
        mount(application)
        server = Server(application, host=host, port=port)
        # The collector took a twelfth of the API's CPU time, and looked through all modules for 75 ms at a time.
        gc.freeze()
        gc.set_threshold(COLLECT_AFTER, 10, 10)
        server.run()
        if not server.started:
            raise StartError("the API did not start; see its log")


@app.command()
def worker(storage: Storage = None) -> None:
    """Run a worker, which generates and scores pictures."""
    with _one_line():
        # Ends the process while it starts. Without a handler a container's first process ignores the signal.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        _use(storage)
        settings = read_to_serve("worker")
        from service.worker.process import main as work

        work(settings)


@app.command()
def check(liveness: Annotated[bool, typer.Option("--liveness", hidden=True)] = False) -> None:
    """Exit with 1 unless a worker of this host is alive and does not hang, for the health checks of containers.

    Only for readiness: a check that restarts workers would restart them all while Redis is away, and a worker that
    hangs ends by itself.
    """
    if liveness:  # until the next release, for probes of the one before
        return
    with _one_line(OSError):
        settings = read("check")
        from service.store import workers
        from service.store.connection import connect

        host = socket.gethostname()
        live = workers.list_live(connect(settings.redis_url))
        if host not in [about["host"] for about in live if not about.get("stalled")]:
            raise StartError(f"no worker of {host} is alive, or it hangs")


@app.command()
def keys(
    name: Annotated[
        str, typer.Argument(help="the key's owner, to whom its jobs belong: letters, digits, '.', '_' and '-'")
    ],
) -> None:
    """Make an API key.

    The key goes to its client and is shown only this once. The line with its hash goes into LABELGRID_API_KEYS, or into
    the file that LABELGRID_API_KEYS_FILE names.
    """
    from service.api.access.api_keys import ENTRY, hash_of, new_key

    key = new_key()
    entry = f"{name}:{hash_of(key)}"
    if ENTRY.fullmatch(entry) is None:
        raise typer.BadParameter(
            f"{name!r}: wanted up to 64 letters, digits, '.', '_' and '-', the first a letter or digit"
        )
    print(f"key for {name}, for the client to keep:", file=sys.stderr)
    print(key)
    print("for LABELGRID_API_KEYS:", file=sys.stderr)
    print(entry)


@app.command()
def webhook_secret(
    name: Annotated[str, typer.Argument(help="the owner; leave it out if the service has no API keys")] = "",
) -> None:
    """Print the secret, derived from LABELGRID_WEBHOOK_SECRET, that verifies an owner's webhooks."""
    from service.webhooks.sender import receiver_secret, signing_key

    with _one_line(OSError):
        settings = _read("webhook-secret")
        if settings.webhook_secret is None:
            raise StartError("LABELGRID_WEBHOOK_SECRET is not set")
        print(receiver_secret(signing_key(settings.webhook_secret.get_secret_value(), name)))


@app.command()
def settings() -> None:
    """Print docs/settings.md."""
    from service.settings_doc import document

    print(document(), end="")


@app.command()
def demo(
    seed: Annotated[int, typer.Option(help="the same seed gives the same pictures")] = 7,
    grid: Annotated[Path, typer.Option(help="file for the grid of pictures")] = Path("grid.png"),
) -> None:
    """Start everything, generate eight pictures, and stop."""
    from service.client.errors import ClientError
    from service.local.demo import run

    drawn = False
    with _one_line(OSError, ClientError):
        _read("demo")
        drawn = run(seed, grid)
    if not drawn:
        raise typer.Exit(INTERRUPTED)


def main(program: str = "python -m service") -> None:
    arguments = sys.argv[1:]
    if not arguments or (arguments[0].startswith("-") and arguments[0] != "--help"):
        arguments = ["all", *arguments]
    app(arguments, prog_name=program)


if __name__ == "__main__":
    main()
