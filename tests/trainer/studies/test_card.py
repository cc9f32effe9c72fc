"""A checkpoint's card: its text comes from the checkpoint, its log and its scores."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from shared.checkpoint import CheckpointError, publish, read_info
from shared.options import SamplingOptions
from tests.paths import ROOT
from trainer.errors import TrainerError
from trainer.studies.card import front_matter, plot_log, write_card


def _published(folder: Path, training: dict[str, Any] | None = None) -> str:
    publish(
        folder,
        "m",
        {"w": torch.zeros(2)},
        kind="denoiser",
        vocabulary=("a", "b"),
        config={"T": 10},
        training=training or {"x": {"y": 3}},
    )
    return read_info(folder / "m.safetensors").digest


def _scores(path: Path, digest: str) -> Path:
    figure = {"mean": 0.5, "std": 0.25, "max": 0.75}
    content = {"file": "test.json", "digest": digest, "runs": [{}, {}], "rows_per_picture": 24.0}
    content["options"] = SamplingOptions(sampler="ddim", steps=12, guidance=2.5).model_dump()
    path.write_text(json.dumps(content | dict.fromkeys(("accuracy", "exact_match", "f1"), figure)))
    return path


def _log(path: Path) -> Path:
    path.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25, "test/accuracy": 0.5}\n')
    return path


def test_the_card_has_digest_scores_and_recipe_and_a_copy_of_the_log(tmp_path: Path) -> None:
    digest = _published(tmp_path)
    scores, log = _scores(tmp_path / "s.json", digest), _log(tmp_path / "log.jsonl")
    path = write_card(tmp_path, "m", log=log, scores=[scores], machine="a test", commands=["train it"], notes=["Note."])
    text = path.read_text()
    assert path == tmp_path / "m.md"
    assert digest[:16] in text
    figures = " | ".join(["0.5000 ± 0.2500"] * 3)
    assert f"| test.json | ddim, 12 steps, w = 2.5 | 2 | {figures} | 0.7500 | 24 |" in text
    assert "| x.y | `3` |" in text
    assert "    train it\n" in text
    assert "\nNote.\n" in text
    assert (tmp_path / "m-log.jsonl").read_text() == log.read_text()
    assert (tmp_path / "m-log.png").stat().st_size > 1000


def _header(text: str) -> dict[str, Any]:
    """Return what the Hugging Face Hub reads from a card."""
    before, header, _ = text.split("---\n", 2)
    assert before == ""
    found: dict[str, Any] = yaml.safe_load(header)
    return found


def test_the_card_begins_with_the_hubs_metadata(tmp_path: Path) -> None:
    scores, log = _scores(tmp_path / "s.json", _published(tmp_path)), _log(tmp_path / "log.jsonl")
    text = write_card(
        tmp_path, "m", log=log, scores=[scores], machine="", commands=[], notes=[], licence="mit"
    ).read_text()
    result = {
        "task": {"type": "text-to-image"},
        "dataset": {"type": "label-lists", "name": "test.json"},
        "metrics": [{"type": one, "value": 0.5} for one in ("accuracy", "exact_match", "f1")],
    }
    header = _header(text)
    assert header.pop("tags")
    assert header == {
        "license": "mit",
        "library_name": "labelgrid",
        "pipeline_tag": "text-to-image",
        "model-index": [{"name": "m", "results": [result]}],
    }
    bare = write_card(tmp_path, "m", log=log, scores=[], machine="", commands=[], notes=[]).read_text()
    assert _header(bare).keys() == {"library_name", "pipeline_tag", "tags"}


@pytest.mark.parametrize("text", ["cc: by", "no", "1.0", "a\nb"])
def test_the_hubs_metadata_holds_any_text(text: str) -> None:
    header = _header(front_matter(text, "denoiser", [["test.json", "", "1", *["0.5 ± 0"] * 3]], text) + "\n")
    assert (header["license"], header["model-index"][0]["name"]) == (text, text)


@pytest.mark.parametrize("card", sorted((ROOT / "models").glob("*.md")), ids=lambda card: card.stem)
def test_a_shipped_cards_metadata_has_its_own_figures_and_its_licence(card: Path) -> None:
    text = card.read_text()
    header = _header(text)
    licence = "cc-by-4.0" if card.stem.startswith("emoji") else "mit"  # as the pictures that it learnt from
    assert (header["license"], header["library_name"]) == (licence, "labelgrid")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ") and ".json | " in line]
    shown = {file: [float(mean.split()[0]) for mean in means[:3]] for file, _, _, *means in rows}
    [index] = header.get("model-index", [{"name": card.stem, "results": []}])
    assert index["name"] == card.stem
    given = {one["dataset"]["name"]: [metric["value"] for metric in one["metrics"]] for one in index["results"]}
    assert given == shown


def test_what_people_wrote_into_a_card_stays(tmp_path: Path) -> None:
    _published(tmp_path)
    log = _log(tmp_path / "log.jsonl")
    first = write_card(tmp_path, "m", log=log, scores=[], machine="m", commands=[], notes=["Before."]).read_text()
    written = "\n## How it was trained\n\nIn two runs.\n\n### The first\n\nFor a day.\n"
    (tmp_path / "m.md").write_text(first.replace("\n## Training\n", f"{written}\n## Training\n"))
    again = write_card(tmp_path, "m", log=log, scores=[], machine="m", commands=[], notes=["After."]).read_text()
    assert again == first.replace("Before.\n", f"After.\n{written}")


def test_a_card_without_commands_has_no_section_for_them(tmp_path: Path) -> None:
    _published(tmp_path)
    path = write_card(tmp_path, "m", log=_log(tmp_path / "l"), scores=[], machine="m", commands=[], notes=[])
    assert "Made by" not in path.read_text()


def test_scores_of_another_checkpoint_and_broken_logs_are_refused(tmp_path: Path) -> None:
    _published(tmp_path)
    log = _log(tmp_path / "log.jsonl")
    with pytest.raises(TrainerError, match="another checkpoint"):
        write_card(
            tmp_path, "m", log=log, scores=[_scores(tmp_path / "s.json", "0")], machine="", commands=[], notes=[]
        )
    without = json.loads(_scores(tmp_path / "s.json", read_info(tmp_path / "m.safetensors").digest).read_text())
    del without["accuracy"]
    for content in ("[1]", '{"file": "test.json"}', "{", json.dumps(without)):
        (tmp_path / "s.json").write_text(content)
        with pytest.raises(TrainerError, match=r"s\.json: not what `score --json` writes"):
            write_card(tmp_path, "m", log=log, scores=[tmp_path / "s.json"], machine="", commands=[], notes=[])
    for content in (
        "{", '{"a.png": ["red cube"]}', "[1]", '"step"', "1\n2", "", '{"step": 1, "loss": "low"}', '{"step": true}',
    ):  # fmt: skip
        log.write_text(content)
        with pytest.raises(TrainerError, match="not a run's log"):
            write_card(tmp_path, "m", log=log, scores=[], machine="", commands=[], notes=[])


def test_the_log_of_another_run_is_refused(tmp_path: Path) -> None:
    log = _log(tmp_path / "log.jsonl")
    for accuracy, is_refused in ((0.5, False), (0.75, True)):
        _published(tmp_path, {"last": {"test/accuracy": accuracy}})
        with pytest.raises(TrainerError, match="log of another run") if is_refused else contextlib.nullcontext():
            write_card(tmp_path, "m", log=log, scores=[], machine="", commands=[], notes=[])


def test_what_cannot_be_used_leaves_the_old_card_and_its_files(tmp_path: Path) -> None:
    storage = tmp_path / "models"
    digest, log = _published(storage), _log(tmp_path / "log.jsonl")
    about: dict[str, Any] = {"machine": "", "commands": [], "notes": []}
    write_card(storage, "m", log=log, scores=[], **about)
    kept = {path: path.read_bytes() for path in storage.iterdir()}
    log.write_text('{"step": 1, "loss": 9.0}\n')
    (tmp_path / "s.json").write_text("{}")
    with pytest.raises(TrainerError, match=r"s\.json: not what"):
        write_card(storage, "m", log=log, scores=[tmp_path / "s.json"], **about)
    with pytest.raises(CheckpointError, match="not a checkpoint's name"):
        write_card(storage, "../models/m", log=log, scores=[_scores(tmp_path / "s.json", digest)], **about)
    assert {path: path.read_bytes() for path in storage.iterdir()} == kept


def test_the_plot_shows_the_losses_with_fixed_noise() -> None:
    lines = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    assert plot_log(lines) != plot_log([*lines, {"step": 2, "held_out_loss": 0.3, "seen_loss": 0.2}])
