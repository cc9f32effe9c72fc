"""Writes a comparison's report.md from the files that `trainer.studies.compare` wrote. Measures nothing."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from trainer.runs import read_log, undamaged
from trainer.score import SCORES
from trainer.studies.compare import COMPARISONS, SAMPLINGS, SWEPT, VARIANTS, WEIGHTS
from trainer.studies.markdown import page, picture, table

PANELS = {"loss": "training loss", "f1": "F1", "accuracy": "accuracy", "exact_match": "exact match"}
READ = ("changes", "steps", "minutes", "parameters", "config", "scores")  # of a variant's result
LOSS_NOTE = (
    "Losses are those that each variant minimises. They compare where only the network or the pictures' fit differs; "
    "another schedule, prediction or weight makes another quantity of them."
)


def _points(curve: list[dict[str, float]], panel: str, x: str) -> list[tuple[float, float]]:
    """Return a panel's points (x, y): the loss, or a score's mean over the test files."""
    points = []
    for line in curve:
        values = [value for key, value in line.items() if key == panel or key.endswith(f"/{panel}")]
        if values:
            points.append((line[x], sum(values) / len(values)))
    return points


def plot_curves(results: dict[str, dict[str, Any]], x: str, path: Path) -> None:
    """Plot the loss and the three scores over training, one line a variant. `x` is `minutes` or `step`."""
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    for axes, (panel, title) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        for name, result in results.items():
            if points := _points(result["curve"], panel, x):
                marker = None if panel == "loss" else "o"
                axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2, marker=marker, markersize=3)
        scale: dict[str, Any] = {"yscale": "log"} if panel == "loss" else {"ylim": (0, 1)}
        axes.set(title=title, xlabel=x, **scale)
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=len(results))
    figure.savefig(path, dpi=90, metadata={"Software": None})


def _found(result: dict[str, Any], sampling: str = "default", weights: str | None = None) -> list[dict[str, Any]]:
    """Return a variant's scores on each test file, by default with the weights that it publishes."""
    wanted = (weights or result["config"]["publish"], sampling)
    return [line for line in result["scores"] if (line["weights"], line["sampling"]) == wanted]


def _cells(found: list[dict[str, Any]]) -> list[str]:
    """Return the mean ± standard deviation over seeds of each score, file by file."""
    return [f"{line[score]['mean']:.3f} ± {line[score]['std']:.3f}" for line in found for score in SCORES]


def _score_table(columns: list[str], files: list[str], rows: list[list[str]]) -> str:
    """Return a table whose rows end in `_cells`."""
    return table([*columns, *(f"{file} {PANELS[score]}" for file in files for score in SCORES)], rows)


def _changes(result: dict[str, Any]) -> str:
    changes = result["changes"]
    flat = {**changes, **{f"network.{key}": value for key, value in changes.get("network", {}).items()}}
    flat.pop("network", None)
    return ", ".join(f"{key} = {json.dumps(value)}" for key, value in flat.items()) or "nothing"


def _variant_row(name: str, result: dict[str, Any]) -> list[str]:
    size = [str(result["steps"]), f"{result['minutes']:.1f}", f"{result['parameters'] / 1e6:.1f} M"]
    return [name, *size, *_cells(_found(result))]


def _comparison(results: dict[str, dict[str, Any]], files: list[str]) -> list[str]:
    """Return the tables of one comparison: its variants, and those of them that were also sampled ancestrally."""
    rows = [_variant_row(name, result) for name, result in results.items()]
    blocks = [_score_table(["variant", "steps", "minutes", "parameters"], files, rows)]
    if rows := [[name, *_cells(found)] for name, result in results.items() if (found := _found(result, "ancestral"))]:
        options = SAMPLINGS["ancestral"]
        blocks.append(
            f"The same weights sampled as the report did, ancestrally, uniform in t, w = {options.guidance:g}, "
            f"in {options.steps} steps instead of 999:"
        )
        blocks.append(_score_table(["variant"], files, rows))
    return blocks


def _sweep(name: str, result: dict[str, Any], files: list[str]) -> list[str]:
    """Return the sections that compare a variant's averages and the ways to sample it."""
    averages = [[kind, *_cells(_found(result, weights=kind))] for kind in WEIGHTS]
    samplings = []
    for sampling in SAMPLINGS:
        found = _found(result, sampling)
        samplings.append([sampling, f"{fmean(line['rows_per_picture'] for line in found):.0f}", *_cells(found)])
    return [
        f"## Averaged weights or raw: {name}",
        "One run, scored with each of its weights.",
        _score_table(["weights"], files, averages),
        f"## Guidance and sampling: {name}",
        "One run, one set of weights, other options.",
        _score_table(["sampling", "network rows a picture"], files, samplings),
    ]


def _preface(setup: dict[str, Any], results: dict[str, dict[str, Any]]) -> list[str]:
    per_variant = " and ".join(f"{setup[key]:g} {key}" for key in ("minutes", "steps") if setup[key])
    blocks = [
        "# Variants compared under one budget",
        f"Each variant trained for {per_variant} on `{setup['data']}`, same seed, same order of pictures; scored "
        f"with seeds 0 to {setup['repeats'] - 1}, nothing picked. Evaluator digest `{setup['evaluator'][:16]}`. "
        "Scores are means ± standard deviation over seeds.",
    ]
    if setup["changes"]:
        blocks.append("All variants with " + ", ".join(f"`{change}`" for change in setup["changes"]) + ".")
    if missing := [name for name in VARIANTS if name not in results]:
        blocks.append("Not trained here: " + ", ".join(missing) + ".")
    rows = [[name, _changes(result)] for name, result in results.items()]
    return [*blocks, "## The variants", table(["variant", "what it changes"], rows)]


def write_report(out: Path) -> Path:
    """Write `out`/report.md and its plots from the finished variants; return its path."""
    results = {}
    for name in VARIANTS:
        if (path := out / f"{name}.json").exists():
            with undamaged(path):
                result = json.loads(path.read_text())
                results[name] = {key: result[key] for key in READ}
            results[name]["curve"] = read_log(path.with_suffix(".jsonl"))
    setup: dict[str, Any] = json.loads((out / "setup.json").read_text())
    files, x = list(setup["tests"]), "minutes" if setup["minutes"] else "step"
    blocks = _preface(setup, results)
    for i, (title, members) in enumerate(COMPARISONS.items(), 1):
        compared = {name: results[name] for name in members if name in results}
        if len(compared) > 1:
            plot_curves(compared, x, out / f"curves-{i}.png")
            caption = f"{title}: over training, scores are means of the test files"
            blocks += [
                f"## {title}",
                *_comparison(compared, files),
                picture(out / f"curves-{i}.png", caption),
                LOSS_NOTE,
            ]
    for name in SWEPT:
        if name in results:
            blocks += _sweep(name, results[name], files)
    blocks += ["## Samples", f"The first label lists of {files[0]}, the same seeds for every variant."]
    blocks += [picture(out / f"{name}.png", name) for name in results]
    (out / "report.md").write_text(page(blocks), "utf-8")
    return out / "report.md"
