"""The package `labelgrid`: one command for all three command lines, the client, the weights, one version."""

import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
import yaml

from labelgrid import __main__ as command
from tests.paths import ROOT
from tests.test_architecture import HEAVY, heavy_modules_after

ELSEWHERE = {command.SERVICE: {"all"}, command.TRAINER: {"score"}, command.CLIENT: set()}  # not in `labelgrid`


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "labelgrid", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("module", command.COMMANDS)
def test_the_table_has_every_command(module: str) -> None:
    app: typer.Typer = importlib.import_module(module).app
    names = {one.name or one.callback.__name__.replace("_", "-") for one in app.registered_commands if one.callback}
    names |= {str(group.name) for group in app.registered_groups}
    assert set(command.COMMANDS[module]) == names - ELSEWHERE[module]


def test_no_name_stands_for_two_commands() -> None:
    names = [name for commands in command.COMMANDS.values() for name in commands]
    assert len(names) == len(set(names))


def test_help_lists_the_commands_and_loads_none_of_them() -> None:
    done = run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for commands in command.COMMANDS.values():
        assert all(f"  {name} " in done.stdout for name in commands)
    assert not heavy_modules_after("import labelgrid.__main__", ("trainer", "fastapi", "redis", *HEAVY))


def test_a_reader_of_the_help_may_leave_early() -> None:
    line = [sys.executable, "-m", "labelgrid", "--help"]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()  # before Python has started
        assert process.stderr.read() == ""
    assert process.returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
def test_a_help_that_cannot_be_written_is_one_line_of_error() -> None:
    with Path("/dev/full").open("w") as full:
        line = [sys.executable, "-m", "labelgrid", "--help"]
        done = subprocess.run(line, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        1, "labelgrid: the help cannot be written: No space left on device\n"
    )  # fmt: skip


@pytest.mark.parametrize("name", ["generate", "serve", "render"])
def test_a_commands_help_is_its_own(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["-m", name, "--help"])
    with pytest.raises(SystemExit) as end:
        command.main()
    assert not end.value.code
    assert f"labelgrid {name} " in capsys.readouterr().out


def test_an_unknown_command_is_refused_in_one_line() -> None:
    done = run("serv")
    assert done.returncode == 2
    assert done.stderr == "labelgrid: no such command 'serv'; `labelgrid --help` lists them\n"


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["labelgrid", "serve"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install 'labelgrid\[serve\]'"):
        command.main()
    monkeypatch.setattr(sys, "argv", ["labelgrid", "render"])
    monkeypatch.setitem(sys.modules, "trainer.__main__", None)
    with pytest.raises(SystemExit, match=r"pip install 'labelgrid\[train\]'"):
        command.main()


def test_an_installation_serves_the_weights_that_came_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LABELGRID_STORAGE", "s3://mine")
    command.use_packaged_weights()
    assert os.environ["LABELGRID_STORAGE"] == "s3://mine"
    monkeypatch.delenv("LABELGRID_STORAGE")
    command.use_packaged_weights()
    assert (Path(os.environ.pop("LABELGRID_STORAGE")) / "promoted.json").exists()
    (tmp_path / "models").mkdir()
    (tmp_path / "models/user.py").touch()
    command.use_packaged_weights()
    assert (Path(os.environ.pop("LABELGRID_STORAGE")) / "promoted.json").exists()
    (tmp_path / "models/mine.safetensors").touch()
    command.use_packaged_weights()
    assert "LABELGRID_STORAGE" not in os.environ


def test_one_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    overlay = ROOT / "deploy" / "kubernetes" / "overlays" / "production" / "kustomization.yaml"
    assert {image["newTag"] for image in yaml.safe_load(overlay.read_text())["images"]} == {version}
    assert f"\n## {version} " in (ROOT / "CHANGELOG.md").read_text()
