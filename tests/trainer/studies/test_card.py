"""A checkpoint's card: its text comes from the checkpoint, its log and its scores. `train` and `score` write it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from shared.checkpoint import publish, read_info
from shared.options import SamplingOptions
from tests.paths import ROOT
from tests.toy_checkpoint import publish_toys
from tests.trainer.command_line import TINY, Command, succeeded
from trainer.errors import TrainerError
from trainer.studies.card import Card, Score, front_matter, read_card, score_of, write_card
from trainer.studies.markdown import part_of, with_part

CARDS = sorted((ROOT / "models").glob("*.md"))


def _published(folder: Path, weight: float = 0.0, **training: Any) -> str:
    publish(
        folder, "m", {"w": torch.full((2,), weight)}, kind="denoiser", vocabulary=("a", "b"), config={"T": 10},
        training={"x": {"y": 3}, **training},
    )  # fmt: skip
    return read_info(folder / "m.safetensors").digest


def _score(runs: int = 2, mean: float = 0.5, file: str = "test.json") -> Score:
    figure = {"mean": mean, "std": 0.25, "max": 0.75}
    figures = {"file": file, "runs": [{}] * runs, "rows_per_picture": 24.0}
    figures["options"] = SamplingOptions(sampler="ddim", steps=12, guidance=2.5).model_dump()
    return score_of(figures | dict.fromkeys(("accuracy", "exact_match", "f1"), figure))


def _log(path: Path) -> Path:
    path.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25, "test/accuracy": 0.5}\n')
    return path


def _header(text: str) -> dict[str, Any]:
    """Return what the Hugging Face Hub reads from a card."""
    before, header, _ = text.split("---\n", 2)
    assert before == ""
    found: dict[str, Any] = yaml.safe_load(header)
    return found


def test_the_card_has_digest_recipe_and_scores_and_a_copy_of_the_log(tmp_path: Path) -> None:
    digest, log = _published(tmp_path, made_by=[{"command": "train it"}]), _log(tmp_path / "log.jsonl")
    path = write_card(tmp_path, "m", log=log, machine="a test")
    assert path == tmp_path / "m.md"
    write_card(tmp_path, "m", score=_score())
    text = path.read_text()
    assert f"digest `{digest[:16]}`" in text
    assert " on a test.\n" in text
    assert part_of(text, "made-by") == "Made by\n\n    train it"
    assert "made_by" not in part_of(text, "training")
    figures = " | ".join(["0.5000 ± 0.2500"] * 3)
    assert f"| test.json | ddim, 12 steps, w = 2.5 | 2 | {figures} | 0.7500 | 24 |" in text
    assert "| x.y | `3` |" in text
    assert (tmp_path / "m-log.jsonl").read_text() == log.read_text()
    assert (tmp_path / "m-log.png").stat().st_size > 1000


def test_the_card_begins_with_the_hubs_metadata_and_keeps_the_licence(tmp_path: Path) -> None:
    _published(tmp_path)
    assert _header(write_card(tmp_path, "m").read_text()).keys() == {"library_name", "pipeline_tag", "tags"}
    write_card(tmp_path, "m", licence="mit")
    header = _header(write_card(tmp_path, "m", score=_score()).read_text())
    result = {
        "task": {"type": "text-to-image"},
        "dataset": {"type": "label-lists", "name": "test.json"},
        "metrics": [{"type": one, "value": 0.5} for one in ("accuracy", "exact_match", "f1")],
    }
    assert header.pop("tags")
    assert header == {
        "license": "mit",
        "library_name": "labelgrid",
        "pipeline_tag": "text-to-image",
        "model-index": [{"name": "m", "results": [result]}],
    }


@pytest.mark.parametrize("text", ["no", "a: b\nc"])
def test_the_hubs_metadata_holds_any_text(text: str) -> None:
    header = _header(front_matter(text, "denoiser", Card(licence=text, scores=(_score(file=text),))) + "\n")
    [index] = header["model-index"]
    assert (header["license"], index["name"], index["results"][0]["dataset"]["name"]) == (text, text, text)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
def test_a_shipped_card_has_its_own_figures_and_licence_and_keeps_its_text(card: Path, tmp_path: Path) -> None:
    text = card.read_text()
    header, found = _header(text), read_card(card.parent, card.stem)
    licence = "cc-by-4.0" if card.stem.startswith("emoji") else "mit"  # as the pictures that it learnt from
    assert (header["license"], header["library_name"], found.licence) == (licence, "labelgrid", licence)
    [index] = header.get("model-index", [{"name": card.stem, "results": []}])
    assert index["name"] == card.stem
    assert found.digest == read_info(card.with_suffix(".safetensors")).digest
    assert [one["dataset"]["name"] for one in index["results"]] == [one.file for one in found.scores]
    for path in card.parent.glob(f"{card.stem}*"):
        shutil.copy(path, tmp_path)
    assert write_card(tmp_path, card.stem).read_text() == text


def test_what_people_wrote_outside_of_the_marks_stays_as_it_is(tmp_path: Path) -> None:
    """Wherever it stands, and also where it looks like what is generated."""
    _published(tmp_path, made_by=[{"command": "train"}])
    path = write_card(tmp_path, "m", machine="m", score=_score())
    odd = "Made by hand.\n\n## Scores\n\n| file | theirs |\n| --- | --- |\n\n\n\n## Training\n\nFor a day.  \n### Why\n"
    text = path.read_text()
    for name in ("about", "made-by", "scores", "training"):
        text = text.replace(f"<!-- end {name} -->", f"<!-- end {name} -->\n{odd}{name}")
    path.write_text(text)
    assert write_card(tmp_path, "m").read_text() == text
    _published(tmp_path, weight=1.0, made_by=[{"command": "train again"}])
    again = write_card(tmp_path, "m", machine="n").read_text()
    assert [f"<!-- end {name} -->\n{odd}{name}" in again for name in ("about", "made-by", "scores", "training")] == [
        True, True, True, True
    ]  # fmt: skip
    assert part_of(again, "made-by") == "Made by\n\n    train again"
    assert part_of(again, "about").endswith(" on n.")
    assert part_of(again, "scores") == ""


def test_a_card_without_marks_gets_them_once(tmp_path: Path) -> None:
    """As those of before version 0.2, and those that people wrote alone. What they wrote stays."""
    _published(tmp_path)
    path = tmp_path / "m.md"
    written = "A note below.\n\n## How it was trained\n\nIn two runs.\n\n### The first\n\nFor a day.\n"
    head = "# m\n\nKind: denoiser, digest `0`, made once.\n\n"
    head += "Made by, in this order:\n\n    render\n    train\n\nA note above.\n"
    scores = (
        "## Scores\n\nMean and standard deviation over the runs, seeds 0 upwards, and so on.\n\n| file | a |\n| --- |\n"
    )
    path.write_text(
        f"---\nlicense: mit\n---\n\n{head}\n{scores}\n{written}\n## Training\n\nx\n\n## Configuration\n\ny\n"
    )
    text = write_card(tmp_path, "m").read_text()
    assert (
        text.index("# m\n") < text.index("<!-- begin about -->") < text.index("<!-- end made-by -->\n\nA note above.\n")
    )
    assert f"<!-- end scores -->\n\n{written}\n<!-- begin training -->" in text
    assert part_of(text, "made-by") == "Made by, in this order:\n\n    render\n    train"
    assert ("made once" in text, "and so on" in text, text.count("## Training")) == (False, False, 1)
    assert write_card(tmp_path, "m").read_text() == text
    path.write_text("# m\n\nVery good.\n")
    assert "Very good.\n" in write_card(tmp_path, "m").read_text()


def test_a_part_that_lacks_a_mark_is_written_anew_at_the_end() -> None:
    page = with_part(with_part("# m\n", "a", "1"), "b", "2")
    assert page == "# m\n\n<!-- begin a -->\n\n1\n\n<!-- end a -->\n\n<!-- begin b -->\n\n2\n\n<!-- end b -->\n"
    again = with_part(page.replace("<!-- end a -->", "mine"), "a", "3")
    assert ("mine" in again, part_of(again, "a"), part_of(again, "b"), again.count("begin a")) == (True, "3", "2", 1)
    assert (part_of("<!-- begin a -->", "a"), part_of("", "a")) == ("", "")


def test_scores_of_more_runs_stay(tmp_path: Path) -> None:
    _published(tmp_path)
    for runs, mean in ((2, 0.25), (1, 0.5), (3, 0.75)):
        write_card(tmp_path, "m", score=_score(runs, mean))
        [score] = read_card(tmp_path, "m").scores
        assert (score.runs, score.accuracy.mean) == {1: (2, 0.25), 2: (2, 0.25), 3: (3, 0.75)}[runs]


def test_a_damaged_file_of_scores_is_named(tmp_path: Path) -> None:
    _published(tmp_path)
    (tmp_path / "m-card.json").write_text('{"scores": [{}]}')
    with pytest.raises(TrainerError, match=r"m-card\.json is damaged"):
        write_card(tmp_path, "m", score=_score())


def test_train_score_and_card_write_the_card(command: Command, data: Path) -> None:
    publish_toys(Path("models"))
    succeeded(command("train", "denoiser", "--data", data, "--name", "tiny", "--steps", 1, *TINY))
    card = Path("models/tiny.md")
    assert "    python -m trainer train denoiser --data" in card.read_text()
    assert Path("models/tiny-log.png").exists()
    Path("few.json").write_text(json.dumps([["red cube"]]))
    score = ("score", "few.json", "--repeats", 1, "--model", "tiny", "--steps", 1)
    for others in (("--seed", 1), ("--evaluator", "toy-evaluator"), ("--keep-padding",)):
        succeeded(command(*score, *others))
    assert "## Scores" not in card.read_text()
    succeeded(command(*score))
    succeeded(command("card", "tiny", "--license", "mit"))
    assert all(one in card.read_text() for one in ('license: "mit"', "| few.json | "))


def test_storage_that_cannot_be_written_only_lacks_the_card(command: Command) -> None:
    publish_toys(Path("models"))
    Path("models/toy.md").mkdir()
    Path("few.json").write_text(json.dumps([["red cube"]]))
    code, out, err = command("score", "few.json", "--repeats", 1, "--steps", 1)
    assert (code, "accuracy" in out) == (0, True)
    assert "note: the model's card was not written" in err
