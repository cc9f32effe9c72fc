"""`python -m service.client`: a command line for a service on this or any other machine.

The API key comes from LABELGRID_API_KEY; there is no option for it, since other users can read command lines.
"""

import contextlib
import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Unpack, get_type_hints

import typer
from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from service.client import Client, ClientError, Options, display
from service.client.messages import DEFAULT_URL
from service.contract.records import Layout, Layouts
from service.contract.schemas import Job, SamplingFields, ScoreResult

app = typer.Typer(
    help="Generates and scores pictures with a labelgrid service. Its API key is read from LABELGRID_API_KEY.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Url = Annotated[str, typer.Option(envvar="LABELGRID_URL", help="address of the service")]
AsJson = Annotated[bool, typer.Option("--json", help="print the service's response as JSON")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", dir_okay=False, writable=True, help="file for the grid, a PNG")
]
Images = Annotated[
    Path | None,
    typer.Option(
        file_okay=False, writable=True, help="folder for the pictures, 0.png, ..., and strips, strips/0.png, ..."
    ),
]
Detach = Annotated[bool, typer.Option("--detach", help="print the job's id and do not wait for it")]
JobId = Annotated[str, typer.Argument(help="a job's id", show_default=False)]


def _fail(message: str, code: int = 1) -> typer.Exit:
    print(f"labelgrid: {message}", file=sys.stderr)
    return typer.Exit(code)


@contextlib.contextmanager
def _connected(url: str) -> Iterator[Client]:
    """Give a client; its errors end the program with one line."""
    try:
        with Client(url) as client:
            yield client
    except ClientError as error:
        raise _fail(str(error)) from error
    except OSError as error:
        raise _fail(f"{error.filename or 'output'}: {error.strerror or error}") from error


def _with_sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's `**options` by an option for each of Options, described as in the API."""
    *parameters, _ = inspect.signature(command).parameters.values()
    for name, kind in {**get_type_hints(Options), "guidance_interval": tuple[float, float]}.items():
        metavar = "LOW HIGH" if name == "guidance_interval" else None
        option = typer.Option(None, help=SamplingFields.model_fields[name].description, metavar=metavar)
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def _read_layouts(path: Path) -> list[Layout | None]:
    try:
        return TypeAdapter(Layouts).validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        raise _fail(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def _create(
    submit: Callable[..., Job], url: str, output: Path | None, images: Path | None, detach: bool, as_json: bool
) -> None:
    """Create a job and print its id or, once it is finished, its result. Ctrl-C cancels it."""
    with _connected(url) as client:
        _check_places(output, images)
        if detach:
            print(submit(client, wait=False).id)
            return
        with display.JobProgress() as progress:
            try:
                job = submit(client, on_event=progress.on_event)
            except KeyboardInterrupt:
                if progress.job_id is None:
                    raise
                client.cancel(progress.job_id)
                raise _fail(f"interrupted; job {progress.job_id} is cancelled", 130) from None
        _show(client, job, output, images, as_json)


def _check_places(output: Path | None, images: Path | None) -> None:
    """Exit if files could not be saved: before the job rather than after it."""
    if output is not None and not output.exists() and not os.access(output.parent, os.W_OK):
        raise _fail(f"{output}: there is no folder {output.parent} that can be written to")
    if images is not None:
        images.mkdir(parents=True, exist_ok=True)


def _show(client: Client, job: Job, output: Path | None, images: Path | None, as_json: bool) -> None:
    """Save the pictures of a finished job and print its result."""
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
    if as_json:
        print(job.model_dump_json(indent=2))
        return
    console = Console()
    display.result(job, console)
    if output is not None:
        console.print(f"the grid is in {display.plain(str(output))}", highlight=False)


@app.command()
@_with_sampling_options
def generate(
    labels: Annotated[
        list[str] | None,
        typer.Argument(help='the labels of each picture: "red cube, blue sphere"', show_default=False),
    ] = None,
    url: Url = DEFAULT_URL,
    output: Output = None,
    images: Images = None,
    layouts: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="positions of the objects: a JSON file with the API's `layouts`"
        ),
    ] = None,
    trajectory: Annotated[int | None, typer.Option(help="stages from noise to picture in each strip")] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="a PNG of the service to reproduce, in place of labels and options")
    ] = None,
    detach: Detach = False,
    as_json: AsJson = False,
    **options: Unpack[Options],
) -> None:
    """Generate and score pictures, one for each argument, or reproduce those of a recipe."""
    if not labels and recipe is None:
        raise typer.BadParameter("give labels or a --recipe")
    lists = [[label.strip() for label in entry.split(",")] for entry in labels] if labels else None
    points = _read_layouts(layouts) if layouts else None
    submit = functools.partial(
        Client.generate, labels=lists, recipe=recipe, layouts=points, trajectory=trajectory, **options
    )
    _create(submit, url, output, images, detach, as_json)


@app.command()
@_with_sampling_options
def score(
    file: Annotated[Path, typer.Argument(help="a test file: a JSON list of label lists", show_default=False)],
    url: Url = DEFAULT_URL,
    pictures: Annotated[
        Path | None,
        typer.Option(help="score these instead of the model: a zip or folder of 0.png, 1.png, ... in the file's order"),
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(help="number of runs over the file, each with its own seed (default: 10)")
    ] = None,
    output: Output = None,
    images: Images = None,
    detach: Detach = False,
    as_json: AsJson = False,
    **options: Unpack[Options],
) -> None:
    """Score the model or given pictures on a test file. --output and --images save the best run."""
    submit = functools.partial(Client.score, conditions=file, pictures=pictures, repeats=repeats, **options)
    _create(submit, url, output, images, detach, as_json)


@app.command()
def wait(
    job_id: JobId, url: Url = DEFAULT_URL, output: Output = None, images: Images = None, as_json: AsJson = False
) -> None:
    """Wait for a job and print its result."""
    with _connected(url) as client:
        _check_places(output, images)
        with display.JobProgress() as progress:
            job = client.wait(job_id, on_event=progress.on_event)
        _show(client, job, output, images, as_json)


@app.command()
def jobs(
    url: Url = DEFAULT_URL,
    limit: Annotated[int, typer.Option(help="maximum number of jobs")] = 20,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first."""
    with _connected(url) as client:
        page = client.jobs(limit=limit)
        if as_json:
            print(page.model_dump_json(indent=2))
        else:
            Console(width=display.UNCUT).print(display.jobs(page.jobs))


@app.command()
def cancel(job_id: JobId, url: Url = DEFAULT_URL) -> None:
    """Cancel a queued or running job."""
    with _connected(url) as client:
        print(f"job {client.cancel(job_id).id} is cancelled")


@app.command()
def labels(
    url: Url = DEFAULT_URL,
    model: Annotated[
        str | None, typer.Option(help="a name that `models` lists; the promoted model if left out")
    ] = None,
) -> None:
    """List the labels that a model knows."""
    with _connected(url) as client:
        for label in client.labels(model).labels:
            Console(width=display.UNCUT).print(display.plain(label), highlight=False)


@app.command()
def models(url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """List the models and the unusable files in storage."""
    with _connected(url) as client:
        listing = client.models()
        if as_json:
            print(listing.model_dump_json(indent=2))
        else:
            Console(width=display.UNCUT).print(display.models(listing))


if __name__ == "__main__":
    app(prog_name="python -m service.client")
