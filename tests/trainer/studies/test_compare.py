"""`trainer compare`: variants are sound, resume one by one, are scored alike, and end in a report that stands alone."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from shared.checkpoint import publish
from shared.diffusion.unet import NetworkConfig
from shared.evaluator import Evaluator
from shared.vocabulary import ICLEVR
from tests.trainer_fixtures import NETWORK, write_data_folder
from trainer import __main__ as cli
from trainer.config import REPORT, TrainConfig
from trainer.errors import TrainerError
from trainer.studies import compare
from trainer.studies.compare import (
    BASE,
    COMPARISONS,
    SAMPLINGS,
    SWEPT,
    VARIANTS,
    Setup,
    chosen,
    config_of,
    ways_to_score,
)
from trainer.studies.compare_report import (
    Heading,
    Picture,
    Table,
    Text,
    _changes,
    _points,
    plot_curves,
    to_html,
    to_markdown,
)


def test_each_variant_changes_what_it_says() -> None:
    base = BASE.model_dump()
    for name, changes in VARIANTS.items():
        config = config_of(name)
        NetworkConfig(num_labels=24, image_size=config.image_size, **config.network)
        differing = {key for key, value in config.model_dump().items() if value != base[key]}
        assert differing <= set(changes), name
    assert config_of("sigmoid") == BASE
    assert {name for names in COMPARISONS.values() for name in names} == set(VARIANTS)
    report = config_of("report").model_dump()
    wanted = REPORT.model_dump()
    assert {key for key in wanted if wanted[key] != report[key]} == {"ema_start"}
    shipped, default = config_of("shipped").model_dump(), TrainConfig().model_dump()
    assert {key for key in default if default[key] != shipped[key]} == {"batch", "ema_start", "warmup_steps"}


def test_the_issues_grid_is_there() -> None:
    assert {config_of(name).schedule for name in COMPARISONS["Noise schedules, eps"]} == {
        "linear", "quadratic", "cosine", "sigmoid",
    }  # fmt: skip
    assert all(config_of(name).prediction == "eps" for name in COMPARISONS["Noise schedules, eps"])
    assert config_of("channels").network == {"conditioning": "channels"}
    assert (config_of("v-min-snr").prediction, config_of("v-min-snr").loss_weight) == ("v", "min_snr")
    assert {w: SAMPLINGS[f"w = {w}"].guidance for w in range(1, 7)} == {w: float(w) for w in range(1, 7)}
    assert any(options.guidance_interval != (0.0, 1.0) for options in SAMPLINGS.values())
    assert (config_of("pad-32").image_size, config_of("pad-32").fit) == (32, "pad")
    swept = ways_to_score(SWEPT[0], "long")
    assert swept[0] == ("long", "default")
    assert {weights for weights, _ in swept} == {"long", "short", "raw"}
    assert len(swept) == len(set(swept)) == len(SAMPLINGS) + 2


def test_variants_are_merged_into_a_changed_base() -> None:
    base = TrainConfig.model_validate({**BASE.model_dump(), "network": {"embedding": 16}, "batch": 8})
    config = config_of("channels", base)
    assert (config.network, config.batch) == ({"embedding": 16, "conditioning": "channels"}, 8)


def test_names_of_variants() -> None:
    assert chosen(None) == list(VARIANTS)
    assert chosen("v, linear") == ["v", "linear"]
    with pytest.raises(TrainerError, match='no variant "nonsense"; there are sigmoid, linear'):
        chosen("v,nonsense")


def test_positions_are_told_only_where_there_are_some() -> None:
    assert chosen(None, positions=False) == [name for name in VARIANTS if name != "shipped"]
    with pytest.raises(TrainerError, match=r'"shipped" tells positions, and the data set has no positions\.json'):
        chosen("v,shipped", positions=False)


def test_another_setup_is_refused(tmp_path: Path) -> None:
    lists = {"test": [["red cube"]]}
    Setup("d", "e", lists, None, 5, 1).keep(tmp_path)
    Setup("d", "e", lists, None, 5, 1).keep(tmp_path)
    with pytest.raises(TrainerError, match=r"setup\.json was made with another steps, repeats; choose another folder"):
        Setup("d", "e", lists, None, 6, 2).keep(tmp_path)


def _run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["trainer", *arguments])
    return cli.main(), capsys.readouterr().err


def _trained_now(err: str) -> str:
    """What the last line of the command says it trained."""
    (line,) = [line for line in err.splitlines() if "trained now" in line]
    return line.replace("│", "|").split("|")[2].strip()


def test_from_data_to_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(
        compare,
        "SAMPLINGS",
        {name: options.model_copy(update={"steps": 2}) for name, options in SAMPLINGS.items()},
    )
    monkeypatch.setattr(compare, "CURVE_POINTS", 2)
    write_data_folder(tmp_path / "data", pictures=4)
    evaluator = Evaluator(ICLEVR)
    tensors = {key: value.clone() for key, value in evaluator.resnet.state_dict().items()}
    publish(tmp_path / "models", "judge", tensors, kind="evaluator", vocabulary=ICLEVR.names, config={}, training={})
    command = ["compare", "data", "--out", "out", "--steps-per-variant", "4", "--evaluator", "judge", "--repeats", "1"]
    for field, value in {**NETWORK, "block": 2}.items():
        command += ["--set", f"network.{field}={json.dumps(value)}"]
    command += ["--set", "image_size=16", "--set", "batch=4"]

    code, err = _run(monkeypatch, capsys, *command, "--only", "sigmoid,linear")
    assert code == 0, err
    assert "sigmoid, linear" in err
    out = tmp_path / "out"
    result: dict[str, Any] = json.loads((out / "sigmoid.json").read_text())
    assert (result["steps"], result["config"]["batch"], len(result["scores"])) == (4, 4, len(SAMPLINGS) + 2)
    curve = [json.loads(line) for line in (out / "sigmoid.jsonl").read_text().splitlines()]
    assert [line["step"] for line in curve if "test/f1" in line] == [2, 4]  # half-way, and at the end
    assert [(s["sampling"], s["file"]) for s in json.loads((out / "linear.json").read_text())["scores"]] == [
        ("default", "test"), ("ancestral", "test"),
    ]  # fmt: skip
    with Image.open(out / "linear.png") as grid:
        assert grid.size == (2 + 2 * 18, 20)
    page, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert "src=" in page
    assert page.count("src=") == page.count('src="data:image/png;base64,')
    for wanted in ("Noise schedules, eps", "w = 6", "linear", "Averaged weights or raw: sigmoid", "ancestrally"):
        assert wanted in page, wanted
        assert wanted in text, wanted
    assert "Not trained here: quadratic" in text

    before = (out / "sigmoid.json").read_bytes()
    (out / "linear.json").unlink()  # stands for a run that was stopped before its scores were written
    (out / "notes.md").write_text("What we found.\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\nAnd why.\n")
    code, err = _run(monkeypatch, capsys, *command, "--only", "sigmoid,linear")
    assert code == 0, err
    assert _trained_now(err) == "linear"
    assert (out / "sigmoid.json").read_bytes() == before
    assert "What we found.\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\nAnd why." in (out / "report.md").read_text()
    assert "<td>1</td><td>2</td>" in (out / "report.html").read_text()
    code, err = _run(monkeypatch, capsys, *command, "--only", "v", "--set", "lr=0.1")
    assert (code, "another changes" in err) == (1, True), err
    code, err = _run(monkeypatch, capsys, *command, "--out", "new", "--repeats", "2")  # states of another comparison
    assert (code, "runs/compare/setup.json was made with another repeats" in err) == (1, True), err
    (tmp_path / "data" / "test.json").unlink()
    code, err = _run(monkeypatch, capsys, *command)
    assert (code, "name test files with --tests" in err) == (1, True), err
    code, err = _run(monkeypatch, capsys, "compare", "data", "--out", "new", "--evaluator", "judge")
    assert (code, "--minutes-per-variant or --steps-per-variant" in err) == (1, True), err


def test_blocks_become_text_and_a_page(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    Image.new("RGB", (2, 2)).save(picture)
    blocks = [
        Heading("First"),
        Text("a < `b`, **c** in [d](e.md)"),
        Heading("Second"),
        Table(["x", "y"], [["1", "<2>"]]),
        Picture(picture, "p"),
    ]
    text, page = to_markdown(blocks), to_html(blocks)
    table = "| x | y |\n| --- | --- |\n| 1 | <2> |"
    assert text == f"# First\n\na < `b`, **c** in [d](e.md)\n\n## Second\n\n{table}\n\n![p](a.png)\n\np\n"
    assert "<h1>First</h1>" in page
    assert "<h2>Second</h2>" in page
    assert '<p>a &lt; <code>b</code>, <b>c</b> in <a href="e.md">d</a></p>' in page
    assert "<tr><td>1</td><td>&lt;2&gt;</td></tr>" in page


def test_a_padded_variant_of_square_pictures_says_that_nothing_was_padded() -> None:
    result = {"changes": {"fit": "pad"}, "config": {"fit": "pad"}}
    square = 'fit = "pad" (but the pictures are square, so that there is nothing to pad)'
    assert _changes({**result, "aspect": 1.0}) == square
    assert _changes({**result, "aspect": 4 / 3}) == 'fit = "pad"'
    assert _changes({"changes": {"network": {"block": 1}}, "config": {"fit": "squeeze"}}) == "network.block = 1"


def test_curves_are_drawn_over_minutes_or_steps(tmp_path: Path) -> None:
    curve = [{"step": 50, "minutes": 1.0, "loss": 0.5}, {"step": 60, "minutes": 1.2, "a/f1": 0.2, "b/f1": 0.4}]
    assert _points(curve, "f1", "step") == [(60, pytest.approx(0.3))]
    assert _points(curve, "loss", "minutes") == [(1.0, 0.5)]
    plot_curves({"v": {"curve": curve}}, ["v"], "minutes", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
