"""The command line's output: a progress bar while a job runs, and tables. Knows no HTTP."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from service.client.messages import Event, Retry
from service.contract.events import PictureEvent, StatusEvent, StepsEvent
from service.contract.schemas import GenerateResult, Job, JobHead, ModelList, PictureResult, ScoreResult

UNCUT = 10_000  # width in characters: wider than any table, so that ids and names can be copied
FOUND = 0.5  # probability above which an object counts as present, as in `exact`


def printable(text: str) -> str:
    """Replace the characters of a service's text that the terminal would interpret."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def plain(text: str) -> str:
    """Make a service's text printable, and escape rich's markup."""
    return escape(printable(text))


class JobProgress(Progress):
    """A bar that shows how many pictures of a job are finished. A picture's steps count as parts of it."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self.add_task("sending", total=None)
        self._finished: set[int] = set()
        self.job_id: str | None = None  # known from the first event on

    def on_event(self, event: Event) -> None:
        match event.data:
            case Job() as job:
                self.job_id = job.id
                self.update(self._task, description=job.status, total=job.progress.total)
            case StatusEvent(status=status):
                self.update(self._task, description=status)
            case PictureEvent(index=index):
                self._finished.add(index)
                self.update(self._task, completed=len(self._finished))
            case StepsEvent(pictures=pictures):
                parts = sum(one.step / one.steps for one in pictures if one.index not in self._finished)
                self.update(self._task, completed=len(self._finished) + parts)
            case Retry(pause_s=pause_s, reason=reason):
                self.console.print(f"[yellow]{plain(reason)}; retrying in {pause_s:.0f} s", highlight=False)


def verdict(picture: PictureResult) -> str:
    """Describe in words whether the requested objects are present."""
    if picture.exact:
        return "[green]as requested[/]"
    extra = [name for name, p in picture.scores.items() if p > FOUND and name not in picture.labels]
    hits = f"{picture.accuracy * len(picture.labels):.0f} of {len(picture.labels)}"
    return f"[yellow]{hits}[/]" + (f", also {plain(', '.join(extra))}" if extra else "")


def pictures(pictures: Sequence[PictureResult]) -> Table:
    table = Table("picture", "requested (probability)", "verdict")
    for i, picture in enumerate(pictures):
        requested = ", ".join(f"{name} ({picture.scores.get(name, 0.0):.2f})" for name in picture.labels)
        table.add_row(str(i), plain(requested), verdict(picture))
    return table


def result(job: Job, console: Console) -> None:
    """Print the scores and verdicts of a finished job."""
    match job.result:
        case GenerateResult() as generated:
            console.print(pictures(generated.pictures))
            figures = f"accuracy {generated.accuracy:.3f}, exact match {generated.exact_match:.3f}"
            console.print(f"{figures}; seed {job.seed}, model {plain(job.model)}", highlight=False)
        case ScoreResult() as scored if job.seed is None:  # uploaded pictures
            console.print(pictures(scored.pictures))
            (one,) = scored.repeats
            figures = f"accuracy {one.accuracy:.3f}, exact match {one.exact_match:.3f}, F1 {one.f1:.3f}"
            console.print(f"{figures}; scored by {plain(job.model)}", highlight=False)
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
    summaries = (scored.accuracy, scored.exact_match, scored.f1)
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
