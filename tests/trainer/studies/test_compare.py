"""`trainer compare`: variants are sound, resume one by one, are scored the same way, and get a report."""

import contextlib
import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from iclevr.labels import ICLEVR
from shared.diffusion.unet import NetworkConfig
from shared.vocabulary import Vocabulary
from tests.toy_checkpoint import publish_toy_evaluator
from tests.trainer.command_line import Command, refused
from tests.trainer_fixtures import NETWORK, write_data_folder
from trainer import __main__ as cli
from trainer.errors import TrainerError
from trainer.studies import compare
from trainer.studies.compare import (
    BASE,
    COMPARISONS,
    SAMPLINGS,
    VARIANTS,
    chosen,
    config_of,
)
from trainer.studies.compare_report import write_report


def test_each_variant_changes_only_the_fields_it_names() -> None:
    base = BASE.model_dump()
    for name, changes in VARIANTS.items():
        config = config_of(name)
        NetworkConfig(num_labels=24, image_size=config.image_size, **config.network)
        differing = {key for key, value in config.model_dump().items() if value != base[key]}
        assert differing <= set(changes), name
    assert config_of("sigmoid") == BASE
    assert {name for names in COMPARISONS.values() for name in names} == set(VARIANTS)
    changed = BASE.model_copy(update={"network": {"embedding": 16}})
    assert config_of("channels", changed).network == {"embedding": 16, "conditioning": "channels"}


def test_variants_are_chosen_by_name_and_those_with_positions_need_a_data_set_with_positions() -> None:
    assert chosen("v, linear") == ["v", "linear"]
    with pytest.raises(TrainerError, match='no variant "nonsense"; there are sigmoid, linear'):
        chosen("v,nonsense")
    assert chosen(None, positions=False) == [name for name in VARIANTS if name != "shipped"]
    with pytest.raises(TrainerError, match=r'"shipped" needs positions, and the data set has no positions\.json'):
        chosen("v,shipped", positions=False)


COMMAND = ["compare", "data", "--out", "out", "--steps-per-variant", "4", "--evaluator", "judge", "--repeats", "1"]
COMMAND += ["--set", "image_size=16", "--set", "batch=4"]
for field, value in {**NETWORK, "block": 2}.items():
    COMMAND += ["--set", f"network.{field}={json.dumps(value)}"]
BOTH = ["--only", "sigmoid,linear"]


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


def test_the_report_has_the_comparisons_of_trained_variants(compared: Path, tmp_path: Path) -> None:
    out = shutil.copytree(compared / "out", tmp_path / "out")
    text = write_report(out).read_text("utf-8")
    for wanted in ("Noise schedules, eps", "w = 6", "linear", "Averaged weights or raw: sigmoid", "ancestrally"):
        assert wanted in text, wanted
    assert "Not trained here: quadratic" in text
    assert "![sigmoid](sigmoid.png)" in text
    assert (out / "curves-1.png").stat().st_size > 5000


def test_a_damaged_variant_is_named(tmp_path: Path) -> None:
    for content in ("{", "{}", "[]"):
        (tmp_path / "sigmoid.json").write_text(content)
        with pytest.raises(TrainerError, match=r"sigmoid\.json is damaged"):
            write_report(tmp_path)


def test_a_resumed_comparison_trains_only_what_is_missing(again: Command) -> None:
    out = Path("out")
    before = (out / "sigmoid.json").read_bytes()
    (out / "linear.json").unlink()
    code, _, err = again(*COMMAND, *BOTH)
    assert code == 0, err
    (line,) = [line for line in err.splitlines() if "trained now" in line]
    assert line.replace("│", "|").split("|")[2].strip() == "linear"
    assert (out / "sigmoid.json").read_bytes() == before


def test_another_setup_is_refused_by_the_command(again: Command) -> None:
    refused(again(*COMMAND, "--only", "v", "--set", "lr=0.1"), "another changes")
    other = again(*COMMAND, "--out", "new", "--repeats", "2")  # its states would be those of another comparison
    refused(other, r"runs/compare/setup\.json has another repeats")


def test_test_files_and_a_budget_are_needed(again: Command) -> None:
    Path("data/test.json").unlink()
    refused(again(*COMMAND), "name test files with --tests")
    refused(again("compare", "data", "--out", "new", "--evaluator", "judge"), "--minutes-per-variant or --steps-per-v")
