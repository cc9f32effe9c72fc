"""A run's budget, setup and log."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress

from shared.vocabulary import Vocabulary
from trainer.errors import TrainerError
from trainer.runs import (
    KINDS,
    Budget,
    Run,
    keep_setup,
    load_state,
    rate_share,
    read_log,
    run_log,
    save_state,
    show_progress,
)

LABELS = Vocabulary(("a",))


def parts_of(kind: str, network: torch.nn.Module) -> dict[str, Any]:
    return {**dict.fromkeys(KINDS[kind]), "network": network.state_dict()}


def test_budget() -> None:
    assert Budget(steps=10).progress(1e9, 5) == 0.5
    assert Budget(minutes=2).progress(60, 10**9) == 0.5
    assert Budget(minutes=2, steps=10).progress(60, 9) == 0.9


def test_the_rate_rises_and_falls() -> None:
    assert [rate_share(step, 0.1, 4, 0.5) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert [rate_share(9, p, 4, 0.5) for p in (0.5, 0.75, 1.0)] == [1, 0.5, 0]
    assert rate_share(0, 0.999, 0, 0.0) == 1  # without warm-up and cool-down, as the report's


def test_a_stage_with_nothing_to_do_shows_no_bar() -> None:
    with Progress(disable=True) as progress:
        show_progress(progress, "layouts")
        on_step = show_progress(progress, "training", batch=8)
        for step in (5, 10):
            on_step(Run(step=step, elapsed_s=2.0, loss=0.5, progress=step / 20))
        (task,) = progress.tasks
    assert (task.completed, task.description) == (500, "training: step 10, loss 0.5000, 40 pictures/s")


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


def test_a_setup_is_written_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_setup(tmp_path, {"a": 1})
    before = (tmp_path / "setup.json").read_text()

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        keep_setup(tmp_path, {"a": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["setup.json"]
    assert (tmp_path / "setup.json").read_text() == before


def test_a_run_resumes_with_a_setting_that_is_newer_than_its_state(tmp_path: Path) -> None:
    path, network = tmp_path / "state.pt", torch.nn.Linear(2, 2)
    save_state(path, {"lr": 0.1}, LABELS, Run(step=3), parts_of("denoiser", network))
    load_state(path, "denoiser", network, {"lr": 0.1, "newer": 1}, LABELS, run := Run())
    assert run.step == 3
    with pytest.raises(TrainerError, match="another lr"):
        load_state(path, "denoiser", network, {"lr": 0.2, "newer": 1}, LABELS, Run())


def test_the_state_of_a_run_on_a_gpu_is_read_to_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, network = tmp_path / "state.pt", torch.nn.Linear(2, 2)
    with monkeypatch.context() as on_a_gpu:
        on_a_gpu.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
        save_state(path, {}, LABELS, Run(step=3), parts_of("denoiser", network))
    state = load_state(path, "denoiser", network, {}, LABELS, Run())
    assert state["network"]["weight"].device == torch.device("cpu")


@pytest.mark.parametrize("wanted", KINDS)
@pytest.mark.parametrize("found", KINDS)
def test_a_run_of_another_kind_is_refused(tmp_path: Path, found: str, wanted: str) -> None:
    path, network = tmp_path / "run" / "state.pt", torch.nn.Linear(2, 2)
    path.parent.mkdir()
    save_state(path, {"of another": "kind"}, LABELS, Run(step=3), parts_of(found, network))
    if found == wanted:
        load_state(path, wanted, network, {}, LABELS, Run())
    else:
        with pytest.raises(TrainerError, match=rf"run holds the run of another kind \({found}, not {wanted}\)"):
            load_state(path, wanted, network, {"lr": 1}, LABELS, Run())


def test_a_state_without_its_parts_or_of_another_network_is_refused(tmp_path: Path) -> None:
    path, network = tmp_path / "state.pt", torch.nn.Linear(2, 2)
    save_state(path, {}, LABELS, Run(), {"network": network.state_dict(), "optimizers": []})
    with pytest.raises(TrainerError, match="is not the state of a run; delete it"):
        load_state(path, "denoiser", network, {}, LABELS, Run())
    save_state(path, {}, LABELS, Run(), parts_of("denoiser", network))
    for other in (torch.nn.Linear(2, 3), torch.nn.Linear(2, 2, bias=False)):
        with pytest.raises(TrainerError, match="holds a network of another shape; choose another --run"):
            load_state(path, "denoiser", other, {}, LABELS, Run())


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
