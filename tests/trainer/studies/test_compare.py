"""`trainer compare`: variants are sound, resume one by one, are scored the same way, and get a report."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from shared.diffusion.unet import NetworkConfig
from shared.vocabulary import ICLEVR, Vocabulary
from tests.paths import ROOT
from tests.toy_checkpoint import publish_toy_evaluator
from tests.trainer.command_line import Command, refused
from tests.trainer_fixtures import NETWORK, write_data_folder
from trainer import __main__ as cli
from trainer.config import REPORT, TrainConfig
from trainer.errors import TrainerError
from trainer.runs import keep_setup
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
from trainer.studies.compare_report import _changes, _points, plot_curves, write_report


def test_each_variant_changes_only_the_fields_it_names() -> None:
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


def test_the_wanted_comparisons_are_there() -> None:
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


def test_variants_are_chosen_by_name() -> None:
    assert chosen(None) == list(VARIANTS)
    assert chosen("v, linear") == ["v", "linear"]
    with pytest.raises(TrainerError, match='no variant "nonsense"; there are sigmoid, linear'):
        chosen("v,nonsense")


def test_variants_with_positions_need_a_data_set_with_positions() -> None:
    assert chosen(None, positions=False) == [name for name in VARIANTS if name != "shipped"]
    with pytest.raises(TrainerError, match=r'"shipped" needs positions, and the data set has no positions\.json'):
        chosen("v,shipped", positions=False)


def test_another_setup_is_refused(tmp_path: Path) -> None:
    lists = {"test": [["red cube"]]}
    keep_setup(tmp_path, asdict(Setup("d", "e", lists, None, 5, 1)))
    keep_setup(tmp_path, asdict(Setup("d", "e", lists, None, 5, 1)))
    with pytest.raises(TrainerError, match=r"setup\.json has another steps, repeats; choose another folder"):
        keep_setup(tmp_path, asdict(Setup("d", "e", lists, None, 6, 2)))


COMMAND = ["compare", "data", "--out", "out", "--steps-per-variant", "4", "--evaluator", "judge", "--repeats", "1"]
COMMAND += ["--set", "image_size=16", "--set", "batch=4"]
for field, value in {**NETWORK, "block": 2}.items():
    COMMAND += ["--set", f"network.{field}={json.dumps(value)}"]
BOTH = ["--only", "sigmoid,linear"]
NOTES = "What we found.\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\nAnd why."


@pytest.fixture(scope="module")
def _fast() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        few = {name: options.model_copy(update={"steps": 2}) for name, options in SAMPLINGS.items()}
        patch.setattr(compare, "SAMPLINGS", few)
        patch.setattr(compare, "CURVE_POINTS", 2)
        yield


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, _fast: None) -> Path:
    """A folder in which two variants were trained, scored and reported by COMMAND."""
    folder = tmp_path_factory.mktemp("compared")
    write_data_folder(folder / "data", pictures=4)
    more = Vocabulary(("pink cube", *ICLEVR.names[::-1]))  # than the folder has, and in another order
    publish_toy_evaluator(folder / "models", "judge", more)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("LABELGRID_STORAGE", raising=False)
        patch.setenv("COLUMNS", "200")
        patch.setattr(sys, "argv", ["trainer", *COMMAND, *BOTH])
        with contextlib.redirect_stderr(io.StringIO()) as err:
            assert cli.main() == 0
        assert "sigmoid, linear" in err.getvalue()
    return folder


@pytest.fixture
def again(compared: Path, command: Command) -> Command:
    """Runs commands in a copy of `compared`."""
    shutil.copytree(compared, Path.cwd(), dirs_exist_ok=True)
    return command


def test_each_variant_leaves_its_scores_curve_and_grid(compared: Path) -> None:
    out = compared / "out"
    result: dict[str, Any] = json.loads((out / "sigmoid.json").read_text())
    assert (result["steps"], result["config"]["batch"], len(result["scores"])) == (4, 4, len(SAMPLINGS) + 2)
    curve = [json.loads(line) for line in (out / "sigmoid.jsonl").read_text().splitlines()]
    assert [line["step"] for line in curve if "test/f1" in line] == [2, 4]  # half-way, and at the end
    assert [(s["sampling"], s["file"]) for s in json.loads((out / "linear.json").read_text())["scores"]] == [
        ("default", "test"), ("ancestral", "test"),
    ]  # fmt: skip
    with Image.open(out / "linear.png") as grid:
        assert grid.size == (2 + 2 * 18, 20)


def test_the_report_has_the_comparisons_of_trained_variants(compared: Path) -> None:
    text = (compared / "out" / "report.md").read_text()
    for wanted in ("Noise schedules, eps", "w = 6", "linear", "Averaged weights or raw: sigmoid", "ancestrally"):
        assert wanted in text, wanted
    assert "Not trained here: quadratic" in text
    assert "![sigmoid](sigmoid.png)" in text


@pytest.mark.parametrize("missing", ["linear.json", "linear.jsonl", "linear.png"])  # the first: if it was stopped
def test_a_resumed_comparison_trains_only_what_is_missing(again: Command, missing: str) -> None:
    out = Path("out")
    before = (out / "sigmoid.json").read_bytes()
    (out / missing).unlink()
    code, _, err = again(*COMMAND, *BOTH)
    assert code == 0, err
    (line,) = [line for line in err.splitlines() if "trained now" in line]
    assert line.replace("│", "|").split("|")[2].strip() == "linear"
    assert (out / "sigmoid.json").read_bytes() == before


def test_notes_go_into_the_report_unchanged(compared: Path, tmp_path: Path) -> None:
    out = shutil.copytree(compared / "out", tmp_path / "out")
    (out / "notes.md").write_text(f"{NOTES}\n")
    assert f"\n\n{NOTES}\n\n## The variants\n\n" in write_report(out).read_text()


def test_a_report_is_written_in_utf_8_whatever_the_locale(compared: Path, tmp_path: Path) -> None:
    out = shutil.copytree(compared / "out", tmp_path / "out")
    (out / "notes.md").write_text("a naïve note", "utf-8")
    wanted = write_report(out).read_bytes()
    assert "a naïve note" in wanted.decode("utf-8")
    script = "import sys; from pathlib import Path; from trainer.studies import compare_report as one; "
    script += "one.write_report(Path(sys.argv[1]))"
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script, str(out)], env=ascii_only, check=True, timeout=120)
    assert (out / "report.md").read_bytes() == wanted


def test_another_setup_is_refused_by_the_command(again: Command) -> None:
    refused(again(*COMMAND, "--only", "v", "--set", "lr=0.1"), "another changes")
    other = again(*COMMAND, "--out", "new", "--repeats", "2")  # its states would be those of another comparison
    refused(other, r"runs/compare/setup\.json has another repeats")


def test_test_files_and_a_budget_are_needed(again: Command) -> None:
    Path("data/test.json").unlink()
    refused(again(*COMMAND), "name test files with --tests")
    refused(again("compare", "data", "--out", "new", "--evaluator", "judge"), "--minutes-per-variant or --steps-per-v")


def test_the_report_notes_that_square_pictures_are_not_padded() -> None:
    result = {"changes": {"fit": "pad"}, "config": {"fit": "pad"}}
    square = 'fit = "pad" (but the pictures are square, so that there is nothing to pad)'
    assert _changes({**result, "aspect": 1.0}) == square
    assert _changes({**result, "aspect": 4 / 3}) == 'fit = "pad"'
    assert _changes({"changes": {"network": {"block": 1}}, "config": {"fit": "squeeze"}}) == "network.block = 1"


def test_curves_are_drawn_over_minutes_or_steps(tmp_path: Path) -> None:
    curve = [{"step": 50, "minutes": 1.0, "loss": 0.5}, {"step": 60, "minutes": 1.2, "a/f1": 0.2, "b/f1": 0.4}]
    assert _points(curve, "f1", "step") == [(60, pytest.approx(0.3))]
    assert _points(curve, "loss", "minutes") == [(1.0, 0.5)]
    plot_curves({"v": {"curve": curve}}, "minutes", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_a_damaged_variant_is_named(tmp_path: Path) -> None:
    for content in ("{", "{}", "[]"):
        (tmp_path / "sigmoid.json").write_text(content)
        with pytest.raises(TrainerError, match=r"sigmoid\.json or its curve is damaged.*delete it and compare again"):
            write_report(tmp_path)


def test_a_variant_without_its_curve_is_named(compared: Path, tmp_path: Path) -> None:
    out = shutil.copytree(compared / "out", tmp_path / "out")
    (out / "sigmoid.jsonl").unlink()
    with pytest.raises(TrainerError, match=r"sigmoid\.json or its curve is damaged: .*sigmoid\.jsonl"):
        write_report(out)
