"""Progress where there is no terminal: a line a minute."""

import pytest

from trainer.commands.terminal import Lines


def test_progress_is_a_line_a_minute_and_one_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    with Lines(lambda: now) as progress:
        task = progress.add_task("training", total=100)
        for second in range(151):
            now = float(second)
            progress.update(task, completed=second * 100 / 150, description=f"training: step {second}")
        progress.update(task, completed=100)
    assert capsys.readouterr().err.splitlines() == [
        "training: step 60: 40 %, 2 min left",
        "training: step 120: 80 %, 0 min left",
        "training: step 150: 100 %",
    ]


def test_a_short_task_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Lines(lambda: 0.0) as progress:
        for _ in progress.track(range(5), description="reading"):
            pass
    assert capsys.readouterr().err == ""


def test_a_task_without_a_known_total_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    with Lines(lambda: now) as progress:
        task = progress.add_task("drawing", total=None)
        for second in range(61):
            now = float(second)
            progress.advance(task)
    assert capsys.readouterr().err == "drawing: 61\n"
