"""Progress where there is no terminal: a line a minute. Tables, and files that could not be written."""

from pathlib import Path

import pytest

from tests.trainer.command_line import Command
from trainer.commands import terminal
from trainer.commands.terminal import Lines
from trainer.errors import TrainerError


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


def test_square_brackets_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    name = "[/red] a [red]cube"
    terminal.print_table(name, ["label", name], [[name, "1"]])
    terminal.show(name, [("checkpoint", name)])
    captured = capsys.readouterr()
    assert (captured.out.count(name), captured.err.count(name)) == (3, 2)


def test_no_name_controls_the_terminal(capsys: pytest.CaptureFixture[str], command: Command, tmp_path: Path) -> None:
    name = "a\x1b[2Jb\x9b5mc"
    terminal.print_table(name, ["label", name], [[name, "1"]])
    terminal.show(name, [("checkpoint", name)])
    captured = capsys.readouterr()
    (tmp_path / "d.csv").write_text(f"file_name,labels\n{name}.png,cat\n")
    code, _, error = command("import", tmp_path / "d.csv", tmp_path / "out")
    assert code == 1
    shown = "a\ufffd[2Jb\ufffd5mc"
    assert [text.count(shown) for text in (*captured, error)] == [3, 2, 2]
    assert not {"\x1b", "\x9b"}.intersection(captured.out + captured.err + error)


def test_long_names_are_printed_in_full(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    path = "/".join(f"folder-{i}" for i in range(20))
    terminal.print_table("labels", ["pictures", "label"], [["1", path]])
    terminal.show("published", [("checkpoint", path)])
    for text in capsys.readouterr():
        assert path in "".join(text.replace("│", "").split())


def test_a_file_or_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    terminal.check_files(png=tmp_path / "new.png", json=None)
    terminal.check_folder(tmp_path / "new/folder", "--out")
    with pytest.raises(TrainerError, match=r"folder\.png is a folder, not a file to write"):
        terminal.check_files(png=tmp_path / "folder.png")
    for path in (tmp_path / "file", tmp_path / "file/in it"):
        with pytest.raises(TrainerError, match=r"--out .*/file.*: .*/file is a file, not a folder"):
            terminal.check_folder(path, "--out")
