"""`trainer score`, `promote`, `configure` and `export`: figures, grids, and refused arguments.

Default sampling is tested in tests/test_sampling_defaults.py, `trainer card` in studies/test_card.py, and ONNX
files in test_export.py.
"""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from service.contract.records import Picture
from service.worker.judge import judge_pictures
from shared.checkpoint import load, publish, read_info, verify
from shared.diffusion.candidates import LOG_SNRS
from shared.diffusion.denoise import sample
from shared.diffusion.model import load_denoiser
from shared.evaluator import Evaluator, load_evaluator
from shared.options import picture_seed
from shared.registry import promote, resolve
from shared.support import support_of
from shared.vocabulary import ICLEVR, Vocabulary
from tests.shared.test_evaluator import CourseEvaluator
from tests.toy_checkpoint import publish_toy_denoiser, publish_toy_evaluator, publish_toys
from tests.trainer.command_line import TINY, Command, refused, succeeded
from tests.trainer_fixtures import write_data_folder


def test_scores_are_printed_and_written(command: Command) -> None:
    publish_toys(Path("models"))
    Path("few.json").write_text(json.dumps([["red cube"], ["blue sphere", "gray cylinder"]]))
    more = ("--steps", 3, "--grid", "grid.png", "--columns", 1, "--json", "score.json")
    assert "few.json, toy" in succeeded(command("score", "few.json", "--repeats", 2, *more))
    figures = json.loads(Path("score.json").read_text())
    assert [run["seed"] for run in figures["runs"]] == [0, 1]
    accuracies = [run["accuracy"] for run in figures["runs"]]
    assert figures["accuracy"]["max"] == max(accuracies)
    assert figures["accuracy"]["mean"] == pytest.approx(sum(accuracies) / 2)
    assert figures["accuracy"]["std"] == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2)
    assert (figures["rows_per_picture"], figures["padding"], figures["evaluator"]) == (6, "none", "toy-evaluator")
    with Image.open("grid.png") as grid:
        assert grid.size == (20, 2 + 2 * 18)


def test_the_best_of_several_candidates_is_scored(command: Command) -> None:
    publish_toys(Path("models"))
    Path("few.json").write_text(json.dumps([["red cube"], ["blue sphere", "gray cylinder"]]))
    succeeded(command("score", "few.json", "--candidates", 3, "--steps", 2, "--json", "score.json"))
    figures = json.loads(Path("score.json").read_text())
    sampled, examined = 2 * 2, 2 * len(LOG_SNRS)
    assert (figures["candidates"], figures["rows_per_picture"]) == (3, 3 * (sampled + examined))


def test_pictures_that_are_not_finite_get_no_score(command: Command) -> None:
    publish_toys(Path("models"))
    info, tensors = load(Path("models/toy.safetensors"))
    tensors["head.bias"][:] = torch.nan
    publish(
        Path("models"), "broken", tensors, kind="denoiser", vocabulary=info.vocabulary, config=info.config, training={}
    )
    Path("few.json").write_text(json.dumps([["red cube"]]))
    refused(command("score", "few.json", "--model", "broken", "--steps", 2), "the network's output is not finite")


def test_an_evaluator_of_more_labels_judges_as_in_the_service(command: Command) -> None:
    """Its labels have another order, too. The verdict is on all of them."""
    storage, labels = Path("models"), ["red cube", "blue sphere", "gray cylinder"]
    publish_toy_denoiser(storage, "few", 0, vocabulary=Vocabulary(tuple(labels)))
    publish_toy_evaluator(storage, "wide")
    promote(storage, "wide")
    promote(storage, "few")
    lists = [labels[:1], labels[1:]]
    Path("few.json").write_text(json.dumps(lists))
    succeeded(command("score", "few.json", "--steps", 2, "--json", "score.json"))
    denoiser, judge = load_denoiser(storage / "few.safetensors"), load_evaluator(storage / "wide.safetensors")
    options = denoiser.options.model_copy(update={"steps": 2})
    seeds = [picture_seed(0, i) for i in range(2)]
    images = sample(denoiser.stepper(), torch.tensor([[1.0, 0, 0], [0, 1, 1]]), options, seeds)
    pictures = [
        Picture(job="j", index=i, labels=tuple(one), seed=seeds[i], options=options) for i, one in enumerate(lists)
    ]
    verdicts = judge_pictures(judge, pictures, images)
    figures = json.loads(Path("score.json").read_text())
    for name, wanted in (("exact_match", [one.exact for one in verdicts]), ("f1", [one.f1 for one in verdicts])):
        assert figures[name]["mean"] == pytest.approx(sum(wanted) / 2)
    hits = sum(one.accuracy * len(one.labels) for one in verdicts)
    assert figures["accuracy"]["mean"] == pytest.approx(hits / 3)
    assert len(verdicts[0].probabilities) == len(ICLEVR)


def test_an_evaluator_is_exported_as_the_courses_checkpoint_which_can_judge(command: Command) -> None:
    publish_toys(Path("models"))
    Path("few.json").write_text(json.dumps([["red cube"]]))
    succeeded(command("export", "toy-evaluator", "checkpoint.pth"))
    succeeded(command("score", "few.json", "--evaluator", "checkpoint.pth", "--steps", 1, "--json", "score.json"))
    assert json.loads(Path("score.json").read_text())["evaluator"] == "checkpoint.pth"
    course = CourseEvaluator(Path("checkpoint.pth"))  # loads strictly
    kept = load(Path("models/toy-evaluator.safetensors"))[1]
    assert all(torch.equal(value, kept[key].to(value.dtype)) for key, value in course.net.state_dict().items())
    refused(command("export", "toy", "checkpoint.pth"), "is of kind denoiser, not evaluator")
    weights = Evaluator(Vocabulary(("zero", "one"))).resnet.state_dict()
    publish(Path("models"), "digits", weights, kind="evaluator", vocabulary=("zero", "one"), config={}, training={})
    refused(command("export", "digits", "c.pth"), "digits has other labels than i-CLEVR's")


def test_another_checkpoint_is_promoted(command: Command) -> None:
    publish_toys(Path("models"))
    assert command("promote", "other")[0] == 0
    assert resolve(Path("models"), None, "denoiser").stem == "other"
    refused(command("promote", "nobody", "--storage", "."), "nobody: no such checkpoint")


def test_support_is_written_and_nothing_else_changes(command: Command) -> None:
    publish_toy_denoiser(Path("models"), "placed", 3, positions=True, support={"objects": [1, 8], "nearest": 0.1})
    path = resolve(Path("models"), "placed", "denoiser")
    before = read_info(path)
    assert command("configure", "placed", "--objects", 1, 3)[0] == 0
    after = verify(path)
    assert after.config.pop("support") == {"objects": [1, 3], "area": None, "nearest": 0.1}
    assert before.config.pop("support") == {"objects": [1, 8], "nearest": 0.1}
    assert after == before
    refused(command("configure", "placed", "--objects", 3, 1), r"objects is \[3, 1\]; the first number")
    refused(command("configure", "nobody", "--objects", 1, 3), "nobody: no such denoiser")
    refused(command("configure", "placed", "--objects", 0, 17), "--objects 0 17: a request names at most 16 labels")
    publish_toy_denoiser(Path("models"), "digits", 0, vocabulary=Vocabulary(("zero", "one")))
    refused(command("configure", "digits", "--objects", 0, 3), "--objects 0 3: digits knows 2 labels")
    assert support_of(read_info(path).config).objects == (1, 3)


def test_proportions_are_written(command: Command) -> None:
    publish_toys(Path("models"))
    path = resolve(Path("models"), "toy", "denoiser")
    assert "proportions" not in read_info(path).config
    succeeded(command("configure", "toy", "--objects", 1, 3, "--proportions", 4, 3))
    assert read_info(path).config["proportions"] == [4, 3]
    assert command("configure", "toy", "--objects", 1, 8)[0] == 0
    assert read_info(path).config["proportions"] == [4, 3]
    wrong = command("configure", "toy", "--objects", 1, 3, "--proportions", 4, 0)
    refused(wrong, "--proportions 4 0: both must be at least 1")


def test_the_padding_is_cropped_before_pictures_are_judged(command: Command, tmp_path: Path) -> None:
    storage = tmp_path / "models"
    publish_toys(storage)
    data, file = write_data_folder(tmp_path / "data", width=16, height=8), tmp_path / "data/test.json"
    to = ("--storage", storage, "--name", "padded", "--run", tmp_path / "run")
    succeeded(command("train", "denoiser", "--data", data, *to, *TINY, "--set", "fit=pad", "--steps", 1))
    assert load_denoiser(storage / "padded.safetensors").aspect == 2.0
    found = []
    for options in ((), ("--keep-padding",)):
        score = ("score", file, "--storage", storage, "--model", "padded", "--steps", 1)
        succeeded(command(*score, *options, "--json", tmp_path / "a.json"))
        found.append(json.loads((tmp_path / "a.json").read_text())["padding"])
    assert found == ["cut", "kept"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bad.json"], r'bad\.json: entry 1: unknown label "red cub"; did you mean "red cube"\?'),
        (["good.json", "--model", "nobody"], "nobody: no such denoiser in .*; available: other, toy"),
        (["good.json", "--preset", "fast"], 'no sampling preset "fast"; there are default, report'),
        (["good.json", "--steps", "0"], "steps: .*greater than or equal to 1, got 0"),
        (["good.json", "--grid", "grid.jpg"], r"grid\.jpg must end in \.png"),
        (["good.json", "--json", "no/out.json"], "there is no folder no"),
        (["good.json", "--renders", "--steps", "4"], "--renders samples nothing; leave out"),
        (["good.json", "--device", "cuda:99"], 'no device "cuda:99": this machine has'),
    ],
)
def test_bad_score_arguments_are_refused(command: Command, storage: Path, arguments: list[str], message: str) -> None:
    Path("good.json").write_text('[["red cube"]]')
    Path("bad.json").write_text('[["red cube"], ["red cub"]]')
    refused(command("score", "--storage", storage, *arguments), message)
