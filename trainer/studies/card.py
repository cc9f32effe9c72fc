"""Writes a checkpoint's card beside it: its training, its loss curve, its scores. Measures nothing.

The card begins with the metadata that the Hugging Face Hub reads from a model card, as YAML. It is written anew by
`train`, `score` and `card`; paragraphs and sections that people wrote into it stay where they are. The scores are kept
in the card alone: those of former weights go when it is written for new ones.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from shared import storage as files
from shared.checkpoint import CheckpointKind, path_of, read_info
from shared.storage import Location
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
MADE_BY = re.compile(r"^Made by.*\n?(?:[ \t]*\n|    .*\n?)*", re.M)  # with the indented lines below
SCORES_HEAD = ("file", "sampling", "runs", "accuracy", "exact match", "F1", "best accuracy", "network rows a picture")


@dataclass
class Card:
    """What a card holds beside what follows from its checkpoint."""

    licence: str | None = None
    digest: str = ""  # the first digits, of the weights that it was written for
    machine: str = ""
    rows: list[list[str]] = field(default_factory=list)  # of the table of scores
    above: str = ""  # what people wrote above the scores
    below: list[str] = field(default_factory=list)  # and below: paragraphs, and sections of their own


def read_card(path: Location) -> Card:
    """Return what there is of a card; an empty one if there is none."""
    text = files.read(path).decode("utf-8", "replace") if path.is_file() else ""
    card = Card()
    if header := re.match(r"---\n(.*?)\n---\n", text, re.S):
        text = text[header.end() :]
        if licence := re.search(r"^license: (.*)$", header[1], re.M):
            card.licence = licence[1].strip('"')
    intro, *sections = re.split(r"^(?=## )", text, flags=re.M)
    if kind := re.search(r"^Kind: \w+, digest `(\w+)`, made \S+(?: on (.*))?\.$", intro, re.M):
        card.digest, card.machine = kind[1], kind[2] or ""
    card.above = intro[kind.end() :] if kind else re.sub(r"\A\s*# .*", "", intro)
    for section in sections:
        title = section.splitlines()[0].removeprefix("## ")
        if title == "Scores":
            blocks = section.strip("\n").split("\n\n")
            tables = [one for one in blocks if one.startswith("| file")]
            card.rows = [line.strip("| ").split(" | ") for one in tables for line in one.splitlines()[2:]]
            card.below += [one for one in blocks[1:] if one not in (SCORES_NOTE, *tables)]
        elif title not in ("Training", "Configuration"):
            card.below.append(section)
    return card


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


def score_row(figures: dict[str, Any]) -> list[str]:
    """Return the row of the table of scores for what `trainer score` found."""
    options, candidates = figures["options"], figures["candidates"]
    best_of = f", best of {candidates}" if candidates > 1 else ""
    means = [figures[name] for name in ("accuracy", "exact_match", "f1")]
    return [
        figures["file"],
        f"{options['sampler']}, {options['steps']} steps, w = {options['guidance']:g}{best_of}",
        str(len(figures["runs"])),
        *(f"{one['mean']:.4f} ± {one['std']:.4f}" for one in means),
        f"{means[0]['max']:.4f}",
        f"{figures['rows_per_picture']:.0f}",
    ]


def with_row(rows: list[list[str]], new: list[str]) -> list[list[str]]:
    """Add a row, in the place of one of the same file and sampling unless that is of more runs."""
    same = next((i for i, row in enumerate(rows) if row[:2] == new[:2]), None)
    if same is None:
        return [*rows, new]
    return rows if int(rows[same][2]) > int(new[2]) else [*rows[:same], new, *rows[same + 1 :]]


def write_card(
    storage: Location, name: str, *, log: Path | None = None, machine: str = "", command: str = "",
    score: list[str] | None = None, licence: str | None = None,
) -> Location:  # fmt: skip
    """Write storage/NAME.md; with a run's log also NAME-log.png and a copy of it. Return the card's path.

    `machine`: that trained it, in words, by `command`. `score`: a row for the table. `licence`: of the weights, by the
    Hub's name of it, such as mit.
    """
    info, path = read_info(path_of(storage, name)), storage / f"{name}.md"
    old = read_card(path)
    is_same = old.digest == info.digest[:16]
    rows = old.rows if is_same else []
    rows = with_row(rows, score) if score else rows
    machine = machine or (old.machine if is_same else "")
    above = old.above
    if command:
        above = f"Made by\n\n    {command}\n\n" + MADE_BY.sub("", above).strip("\n")
    made = f"made {info.created_at}" + (f" on {machine}" if machine else "")
    parts = [front_matter(name, info.kind, rows, licence or old.licence)]
    parts += [f"# {name}", f"Kind: {info.kind}, digest `{info.digest[:16]}`, {made}.", above]
    if rows:
        parts.append(f"## Scores\n\n{SCORES_NOTE}\n\n" + table(SCORES_HEAD, rows))
    curve = storage / f"{name}-log.png"
    if log is not None:
        lines = read_log(log)
        files.write(curve, plot_log(lines))
        files.write(storage / f"{name}-log.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    shown = f"![loss and scores over training]({curve.name})" if curve.is_file() else ""
    parts += [*old.below, "## Training", shown, table(["what", "value"], list(_flat(info.training)))]
    parts += ["## Configuration", table(["what", "value"], list(_flat(info.config)))]
    parts.append(f"{len(info.vocabulary)} labels: {', '.join(info.vocabulary)}.")
    files.write(path, page([part for part in parts if part.strip()]).encode())
    return path
