"""The command line: what prevents a start is reported in one line on stderr; Ctrl-C is no error."""

import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from redis import Redis

from service.local.demo import free_port
from service.local.supervisor import Supervisor
from service.settings import Settings
from tests.paths import ROOT
from tests.service.conftest import Command
from tests.service.processes import clean_environment, run_all


def test_a_failed_start_is_reported(command: Command, storage: Path, tmp_path: Path) -> None:
    def run(*args: str, port: int) -> str:
        line = ("--port", str(port), "--storage", str(storage), *args)
        code, _, err = command(*line, environment=clean_environment())
        assert code != 0
        return err

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "cannot be used" in run(port=taken.getsockname()[1])
    assert "no denoiser is promoted" in run("--storage", str(tmp_path), port=free_port())
    assert f"there is no folder {tmp_path / 'no'}" in run("--storage", str(tmp_path / "no"), port=free_port())
    assert "No such option: --host" in run("--host", "0.0.0.0", port=free_port())


@pytest.mark.parametrize("process", ["all", "worker"])
def test_a_redis_that_is_too_old_is_refused_before_anything_starts(
    command: Command, monkeypatch: pytest.MonkeyPatch, settings: Settings, storage: Path, process: str
) -> None:
    monkeypatch.setattr(Redis, "info", lambda *_: {"redis_version": "6.2.5"})
    variables = {"LABELGRID_REDIS_URL": settings.redis_url, "LABELGRID_STORAGE": str(storage)}
    code, _, err = command(process, environment={**clean_environment(), **variables})
    assert (code, err.count("\n"), "is Redis 6.2.5: upgrade it" in err) == (1, 1, True)


def test_an_unknown_variable_is_a_warning_and_an_unusable_device_an_error(storage: Path) -> None:
    environment = {**clean_environment(), "LABELGRID_DEVICE": "cuda:99", "LABELGRID_WAIT": "3"}
    line = run_all(free_port(), storage)
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.count("did you mean LABELGRID_WAIT_S?") == 1
    assert 'labelgrid: LABELGRID_DEVICE=cuda:99: no device "cuda:99": this machine has' in done.stderr


def test_sigterm_ends_a_worker_that_is_starting(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's first process has no default action for it, and would go on to take jobs until it is killed."""
    ignored = list[int]()

    def start(settings: Settings) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("service.worker.process.main", start)
    before = signal.signal(signal.SIGTERM, lambda number, frame: ignored.append(number))
    try:
        assert command("worker", environment=clean_environment())[0] == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ignored == []


def test_a_demo_that_ctrl_c_ended_is_no_success(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Supervisor, "run", lambda supervisor, on_ready: None)
    assert command("demo", environment=clean_environment())[0] == 130


def test_a_demo_without_a_place_for_its_grid_starts_nothing(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Supervisor, "run", lambda supervisor, on_ready: pytest.fail("started"))
    code, _, err = command("demo", "--grid", str(tmp_path / "no/grid.png"), environment=clean_environment())
    assert (code, err) == (1, f"labelgrid: {tmp_path}/no/grid.png: there is no folder {tmp_path}/no\n")


def test_a_demo_needs_no_key_of_another_service(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = list[str]()
    monkeypatch.setattr(Supervisor, "run", lambda supervisor, on_ready: kept.extend(os.environ))
    keys = {"LABELGRID_API_KEYS": "a:x", "LABELGRID_API_KEYS_FILE": "keys.txt"}
    command("demo", environment={**clean_environment(), **keys})
    assert kept
    assert not keys.keys() & set(kept)


def test_settings_prints_the_document(command: Command) -> None:
    assert command("settings")[:2] == (0, (ROOT / "docs/settings.md").read_text())


def test_an_error_of_torch_ends_a_worker_with_its_traceback(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), OSError("in the middle")):

        def fail(settings: Settings, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("service.worker.process.main", fail)
        with pytest.raises(type(error), match=str(error)):  # which Python prints
            command("worker", environment=clean_environment())
