"""`python -m service.client`: a command line for a service on this or any other machine.

The API key comes from LABELGRID_API_KEY; there is no option for it, since other users can read command lines.
"""

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, cast

import typer
from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from service.client import Client, ClientError, Options, display
from service.client.messages import DEFAULT_URL
from service.contract.records import Layout
from service.contract.schemas import Job, ScoreResult
from shared.options import SamplerName, SpacingName

HELP = (
    "Generates and scores pictures with a labelgrid service. Its address is --url or LABELGRID_URL, its API key "
    "LABELGRID_API_KEY."
)

app = typer.Typer(
    help=HELP, no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
)

Url = Annotated[str, typer.Option(envvar="LABELGRID_URL", help="address of the service")]
AsJson = Annotated[bool, typer.Option("--json", help="print the service's response as JSON")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="file for the grid, a PNG")]
Images = Annotated[
    Path | None, typer.Option(help="folder for the pictures, 0.png, 1.png, ..., and their strips, strips/0.png, ...")
]
Detach = Annotated[bool, typer.Option("--detach", help="print the job's id and do not wait for it")]
Seed = Annotated[int | None, typer.Option(help="the same seed gives the same pictures")]
Steps = Annotated[int | None, typer.Option(help="number of sampling steps")]
Guidance = Annotated[float | None, typer.Option(help="weight w of classifier-free guidance; 1 turns it off")]
Sampler = Annotated[SamplerName | None, typer.Option(help="the sampler")]
Spacing = Annotated[SpacingName | None, typer.Option(help="spacing of the timesteps")]
Eta = Annotated[float | None, typer.Option(help="noise of the sampler ddim, 0 to 1")]
Interval = Annotated[
    tuple[float, float] | None,
    typer.Option(metavar="LOW HIGH", help="apply guidance only between these fractions of T"),
]
ClipX0 = Annotated[bool | None, typer.Option(help="clip the predicted picture to [-1, 1] in every step")]
ModelName = Annotated[
    str | None, typer.Option("--model", help="a name that `models` lists; the promoted model if left out")
]
Columns = Annotated[int | None, typer.Option(help="columns of the grid")]
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


def _check_places(output: Path | None, images: Path | None) -> None:
    """Exit if the files could not be written: before the job rather than after it."""
    written = []
    if output is not None:
        if not output.parent.is_dir():
            raise _fail(f"{output}: there is no folder {output.parent}")
        if output.is_dir():
            raise _fail(f"{output} is a folder; --output wants a file")
        written.append(output if output.exists() else output.parent)
    if images is not None:
        there = next(path for path in (images, *images.absolute().parents) if path.exists())
        if not there.is_dir():
            raise _fail(f"{images}: {there} is not a folder")
        written.append(there)
    for path in written:
        if not os.access(path, os.W_OK):
            raise _fail(f"{path} cannot be written")


def _sampling(context: typer.Context) -> Options:
    """Return the given sampling options of a command; its parameters have their names."""
    given = {name: context.params.get(name) for name in Options.__annotations__}
    return cast(Options, {name: value for name, value in given.items() if value is not None})


def _read_layouts(path: Path) -> list[Layout | None]:
    try:
        return TypeAdapter(list[Layout | None]).validate_json(path.read_bytes())
    except OSError as error:
        raise _fail(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise _fail(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def _follow(client: Client, submit: Callable[..., Job]) -> Job:
    """Submit a job and wait for it, with a progress bar. Ctrl-C cancels it."""
    with display.JobProgress(Console(stderr=True)) as progress:
        try:
            return submit(on_event=progress.on_event)
        except KeyboardInterrupt:
            if progress.job_id is None:
                raise _fail("interrupted", 130) from None
            client.cancel(progress.job_id)
            raise _fail(f"interrupted; job {progress.job_id} is cancelled", 130) from None


def _show(client: Client, job: Job, output: Path | None, images: Path | None, as_json: bool) -> None:
    """Save the pictures of a finished job and print its result."""
    if output is not None:
        output.write_bytes(client.grid(job.id))
    if images is not None and job.result is not None:
        images.mkdir(parents=True, exist_ok=True)
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
def generate(
    context: typer.Context,
    labels: Annotated[
        list[str] | None,
        typer.Argument(help='the labels of each picture: "red cube, blue sphere"', show_default=False),
    ] = None,
    url: Url = DEFAULT_URL,
    output: Output = None,
    images: Images = None,
    seed: Seed = None,
    steps: Steps = None,
    guidance: Guidance = None,
    sampler: Sampler = None,
    spacing: Spacing = None,
    guidance_interval: Interval = None,
    eta: Eta = None,
    clip_x0: ClipX0 = None,
    model: ModelName = None,
    columns: Columns = None,
    layouts: Annotated[
        Path | None, typer.Option(help="positions of the objects: a JSON file with the API's `layouts`")
    ] = None,
    trajectory: Annotated[int | None, typer.Option(help="stages from noise to picture in each strip")] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="a PNG of the service to reproduce, in place of labels and options")
    ] = None,
    detach: Detach = False,
    as_json: AsJson = False,
) -> None:
    """Generate and score pictures, one for each argument, or reproduce those of a recipe."""
    if not labels and recipe is None:
        raise typer.BadParameter("give labels or a --recipe")
    lists = [[label.strip() for label in entry.split(",")] for entry in labels] if labels else None
    options = _sampling(context)
    points = _read_layouts(layouts) if layouts else None
    with _connected(url) as client:
        _check_places(output, images)
        submit = functools.partial(
            client.generate, lists, recipe=recipe, layouts=points, trajectory=trajectory, **options
        )
        if detach:
            print(submit(wait=False).id)
        else:
            _show(client, _follow(client, submit), output, images, as_json)


@app.command()
def score(
    context: typer.Context,
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
    seed: Seed = None,
    steps: Steps = None,
    guidance: Guidance = None,
    sampler: Sampler = None,
    spacing: Spacing = None,
    guidance_interval: Interval = None,
    eta: Eta = None,
    clip_x0: ClipX0 = None,
    model: ModelName = None,
    columns: Columns = None,
    detach: Detach = False,
    as_json: AsJson = False,
) -> None:
    """Score the model or given pictures on a test file. --output and --images save the best run."""
    options = _sampling(context)
    with _connected(url) as client:
        _check_places(output, images)
        submit = functools.partial(client.score, file, pictures=pictures, repeats=repeats, **options)
        if detach:
            print(submit(wait=False).id)
        else:
            _show(client, _follow(client, submit), output, images, as_json)


@app.command()
def wait(
    job_id: JobId, url: Url = DEFAULT_URL, output: Output = None, images: Images = None, as_json: AsJson = False
) -> None:
    """Wait for a job and print its result."""
    with _connected(url) as client:
        _check_places(output, images)
        with display.JobProgress(Console(stderr=True)) as progress:
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
            display.whole(display.jobs(page.jobs), Console())


@app.command()
def cancel(job_id: JobId, url: Url = DEFAULT_URL) -> None:
    """Cancel a queued or running job."""
    with _connected(url) as client:
        print(f"job {client.cancel(job_id).id} is cancelled")


@app.command()
def labels(url: Url = DEFAULT_URL, model: ModelName = None) -> None:
    """List the labels that a model knows."""
    with _connected(url) as client:
        for label in client.labels(model).labels:
            print("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in label))


@app.command()
def models(url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """List the models and the unusable files in storage."""
    with _connected(url) as client:
        listing = client.models()
        if as_json:
            print(listing.model_dump_json(indent=2))
        else:
            display.whole(display.models(listing), Console())


if __name__ == "__main__":
    app(prog_name="python -m service.client")
