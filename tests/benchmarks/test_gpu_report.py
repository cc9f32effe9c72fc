"""`make gpu-report`: it says where there is no GPU, and what its page has of a run's log."""

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_report
from benchmarks.document import Table

LOG = [
    {"step": 50, "minutes": 0.5, "loss": 0.5, "pictures": 3200},
    {
        "step": 100,
        "minutes": 1.0,
        "held_out_loss": 0.4,
        "seen_loss": 0.3,
        "test/accuracy": 0.6,
        "test/exact_match": 0.5,
    },
    {"step": 100, "minutes": 1.0, "loss": 0.25, "pictures": 6400},
]


def test_without_a_gpu_it_writes_nothing_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_report", "--out", str(tmp_path / "gpu.md")])
    assert gpu_report.main() == 1
    assert capsys.readouterr().err == "error: torch finds no GPU here, only cpu; make gpu-report measures one\n"
    assert not list(tmp_path.iterdir())


def test_the_page_has_the_rate_of_the_run_and_its_last_figures() -> None:
    sampled = Table(["way", "pictures/s"])
    sampled.add("ours", "7")
    facts: dict[str, object] = {"gpu": "Some GPU", "cpu": "Some CPU", "cores": 8}
    text = gpu_report.page(facts, "9 passed in 60 s", 10.0, LOG, [sampled])
    for line in (
        "Written by `make gpu-report` on one Some GPU and 8 cores of Some CPU.", "`pytest -m gpu`: 9 passed in 60 s.",
        "| steps | 100 |", "| pictures/s | 107 |", "| held out loss | 0.4000 |", "| test/exact match | 0.5000 |",
        "| ours | 7 |",
    ):  # fmt: skip
        assert line in text
