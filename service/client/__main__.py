"""`python -m service.client`: a command line for a service on this or any other machine.

The API key comes from LABELGRID_API_KEY; there is no option for it, since other users can read command lines.
Exit codes: 0 success, 1 an error, 2 wrong usage, 3 a score below --fail-under, 130 interrupted.
"""

import contextlib
import functools
import inspect
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, Unpack, get_type_hints

import typer
from pydantic_core import from_json
from rich.console import Console

from service.client import ApiError, Client, ClientError, Options, display, lines
from service.client.job_command import (
    INTERRUPTED,
    OneLineErrors,
    Outputs,
    connect,
    fail,
    print_json,
    run_job,
)
from service.client.messages import DEFAULT_URL
from service.client.thresholds import BELOW, below, parse_thresholds
from service.contract.schemas import LONGEST_PAGE, JobHead, JobPage, SamplingFields, ScoreResult, WorkerDevice

Number = TypeVar("Number", int, float)

app = typer.Typer(
    cls=OneLineErrors,
    help="Generates and scores pictures with a labelgrid service. Its API key is read from LABELGRID_API_KEY.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Url = Annotated[str, typer.Option(envvar="LABELGRID_URL", help="address of the service")]
AsJson = Annotated[bool, typer.Option("--json", help="print the service's response as JSON")]
AsLines = Annotated[bool, typer.Option("--jsonl", help="print JSON Lines: one for each picture, or for each run")]
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


def _with_sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's `**options` by an option for each of Options, described as in the API."""
    *parameters, _ = inspect.signature(command).parameters.values()
    for name, kind in {**get_type_hints(Options), "guidance_interval": tuple[float, float]}.items():
        metavar = "LOW HIGH" if name == "guidance_interval" else None
        option = typer.Option(None, help=SamplingFields.model_fields[name].description, metavar=metavar)
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def _read_layouts(path: Path) -> Any:
    """Return the content of a JSON file, whose entries the service checks."""
    try:
        layouts = from_json(path.read_bytes())
    except ValueError as error:
        raise ClientError(f"{path}: not JSON: {error}") from error
    if not isinstance(layouts, list):
        raise ClientError(f"{path}: wanted a list with a layout, or null, for each picture")
    return layouts


@app.command()
@_with_sampling_options
def generate(
    labels: Annotated[
        list[str] | None,
        typer.Argument(help='the labels of each picture: "red cube, blue sphere"', show_default=False),
    ] = None,
    url: Url = DEFAULT_URL,
    from_lines: Annotated[
        Path | None,
        typer.Option("--lines", help="read label lists from a file of JSON Lines, or - for standard input"),
    ] = None,
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
    as_lines: AsLines = False,
    **options: Unpack[Options],
) -> None:
    """Generate and score pictures, one for each argument or line, or reproduce those of a recipe."""
    if not labels and recipe is None and from_lines is None:
        raise typer.BadParameter("give labels, --lines or a --recipe")
    if labels and from_lines is not None:
        raise typer.BadParameter("give labels or --lines, not both")
    lists = _lists(labels) if labels else None
    others = list[dict[str, Any]]()
    if from_lines is not None:
        lists, others = lines.read_lines(from_lines, lines.OUTPUT_FIELDS)
    points = _read_layouts(layouts) if layouts else None
    submit = functools.partial(
        Client.generate, labels=lists, recipe=recipe, layouts=points, trajectory=trajectory, **options
    )
    outputs = Outputs(output=output, images=images, as_json=as_json, as_lines=as_lines, others=others)
    run_job(submit, url, outputs, detach)


def _lists(labels: Sequence[str]) -> list[list[str]]:
    return [[label.strip() for label in entry.split(",")] for entry in labels]


@app.command()
@_with_sampling_options
def score(
    file: Annotated[
        Path,
        typer.Argument(
            help="a test file: a JSON list of label lists; or JSON Lines, .jsonl or - for standard input",
            show_default=False,
        ),
    ],
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
    fail_under: Annotated[
        list[str] | None,
        typer.Option(
            help="exit with 3 if a mean is lower: accuracy=0.95, exact_match=0.9, f1=0.9 or 'recall:red cube=0.9'. "
            "Repeatable"
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(dir_okay=False, writable=True, help="file for an HTML page: scores by label, the worst pictures"),
    ] = None,
    by_label: Annotated[
        Path | None, typer.Option("--csv", dir_okay=False, writable=True, help="file for the scores by label")
    ] = None,
    detach: Detach = False,
    as_json: AsJson = False,
    as_lines: AsLines = False,
    **options: Unpack[Options],
) -> None:
    """Score the model or given pictures on a test file. --output and --images save the best run."""
    try:
        thresholds = parse_thresholds(fail_under or [])
    except ValueError as error:
        raise typer.BadParameter(f"--fail-under {error}") from error
    if detach and thresholds:
        raise typer.BadParameter("with --detach there is no score yet for --fail-under")
    if detach and (report or by_label):
        raise typer.BadParameter("with --detach there is no score yet for --report and --csv")
    conditions = lines.read_lines(file)[0] if lines.is_lines(file) else file
    submit = functools.partial(Client.score, conditions=conditions, pictures=pictures, repeats=repeats, **options)
    outputs = Outputs(
        output=output, images=images, report=report, by_label=by_label, as_json=as_json, as_lines=as_lines
    )
    job = run_job(submit, url, outputs, detach)
    if job is not None and isinstance(job.result, ScoreResult):
        try:
            missed = below(job.result, thresholds)
        except ValueError as error:
            raise ClientError(f"--fail-under: {error}") from error
        if missed:
            raise fail(missed, BELOW)


def _numbers(text: str, kind: Callable[[str], Number]) -> list[Number]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a list of numbers, such as 2,4,8") from error


@app.command()
def sweep(
    labels: Annotated[
        list[str], typer.Argument(help='the labels of each picture: "red cube, blue sphere"', show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", dir_okay=False, writable=True, help="file for the grid")],
    steps: Annotated[str, typer.Option(help="numbers of steps, separated by commas")] = "1,2,4,8",
    guidance: Annotated[str, typer.Option(help="values of w, separated by commas")] = "1,2,3",
    seed: Annotated[int, typer.Option(help="seed of all pictures")] = 0,
    model: Annotated[str | None, typer.Option(help="a model's name; the promoted one by default")] = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Generate the same pictures with every combination of steps and guidance, in a grid with labelled axes."""
    from service.client.sweep import draw, run_sweep  # needs Pillow, and the rest does not

    steps_, ws = _numbers(steps, int), _numbers(guidance, float)
    with connect(url) as client, display.Bar() as progress:
        Outputs(output=output).check()
        task = progress.add_task("combinations", total=len(steps_) * len(ws))
        cells = run_sweep(
            client, _lists(labels), steps_, ws, seed=seed, model=model, on_cell=lambda: progress.advance(task)
        )
        output.write_bytes(draw(cells))
    Console(width=display.UNCUT).print(display.plain(str(output)), highlight=False)


@app.command()
def wait(
    job_id: JobId, url: Url = DEFAULT_URL, output: Output = None, images: Images = None, as_json: AsJson = False
) -> None:
    """Wait for a job and print its result. Ctrl-C ends the waiting, and the job goes on."""
    outputs = Outputs(output=output, images=images, as_json=as_json)
    with connect(url) as client:
        outputs.check()
        with display.JobProgress() as progress:
            try:
                job = client.wait(job_id, on_event=progress.on_event)
            except KeyboardInterrupt:  # whoever created the job may still want it
                message = f"interrupted; job {job_id} goes on; `labelgrid cancel {job_id}` ends it"
                raise fail(message, INTERRUPTED) from None
        outputs.write(client, job)


@app.command()
def jobs(
    url: Url = DEFAULT_URL,
    limit: Annotated[int, typer.Option(min=1, help="maximum number of jobs")] = 20,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first."""
    with connect(url) as client:
        page = _newest_jobs(client, limit)
        if as_json:
            print_json(page)
        else:
            Console(width=display.UNCUT).print(display.jobs(page.jobs))


def _newest_jobs(client: Client, limit: int) -> JobPage:
    """Return up to `limit` jobs as one page. The service's own may be short, since deleted jobs take places in them."""
    found, cursor = list[JobHead](), None
    while True:
        page = client.jobs(limit=min(limit - len(found), LONGEST_PAGE), cursor=cursor)
        found, cursor = [*found, *page.jobs], page.next
        if cursor is None or len(found) >= limit:
            return JobPage(jobs=found, next=cursor)


@app.command()
def cancel(job_id: JobId, url: Url = DEFAULT_URL) -> None:
    """Cancel a queued or running job."""
    with connect(url) as client:
        print(f"job {client.cancel(job_id).id} is cancelled")


@app.command()
def labels(
    url: Url = DEFAULT_URL,
    model: Annotated[
        str | None, typer.Option(help="a name that `models` lists; the promoted model if left out")
    ] = None,
) -> None:
    """List the labels that a model knows."""
    with connect(url) as client:
        for label in client.labels(model).labels:
            Console(width=display.UNCUT).print(display.plain(label), highlight=False)


@app.command()
def models(url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """List the models, which workers have loaded them, and the unusable files in storage."""
    with connect(url) as client:
        listing = client.models()
        if as_json:
            print_json(listing)
        else:
            devices = list[WorkerDevice]()
            with Client(url, retries=0) as once, contextlib.suppress(ApiError):  # 503 where no worker runs
                devices = once.ready().devices
            Console(width=display.UNCUT).print(display.models(listing, devices))


def main(program: str = "python -m service.client") -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # labels that the terminal's encoding lacks, as on stderr
    app(prog_name=program)


if __name__ == "__main__":
    main()
