"""What the commands share: how errors end them, and a job: created, waited for with a progress bar, saved, printed."""

import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import typer
from pydantic import BaseModel
from rich.console import Console

from service.client import ApiError, Client, ClientError, Event, display, lines
from service.client.connection import OnEvent
from service.contract.records import TERMINAL
from service.contract.schemas import Job, ScoreResult

INTERRUPTED: Final = 130  # the exit code after Ctrl-C, as shells have it


def fail(message: str, code: int = 1) -> typer.Exit:
    print(f"labelgrid: {message}", file=sys.stderr)
    return typer.Exit(code)


@contextlib.contextmanager
def connected(url: str) -> Iterator[Client]:
    """Give a client; its errors end the program with one line."""
    try:
        with Client(url) as client:
            yield client
    except ClientError as error:
        keyless = isinstance(error, ApiError) and error.status == 401  # the service's words are for HTTP
        raise fail(f"{error} (set LABELGRID_API_KEY)" if keyless else str(error)) from error
    except OSError as error:
        raise fail(f"{error.filename or 'output'}: {error.strerror or error}") from error
    except KeyboardInterrupt:
        raise fail("interrupted", INTERRUPTED) from None


def until_ctrl_c(
    client: Client, submit: Callable[..., Job], report: OnEvent | None = None, *, wait: bool = True
) -> Job:
    """Return the job that `submit` creates, finished unless `wait` is false. Ctrl-C cancels it.

    After Ctrl-C before the answer, the same request with the same Idempotency-Key tells which job it created.
    `report` is called with all events.
    """
    send = functools.partial(submit, client, idempotency_key=uuid4().hex)
    states: list[Job] = []

    def on_event(event: Event) -> None:
        if isinstance(event.data, Job):
            states.append(event.data)
        if report is not None:
            report(event)

    try:
        return send(on_event=on_event, wait=wait)
    except KeyboardInterrupt:
        if states and states[-1].status in TERMINAL:
            raise
        which = f"job {states[-1].id}" if states else "its job, if there is one,"
        try:
            job_id = client.cancel((states[-1] if states else send(wait=False)).id).id
        except ClientError as error:
            raise fail(f"interrupted; {which} is not cancelled: {error}", INTERRUPTED) from error
        raise fail(f"interrupted; job {job_id} is cancelled", INTERRUPTED) from None


def run_job(
    submit: Callable[..., Job], url: str, output: Path | None, images: Path | None, detach: bool,
    show: Callable[[Job], None], report: Path | None = None, by_label: Path | None = None,
) -> Job | None:  # fmt: skip
    """Create a job, and return it once it is finished and its result is shown. Ctrl-C cancels it.

    `detach`: print its id instead, and return None. `report` and `by_label`: files for a score as HTML and CSV.
    """
    with connected(url) as client:
        for file in (report, by_label):
            check_places(file, None)
        check_places(output, images)
        if detach and (output or images):
            raise typer.BadParameter("with --detach there is nothing to save yet; give --output and --images to `wait`")
        if detach:
            print(until_ctrl_c(client, submit, wait=False).id)
            return None
        with display.JobProgress() as progress:
            job = until_ctrl_c(client, submit, progress.on_event)
        save_pictures(client, job, output, images)
        save_report(client, job, report, by_label)
        show(job)
        return job


def check_places(output: Path | None, images: Path | None) -> None:
    """Exit if files could not be saved: before the job rather than after it."""
    if output is not None and not output.exists() and not os.access(output.parent, os.W_OK):
        raise fail(f"{output}: there is no folder {output.parent} that can be written to")
    if images is not None:
        images.mkdir(parents=True, exist_ok=True)


def save_pictures(client: Client, job: Job, output: Path | None, images: Path | None) -> None:
    """Save the pictures of a finished job."""
    if output is not None:
        output.write_bytes(client.grid(job.id))
    if images is not None and job.result is not None:
        n = len(job.result.pictures)
        first = job.result.best * n if isinstance(job.result, ScoreResult) else 0
        for i, picture in enumerate(job.result.pictures):
            (images / f"{i}.png").write_bytes(client.image(job.id, first + i))
            if picture.trajectory_url is not None:
                (images / "strips").mkdir(exist_ok=True)
                (images / "strips" / f"{i}.png").write_bytes(client.strip(job.id, first + i))


def save_report(client: Client, job: Job, report: Path | None, by_label: Path | None) -> None:
    """Save what a finished score says of each label."""
    if not isinstance(job.result, ScoreResult) or not (report or by_label):
        return
    from service.client.report import as_csv, html  # takes a while, and most commands need none

    if by_label is not None:
        by_label.write_text(as_csv(job.result.by_label), encoding="utf-8")
    if report is not None:
        report.write_text(html(job, functools.partial(client.image, job.id)), encoding="utf-8")


def printer(
    output: Path | None, as_json: bool, as_lines: bool = False, others: Sequence[Mapping[str, Any]] = ()
) -> Callable[[Job], None]:
    """Return what prints a finished job: as a table, as JSON, or as JSON Lines with the `others`' fields."""

    def show(job: Job) -> None:
        if as_json:
            print_json(job)
        elif as_lines:
            for line in lines.lines_of(job, others):
                print(line)
        else:
            console = Console()
            display.result(job, console)
            if output is not None:
                console.print(f"the grid is in {display.plain(str(output))}", highlight=False)

    return show


def print_json(body: BaseModel) -> None:
    print(json.dumps(body.model_dump(mode="json"), indent=2))  # ASCII, which every terminal and pipe takes
