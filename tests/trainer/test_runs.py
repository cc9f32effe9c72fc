"""A run's budget, setup and log."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.errors import TrainerError
from trainer.runs import (
    Budget,
    Run,
    keep_setup,
    load_state,
    rate_share,
    read_log,
    run_log,
    save_state,
)


def state_of(network: torch.nn.Module, config: dict[str, Any] | None = None) -> dict[str, Any]:
    parts = {"averages": {}, "optimizers": [], "step": 3, "elapsed_s": 1.0}
    return {"kind": "line", "config": config or {}, "network": network.state_dict(), **parts}


def test_budget() -> None:
    assert Budget(steps=10).progress(1e9, 5) == 0.5
    assert Budget(minutes=2).progress(60, 10**9) == 0.5
    assert Budget(minutes=2, steps=10).progress(60, 9) == 0.9


def test_the_rate_rises_and_falls() -> None:
    assert [rate_share(step, 0.1, 4, 0.5) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert [rate_share(9, p, 4, 0.5) for p in (0.5, 0.75, 1.0)] == [1, 0.5, 0]
    assert rate_share(0, 0.999, 0, 0.0) == 1  # without warm-up and cool-down, as the report's


def test_another_setup_is_refused(tmp_path: Path) -> None:
    keep_setup(tmp_path / "run", {"a": 1, "b": [2]})
    keep_setup(tmp_path / "run", {"a": 1, "b": (2,)})
    with pytest.raises(TrainerError, match=r"setup\.json has another b; choose another folder"):
        keep_setup(tmp_path / "run", {"a": 1, "b": 3})


@pytest.mark.parametrize("content", ['{"a": 1', "[1]", ""])
def test_a_damaged_setup_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "setup.json").write_text(content)
    with pytest.raises(TrainerError, match=r"setup\.json is damaged"):
        keep_setup(tmp_path, {"a": 1})


def test_a_run_resumes_with_a_setting_that_is_newer_than_its_state(tmp_path: Path) -> None:
    path, network = tmp_path / "state.pt", torch.nn.Linear(2, 2)
    save_state(path, state_of(network, {"lr": 0.1}))
    assert load_state(path, "line", {"lr": 0.1, "newer": 1}, network)["step"] == 3
    with pytest.raises(TrainerError, match="another lr"):
        load_state(path, "line", {"lr": 0.2, "newer": 1}, network)


def test_the_state_of_a_run_on_a_gpu_is_read_to_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, network = tmp_path / "state.pt", torch.nn.Linear(2, 2)
    with monkeypatch.context() as on_a_gpu:
        on_a_gpu.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
        save_state(path, state_of(network))
    assert load_state(path, "line", {}, network)["network"]["weight"].device == torch.device("cpu")


def test_a_state_of_a_former_release_without_a_kind_resumes_and_one_without_its_parts_is_refused(
    tmp_path: Path,
) -> None:
    path, network = tmp_path / "state.pt", torch.nn.Linear(2, 2)
    former = state_of(network)
    del former["kind"]
    save_state(path, former)
    load_state(path, "line", {}, network)
    del former["averages"]
    save_state(path, former)
    with pytest.raises(TrainerError, match="is not the state of a run; delete it"):
        load_state(path, "line", {}, network)


def test_a_log_is_read_as_it_was_written(tmp_path: Path) -> None:
    run = Run(step=1, elapsed_s=90)
    with run_log(tmp_path) as record:
        record(run, {"loss": 0.5})
    assert read_log(tmp_path / "log.jsonl") == [{"step": 1, "minutes": 1.5, "loss": 0.5}]
    with run_log(None) as record:
        record(run, {"loss": 0.5})


def test_a_line_that_a_full_disk_left_unfinished_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 50, "minutes": 0.1, "loss": 0.5}\n{"step": 100, "min')
    with run_log(tmp_path) as record:
        record(Run(100), {"loss": 0.25})
    assert [(line["step"], line["loss"]) for line in read_log(tmp_path / "log.jsonl")] == [(50, 0.5), (100, 0.25)]


def test_a_folder_takes_one_run_at_a_time(tmp_path: Path) -> None:
    with run_log(tmp_path) as record:
        record(Run(50), {"loss": 0.5})
        with pytest.raises(TrainerError, match="is in use by another process"), run_log(tmp_path):
            pass
    with run_log(tmp_path) as record:
        record(Run(100), {"loss": 0.25})
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [50, 100]


def test_steps_that_an_interrupted_run_logged_twice_count_once(tmp_path: Path) -> None:
    first = {"step": 50, "loss": 3.0}
    before = [{"step": 100, "loss": 2.0}, {"step": 100, "test/f1": 0.5}, {"step": 120, "test/f1": 0.6}]
    again = [{"step": 100, "loss": 0.5}, {"step": 100, "test/f1": 0.7}]
    lines = [first, *before, *again, again[-1]]
    (tmp_path / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert read_log(tmp_path / "log.jsonl") == [first, *again]
