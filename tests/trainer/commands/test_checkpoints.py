"""`trainer score`, `promote`, `configure` and `export`: figures, grids, and refused arguments.

Default sampling is tested in tests/test_sampling_defaults.py, `trainer card` in studies/test_card.py, and ONNX
files in test_export.py.
"""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from service.contract.options import PictureOptions
from service.contract.records import Picture
from service.worker.attempts import judge_pictures
from shared.checkpoint import load, publish, read_info, verify
from shared.diffusion.denoise import sample
from shared.diffusion.model import load_denoiser
from shared.evaluator import load_evaluator
from shared.options import picture_seed
from shared.registry import promote, resolve
from shared.support import support_of
from shared.vocabulary import Vocabulary
from tests.toy_checkpoint import publish_toy_denoiser, publish_toy_evaluator, publish_toys
from tests.trainer.command_line import TINY, Command, refused, succeeded
from tests.trainer_fixtures import write_data_folder


@pytest.fixture(autouse=True)
def _files(command: Command) -> None:
    """Publish the toys, and write two label lists."""
    publish_toys(Path("models"))
    Path("few.json").write_text(json.dumps([["red cube"], ["blue sphere", "gray cylinder"]]))


def test_scores_are_printed_and_written(command: Command) -> None:
    more = ("--steps", 3, "--grid", "grid.png", "--json", "score.json")
    assert "few.json, toy" in succeeded(command("score", "few.json", "--repeats", 2, *more))
    figures = json.loads(Path("score.json").read_text())
    assert [run["seed"] for run in figures["runs"]] == [0, 1]
    accuracies = [run["accuracy"] for run in figures["runs"]]
    assert figures["accuracy"]["max"] == max(accuracies)
    assert figures["accuracy"]["mean"] == pytest.approx(sum(accuracies) / 2)
    assert figures["accuracy"]["std"] == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2)
    assert (figures["rows_per_picture"], figures["padding"], figures["evaluator"]) == (6, "none", "toy-evaluator")
    with Image.open("grid.png") as grid:
        assert grid.size == (2 + 2 * 18, 20)


def test_a_list_of_more_objects_than_the_model_has_learnt_is_refused(command: Command) -> None:
    """`placed` draws layouts of up to three objects; a fourth would have no place."""
    publish_toy_denoiser(Path("models"), "placed", 3, positions=True, support={"objects": [1, 3]})
    labels = ["red cube", "blue sphere", "gray cylinder", "cyan cube"]
    Path("many.json").write_text(json.dumps([labels[:3], labels, labels]))
    score = "score", "many.json", "--repeats", 1, "--model", "placed", "--steps", 1
    refused(command(*score), "many.json: entry 1: 4 labels; this model has learnt pictures of 1 to 3 objects")
    Path("many.json").write_text(json.dumps([labels[:3]]))
    succeeded(command(*score))


def test_pictures_that_are_not_finite_get_no_score(command: Command) -> None:
    info, tensors = load(Path("models/toy.safetensors"))
    tensors["head.bias"][:] = torch.nan
    publish(
        Path("models"), "broken", tensors, kind="denoiser", vocabulary=info.vocabulary, config=info.config, training={}
    )
    refused(
        command("score", "few.json", "--repeats", 1, "--model", "broken", "--steps", 2),
        "the network's output is not finite",
    )


def test_an_evaluator_of_more_labels_judges_as_in_the_service(command: Command) -> None:
    """Its labels have another order, too. The verdict is on all of them."""
    storage, labels = Path("models"), ["red cube", "blue sphere", "gray cylinder"]
    publish_toy_denoiser(storage, "few", 0, vocabulary=Vocabulary(tuple(labels)))
    publish_toy_evaluator(storage, "wide")
    promote(storage, "wide")
    promote(storage, "few")
    lists = [labels[:1], labels[1:]]
    Path("few.json").write_text(json.dumps(lists))
    succeeded(command("score", "few.json", "--repeats", 1, "--steps", 2, "--json", "score.json"))
    denoiser, judge = load_denoiser(storage / "few.safetensors"), load_evaluator(storage / "wide.safetensors")
    options = denoiser.options.model_copy(update={"steps": 2})
    seeds = [picture_seed(0, i) for i in range(2)]
    images = sample(denoiser.stepper(), torch.tensor([[1.0, 0, 0], [0, 1, 1]]), options, seeds)
    same = PictureOptions(**options.model_dump())
    pictures = [
        Picture(job="j", index=i, labels=tuple(one), seed=seeds[i], options=same) for i, one in enumerate(lists)
    ]
    verdicts = judge_pictures(judge, pictures, images)
    figures = json.loads(Path("score.json").read_text())
    for name, wanted in (("exact_match", [one.exact for one in verdicts]), ("f1", [one.f1 for one in verdicts])):
        assert figures[name]["mean"] == pytest.approx(sum(wanted) / 2)
    hits = sum(one.accuracy * len(one.labels) for one in verdicts)
    assert figures["accuracy"]["mean"] == pytest.approx(hits / 3)


def test_another_checkpoint_is_promoted(command: Command) -> None:
    assert command("promote", "other")[0] == 0
    assert resolve(Path("models"), None, "denoiser").stem == "other"
    refused(command("promote", "nobody", "--storage", "."), "nobody: no such checkpoint")


def test_support_and_proportions_are_written_and_nothing_else_changes(command: Command) -> None:
    publish_toy_denoiser(Path("models"), "placed", 3, positions=True, support={"objects": [1, 8], "nearest": 0.1})
    path = resolve(Path("models"), "placed", "denoiser")
    before = read_info(path)
    succeeded(command("configure", "placed", "--proportions", 4, 3))
    succeeded(command("configure", "placed", "--objects", 1, 3))
    after = verify(path)
    assert after.config.pop("proportions") == [4, 3]
    assert after.config.pop("support") == {"objects": [1, 3], "area": None, "nearest": 0.1}
    assert before.config.pop("support") == {"objects": [1, 8], "nearest": 0.1}
    assert after == before
    refused(command("configure", "placed", "--objects", 3, 1), r"objects is \[3, 1\]; the first number")
    refused(command("configure", "placed", "--objects", 0, 17), "--objects 0 17: a request names at most 16 labels")
    refused(command("configure", "placed", "--proportions", 4, 0), "--proportions 4 0: both must be at least 1")
    publish_toy_denoiser(Path("models"), "digits", 0, vocabulary=Vocabulary(("zero", "one")))
    refused(command("configure", "digits", "--objects", 0, 3), "--objects 0 3: digits knows 2 labels")
    assert support_of(read_info(path).config).objects == (1, 3)


def test_the_padding_is_cropped_before_pictures_are_judged(command: Command, tmp_path: Path) -> None:
    data = write_data_folder(tmp_path / "data", width=16, height=8)
    train = ("train", "denoiser", "--data", data, "--name", "padded", *TINY, "--set", "fit=pad", "--steps", 1)
    succeeded(command(*train))
    assert load_denoiser(Path("models/padded.safetensors")).aspect == 2.0
    Path("few.json").write_text(json.dumps([["red cube"], ["blue sphere"]]))
    found = []
    for options in ((), ("--keep-padding",)):
        succeeded(
            command(
                "score", "few.json", "--repeats", 1, "--model", "padded", "--steps", 1, *options, "--json", "a.json"
            )
        )
        found.append(json.loads(Path("a.json").read_text())["padding"])
    assert found == ["cut", "kept"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bad.json"], r'bad\.json: entry 1: unknown label "red cub"; did you mean "red cube"\?'),
        (["few.json", "--model", "nobody"], "nobody: no such denoiser in .*; available: other, toy"),
        (["few.json", "--steps", "0"], "steps: .*greater than or equal to 1, got 0"),
        (["few.json", "--grid", "grid.jpg"], r"grid\.jpg must end in \.png"),
        (["few.json", "--json", "few.json/out.json"], r"few\.json is a file, not a folder"),
        (["few.json", "--renders", "--steps", "4"], "--renders samples nothing; leave out"),
        (["few.json", "--device", "cuda:99"], 'no device "cuda:99": this machine has'),
    ],
)
def test_bad_score_arguments_are_refused(command: Command, arguments: list[str], message: str) -> None:
    Path("bad.json").write_text('[["red cube"], ["red cub"]]')
    refused(command("score", *arguments), message)
