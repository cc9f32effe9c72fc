"""What the command line shows of jobs: a progress bar while they run, and tables. Knows no HTTP."""

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from service.client.messages import Event, Retry
from service.contract.events import PictureEvent, StatusEvent, StepsEvent
from service.contract.schemas import GenerateResult, Job, JobHead, ModelList, PictureResult, ScoreResult, Summary

WIDEST = 10_000  # characters of a table, more than any has
FOUND = 0.5  # probability from which the evaluator sees an object, as in `exact`


def plain(text: str) -> str:
    """Text of a service for the terminal: nothing that rich takes for markup, nor the terminal for a command."""
    return escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text))


def whole(table: Table, console: Console) -> None:
    """Prints a table as wide as it is, even where the terminal is narrower: ids and names are there to be copied."""
    table.width = console.measure(table, options=console.options.update(max_width=WIDEST)).maximum
    console.print(table, crop=False)


class JobProgress:
    """A bar of the pictures of a job, fed with its events. Steps count as parts of a picture."""

    def __init__(self, console: Console) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[made]}/{task.fields[pictures]} pictures"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("asking", total=None, made=0, pictures="?")
        self._made: set[int] = set()
        self._done_before = 0
        self.job_id: str | None = None  # once it is known

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def on_event(self, event: Event) -> None:
        match event.data:
            case Job() as job:
                self.job_id = job.id
                self._done_before = max(self._done_before, job.progress.done)
                total = job.progress.total
                self._bar.update(self._task, description=job.status, total=total, pictures=total)
                self._show(0.0)
            case StatusEvent(status=status):
                self._bar.update(self._task, description=status)
            case PictureEvent(index=index):
                self._made.add(index)
                self._show(0.0)
            case StepsEvent(pictures=pictures):
                self._show(sum(one.step / one.steps for one in pictures if one.index not in self._made))
            case Retry(pause_s=pause_s, reason=reason):
                self._bar.console.print(f"[yellow]{plain(reason)}; again in {pause_s:.0f} s", highlight=False)

    def _show(self, parts: float) -> None:
        made = max(self._done_before, len(self._made))
        self._bar.update(self._task, completed=made + parts, made=made)


def verdict(picture: PictureResult) -> str:
    """Whether what was asked for is there, in words."""
    if picture.exact:
        return "[green]as asked[/]"
    extra = [name for name, p in picture.scores.items() if p > FOUND and name not in picture.labels]
    hits = f"{picture.accuracy * len(picture.labels):.0f} of {len(picture.labels)}"
    return f"[yellow]{hits}[/]" + (f", also {plain(', '.join(extra))}" if extra else "")


def pictures(pictures: Sequence[PictureResult]) -> Table:
    table = Table("picture", "asked (probability)", "verdict")
    for i, picture in enumerate(pictures):
        asked = ", ".join(f"{name} ({picture.scores.get(name, 0.0):.2f})" for name in picture.labels)
        table.add_row(str(i), plain(asked), verdict(picture))
    return table


def result(job: Job, console: Console) -> None:
    """The scores and verdicts of a finished job."""
    match job.result:
        case GenerateResult() as generated:
            console.print(pictures(generated.pictures))
            figures = f"accuracy {generated.accuracy:.3f}, exact match {generated.exact_match:.3f}"
            console.print(f"{figures}; seed {job.seed}, model {plain(job.model)}", highlight=False)
        case ScoreResult() as scored if job.seed is None:  # of pictures that were sent
            console.print(pictures(scored.pictures))
            (one,) = scored.repeats
            figures = f"accuracy {one.accuracy:.3f}, exact match {one.exact_match:.3f}, F1 {one.f1:.3f}"
            console.print(f"{figures}; judged by {plain(job.model)}", highlight=False)
        case ScoreResult() as scored:
            console.print(repeats(scored))
            seeds = f"seeds {scored.repeats[0].seed} to {scored.repeats[-1].seed}"
            console.print(f"model {plain(job.model)}, {seeds}; the grid shows the best", highlight=False)


def repeats(scored: ScoreResult) -> Table:
    table = Table("repeat", "seed", "accuracy", "exact match", "F1")
    for i, one in enumerate(scored.repeats):
        name = f"{i} (best)" if i == scored.best else str(i)
        table.add_row(name, str(one.seed), f"{one.accuracy:.3f}", f"{one.exact_match:.3f}", f"{one.f1:.3f}")
    table.add_section()
    summaries: tuple[Summary, ...] = (scored.accuracy, scored.exact_match, scored.f1)
    table.add_row("mean ± std", "", *(f"{one.mean:.3f} ± {one.std:.3f}" for one in summaries))
    table.add_row("maximum", "", *(f"{one.max:.3f}" for one in summaries))
    return table


def jobs(heads: Sequence[JobHead]) -> Table:
    table = Table("id", "kind", "status", "pictures", "created", "model")
    for head in heads:
        progress = f"{head.progress.done}/{head.progress.total}"
        table.add_row(plain(head.id), head.kind, head.status, progress, plain(head.created_at[:19]), plain(head.model))
    return table


def models(listing: ModelList) -> Table:
    table = Table("name", "labels", "created", "digest", "")
    for model in listing.models:
        default = "default" if model.promoted else ""
        row = (model.name, str(model.labels), model.created_at[:19], model.digest[:12], default)
        table.add_row(*map(plain, row))
    for name, reason in listing.problems.items():
        table.add_row(plain(name), "", "", "", f"[yellow]{plain(reason)}[/]")
    return table
