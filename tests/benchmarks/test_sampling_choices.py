"""`python -m benchmarks.sampling_choices`: its table, where it looks for checkpoints, and errors in one line."""

import json
import re
import sys
from pathlib import Path

import pytest

from benchmarks import sampling_choices
from shared import evaluator
from shared.diffusion import model
from shared.registry import promote
from shared.vocabulary import Vocabulary
from tests.toy_checkpoint import publish_toy_denoiser, publish_toy_evaluator, publish_toys


def test_the_models_own_evaluator_judges_it_in_the_storage_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (evaluator, model):
        monkeypatch.setattr(module, "uses_openvino", lambda engine, device: engine == "openvino")  # compile nothing
    digits = Vocabulary(("zero", "one"))
    publish_toys(tmp_path)  # its promoted evaluator knows no digits
    publish_toy_denoiser(tmp_path, "digits", 0, vocabulary=digits)
    publish_toy_evaluator(tmp_path, "judge", digits)
    promote(tmp_path, "digits")
    (tmp_path / "train.json").write_text(json.dumps({"a.png": ["zero"], "b.png": ["one"]}))
    monkeypatch.setenv("LABELGRID_STORAGE", str(tmp_path))
    few = sampling_choices.CHOICES["few-rows"]
    monkeypatch.setitem(sampling_choices.CHOICES, "few-rows", [few[0], few[-1]])
    arguments = ["sampling_choices", str(tmp_path / "train.json"), "--choices", "few-rows"]
    monkeypatch.setattr(sys, "argv", arguments)
    sampling_choices.main()
    printed = capsys.readouterr().out
    assert "2 lists of train.json" in printed
    lines = [re.findall(r"[\w. ,]+", line) for line in printed.splitlines() if "steps" in line]
    assert [(cells[0].strip(), cells[-1].strip()) for cells in lines] == [
        ("sampler sde_dpmpp_2m, steps 4, guidance 1.0", "4.0"),
        ("sampler dpmpp_2m, steps 8, guidance 3.0", "16.0"),
    ]
    for more, message in (
        (["--model", "nobody"], "error: nobody: no such denoiser"),
        (["--evaluator", "toy-evaluator"], "error: the evaluator toy-evaluator does not know the denoiser's"),
    ):
        monkeypatch.setattr(sys, "argv", [*arguments, *more])
        with pytest.raises(SystemExit) as caught:
            sampling_choices.main()
        assert str(caught.value.code).startswith(message)
