"""`python -m trainer`: help, the whole way from rendering to a score, and one line for everything that is wrong."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from shared.checkpoint import read_info
from shared.diffusion.model import load_denoiser
from shared.registry import promote
from shared.vocabulary import ICLEVR
from tests.toy_checkpoint import publish_toys
from tests.trainer_fixtures import NETWORK, write_data_folder
from trainer import __main__ as cli
from trainer import fit_evaluator
from trainer.commands import train as train_command

Command = Callable[..., tuple[int, str, str]]
TINY = ["--set", "image_size=16", "--set", "batch=8"]
for field, value in NETWORK.items():
    TINY += ["--set", f"network.{field}={json.dumps(value)}"]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Runs a command in a folder of its own; gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("FORCE_COLOR", "LABELGRID_STORAGE"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["trainer", *map(str, arguments)])
        code = cli.main()
        out, err = capsys.readouterr()
        return code, out, err

    return run


def refused(result: tuple[int, str, str], message: str, code: int = 1) -> None:
    """One line on stderr that says what is wrong, after a note at most, nothing on stdout, and the exit code."""
    got, out, err = result
    err = re.sub("^note: .*\n", "", err)
    assert got == code, err
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert re.search(message, err), err


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data_folder(tmp_path / "data", pictures=4)


def test_help(command: Command) -> None:
    code, out, _ = command("--help")
    assert code == 0
    for name in ("render", "fit-evaluator", "train", "score", "promote"):
        assert name in out


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("render", ["--train", "--scenes", "--size", "--seed"]),
        ("fit-evaluator", ["--data", "--held-out", "--minutes", "--steps", "--course-file"]),
        ("train", ["--data", "--preset", "--set", "--minutes", "--steps", "--evaluator", "--device"]),
        ("score", ["--repeats", "--model", "--sampler", "--guidance", "--grid", "--json"]),
        ("promote", ["--storage"]),
        ("memorisation", ["--held-out", "--model", "--evaluator", "--pictures", "--label-sets", "--json", "--grid"]),
        ("compare", ["--out", "--evaluator", "--minutes-per-variant", "--steps-per-variant", "--only"]),
    ],
)
def test_help_of_a_command(command: Command, name: str, options: list[str]) -> None:
    code, out, _ = command(name, "--help")
    assert code == 0
    assert [option for option in options if option not in out] == []


def test_as_a_process() -> None:
    """The entry itself, once: exit code and stderr are those of `main`."""
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "nonsense"], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: No such command 'nonsense'")
    assert done.stderr.count("\n") == 1


def test_labels_that_no_picture_shows_are_noted(command: Command, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_evaluator, "BATCH", 8)
    note = "note: no picture shows brown cube, purple cube, .*, yellow cylinder, of which nothing can be learnt\n"
    code, _, err = command("train", "--data", data, "--steps", 1, *TINY)
    assert (code, bool(re.search(note, err))) == (0, True), err
    code, _, err = command("fit-evaluator", "--data", data, "--held-out", data, "--steps", 1)
    assert (code, bool(re.search(note, err))) == (0, True), err


def test_ctrl_c_is_said(command: Command, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train_command, "make_config", interrupt)
    refused(command("train", "--data", data, "--steps", 1), "interrupted", 130)


def test_from_rendering_to_a_score(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_evaluator, "BATCH", 8)
    code, _, err = command("render", "data", "--scenes", 8, "--size", 16, "--seed", 3)
    assert (code, "24" in err) == (0, True), err
    code, _, err = command("render", "again", "--train", "data/train.json", "--size", 16)
    assert code == 0, err
    assert json.loads(Path("again/train.json").read_text()) == json.loads(Path("data/train.json").read_text())
    refused(command("render", "data", "--scenes", 1), "data already holds a data set")

    refused(command("locate", "again"), "again/positions.json is there already")
    Path("again/positions.json").unlink()
    code, _, err = command("locate", "again")
    assert code == 0, err
    assert Path("again/positions.json").exists()

    fit = ("fit-evaluator", "--data", "data", "--data", "again", "--held-out", "again", "--steps", 2)
    code, _, err = command(*fit)
    assert (code, "finished before" in err) == (0, False), err
    code, _, err = command(*fit, "--course-file", "checkpoint.pth")
    assert (code, "the run was finished before" in err) == (0, True), err
    assert read_info(Path("models/evaluator.safetensors")).kind == "evaluator"
    assert torch.load("checkpoint.pth", weights_only=True)["model"]["fc.0.weight"].shape == (24, 512)

    Path("few.json").write_text(json.dumps([["red cube"], ["blue sphere", "gray cylinder"]]))
    train = ["train", "--data", "data", "--name", "tiny", "--evaluator", "evaluator", "--tests", "few.json", *TINY]
    code, _, err = command(*train, "--steps", 2)
    assert code == 0, err
    with Image.open("runs/denoiser/samples-0000002.png") as grid:
        assert grid.size == (2 + 2 * 18, 20)
    last = json.loads(Path("runs/denoiser/log.jsonl").read_text().splitlines()[-1])
    assert {"few/accuracy", "few/exact_match", "few/f1"} < last.keys()
    assert read_info(Path("models/tiny.safetensors")).training["steps"] == 2
    code, _, err = command(*train, "--steps", 3)  # the same command resumes
    assert code == 0, err
    assert read_info(Path("models/tiny.safetensors")).training["steps"] == 3
    refused(command(*train, "--steps", 4, "--set", "lr=0.5"), "was started with another lr")

    for name in ("tiny", "evaluator"):
        assert command("promote", name)[0] == 0
    code, out, err = command(
        "score", "few.json", "--repeats", 2, "--steps", 3, "--grid", "grid.png", "--columns", 1, "--json", "score.json"
    )
    assert code == 0, err
    for word in ("accuracy", "exact_match", "max", "mean", "std", "pictures/s"):
        assert word in out
    figures = json.loads(Path("score.json").read_text())
    assert [run["seed"] for run in figures["runs"]] == [0, 1]
    accuracies = [run["accuracy"] for run in figures["runs"]]
    assert figures["accuracy"]["max"] == max(accuracies)
    assert figures["accuracy"]["mean"] == pytest.approx(sum(accuracies) / 2)
    assert figures["accuracy"]["std"] == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2)
    assert (figures["rows_per_picture"], figures["padding"]) == (6, "none")
    with Image.open("grid.png") as grid:
        assert grid.size == (20, 2 + 2 * 18)
    code, _, err = command("score", "few.json", "--evaluator", "checkpoint.pth", "--steps", 1)
    assert code == 0, err


def test_padded_pictures_are_scored_by_what_lies_between_the_borders(command: Command, tmp_path: Path) -> None:
    storage = tmp_path / "models"
    publish_toys(storage)
    data, file = write_data_folder(tmp_path / "data", width=16, height=8), tmp_path / "data/test.json"
    to = ("--storage", storage, "--name", "padded", "--run", tmp_path / "run")
    code, _, err = command("train", "--data", data, *to, *TINY, "--set", "fit=pad", "--steps", 1)
    assert code == 0, err
    assert load_denoiser(storage / "padded.safetensors").aspect == 2.0
    found = []
    for options in ((), ("--keep-padding",)):
        score = ("score", file, "--storage", storage, "--model", "padded", "--steps", 1)
        code, _, err = command(*score, *options, "--json", tmp_path / "a.json")
        assert code == 0, err
        found.append(json.loads((tmp_path / "a.json").read_text())["padding"])
    assert found == ["cut", "kept"]


BAD_FILES = {
    "unknown label": ('[["red cube"], ["red cub"]]', r'entry 1: unknown label "red cub"; did you mean "red cube"\?'),
    "empty list": ('[["red cube"], []]', "entry 1: empty list"),
    "label twice": ('[["red cube", "red cube"]]', 'entry 0: duplicate label "red cube"'),
    "too many": (json.dumps([ICLEVR.names[:9]]), "entry 0: 9 labels; at most 8"),
    "not JSON": ('[["red cube"', "not JSON"),
    "not text": ("\x00\x01", "not JSON"),
    "object": ('{"a": ["red cube"]}', "expected a list of label lists, got an object"),
    "flat list": ('["red cube"]', 'entry 0: expected a list of labels, got the string "red cube"'),
    "number": ("[[3]]", "entry 0: expected a label's name, got the number 3"),
    "nothing": ("[]", "expected at least one label list"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_score_refuses_a_bad_test_file(command: Command, storage: Path, tmp_path: Path, case: str) -> None:
    content, message = BAD_FILES[case]
    (tmp_path / "bad.json").write_text(content)
    refused(command("score", "bad.json", "--storage", storage), rf"bad\.json: {message}")


@pytest.mark.parametrize("case", ["unknown label", "empty list", "label twice", "not JSON", "flat list"])
def test_train_refuses_bad_labels(command: Command, data: Path, case: str) -> None:
    train = {
        "unknown label": ('{"a.png": ["blu sphere"]}', 'entry "a.png": unknown label .* did you mean "blue sphere"'),
        "empty list": ('{"a.png": []}', "empty list"),
        "label twice": ('{"a.png": ["red cube", "red cube"]}', "duplicate label"),
        "not JSON": ("{", "not JSON"),
        "flat list": ('["a.png"]', "expected an object of file name -> labels"),
    }
    content, message = train[case]
    (data / "train.json").write_text(content)
    refused(command("train", "--data", data, "--steps", 1), message)
    refused(command("fit-evaluator", "--data", data, "--held-out", data, "--steps", 1), message)
    refused(command("render", "out", "--train", data / "train.json"), message)


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        ([], "Missing command", 2),
        (["train"], "Missing option '--data'", 2),
        (["train", "--data", "missing", "--steps", "1"], "'missing' does not exist", 2),
        (["train", "--data", ".", "--steps", "1"], r"objects\.json: cannot be read: No such file", 1),
        (["train", "--data", "data"], "say how long: --minutes or --steps", 1),
        (["train", "--data", "data", "--steps", "0"], "--steps.*>=? ?1|greater than or equal to 1", 2),
        (["train", "--data", "data", "--steps", "many"], "'--steps'.*integer", 2),
        (["train", "--data", "data", "--minutes", "nan"], "'--minutes'", 2),
        (["train", "--data", "data", "--steps", "1", "--preset", "best"], 'no preset "best"; there are default', 1),
        (["train", "--data", "data", "--steps", "1", "--set", "batchsize=4"], r"batchsize: unknown; .* batch\?", 1),
        (["train", "--data", "data", "--steps", "1", "--set", "batch"], "not of the form field=value", 1),
        (["train", "--data", "data", "--steps", "1", "--set", "batch=0"], "batch: .*, got 0", 1),
        (["train", "--data", "data", "--steps", "1", "--set", "lr=-1"], "lr: .*, got -1", 1),
        (["train", "--data", "data", "--steps", "1", "--set", "lr=NaN"], "lr: .*, got nan", 1),
        (["train", "--data", "data", "--steps", "1", "--set", "schedule=cosin"], "schedule: .*, got 'cosin'", 1),
        (["train", "--data", "data", "--steps", "1", "--set", "network.block=3"], "error: image_size 64 must be", 1),
        (["train", "--data", "data", "--steps", "1", "--set", "network.depth=3"], "depth: unknown; known are num_", 1),
        (["train", "--data", "data", "--steps", "1", "--set", "network.num_labels=3"], "num_labels cannot be set", 1),
        (
            ["train", "--data", "data", "--steps", "1", "--set", "network=5", "--set", "network.block=1"],
            "network: .*dictionary",
            1,
        ),
        (["train", "--data", "data", "--steps", "1", "--name", "a/b"], '"a/b" is no checkpoint name', 1),
        (["train", "--data", "data", "--steps", "1", "--device", "tpu"], 'unknown device "tpu"; use auto', 1),
        (["train", "--data", "data", "--steps", "1", "--device", "cuda:99"], r'no device "cuda:99": this machine', 1),
        (["train", "--data", "data", "--steps", "1", "--evaluator", "nobody"], r"no folder /.*/models", 1),
        (["train", "--data", "data", "--steps", "1", "--tests", "bad.json"], r'bad\.json: .*unknown label "x"', 1),
        (["fit-evaluator", "--data", "data", "--held-out", "data"], "say how long", 1),
        (["fit-evaluator", "--data", "data", "--held-out", "no", "--steps", "1"], "'no' does not exist", 2),
        (
            ["fit-evaluator", "--data", "data", "--held-out", "data", "--steps", "1", "--course-file", "no/c.pth"],
            "there is no folder no",
            1,
        ),
        (["render", "out", "--train", "missing.json"], r"'missing\.json' does not exist", 2),
        (["render", "out", "--train", "data/train.json", "--scenes", "2"], "--scenes and --train exclude", 1),
        (["render", "out", "--size", "4"], "--size", 2),
        (["render", "bad.json", "--scenes", "1", "--size", "16"], r"bad\.json", 1),
        (["promote", "nobody", "--storage", "."], "nobody: no such checkpoint", 1),
    ],
)  # fmt: skip
def test_one_line_for_what_is_wrong(
    command: Command, data: Path, arguments: list[str], message: str, code: int
) -> None:
    Path("bad.json").write_text('[["x"]]')
    refused(command(*arguments), message, code)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.json"], r"missing\.json: cannot be read: No such file"),
        (["good.json", "--model", "nobody"], "nobody: no such denoiser in .*; available: other, toy"),
        (["good.json", "--model", "toy-evaluator"], "is of kind evaluator, not denoiser"),
        (["good.json", "--evaluator", "toy"], "is of kind denoiser, not evaluator"),
        (["good.json", "--evaluator", "missing.pth"], r"missing\.pth: cannot be read: No such file"),
        (["good.json", "--storage", "nope"], r"nope: there is no folder /.*/nope"),
        (["good.json", "--preset", "fast"], 'no sampling preset "fast"; there are default, report'),
        (["good.json", "--steps", "0"], "steps: .*greater than or equal to 1, got 0"),
        (["good.json", "--steps", "1001"], "steps: .*less than or equal to 1000, got 1001"),
        (["good.json", "--sampler", "heun"], "sampler: .*'dpmpp_2m'.*, got 'heun'"),
        (["good.json", "--spacing", "cubic"], "spacing: .*'logsnr'.*, got 'cubic'"),
        (["good.json", "--guidance", "nan"], "guidance: .*got nan"),
        (["good.json", "--guidance", "-1"], "guidance: .*got -1"),
        (["good.json", "--interval", "0.9", "0.1"], "guidance_interval is"),
        (["good.json", "--grid", "grid.jpg"], r"grid\.jpg must end in \.png"),
        (["good.json", "--grid", "no/grid.png"], "there is no folder no"),
        (["good.json", "--json", "no/out.json"], "there is no folder no"),
        (["good.json", "--device", "cuda:99"], 'no device "cuda:99": this machine has'),
    ],
)
def test_score_says_what_is_wrong(command: Command, storage: Path, arguments: list[str], message: str) -> None:
    Path("good.json").write_text('[["red cube"]]')
    refused(command("score", "--storage", storage, *arguments), message)


def test_a_cut_checkpoint(command: Command, storage: Path, tmp_path: Path) -> None:
    shutil.copytree(storage, "copy")
    path = tmp_path / "copy" / "toy.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    Path("good.json").write_text('[["red cube"]]')
    refused(command("score", "good.json", "--storage", "copy"), r"toy\.safetensors: truncated")
    promote(tmp_path / "copy", "other")
    assert command("score", "good.json", "--storage", "copy", "--steps", 1)[0] == 0
