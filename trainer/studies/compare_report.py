"""Writes a comparison's report.md from the files that `trainer.studies.compare` wrote. Measures nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from trainer.errors import TrainerError
from trainer.runs import read_log
from trainer.score import SCORES
from trainer.studies.compare import COMPARISONS, SAMPLINGS, SWEPT, VARIANTS, WEIGHTS
from trainer.studies.markdown import page, picture, table

PANELS = {"loss": "training loss", "f1": "F1", "accuracy": "accuracy", "exact_match": "exact match"}
LOSS_NOTE = (
    "Losses are those that each variant minimises. They compare where only the network or the pictures' fit differs; "
    "another schedule, prediction or weight makes another quantity of them."
)


def read_results(out: Path) -> dict[str, dict[str, Any]]:
    """Return the figures of each finished variant, in the order of VARIANTS.

    Raises TrainerError where there are none, or where they cannot be read.
    """
    results = {}
    for name in VARIANTS:
        path = out / f"{name}.json"
        try:
            if path.exists():
                results[name] = {**json.loads(path.read_text()), "curve": read_log(out / f"{name}.jsonl")}
        except (ValueError, OSError) as error:
            raise TrainerError(f"{path}: not a variant's figures ({error})") from error
    if not results:
        raise TrainerError(f"{out} holds no finished variant")
    return results


def _points(curve: list[dict[str, float]], panel: str, x: str) -> list[tuple[float, float]]:
    """Return a panel's points (x, y): the loss, or a score's mean over the test files."""
    points = []
    for line in curve:
        values = [value for key, value in line.items() if key == panel or key.endswith(f"/{panel}")]
        if values:
            points.append((line[x], sum(values) / len(values)))
    return points


def plot_curves(results: dict[str, dict[str, Any]], names: list[str], x: str, path: Path) -> None:
    """Plot the loss and the three scores over training, one line a variant. `x` is `minutes` or `step`."""
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    for axes, (panel, title) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        for name in names:
            if points := _points(results[name]["curve"], panel, x):
                marker = None if panel == "loss" else "o"
                axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2, marker=marker, markersize=3)
        axes.set(title=title, xlabel=x)
        if panel == "loss":
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, 1)
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=len(names))
    figure.savefig(path, dpi=90, metadata={"Software": None})


def _by_file(scores: list[dict[str, Any]], weights: str, sampling: str) -> dict[str, dict[str, Any]]:
    return {s["file"]: s for s in scores if (s["weights"], s["sampling"]) == (weights, sampling)}


def _cells(found: dict[str, dict[str, Any]], files: list[str]) -> list[str]:
    """Return the mean ± standard deviation over seeds of each score, file by file."""
    return [f"{found[file][score]['mean']:.3f} ± {found[file][score]['std']:.3f}" for file in files for score in SCORES]


def _score_head(files: list[str]) -> list[str]:
    return [f"{file} {PANELS[score]}" for file in files for score in SCORES]


def _changes(result: dict[str, Any]) -> str:
    changes = result["changes"]
    flat = {**changes, **{f"network.{key}": value for key, value in changes.get("network", {}).items()}}
    flat.pop("network", None)
    text = ", ".join(f"{key} = {json.dumps(value)}" for key, value in flat.items()) or "nothing"
    if result["config"]["fit"] == "pad" and result["aspect"] == 1.0:
        text += " (but the pictures are square, so that there is nothing to pad)"
    return text


def _variant_table(results: dict[str, dict[str, Any]], names: list[str], files: list[str]) -> str:
    rows = []
    for name in names:
        result = results[name]
        found = _by_file(result["scores"], result["config"]["publish"], "default")
        size = [str(result["steps"]), f"{result['minutes']:.1f}", f"{result['parameters'] / 1e6:.1f} M"]
        rows.append([name, *size, *_cells(found, files)])
    return table(["variant", "steps", "minutes", "parameters", *_score_head(files)], rows)


def _ancestral_table(results: dict[str, dict[str, Any]], names: list[str], files: list[str]) -> list[str]:
    rows = []
    for name in names:
        result = results[name]
        if found := _by_file(result["scores"], result["config"]["publish"], "ancestral"):
            rows.append([name, *_cells(found, files)])
    if not rows:
        return []
    options = SAMPLINGS["ancestral"]
    text = (
        f"The same weights sampled as the report did, ancestrally, uniform in t, w = {options.guidance:g}, "
        f"in {options.steps} steps instead of 999:"
    )
    return [text, table(["variant", *_score_head(files)], rows)]


def _sweeps(results: dict[str, dict[str, Any]], files: list[str]) -> list[str]:
    """Return the sections that compare averages and ways to sample, for each finished variant of SWEPT."""
    blocks: list[str] = []
    for name in (name for name in SWEPT if name in results):
        result = results[name]
        scores, publish = result["scores"], result["config"]["publish"]
        rows = [[weights, *_cells(_by_file(scores, weights, "default"), files)] for weights in WEIGHTS]
        blocks += [f"## Averaged weights or raw: {name}", "One run, scored with each of its weights."]
        blocks.append(table(["weights", *_score_head(files)], rows))
        rows = []
        for sampling in SAMPLINGS:
            found = _by_file(scores, publish, sampling)
            cost = sum(one["rows_per_picture"] for one in found.values()) / len(found)
            rows.append([sampling, f"{cost:.0f}", *_cells(found, files)])
        blocks += [f"## Guidance and sampling: {name}", "One run, one set of weights, other options."]
        blocks.append(table(["sampling", "network rows a picture", *_score_head(files)], rows))
    return blocks


def _preface(out: Path, setup: dict[str, Any], results: dict[str, dict[str, Any]]) -> list[str]:
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
    if (notes := out / "notes.md").exists():
        blocks.append(notes.read_text())
    rows = [[name, _changes(result)] for name, result in results.items()]
    return [*blocks, "## The variants", table(["variant", "what it changes"], rows)]


def write_report(out: Path) -> Path:
    """Write `out`/report.md and its plots from the finished variants; return its path.

    If there is an `out`/notes.md, its text goes before the tables.
    """
    results = read_results(out)
    setup: dict[str, Any] = json.loads((out / "setup.json").read_text())
    files, x = list(setup["tests"]), "minutes" if setup["minutes"] else "step"
    blocks = _preface(out, setup, results)
    for i, (title, members) in enumerate(COMPARISONS.items()):
        names = [name for name in members if name in results]
        if len(names) < 2:
            continue
        path = out / f"curves-{i + 1}.png"
        plot_curves(results, names, x, path)
        blocks += [f"## {title}", _variant_table(results, names, files), *_ancestral_table(results, names, files)]
        blocks += [picture(path, f"{title}: over training, scores are means of the test files"), LOSS_NOTE]
    blocks += _sweeps(results, files)
    blocks += ["## Samples", f"The first label lists of {files[0]}, the same seeds for every variant."]
    blocks += [picture(out / f"{name}.png", name) for name in results]
    (out / "report.md").write_text(page(blocks))
    return out / "report.md"
