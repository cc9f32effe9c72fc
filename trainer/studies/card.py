"""Writes a checkpoint's card beside it: its training, its loss curve, its scores. Measures nothing.

The card begins with the metadata that the Hugging Face Hub reads from a model card, as YAML. Of an existing card it
keeps the section "How it was trained", which people write.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from shared import storage as files
from shared.checkpoint import CheckpointKind, path_of, read_info
from trainer.errors import TrainerError
from trainer.runs import read_log
from trainer.studies.markdown import page, table

SCORES_NOTE = """Mean and standard deviation over the runs, seeds 0 upwards, nothing picked. Each line is what
`python -m trainer score FILE --repeats N` prints."""
# The Hub's name of what a model does. Of its names, "text-to-image" is the one for pictures of what a request lists.
TASKS: dict[CheckpointKind, str] = {"denoiser": "text-to-image", "evaluator": "image-classification"}
TAGS: dict[CheckpointKind, list[str]] = {
    "denoiser": ["diffusion", "conditional-image-generation"],
    "evaluator": ["resnet", "multi-label-classification"],
}


def read_figures(path: Path) -> list[dict[str, float]]:
    """Return the lines of a run's log. TrainerError if there are none, or if a figure is not a number."""
    lines = read_log(path)
    if not lines:
        raise TrainerError(f"{path}: not a run's log (it is empty)")
    for line in lines:
        for key, value in line.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TrainerError(f"{path}: not a run's log ({key} is {json.dumps(value)[:40]}, not a number)")
    return lines


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


def _score_row(path: Path, digest: str) -> list[str]:
    try:
        figures: dict[str, Any] = json.loads(path.read_text())
        options = figures["options"]
        means = [figures[name] for name in ("accuracy", "exact_match", "f1")]
        row = [
            str(figures["file"]),
            f"{options['sampler']}, {options['steps']} steps, w = {options['guidance']:g}" + _best_of(figures),
            str(len(figures["runs"])),
            *(f"{one['mean']:.4f} ± {one['std']:.4f}" for one in means),
            f"{means[0]['max']:.4f}",
            f"{figures['rows_per_picture']:.0f}",
        ]
        made_for = figures["digest"]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise TrainerError(f"{path}: not what `score --json` writes") from error
    if made_for != digest:
        raise TrainerError(f"{path} was written for another checkpoint; score this one again")
    return row


def _best_of(figures: dict[str, Any]) -> str:
    candidates = figures.get("candidates", 1)
    return f", best of {candidates}" if candidates > 1 else ""


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[list[str]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield [f"{prefix}{key}", f"`{json.dumps(value)}`"]


def front_matter(name: str, kind: CheckpointKind, rows: list[list[str]], licence: str | None) -> str:
    """Return the Hub's metadata as YAML. `rows`: those of the table of scores, whose means become its results.

    JSON is YAML, so values are written as JSON.
    """
    task = {"type": TASKS[kind]}
    lines = [f"license: {json.dumps(licence)}"] if licence else []
    lines += ["library_name: labelgrid", f"pipeline_tag: {TASKS[kind]}", f"tags: {json.dumps(TAGS[kind])}"]
    if rows:
        lines += ["model-index:", f"- name: {json.dumps(name)}", "  results:"]
    for file, _, _, *means in rows:
        metrics = [
            {"type": metric, "value": float(mean.split()[0])}
            for metric, mean in zip(("accuracy", "exact_match", "f1"), means, strict=False)
        ]
        dataset = {"type": "label-lists", "name": file}
        lines.append(f"  - {json.dumps({'task': task, 'dataset': dataset, 'metrics': metrics})}")
    return "\n".join(["---", *lines, "---"])


def _written_by_people(card: Path) -> list[str]:
    """Return a card's section "How it was trained", or nothing."""
    text = card.read_text("utf-8") if card.is_file() else ""
    return [section.strip() for section in re.findall(r"^## How it was trained\n.*?(?=^## |\Z)", text, re.M | re.S)]


def write_card(
    storage: Path, name: str, *, log: Path, scores: list[Path], machine: str, commands: list[str], notes: list[str],
    licence: str | None = None,
) -> Path:  # fmt: skip
    """Write storage/NAME.md, NAME-log.png and a copy of the log; return the card's path.

    `scores`: files that `trainer score --json` wrote. `notes`: paragraphs of Markdown. `licence`: of the weights, by
    the Hub's name of it, such as mit. What cannot be used is refused before anything is written.
    """
    info = read_info(path_of(storage, name))
    lines = read_figures(log)
    last = info.training.get("last") or {}
    if not any(last.items() <= line.items() for line in lines):
        raise TrainerError(f"{log} is the log of another run: it lacks the last figures of {name}'s")
    rows = [_score_row(path, info.digest) for path in scores]
    parts = [front_matter(name, info.kind, rows, licence)]
    parts += [f"# {name}", f"Kind: {info.kind}, digest `{info.digest[:16]}`, made {info.created_at} on {machine}."]
    if commands:
        parts.append("Made by, in this order:\n\n" + "\n".join(f"    {command}" for command in commands))
    if rows:
        head = ["file", "sampling", "runs", "accuracy", "exact match", "F1", "best accuracy", "network rows a picture"]
        parts.append(f"## Scores\n\n{SCORES_NOTE}\n\n" + table(head, rows))
    path = storage / f"{name}.md"
    parts += [*notes, *_written_by_people(path)]
    curve = f"![loss and scores over training]({name}-log.png)"
    parts.append(f"## Training\n\n{curve}\n\n" + table(["what", "value"], list(_flat(info.training))))
    parts.append("## Configuration\n\n" + table(["what", "value"], list(_flat(info.config))))
    parts.append(f"{len(info.vocabulary)} labels: {', '.join(info.vocabulary)}.")
    written = {
        storage / f"{name}-log.png": plot_log(lines),
        storage / f"{name}-log.jsonl": "".join(json.dumps(line) + "\n" for line in lines).encode(),
        path: page(parts).encode(),
    }
    if folder := next((one for one in written if one.is_dir()), None):
        raise TrainerError(f"{folder} is a folder, not a file to write")
    for one, content in written.items():
        files.write(one, content)
    return path
