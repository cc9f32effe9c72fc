"""What the commands share: how errors end them, and how a job is created, awaited, saved and printed."""

import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final
from uuid import uuid4

import httpx
import typer
from pydantic import BaseModel
from rich.console import Console
from typer.core import TyperGroup

from service.client import ApiError, Client, ClientError, display
from service.client.connection import OnEvent
from service.contract.schemas import Job, PictureResult

INTERRUPTED: Final = 130  # the exit code after Ctrl-C, as shells have it


def fail(message: str, code: int = 1) -> typer.Exit:
    print(f"labelgrid: {message}", file=sys.stderr)
    return typer.Exit(code)


class OneLineErrors(TyperGroup):
    """A command line whose expected errors are one line each. After Ctrl-C typer itself ends it with INTERRUPTED."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ClientError as error:
            keyless = isinstance(error, ApiError) and error.status == 401  # the service's words are for HTTP
            raise fail(f"{error} (set LABELGRID_API_KEY)" if keyless else str(error)) from error
        except OSError as error:
            raise fail(f"{error.filename or 'output'}: {error.strerror or error}") from error


def connect(url: str) -> Client:
    """Return a client. Raises ClientError, also for a proxy of the environment that cannot be used."""
    try:
        return Client(url)
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        raise ClientError(str(error)) from error


def until_ctrl_c(client: Client, submit: Callable[..., Job], report: OnEvent, *, wait: bool) -> Job:
    """Return the job that `submit` creates, finished if `wait`. Ctrl-C cancels it.

    After Ctrl-C before the answer, the same request with the same Idempotency-Key tells which job it created.
    `report` is called with all events.
    """
    send = functools.partial(submit, client, idempotency_key=uuid4().hex, wait=False)
    job = None
    try:
        job = send(on_event=report)
        return client.wait(job.id, on_event=report) if wait else job
    except KeyboardInterrupt:
        which = f"job {job.id}" if job else "its job, if there is one,"
        try:
            job_id = client.cancel((job or send()).id).id
        except ClientError as error:
            raise fail(f"interrupted; {which} is not cancelled: {error}", INTERRUPTED) from error
        raise fail(f"interrupted; job {job_id} is cancelled", INTERRUPTED) from None


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What a command saves and prints of a finished job."""

    output: Path | None
    images: Path | None
    as_json: bool

    def check(self) -> None:
        """Raise an error if files could not be saved: before the job rather than after it."""
        if self.output is not None and not self.output.exists() and not os.access(self.output.parent, os.W_OK):
            raise ClientError(f"{self.output}: there is no folder {self.output.parent} that can be written to")
        if self.images is not None:
            self.images.mkdir(parents=True, exist_ok=True)

    def write(self, client: Client, job: Job) -> None:
        if self.output is not None:
            self.output.write_bytes(client.grid(job.id))
        if self.images is not None and job.result is not None:
            _save_pictures(client, job.id, job.result.pictures, self.images)
        if self.as_json:
            print_json(job)
            return
        console = Console()
        display.result(job, console)
        if self.output is not None:
            console.print(f"the grid is in {display.plain(str(self.output))}", highlight=False)


def _save_pictures(client: Client, job_id: str, pictures: Sequence[PictureResult], folder: Path) -> None:
    for i, picture in enumerate(pictures):
        index = int(PurePosixPath(picture.url).stem)  # in the job, of whose runs these are the best
        (folder / f"{i}.png").write_bytes(client.image(job_id, index))
        if picture.trajectory_url is not None:
            (folder / "strips").mkdir(exist_ok=True)
            (folder / "strips" / f"{i}.png").write_bytes(client.strip(job_id, index))


def run_job(submit: Callable[..., Job], url: str, outputs: Outputs, detach: bool) -> Job:
    """Create a job, and return it once it is finished and its result is written. Ctrl-C cancels it.

    `detach`: print its id instead, and return it at once.
    """
    if detach and (outputs.output or outputs.images):
        raise typer.BadParameter("with --detach there is nothing to save yet; give --output and --images to `wait`")
    with connect(url) as client:
        outputs.check()
        with display.JobProgress() as progress:
            job = until_ctrl_c(client, submit, progress.on_event, wait=not detach)
        if detach:
            print(job.id)
        else:
            outputs.write(client, job)
        return job


def print_json(body: BaseModel) -> None:
    print(json.dumps(body.model_dump(mode="json"), indent=2))  # ASCII, which every terminal and pipe takes
