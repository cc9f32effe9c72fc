"""Writes a checkpoint's card beside it: its training, its loss curve, its scores. Measures nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from shared.checkpoint import read_info
from trainer.errors import TrainerError
from trainer.runs import read_log
from trainer.studies.markdown import page, table

SCORES_NOTE = """Mean and standard deviation over the runs, seeds 0 upwards, nothing picked. Each line is what
`python -m trainer score FILE --repeats N` prints."""


def plot_log(lines: list[dict[str, float]], path: Path) -> None:
    """Plot the losses over steps on a logarithmic scale, and the log's scores on a second axis."""
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
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=110)


def _score_row(path: Path, digest: str) -> list[str]:
    try:
        figures: dict[str, Any] = json.loads(path.read_text())
        made_for, options = figures["digest"], figures["options"]
    except (ValueError, KeyError, TypeError) as error:
        raise TrainerError(f"{path}: not what `score --json` writes") from error
    if made_for != digest:
        raise TrainerError(f"{path} was written for another checkpoint; score this one again")
    return [
        figures["file"],
        f"{options['sampler']}, {options['steps']} steps, w = {options['guidance']:g}",
        str(len(figures["runs"])),
        *(f"{figures[name]['mean']:.4f} ± {figures[name]['std']:.4f}" for name in ("accuracy", "exact_match", "f1")),
        f"{figures['accuracy']['max']:.4f}",
        f"{figures['rows_per_picture']:.0f}",
    ]


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[list[str]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield [f"{prefix}{key}", f"`{json.dumps(value)}`"]


def write_card(
    storage: Path, name: str, *, log: Path, scores: list[Path], machine: str, commands: list[str], notes: list[str]
) -> Path:
    """Write storage/NAME.md, NAME-log.png and a copy of the log; return the card's path.

    `scores`: files that `trainer score --json` wrote. `notes`: paragraphs of Markdown.
    """
    info = read_info(storage / f"{name}.safetensors")
    lines = read_log(log)
    plot_log(lines, storage / f"{name}-log.png")
    (storage / f"{name}-log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    parts = [f"# {name}", f"Kind: {info.kind}, digest `{info.digest[:16]}`, made {info.created_at} on {machine}."]
    if commands:
        parts.append("Made by, in this order:\n\n" + "\n".join(f"    {command}" for command in commands))
    if scores:
        head = ["file", "sampling", "runs", "accuracy", "exact match", "F1", "best accuracy", "network rows a picture"]
        parts.append(
            f"## Scores\n\n{SCORES_NOTE}\n\n" + table(head, [_score_row(path, info.digest) for path in scores])
        )
    parts += notes
    curve = f"![loss and scores over training]({name}-log.png)"
    parts.append(f"## Training\n\n{curve}\n\n" + table(["what", "value"], list(_flat(info.training))))
    parts.append("## Configuration\n\n" + table(["what", "value"], list(_flat(info.config))))
    parts.append(f"{len(info.vocabulary)} labels: {', '.join(info.vocabulary)}.")
    path = storage / f"{name}.md"
    path.write_text(page(parts))
    return path
