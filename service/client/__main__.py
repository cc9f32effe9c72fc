"""`python -m service.client`: a command line for a service on this or any other machine.

The API key comes from LABELGRID_API_KEY; there is no option for it, since other users can read command lines.
Exit codes: 0 success, 1 an error, 2 wrong usage, 3 a score below --fail-under, 130 interrupted.
"""

import codecs
import contextlib
import functools
import inspect
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple, Unpack, get_type_hints

import typer
from pydantic_core import from_json
from rich.console import Console

from service.client import ApiError, Client, ClientError, Options, display
from service.client.edits import HELP, read_edit
from service.client.job_command import INTERRUPTED, OneLineErrors, Outputs, connect, fail, print_json, run_job
from service.client.messages import DEFAULT_URL
from service.contract.records import JOB_ID
from service.contract.schemas import (
    LONGEST_PAGE,
    JobFields,
    JobHead,
    JobPage,
    SamplingFields,
    ScoreResult,
    WorkerDevice,
)

SCORES: Final = ("accuracy", "exact_match", "f1")
RECALL: Final = "recall:"  # of the label that follows
BELOW: Final = 3  # the exit code of a score below its threshold

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


def _read_list(file: typer.FileBinaryRead) -> Any:
    """Return the list in a JSON file, whose entries the service checks."""
    try:
        content = from_json(file.read().removeprefix(codecs.BOM_UTF8))
    except ValueError as error:
        raise ClientError(f"{file.name}: not JSON: {error}") from error
    if not isinstance(content, list):
        raise ClientError(f"{file.name}: wanted a JSON list with an entry for each picture")
    return content


@app.command()
@_with_sampling_options
def generate(
    labels: Annotated[
        list[str] | None,
        typer.Argument(help='the labels of each picture: "red cube, blue sphere"', show_default=False),
    ] = None,
    url: Url = DEFAULT_URL,
    file: Annotated[
        typer.FileBinaryRead | None,
        typer.Option(metavar="FILE", help="read labels from a JSON list of label lists; - is standard input"),
    ] = None,
    output: Output = None,
    images: Images = None,
    layouts: Annotated[
        typer.FileBinaryRead | None,
        typer.Option(metavar="FILE", help="positions of the objects: a JSON file with the API's `layouts`"),
    ] = None,
    trajectory: Annotated[int | None, typer.Option(help="stages from noise to picture in each strip")] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="a PNG of the service to reproduce, in place of labels and options")
    ] = None,
    detach: Detach = False,
    as_json: AsJson = False,
    **options: Unpack[Options],
) -> None:
    """Generate and score pictures, one for each argument or list of a file, or reproduce those of a recipe."""
    if not labels and file is None and recipe is None:
        raise typer.BadParameter("give labels, a --file or a --recipe")
    if labels and file is not None:
        raise typer.BadParameter("give labels or a --file, not both")
    lists = [[label.strip() for label in entry.split(",")] for entry in labels] if labels else None
    submit = functools.partial(
        Client.generate,
        labels=_read_list(file) if file else lists,
        recipe=recipe,
        layouts=_read_list(layouts) if layouts else None,
        trajectory=trajectory,
        **options,
    )
    run_job(submit, url, Outputs(output=output, images=images, as_json=as_json), detach)


@app.command()
def edit(
    picture: Annotated[str, typer.Argument(help="a PNG of the service, or a job's id", show_default=False)],
    edits: Annotated[list[str], typer.Argument(help=HELP, show_default=False)],
    url: Url = DEFAULT_URL,
    index: Annotated[int, typer.Option(min=0, help="which picture of the job")] = 0,
    output: Output = None,
    images: Images = None,
    trajectory: Annotated[int | None, typer.Option(help="stages from noise to picture in the strip")] = None,
    deadline_s: Annotated[float | None, typer.Option(help=JobFields.model_fields["deadline_s"].description)] = None,
    detach: Detach = False,
    as_json: AsJson = False,
) -> None:
    """Draw a picture again with some objects changed, one after the other, and all else as it is."""
    changes = [read_edit(one) for one in edits]
    if JOB_ID.fullmatch(picture):
        submit = functools.partial(Client.edit, job_id=picture, index=index)
    else:
        submit = functools.partial(Client.generate, recipe=Path(picture))
    submit = functools.partial(submit, edits=changes, trajectory=trajectory, deadline_s=deadline_s)
    run_job(submit, url, Outputs(output=output, images=images, as_json=as_json), detach)


class Threshold(NamedTuple):
    """The lowest value of a score with which the command succeeds."""

    score: str  # one of SCORES, or RECALL and a label
    least: float

    def value(self, result: ScoreResult) -> float:
        """Return the mean that the threshold is for. Raises ClientError for a label that no picture asked for."""
        if self.score in SCORES:
            return float(getattr(result, self.score).mean)
        label = self.score.removeprefix(RECALL)
        recall = next((one.recall for one in result.by_label if one.label == label), None)
        if recall is None:
            raise ClientError(f'--fail-under: no picture asked for "{label}"')
        return recall


def _parse_threshold(text: str) -> Threshold:
    """Read NAME=VALUE, such as accuracy=0.95 or "recall:red cube=0.9"."""
    score, _, value = text.rpartition("=")
    with contextlib.suppress(ValueError):
        if (score in SCORES or score.removeprefix(RECALL) not in ("", score)) and 0 <= float(value) <= 1:
            return Threshold(score, float(value))
    raise typer.BadParameter(f'"{text}" is not NAME=VALUE: one of {", ".join(SCORES)} or recall:LABEL, and 0 to 1')


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
    fail_under: Annotated[
        list[Threshold] | None,
        typer.Option(
            parser=_parse_threshold,
            metavar="NAME=VALUE",
            help="exit with 3 if a mean is lower: accuracy=0.95, exact_match=0.9, f1=0.9 or 'recall:red cube=0.9'. "
            "Repeatable",
        ),
    ] = None,
    detach: Detach = False,
    as_json: AsJson = False,
    **options: Unpack[Options],
) -> None:
    """Score the model or given pictures on a test file. --output and --images save the best run.

    The seed is 0 unless --seed gives another, as with `python -m trainer score`, so that both find the same.
    """
    if detach and fail_under:
        raise typer.BadParameter("with --detach there is no score yet for --fail-under")
    if pictures is None and options.get("seed") is None:
        options["seed"] = 0
    submit = functools.partial(Client.score, conditions=file, pictures=pictures, repeats=repeats, **options)
    job = run_job(submit, url, Outputs(output=output, images=images, as_json=as_json), detach)
    if isinstance(job.result, ScoreResult):
        missed = [
            f"{one.score} {value:.4f} is below {one.least:g}"
            for one in fail_under or []
            if (value := one.value(job.result)) < one.least
        ]
        if missed:
            raise fail(", ".join(missed), BELOW)


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
