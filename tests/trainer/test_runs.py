"""A run's budget, setup and log."""

import json
from pathlib import Path

import pytest
import torch

from shared.vocabulary import Vocabulary
from trainer.errors import TrainerError
from trainer.runs import Budget, Run, keep_setup, load_state, read_log, run_log, save_state


def test_budget() -> None:
    assert Budget(steps=10).progress(1e9, 5) == 0.5
    assert Budget(minutes=2).progress(60, 10**9) == 0.5
    assert Budget(minutes=2, steps=10).progress(60, 9) == 0.9


def test_another_setup_is_refused(tmp_path: Path) -> None:
    keep_setup(tmp_path / "run", {"a": 1, "b": [2]})
    keep_setup(tmp_path / "run", {"a": 1, "b": (2,)})
    with pytest.raises(TrainerError, match=r"setup\.json has another b; choose another folder"):
        keep_setup(tmp_path / "run", {"a": 1, "b": 3})


def test_a_run_resumes_with_a_setting_that_is_newer_than_its_state(tmp_path: Path) -> None:
    path, labels, cpu = tmp_path / "state.pt", Vocabulary(("a",)), torch.device("cpu")
    save_state(path, {"lr": 0.1}, labels, Run(step=3), {})
    load_state(path, {"lr": 0.1, "newer": 1}, labels, run := Run(), cpu)
    assert run.step == 3
    with pytest.raises(TrainerError, match="another lr"):
        load_state(path, {"lr": 0.2, "newer": 1}, labels, Run(), cpu)


def test_a_log_is_read_as_it_was_written(tmp_path: Path) -> None:
    run = Run(step=1, elapsed_s=90)
    with run_log(tmp_path) as record:
        record(run, {"loss": 0.5})
    assert read_log(tmp_path / "log.jsonl") == [{"step": 1, "minutes": 1.5, "loss": 0.5}]
    with run_log(None) as record:
        record(run, {"loss": 0.5})


def test_steps_that_an_interrupted_run_logged_twice_count_once(tmp_path: Path) -> None:
    first = {"step": 50, "loss": 3.0}
    before = [{"step": 100, "loss": 2.0}, {"step": 100, "test/f1": 0.5}, {"step": 120, "test/f1": 0.6}]
    again = [{"step": 100, "loss": 0.5}, {"step": 100, "test/f1": 0.7}]
    lines = [first, *before, *again, again[-1]]
    (tmp_path / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert read_log(tmp_path / "log.jsonl") == [first, *again]
