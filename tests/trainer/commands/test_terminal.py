"""Progress where there is no terminal: a line a minute. Names in tables."""

import pytest

from trainer.commands import terminal
from trainer.commands.terminal import Lines


def test_progress_is_a_line_a_minute_and_one_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    with Lines(lambda: now) as progress:
        task = progress.add_task("training", total=100)
        for second in range(151):
            now = float(second)
            progress.update(task, completed=second * 100 / 150, description=f"training: step {second}")
        progress.update(task, completed=100)
        for _ in progress.track(range(5), description="short tasks have none"):
            pass
        counted = progress.add_task("drawing", total=None)
        for second in range(151, 212):
            now = float(second)
            progress.advance(counted)
    assert capsys.readouterr().err.splitlines() == [
        "training: step 60: 40 %, 2 min left",
        "training: step 120: 80 %, 0 min left",
        "training: step 150: 100 %",
        "drawing: 61",
    ]


def test_no_name_controls_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    name = "a\x1b[2Jb\x9b5mc [red]"  # and square brackets are printed as they are
    terminal.print_table(name, ["label", name], [[name, "1"]])
    terminal.show(name, [("checkpoint", name)])
    terminal.note(name)
    captured = capsys.readouterr()
    assert [text.count("a\ufffd[2Jb\ufffd5mc [red]") for text in captured] == [3, 3]
    assert not {"\x1b", "\x9b"}.intersection(captured.out + captured.err)


def test_long_names_are_printed_in_full(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    path = "/".join(f"[red]folder-{i}" for i in range(20))  # and square brackets are no markup
    terminal.print_table("labels", ["pictures", "label"], [["1", path]])
    terminal.show("published", [("checkpoint", path)])
    for text in capsys.readouterr():
        assert path in "".join(text.replace("│", "").split())


def test_figures_are_rounded_and_those_that_are_not_known_are_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_figures("study", [{"exact_match": 0.123456, "distance": None, "objects": 3}])
    *_, head, _, row, _ = capsys.readouterr().out.splitlines()
    assert [line.replace("┃", "│").split("│")[1:-1] for line in (head, row)] == [
        [" exact match ", " distance ", " objects "], [" 0.1235      ", " -        ", " 3       "],
    ]  # fmt: skip
