"""The comparison as report.md and report.html, from the files that `trainer.studies.compare` left. Measures nothing."""

from __future__ import annotations

import base64
import html
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from trainer.errors import TrainerError
from trainer.studies.card import read_log
from trainer.studies.compare import COMPARISONS, SAMPLINGS, SWEPT, VARIANTS, WEIGHTS

mpl.use("Agg")

PANELS = {"loss": "training loss", "f1": "F1", "accuracy": "accuracy", "exact_match": "exact match"}
SCORES = ("accuracy", "exact_match", "f1")
STYLE = """body{font:15px/1.5 sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
table{border-collapse:collapse;margin:1rem 0}td,th{border:1px solid #bbb;padding:.2rem .6rem;text-align:left}
img{max-width:100%}"""
LOSS_NOTE = (
    "Losses are those that each variant minimises. They compare where only the network or the pictures' fit differs; "
    "another schedule, prediction or weight makes another quantity of them."
)


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Table:
    head: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Picture:
    path: Path
    caption: str


Block = Heading | Text | Table | Picture


def read_results(out: Path) -> dict[str, dict[str, Any]]:
    """Variant -> its figures, in the order of VARIANTS. TrainerError where there are none, or not readable."""
    results = {}
    for name in VARIANTS:
        path = out / f"{name}.json"
        try:
            if path.exists():
                results[name] = {**json.loads(path.read_text()), "curve": read_log(out / f"{name}.jsonl")}
        except (ValueError, OSError) as error:
            raise TrainerError(f"{path}: not a variant's figures ({error})") from error
    if not results:
        raise TrainerError(f"{out} holds no variant that is done")
    return results


def _points(curve: list[dict[str, float]], panel: str, x: str) -> list[tuple[float, float]]:
    """(x, y) of a panel: the loss, or a score's mean over the test files."""
    points = []
    for line in curve:
        values = [value for key, value in line.items() if key == panel or key.endswith(f"/{panel}")]
        if values:
            points.append((line[x], sum(values) / len(values)))
    return points


def plot_curves(results: dict[str, dict[str, Any]], names: list[str], x: str, path: Path) -> None:
    """Loss and the three scores over training, one line a variant. `x` is `minutes` or `step`."""
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
    """Mean ± standard deviation over seeds of each score, file by file."""
    return [f"{found[file][score]['mean']:.3f} ± {found[file][score]['std']:.3f}" for file in files for score in SCORES]


def _score_head(files: list[str]) -> list[str]:
    return [f"{file} {PANELS[score]}" for file in files for score in SCORES]


def _changes(result: dict[str, Any]) -> str:
    changes = result["changes"]
    flat = {**changes, **{f"network.{key}": value for key, value in changes.get("network", {}).items()}}
    flat.pop("network", None)
    text = ", ".join(f"{key} = {json.dumps(value)}" for key, value in flat.items()) or "nothing"
    if result["config"]["fit"] == "pad" and result.get("aspect", 1.0) == 1.0:
        text += " (but the pictures are square, so that there is nothing to pad)"
    return text


def _variant_table(results: dict[str, dict[str, Any]], names: list[str], files: list[str]) -> Table:
    rows = []
    for name in names:
        result = results[name]
        found = _by_file(result["scores"], result["config"]["publish"], "default")
        size = [str(result["steps"]), f"{result['minutes']:.1f}", f"{result['parameters'] / 1e6:.1f} M"]
        rows.append([name, *size, *_cells(found, files)])
    return Table(["variant", "steps", "minutes", "parameters", *_score_head(files)], rows)


def _ancestral_table(results: dict[str, dict[str, Any]], names: list[str], files: list[str]) -> list[Block]:
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
    return [Text(text), Table(["variant", *_score_head(files)], rows)]


def _sweeps(results: dict[str, dict[str, Any]], files: list[str]) -> list[Block]:
    """Averages, and ways to sample, of each swept variant that is there."""
    blocks: list[Block] = []
    for name in (name for name in SWEPT if name in results):
        result = results[name]
        scores, publish = result["scores"], result["config"]["publish"]
        rows = [[weights, *_cells(_by_file(scores, weights, "default"), files)] for weights in WEIGHTS]
        blocks += [Heading(f"Averaged weights or raw: {name}"), Text("One run, scored with each of its weights.")]
        blocks.append(Table(["weights", *_score_head(files)], rows))
        rows = []
        for sampling in SAMPLINGS:
            found = _by_file(scores, publish, sampling)
            cost = sum(one["rows_per_picture"] for one in found.values()) / len(found)
            rows.append([sampling, f"{cost:.0f}", *_cells(found, files)])
        blocks += [Heading(f"Guidance and sampling: {name}"), Text("One run, one set of weights, other options.")]
        blocks.append(Table(["sampling", "network rows a picture", *_score_head(files)], rows))
    return blocks


def _note(paragraph: str) -> Block:
    """A paragraph of Markdown, or a table of it."""
    if not paragraph.startswith("|"):
        return Text(paragraph)
    head, _, *rows = ([cell.strip() for cell in line.strip("| ").split("|")] for line in paragraph.splitlines())
    return Table(head, rows)


def _preface(out: Path, setup: dict[str, Any], results: dict[str, dict[str, Any]]) -> list[Block]:
    per_variant = " and ".join(
        f"{setup[key]:g} {key}" if setup[key] else "" for key in ("minutes", "steps") if setup[key]
    )
    blocks: list[Block] = [Heading("Variants compared under one budget")]
    blocks.append(
        Text(
            f"Each variant trained for {per_variant} on `{setup['data']}`, same seed, same order of pictures; scored "
            f"with seeds 0 to {setup['repeats'] - 1}, nothing picked. Evaluator digest `{setup['evaluator'][:16]}`. "
            "Scores are means ± standard deviation over seeds."
        )
    )
    if setup["changes"]:
        blocks.append(Text("All variants with " + ", ".join(f"`{change}`" for change in setup["changes"]) + "."))
    if missing := [name for name in VARIANTS if name not in results]:
        blocks.append(Text("Not trained here: " + ", ".join(missing) + "."))
    if (notes := out / "notes.md").exists():
        blocks += [_note(paragraph.strip()) for paragraph in notes.read_text().split("\n\n") if paragraph.strip()]
    rows = [[name, _changes(result)] for name, result in results.items()]
    return [*blocks, Heading("The variants"), Table(["variant", "what it changes"], rows)]


def make_blocks(out: Path) -> list[Block]:
    """The whole report, its plots drawn into `out`. A file `notes.md` there comes first, in a person's words."""
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
        blocks += [Heading(title), _variant_table(results, names, files), *_ancestral_table(results, names, files)]
        blocks += [Picture(path, f"{title}: over training, scores are means of the test files"), Text(LOSS_NOTE)]
    blocks += _sweeps(results, files)
    blocks.append(Heading("Samples"))
    first = f"The first label lists of {files[0]}, the same seeds for every variant."
    return [*blocks, Text(first), *(Picture(out / f"{name}.png", name) for name in results)]


def to_markdown(blocks: list[Block]) -> str:
    parts, level = [], "#"
    for block in blocks:
        match block:
            case Heading(text):
                parts.append(f"{level} {text}")
                level = "##"
            case Text(text):
                parts.append(text.strip())
            case Table(head, rows):
                parts.append("\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]))
            case Picture(path, caption):
                parts.append(f"![{caption}]({path.name})\n\n{caption}")
    return "\n\n".join(parts) + "\n"


def to_html(blocks: list[Block]) -> str:
    """One page that needs no other file: pictures are inside."""
    parts, level = [], "h1"
    for block in blocks:
        match block:
            case Heading(text):
                parts.append(f"<{level}>{html.escape(text)}</{level}>")
                level = "h2"
            case Text(text):
                parts.append(f"<p>{_inline(text.strip())}</p>")
            case Table(head, rows):
                parts.append(f"<table>{_html_row('th', head)}{''.join(_html_row('td', row) for row in rows)}</table>")
            case Picture(path, caption):
                data = base64.b64encode(path.read_bytes()).decode()
                image = f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
                parts.append(f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>")
    meta = f'<meta charset="utf-8"><title>labelgrid: variants compared</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{meta}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _html_row(tag: str, cells: list[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{_inline(cell)}</{tag}>" for cell in cells) + "</tr>"


def _inline(text: str) -> str:
    """Code, bold and links of Markdown as HTML."""
    text = re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(text))
    text = re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", text)
    return re.sub(r"\[([^]]+)\]\(([^)]+)\)", r'<a href="\2">\1</a>', text)


def write_report(out: Path) -> Path:
    """`out`/report.md and report.html from whatever variants are done; gives the first's path."""
    blocks = make_blocks(out)
    (out / "report.html").write_text(to_html(blocks))
    (out / "report.md").write_text(to_markdown(blocks))
    return out / "report.md"
