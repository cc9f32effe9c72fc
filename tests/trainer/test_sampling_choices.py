"""`python -m benchmarks.choices.sampling`: where it looks for checkpoints, and errors in one line.

Its table is tested in tests/test_sampling_defaults.py.
"""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.choices import sampling
from shared.registry import promote
from shared.vocabulary import Vocabulary
from tests.toy_checkpoint import publish_toy_denoiser, publish_toy_evaluator, publish_toys


def test_the_models_own_evaluator_judges_it_in_the_storage_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    digits = Vocabulary(("zero", "one"))
    publish_toys(tmp_path)  # its promoted evaluator knows no digits
    publish_toy_denoiser(tmp_path, "digits", 0, vocabulary=digits)
    publish_toy_evaluator(tmp_path, "judge", digits)
    promote(tmp_path, "digits")
    (tmp_path / "train.json").write_text(json.dumps({"a.png": ["zero"], "b.png": ["one"]}))
    monkeypatch.setenv("LABELGRID_STORAGE", str(tmp_path))
    monkeypatch.setitem(sampling.CHOICES, "few-rows", sampling.CHOICES["few-rows"][:1])
    arguments = ["sampling", str(tmp_path / "train.json"), "--choices", "few-rows"]
    monkeypatch.setattr(sys, "argv", arguments)
    sampling.main()
    assert "2 lists of train.json" in capsys.readouterr().out
    for more, message in (
        (["--model", "nobody"], "error: nobody: no such denoiser"),
        (
            ["--evaluator", "toy-evaluator"],
            "error: the evaluator toy-evaluator does not know the denoiser's labels zero",
        ),
        (["--storage", "nope"], "error: nope: there is no folder"),
        (["--storage", "nothing://here"], "error: nothing://here: cannot be opened as storage"),
    ):
        monkeypatch.setattr(sys, "argv", [*arguments, *more])
        with pytest.raises(SystemExit) as caught:
            sampling.main()
        assert str(caught.value.code).startswith(message)
