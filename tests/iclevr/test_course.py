"""The course's checkpoint.pth, compared with a copy of its evaluator; what no such file is; the commands."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from iclevr import course
from iclevr.labels import ICLEVR
from shared.checkpoint import CheckpointError, load, publish
from shared.evaluator import Evaluator, score_set
from shared.vocabulary import Vocabulary
from tests.shared_evaluators import random_evaluator
from tests.toy_checkpoint import publish_toy_evaluator, publish_toys
from tests.trainer.command_line import Command, refused, succeeded


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    return random_evaluator()


@pytest.fixture(scope="module")
def course_file(evaluator: Evaluator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("course") / "checkpoint.pth"
    course.write(evaluator, path)
    return path


def test_the_position_head_is_left_out(course_file: Path, tmp_path: Path) -> None:
    course.write(random_evaluator(locates=True), tmp_path / "checkpoint.pth")
    written = torch.load(tmp_path / "checkpoint.pth", weights_only=True)["model"]
    assert list(written) == list(torch.load(course_file, weights_only=True)["model"])
    assert course.read(tmp_path / "checkpoint.pth", engine="torch").positions(torch.zeros(1, 3, 64, 64)) is None


def test_a_checkpoint_written_on_a_gpu_can_be_read_without_one(
    evaluator: Evaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as on_a_gpu:
        on_a_gpu.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
        course.write(evaluator, tmp_path / "checkpoint.pth")
    assert course.read(tmp_path / "checkpoint.pth", engine="torch").resnet.conv1.weight.device.type == "cpu"


class CourseEvaluator:
    """The course's evaluator.py, rewritten for the CPU."""

    def __init__(self, path: Path) -> None:
        self.net = resnet18(weights=None)
        self.net.fc = nn.Sequential(nn.Linear(512, 24), nn.Sigmoid())
        self.net.load_state_dict(torch.load(path, weights_only=True)["model"])
        self.net.eval()

    @torch.no_grad()
    def accuracy(self, images: Tensor, onehot: Tensor) -> float:
        hits = total = 0
        for out, wanted in zip(self.net(images), onehot, strict=True):
            k = int(wanted.sum())
            hits += len(set(out.topk(k).indices.tolist()) & set(wanted.topk(k).indices.tolist()))
            total += k
        return hits / total


def test_the_courses_evaluator_gives_our_scores(evaluator: Evaluator, course_file: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(12, 3, 64, 64, generator=generator) * 2 - 1
    targets = (torch.rand(12, 24, generator=generator) < 0.4).float()
    targets[:, 0] = 1
    theirs, loaded = CourseEvaluator(course_file), course.read(course_file, engine="torch")
    probabilities = evaluator.probabilities(images)
    with torch.no_grad():
        torch.testing.assert_close(theirs.net(images), probabilities, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loaded.probabilities(images), probabilities, rtol=1e-4, atol=1e-5)
    wanted = theirs.accuracy(images, targets)
    assert 0 < wanted < 1
    assert score_set(probabilities, targets, ICLEVR.names).accuracy == pytest.approx(wanted)


class Harmful:
    """A pickle that would run code; weights_only must refuse it."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("code ran",))


def test_files_that_are_not_checkpoints_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, form, fit = tmp_path / "checkpoint.pth", "not a checkpoint of the form", "weights do not fit resnet18"
    contents = [
        ({"model": Harmful()}, form),
        ({"state": {}}, form),
        ({"model": {"fc.0.weight": torch.zeros(24, 512)}}, fit),
        ({"model": [1, 2]}, fit),
        (b"no pickle at all", form),
        (b"PK\3\4" + bytes(100), form),
    ]
    for content, message in contents:
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(CheckpointError, match=rf"checkpoint\.pth: {message}") as caught:
            course.read(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=r"missing\.pth: cannot be read: No such file"):
        course.read(tmp_path / "missing.pth")
    assert "code ran" not in capsys.readouterr().out


def test_an_evaluator_is_exported_as_the_courses_checkpoint_which_can_judge(command: Command) -> None:
    publish_toys(Path("models"))
    Path("few.json").write_text(json.dumps([["red cube"], ["blue sphere", "gray cylinder"]]))
    publish_toy_evaluator(Path("models"), "course", architecture="resnet18")
    succeeded(command("export", "course", "checkpoint.pth"))
    succeeded(
        command(
            "score", "few.json", "--repeats", 1, "--evaluator", "checkpoint.pth", "--steps", 1, "--json", "score.json"
        )
    )
    assert json.loads(Path("score.json").read_text())["evaluator"] == "checkpoint.pth"
    theirs = CourseEvaluator(Path("checkpoint.pth"))  # loads strictly
    kept = load(Path("models/course.safetensors"))[1]
    assert all(torch.equal(value, kept[key].to(value.dtype)) for key, value in theirs.net.state_dict().items())
    refused(command("export", "toy", "checkpoint.pth"), "is of kind denoiser, not evaluator")
    weights = Evaluator(Vocabulary(("zero", "one"))).resnet.state_dict()
    publish(Path("models"), "digits", weights, kind="evaluator", vocabulary=("zero", "one"), config={}, training={})
    refused(command("export", "digits", "c.pth"), "digits has other labels than i-CLEVR's")
