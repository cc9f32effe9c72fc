"""Writes a checkpoint's card beside it: its training, its loss curve, its scores. Measures nothing.

NAME-card.json has what does not follow from the checkpoint: scores, licence, machine. From both, `train`, `score` and
`card` write the parts of NAME.md that stand between marks (`markdown.py`). What people write outside of them stays. The
card begins with the metadata that the Hugging Face Hub reads, as YAML. Scores of former weights are dropped.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from shared import storage as files
from shared.checkpoint import CheckpointInfo, CheckpointKind, path_of, read_info
from shared.options import NoOtherFields
from shared.storage import Location
from trainer.made_by import in_words, stages_of
from trainer.runs import read_log, undamaged
from trainer.score import SCORES
from trainer.studies.former_card import with_marks
from trainer.studies.markdown import marks, page, part_of, table, with_part

DATA = "-card.json"
SCORES_NOTE = """Mean and standard deviation over the runs, seeds 0 upwards, nothing picked. Each line is what
`python -m trainer score FILE --repeats N` prints."""
# The Hub's name of what a model does. Of its names, "text-to-image" is the one for pictures of what a request lists.
TASKS: dict[CheckpointKind, str] = {"denoiser": "text-to-image", "evaluator": "image-classification"}
TAGS: dict[CheckpointKind, list[str]] = {
    "denoiser": ["diffusion", "conditional-image-generation"],
    "evaluator": ["resnet", "multi-label-classification"],
}
PARTS = ("about", "made-by", "scores", "training")  # generated
SCORES_HEAD = ("file", "sampling", "runs", "accuracy", "exact match", "F1", "best accuracy", "network rows a picture")


class Spread(NoOtherFields):
    """A score's mean and standard deviation over runs."""

    mean: float
    std: float

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.std:.4f}"


class Score(NoOtherFields):
    """What `trainer score` found on a file, in so many runs."""

    file: str
    sampling: str  # in words
    runs: int
    accuracy: Spread
    exact_match: Spread
    f1: Spread
    best_accuracy: float
    rows_per_picture: float  # network rows


class Card(NoOtherFields):
    """NAME-card.json: what is known of a checkpoint beside what it says itself."""

    digest: str = ""  # of the weights that have these scores
    machine: str = ""  # that trained it, in words
    licence: str | None = None
    scores: tuple[Score, ...] = ()


def read_card(storage: Location, name: str) -> Card:
    """Return what NAME-card.json has; an empty card if there is none. TrainerError for a damaged file."""
    path = storage / f"{name}{DATA}"
    with undamaged(path):
        return Card.model_validate_json(files.read(path)) if path.is_file() else Card()


def plot_log(lines: list[dict[str, float]]) -> bytes:
    """Plot the losses over steps on a logarithmic scale, and the log's scores on a second axis; return the PNG."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    axes.plot([step for step, _ in losses], [loss for _, loss in losses], color="tab:gray", linewidth=1, label="loss")
    for name in sorted({key for line in lines for key in line if key.endswith("_loss")}):
        points = [(line["step"], line[name]) for line in lines if name in line]
        axes.plot(*zip(*points, strict=True), marker=".", label=name.replace("_", " "))
    axes.legend(loc="upper right", fontsize="small")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    names = sorted({key for line in lines for key in line if key.endswith(("/accuracy", "/exact_match"))})
    if names:
        scores = axes.twinx()
        for name in names:
            points = [(line["step"], line[name]) for line in lines if name in line]
            scores.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        scores.set(ylabel="score", ylim=(0, 1))
        scores.legend(loc="center right", fontsize="small")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[list[str]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield [f"{prefix}{key}", f"`{json.dumps(value)}`"]


def front_matter(name: str, kind: CheckpointKind, card: Card) -> str:
    """Return the Hub's metadata as YAML, with the means of the scores as its results.

    JSON is YAML, so values are written as JSON.
    """
    task = {"type": TASKS[kind]}
    lines = [f"license: {json.dumps(card.licence)}"] if card.licence else []
    lines += ["library_name: labelgrid", f"pipeline_tag: {TASKS[kind]}", f"tags: {json.dumps(TAGS[kind])}"]
    if card.scores:
        lines += ["model-index:", f"- name: {json.dumps(name)}", "  results:"]
    for score in card.scores:
        metrics = [{"type": one, "value": round(getattr(score, one).mean, 4)} for one in SCORES]
        dataset = {"type": "label-lists", "name": score.file}
        lines.append(f"  - {json.dumps({'task': task, 'dataset': dataset, 'metrics': metrics})}")
    return "\n".join(["---", *lines, "---"])


def score_of(figures: dict[str, Any]) -> Score:
    """Return the card's entry for what `trainer score` found."""
    options = figures["options"]
    return Score(
        file=figures["file"], runs=len(figures["runs"]), best_accuracy=figures["accuracy"]["max"],
        sampling=f"{options['sampler']}, {options['steps']} steps, w = {options['guidance']:g}",
        rows_per_picture=figures["rows_per_picture"],
        **{one: Spread(mean=figures[one]["mean"], std=figures[one]["std"]) for one in SCORES},
    )  # fmt: skip


def with_score(scores: tuple[Score, ...], new: Score) -> tuple[Score, ...]:
    """Add a score, in the place of one of the same file and sampling unless that is of more runs."""
    for i, one in enumerate(scores):
        if (one.file, one.sampling) == (new.file, new.sampling):
            return scores if one.runs > new.runs else (*scores[:i], new, *scores[i + 1 :])
    return *scores, new


def _row(score: Score) -> list[str]:
    means = [str(getattr(score, one)) for one in SCORES]
    last = [f"{score.best_accuracy:.4f}", f"{score.rows_per_picture:.0f}"]
    return [score.file, score.sampling, str(score.runs), *means, *last]


def write_card(
    storage: Location, name: str, *, log: Path | None = None, machine: str = "", score: Score | None = None,
    licence: str | None = None,
) -> Location:  # fmt: skip
    """Write storage/NAME.md and NAME-card.json; with a run's log also NAME-log.png and a copy of it.

    Return the card's path. `machine`: that trained it, in words. `licence`: of the weights, by the Hub's name of it,
    such as mit.
    """
    info, path = read_info(path_of(storage, name)), storage / f"{name}.md"
    old = read_card(storage, name)
    is_same = old.digest == info.digest
    scores = old.scores if is_same else ()
    card = Card(
        digest=info.digest, machine=machine or (old.machine if is_same else ""), licence=licence or old.licence,
        scores=with_score(scores, score) if score else scores,
    )  # fmt: skip
    files.write(storage / f"{name}{DATA}", f"{card.model_dump_json(indent=1)}\n".encode())
    curve = storage / f"{name}-log.png"
    if log is not None:
        lines = read_log(log)
        files.write(curve, plot_log(lines))
        files.write(storage / f"{name}-log.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    text = _without_metadata(files.read(path).decode("utf-8", "replace") if path.is_file() else "")
    if not any(mark in text for part in PARTS for mark in marks(part)):
        text = with_marks(text, name)
    made_by = in_words(stages_of(info)) or part_of(text, "made-by")
    for part, content in zip(PARTS, (_about(info, card), made_by, _scores(card), _training(info, curve)), strict=True):
        text = with_part(text, part, content)
    files.write(path, f"{front_matter(name, info.kind, card)}\n\n{text.lstrip()}".encode())
    return path


def _without_metadata(text: str) -> str:
    """Return the card without the Hub's metadata."""
    after = text.partition("\n---\n")[2] if text.startswith("---\n") else ""
    return after or text


def _about(info: CheckpointInfo, card: Card) -> str:
    made = f"made {info.created_at}" + (f" on {card.machine}" if card.machine else "")
    return f"Kind: {info.kind}, digest `{info.digest[:16]}`, {made}."


def _scores(card: Card) -> str:
    if not card.scores:
        return ""
    return page(["## Scores", SCORES_NOTE, table(SCORES_HEAD, [_row(one) for one in card.scores])])


def _training(info: CheckpointInfo, curve: Location) -> str:
    """Return how a checkpoint was trained, its configuration and its labels."""
    shown = f"![loss and scores over training]({curve.name})" if curve.is_file() else ""
    training = [row for row in _flat(info.training) if not row[0].endswith("made_by")]
    return page([
        "## Training", shown, table(["what", "value"], training),
        "## Configuration", table(["what", "value"], list(_flat(info.config))),
        f"{len(info.vocabulary)} labels: {', '.join(info.vocabulary)}.",
    ])  # fmt: skip
