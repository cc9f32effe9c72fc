"""`trainer train evaluator` and `trainer train denoiser`: publishing, resuming, logging, and refused arguments."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
import typer
from PIL import Image
from torch import Tensor

from shared.checkpoint import read_info
from shared.registry import promote, promoted
from tests.toy_checkpoint import publish_toys
from tests.trainer.command_line import TINY, Command, refused, succeeded
from tests.trainer_fixtures import write_data_folder
from trainer.commands import training
from trainer.errors import TrainerError
from trainer.objectives.denoiser import Denoising

FIT = ("train", "evaluator", "--architecture", "resnet10", "--set", "batch=8")
UNSEEN = "note: no picture shows brown cube, purple cube, .*, yellow cylinder, so they cannot be learnt\n"


@pytest.fixture
def unseen(tmp_path: Path) -> Path:
    return write_data_folder(tmp_path / "unseen", pictures=4)


OF_ANY_RUN = {
    "data": [Path("x")], "storage": Path("s"), "name": "n", "run": Path("r"), "minutes": 1.5, "steps": 7,
    "start_from": "b", "set_": ["batch=3"], "patience": 4, "publish_every": "9", "promote": True,
    "grad_accumulation": 2, "device": "cuda:1",
}  # fmt: skip
OWN = {
    "evaluator": {"--held-out": "x"}, "denoiser": {}, "layouts": {}, "distilled": {}, "upsampler": {"--base": "d"},
    "one-step": {"--base": "d"},
}  # fmt: skip


@pytest.mark.parametrize("objective", OWN)
def test_the_options_of_any_run_are_those_of_each_objective(
    command: Command, monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    """Each with its value. An objective's own options come after them."""
    Path("x").mkdir()
    found = dict[str, object]()

    def plan(**given: object) -> None:
        found.update(given)
        raise TrainerError("enough")

    monkeypatch.setattr(training, "Plan", plan)
    options = [
        "--data", "x", "--storage", "s", "--name", "n", "--run-folder", "r", "--minutes", 1.5, "--steps", 7,
        "--start-from", "b", "--set", "batch=3", "--patience", 4, "--publish-every", 9, "--promote",
        "--grad-accumulation", 2, "--device", "cuda:1",
    ]  # fmt: skip
    own = [part for option in OWN[objective].items() for part in option]
    refused(command("train", objective, *options, *own), "enough")
    assert found == OF_ANY_RUN
    every = typer.main.get_command(training.app).commands  # type: ignore[attr-defined]
    parameters = {one: {p.name: p for p in every[one].params} for one in (objective, "evaluator")}
    assert list(parameters[objective])[: len(OF_ANY_RUN)] == list(OF_ANY_RUN)
    for name in OF_ANY_RUN.keys() - {"name", "run"}:
        ours, first = (
            (one.opts, one.help, one.default, one.required)
            for one in (parameters[objective][name], parameters["evaluator"][name])
        )
        assert ours == first
    name, run = (parameters[objective][one].default for one in ("name", "run"))
    assert (name, str(run)) == (None if objective == "layouts" else objective, f"runs/{objective}")


def test_the_evaluator_is_published_and_resumes(command: Command, data: Path, unseen: Path) -> None:
    for has_finished in (False, True):
        code, _, err = command(*FIT, "--data", data, "--data", data, "--held-out", unseen, "--steps", 1)
        assert (code, "the run was finished before" in err) == (0, has_finished), err
        assert re.search(UNSEEN, err)
    assert read_info(Path("models/evaluator.safetensors")).kind == "evaluator"


def test_the_denoiser_is_scored_while_it_trains_and_resumes_by_the_same_command(command: Command, data: Path) -> None:
    publish_toys(Path("models"))
    Path("few.json").write_text(json.dumps([["red cube"], ["blue sphere", "gray cylinder"]]))
    train = ["train", "denoiser", "--data", data, "--name", "tiny", "--evaluator", "toy-evaluator"]
    train += ["--tests", "few.json", *TINY]
    succeeded(command(*train, "--steps", 2))
    with Image.open("runs/denoiser/samples-0000002.png") as grid:
        assert grid.size == (2 + 2 * 18, 20)
    last = json.loads(Path("runs/denoiser/log.jsonl").read_text().splitlines()[-1])
    assert {"few/accuracy", "few/exact_match", "few/f1"} < last.keys()
    assert read_info(Path("models/tiny.safetensors")).training["steps"] == 2
    succeeded(command(*train, "--steps", 3))
    assert read_info(Path("models/tiny.safetensors")).training["steps"] == 3
    refused(command(*train, "--steps", 4, "--set", "lr=0.5"), "was started with another lr")


def test_the_best_weights_are_published_beside_the_last_and_patience_ends_a_run(
    command: Command, data: Path, unseen: Path
) -> None:
    """With a rate that undoes what is learnt, the first evaluation is the best."""
    train = ["train", "denoiser", "--data", data, "--held-out", unseen, "--name", "tiny", "--set", "evaluate_every=1"]
    train += [*TINY, "--set", "publish=raw", "--set", "warmup_steps=0", "--set", "optimizer=adamw"]
    succeeded(command(*train, "--steps", 1))
    assert not Path("models/tiny-best.safetensors").exists()
    spoiling = [*train, "--set", "lr=3.0", "--run", "spoilt", "--steps", 50]
    assert "best, at step 1 " in command(*spoiling, "--patience", 2)[2]
    last, best = (read_info(Path(f"models/{name}.safetensors")).training for name in ("tiny", "tiny-best"))
    assert (last["steps"], best["steps"]) == (3, 1)
    assert best["last"]["held_out_loss"] < last["last"]["held_out_loss"]
    spoilt_further = command(*spoiling, "--patience", 2)
    assert "the run was finished before" in spoilt_further[2]
    promote(Path("models"), "tiny-best")
    plain = ("train", "denoiser", "--data", data, "--name", "tiny", *TINY, "--run", "plain", "--steps", 1)
    succeeded(command(*plain))  # without held-out pictures it has no best, and the former run's does not stay
    assert sorted(path.name for path in Path("models").glob("tiny*")) == [
        "tiny-card.json", "tiny-log.jsonl", "tiny-log.png", "tiny.md", "tiny.safetensors"
    ]  # fmt: skip
    assert promoted(Path("models")) == "tiny"
    publish_toys(Path("models"))
    shutil.copy("models/toy-evaluator.safetensors", "models/other-best.safetensors")
    other = ("train", "denoiser", "--data", data, "--name", "other", "--steps", 1)
    refused(command(*other), "other-best: exists and is of kind evaluator")


def test_a_run_is_published_and_promoted_while_it_goes_on_and_after_a_signal(
    command: Command, data: Path, unseen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes while step 4 is drawn. The best of what is published is the default."""
    seen = list[tuple[int, str | None]]()
    original = Denoising.draw

    def draw(self: Denoising, index: Tensor, share: slice, generator: torch.Generator) -> list[Tensor]:
        path = Path("models/tiny.safetensors")
        if path.exists() and len(index) == 8:
            seen.append((read_info(path).training["steps"], promoted(Path("models"))))
        if self.config.seed == 0 and len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, index, share, generator)

    monkeypatch.setattr(Denoising, "draw", draw)
    train = ["train", "denoiser", "--data", data, "--name", "tiny", *TINY, "--steps", 9, "--set", "warmup_steps=2"]
    refused(
        command(*train, "--publish-every", 2, "--promote"),
        "stopped by SIGTERM at step 4; the same command goes on from there", code=128 + signal.SIGTERM,
    )  # fmt: skip
    assert seen == [(2, "tiny"), (2, "tiny")]
    assert read_info(Path("models/tiny.safetensors")).training["steps"] == 4
    refused(command(*train, "--publish-every", "soon"), '"soon" is neither minutes, as 10m, nor steps, as 500')
    same = [*train, "--held-out", unseen, "--held-out", data]
    refused(command(*same), "data is given as --data and as --held-out; pictures that are learnt test nothing")
    refused(command(*train, "--held-out", unseen), "was started with another held out; choose another --run")


def test_the_loss_on_held_out_pictures_is_logged(command: Command, data: Path, tmp_path: Path) -> None:
    unseen, other = (write_data_folder(tmp_path / name, pictures=4) for name in ("unseen", "other"))
    train = ("train", "denoiser", "--data", data, "--held-out", other, "--held-out", unseen, "--name", "tiny", *TINY)
    code, _, err = command(*train, "--steps", 2)
    assert code == 0, err
    last = json.loads(Path("runs/denoiser/log.jsonl").read_text().splitlines()[-1])
    assert min(last["held_out_loss"], last["seen_loss"]) > 0
    assert f"{last['held_out_loss']:.5f}" in err
    assert re.search(UNSEEN, err)
    assert read_info(Path("models/tiny.safetensors")).training["last"]["held_out_loss"] == last["held_out_loss"]
    for label in ("red cube", "cat"):
        (unseen / "objects.json").write_text(json.dumps({label: 0}))
        (unseen / "train.json").write_text(json.dumps({"CLEVR_train_000000_0.png": [label]}))
        again = command(*train, "--steps", 3, "--run", label.split()[0])
    refused(again, "does not know labels of the folder: cat")
    assert read_info(Path("models/tiny.safetensors")).training["steps"] == 3


def test_pictures_without_any_labels_are_refused_before_training(command: Command, data: Path, tmp_path: Path) -> None:
    empty = write_data_folder(tmp_path / "empty", pictures=4)
    (empty / "train.json").write_text(json.dumps(dict.fromkeys(json.loads((empty / "train.json").read_text()), ())))
    message = "none of the {} pictures has labels"
    refused(command(*FIT, "--steps", 1, "--data", data, "--held-out", empty), message.format("held-out"))
    refused(command("train", "denoiser", "--data", empty, "--steps", 1, *TINY), message.format("training"))
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        ([], "Missing option '--data'", 2),
        (["--data", ".", "--steps", "1"], r"error: \. is no data set, but data is one", 1),
        (["--data", "data"], "say how long: --minutes or --steps", 1),
        (["--data", "data", "--steps", "1", "--preset", "best"], "'best' is not one of 'default', 'report'", 2),
        (["--data", "data", "--steps", "1", "--set", "batchsize=4"], r"batchsize: unknown; .* batch\?", 1),
        (["--data", "data", "--steps", "1", "--set", "batch"], "not of the form field=value", 1),
        (["--data", "data", "--steps", "1", "--set", "lr=NaN"], "lr: .*, got nan", 1),
        (["--data", "data", "--steps", "1", "--set", "network.block=3"], "error: image_size 64 must be", 1),
        (["--data", "data", "--steps", "1", "--set", "network.num_labels=3"], "num_labels cannot be set", 1),
        (["--data", "data", "--steps", "1", "--name", "a/b"], "'a/b': not a checkpoint's name", 1),
        (["--data", "data", "--steps", "1", "--device", "tpu"], 'unknown device "tpu"; use auto', 1),
        (["--data", "data", "--steps", "1", "--tests", "bad.json"], r'bad\.json: .*unknown label "x"', 1),
        (["--data", "data", "--steps", "1", *2 * ["--tests", "data/test.json"]], "several of --tests have one name", 1),
    ],
)
def test_bad_arguments_are_refused(command: Command, data: Path, arguments: list[str], message: str, code: int) -> None:
    Path("bad.json").write_text('[["x"]]')
    refused(command("train", "denoiser", *arguments), message, code)
