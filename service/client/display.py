"""The command line's output: a progress bar while a job runs, and tables. Knows no HTTP."""

from collections import Counter
from collections.abc import Sequence
from datetime import datetime

from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table

from service.client.messages import Event, Retry
from service.contract.records import TERMINAL
from service.contract.schemas import (
    EtaEvent,
    Job,
    JobHead,
    ModelList,
    PictureEvent,
    PictureResult,
    ScoreResult,
    StatusEvent,
    StepsEvent,
    WorkerDevice,
)

UNCUT = 10_000  # width in characters: wider than any table, so that ids and names can be copied


def plain(text: str) -> str:
    """Make a service's text safe to print: escape rich's markup, and replace what the terminal would interpret."""
    return escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text))


class JobProgress(Progress):
    """Shows on stderr, if that is a terminal, how many pictures of a job are finished. Steps count as parts of one."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        columns = (*Progress.get_default_columns(), MofNCompleteColumn())
        super().__init__(*columns, console=console, disable=not console.is_terminal, transient=True)
        self._task = self.add_task("sending", total=None)
        self._finished: set[int] = set()
        self._status, self._eta = "sending", ""

    def _words(self, eta: str | None = None) -> str:
        """Return the job's status, and when it will be done by the service's forecast; by default, the last one."""
        if eta is not None:
            self._eta = f", done at {datetime.fromisoformat(eta).astimezone():%H:%M:%S}"
        return self._status + (self._eta if self._status not in TERMINAL else "")

    def on_event(self, event: Event) -> None:
        match event.data:
            case Job() as job:
                self._status = job.status
                self.update(self._task, description=self._words(job.eta), total=job.progress.total)
            case StatusEvent(status=status):
                self._status = status
                self.update(self._task, description=self._words())
            case EtaEvent(eta=eta):
                self.update(self._task, description=self._words(eta))
            case PictureEvent(index=index):
                self._finished.add(index)
                self.update(self._task, completed=len(self._finished))
            case StepsEvent(pictures=pictures):
                parts = sum(one.step / one.steps for one in pictures if one.index not in self._finished)
                self.update(self._task, completed=len(self._finished) + parts)
            case Retry(pause_s=pause_s, reason=reason):
                self.console.print(f"[yellow]{plain(reason)}; retrying in {pause_s:.0f} s", highlight=False)


def pictures(pictures: Sequence[PictureResult]) -> Table:
    table = Table("picture", "requested (probability)", "verdict")
    for i, picture in enumerate(pictures):
        away = picture.distances or [None] * len(picture.labels)
        requested = ", ".join(
            f"{name} ({picture.scores.get(name, 0.0):.2f}{'' if d is None else f', {d:.1%} of the width off'})"
            for name, d in zip(picture.labels, away, strict=True)
        )
        verdict = f"[yellow]{picture.accuracy * len(picture.labels):.0f} of {len(picture.labels)}[/]"
        if picture.exact:
            verdict = "[green]exact[/]"
        elif picture.extra:
            verdict += f", also {plain(', '.join(picture.extra))}"
        if picture.kept is not None:
            verdict += f", selected: attempt {picture.kept}"
            verdict += f" of {len(picture.attempts)}" if picture.attempts else ""
        table.add_row(str(i), plain(requested), verdict)
    return table


def result(job: Job, console: Console) -> None:
    """Print the scores and verdicts of a finished job."""
    if isinstance(job.result, ScoreResult) and job.seed is not None:
        console.print(repeats(job.result))
        console.print(f"model {plain(job.model)}; the grid shows the best repeat", highlight=False)
    elif job.result is not None:  # pictures scored once: generated, or uploaded, which have no seed
        scores = job.result.repeats[0] if isinstance(job.result, ScoreResult) else job.result
        figures = f"accuracy {scores.accuracy:.3f}, exact match {scores.exact_match:.3f}, F1 {scores.f1:.3f}"
        figures += " of selected pictures" if getattr(scores, "selected", False) else ""
        source = "scored by" if job.seed is None else f"seed {job.seed}, model"
        console.print(pictures(job.result.pictures))
        console.print(f"{figures}; {source} {plain(job.model)}", highlight=False)


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


def models(listing: ModelList, devices: Sequence[WorkerDevice]) -> Table:
    """List the models, with the devices of the workers that have loaded them."""
    table = Table("name", "labels", "objects", "pixels", "created", "digest", "loaded on", "")
    for model in listing.models:
        default = "default" if model.promoted else ""
        objects = "{} to {}".format(*model.support.objects) if model.support else ""
        pixels = "{}x{}".format(*model.picture) if model.picture else ""
        counts = Counter(device.name for device in devices if model.name in device.models)
        loaded = ", ".join(f"{count} x {name}" if count > 1 else name for name, count in counts.items())
        about = (model.created_at[:19], model.digest[:12], loaded, default)
        row = (model.name, str(model.labels), objects, pixels, *about)
        table.add_row(*map(plain, row))
    for name, reason in listing.problems.items():
        table.add_row(plain(name), *[""] * 6, f"[yellow]{plain(reason)}[/]")
    return table
