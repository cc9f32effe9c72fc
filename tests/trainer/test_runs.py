"""A run's configuration, budget, setup and log."""

import json
import resource
from pathlib import Path

import pytest
import torch
from rich.progress import Progress

from shared.options import MAX_SEED
from trainer.config import make_config
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
    say_when,
    show_progress,
    step_seed,
)


def test_changes_to_a_preset() -> None:
    config = make_config("default", ["batch=8", "fit=pad", "clip_norm=null", "network.channels=[8,16,32]"])
    assert (config.batch, config.fit, config.clip_norm) == (8, "pad", None)
    assert config.network == {"channels": [8, 16, 32]}


def test_every_seed_that_is_taken_serves_torch() -> None:
    assert make_config("default", [f"seed={MAX_SEED}"]).seed == MAX_SEED
    assert step_seed(MAX_SEED, 1) != step_seed(MAX_SEED, 2)
    torch.Generator().manual_seed(step_seed(MAX_SEED, 10**9))


def test_budget() -> None:
    assert Budget(steps=10).progress(1e9, 5) == 0.5
    assert Budget(minutes=2).progress(60, 10**9) == 0.5
    assert Budget(minutes=2, steps=10).progress(60, 9) == 0.9


def test_the_rate_rises_and_falls() -> None:
    assert [rate_share(step, 0.1, 4, 0.5) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert [rate_share(9, p, 4, 0.5) for p in (0.5, 0.75, 1.0)] == [1, 0.5, 0]
    assert rate_share(0, 0.999, 0, 0.0) == 1  # without warm-up and cool-down, as the report's


def test_another_or_damaged_setup_is_refused(tmp_path: Path) -> None:
    keep_setup(tmp_path / "run", {"a": 1, "b": [2]})
    keep_setup(tmp_path / "run", {"a": 1, "b": (2,)})
    with pytest.raises(TrainerError, match=r"setup\.json has another b; choose another folder"):
        keep_setup(tmp_path / "run", {"a": 1, "b": 3})
    for content in ("", "[1]"):
        (tmp_path / "setup.json").write_text(content)
        with pytest.raises(TrainerError, match=r"setup\.json is damaged"):
            keep_setup(tmp_path, {"a": 1})


def test_a_run_resumes_on_the_cpu_with_a_setting_that_is_newer_than_its_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, network = tmp_path / "state.pt", torch.nn.Linear(2, 2)
    state = {"network": network.state_dict(), "averages": {}, "optimizers": [], "step": 3, "elapsed_s": 1.0}
    with monkeypatch.context() as on_a_gpu:
        on_a_gpu.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
        save_state(path, {"recipe": {"lr": 0.1}, **state})
    resumed = load_state(path, {"lr": 0.1, "newer": 1}, network)
    assert (resumed["step"], resumed["network"]["weight"].device) == (3, torch.device("cpu"))


def test_a_resumed_log_goes_on_at_its_step_without_a_line_that_a_full_disk_left_unfinished(tmp_path: Path) -> None:
    kept, again = {"step": 50, "minutes": 0.1, "loss": 0.5}, {"step": 100, "minutes": 1.5, "loss": 0.25}
    for after in ('{"step": 100, "minutes": 0.2, "loss": 0.4}\n{"step": 120, "min', '{"step": 50, "min'):
        (tmp_path / "log.jsonl").write_text(f"{json.dumps(kept)}\n{after}")
        with run_log(tmp_path, 50) as log:
            log.record(Run(100, elapsed_s=90), {"loss": 0.25})
        assert read_log(tmp_path / "log.jsonl") == [kept, again]


def test_another_or_damaged_log_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for content in ('{"step": 50}\n{"st\n{"step": 100}\n', '{"file_name": "a.png"}\n', "5\n"):
        path.write_text(content)
        with pytest.raises(TrainerError, match=r"log\.jsonl is damaged"), run_log(tmp_path, 100):
            pass
        with pytest.raises(TrainerError, match=r"log\.jsonl is damaged"):
            read_log(path)
        assert path.read_text() == content


def test_a_full_disk_is_reported_and_the_last_state_stays(tmp_path: Path) -> None:
    save_state(path := tmp_path / "state.pt", {"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(TrainerError, match=r"state\.pt cannot be written; is the disk full\?"):
            save_state(path, {"step": 2, "network": torch.zeros(1 << 16)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [path]
    assert torch.load(path) == {"step": 1}


def test_a_folder_takes_one_run_at_a_time(tmp_path: Path) -> None:
    with run_log(tmp_path) as log:
        log.record(Run(50), {"loss": 0.5})
        with pytest.raises(TrainerError, match="is in use by another process"), run_log(tmp_path, 50):
            pass
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [50]


def test_the_rate_shown_is_that_since_the_run_was_resumed() -> None:
    with Progress(disable=True) as progress:
        on_step, run = show_progress(progress, "fitting", batch=10), Run(step=100, elapsed_s=1000.0)
        on_step(run)
        assert progress.tasks[0].description == "fitting: step 100"
        run.step, run.elapsed_s = 120, 1010.0
        on_step(run)
        assert progress.tasks[0].description == "fitting: step 120, 20 pictures/s"


def test_a_run_says_once_how_long_a_usual_one_takes_here() -> None:
    said: list[str] = []
    for objective in ("denoiser", "layouts"):
        on_step = say_when(objective, said.append)
        for step in range(40, 400):  # resumed at step 39
            on_step(Run(step, elapsed_s=0.5 * step))
    assert said == [
        "2,400 steps take 20 minutes here (emoji-64 drew 0.85 of unseen label sets exactly after 2,390 of batch 64)"
    ]
