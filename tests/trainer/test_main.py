"""`python -m trainer`: help, exit codes, and how errors are reported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.paths import ROOT
from tests.trainer.command_line import Command, refused
from trainer import config
from trainer.former import FORMER


def test_a_former_command_says_what_replaces_it(command: Command) -> None:
    refused(command("limit", "--help"), "`trainer limit` is now `trainer score FILE --renders`", 2)
    refused(command("train", "--data", "data"), "`trainer train` is now `trainer train denoiser`", 2)
    assert all(command(new.split()[0], "--help")[0] == 0 for new in FORMER.values())


def run(*program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    line = [sys.executable, *program]
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)


def test_the_process_exits_as_main_does() -> None:
    done = run("-m", "trainer", "nonsense")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: No such command 'nonsense'")
    assert done.stderr.count("\n") == 1


def test_labels_that_the_terminals_encoding_lacks_are_printed_escaped(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    (tmp_path / "metadata.csv").write_text("file_name,labels\n0.png,na\u00efve\n", "utf-8")
    done = run("-m", "trainer", "import", str(tmp_path), str(tmp_path / "out"), PYTHONIOENCODING="ascii")
    assert (done.returncode, r"na\xefve" in done.stdout) == (0, True), done.stderr


def test_help_is_fast_because_it_imports_no_torch() -> None:
    assert run("-c", "import sys, trainer.__main__; sys.exit('torch' in sys.modules)").returncode == 0


def test_ctrl_c_is_reported(command: Command, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(config, "make_config", interrupt)
    refused(command("train", "denoiser", "--data", data, "--steps", 1), "interrupted", 130)
