"""`python -m service` starts everything, restarts what dies, and leaves no process behind."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service.local import supervisor
from service.local.demo import free_port
from tests.paths import ROOT
from tests.service.conftest import Command
from tests.service.processes import children, clean_environment, is_alive, run_all, until, until_it_answers


@pytest.fixture
def service(storage: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    port = free_port()
    environment = {**clean_environment(), "TMPDIR": str(tmp_path)} if len(str(tmp_path)) < 60 else clean_environment()
    process = subprocess.Popen(run_all(port, storage), cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert f"http://127.0.0.1:{port}" in line
    yield process, f"http://127.0.0.1:{port}"
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize(
    ("workers", "device", "gpus", "expected"),
    [
        (None, "auto", 0, [{}]),
        (3, "cpu", 2, [{"OMP_NUM_THREADS": "2"}] * 3),
        (16, "auto", 0, [{"OMP_NUM_THREADS": "1"}] * 16),
        (None, "auto", 2, [{"LABELGRID_DEVICE": "cuda:0"}, {"LABELGRID_DEVICE": "cuda:1"}]),
        (3, "auto", 2, [{"LABELGRID_DEVICE": f"cuda:{i}"} for i in (0, 1, 0)]),
        (2, "cuda:1", 4, [{}] * 2),
    ],
)
def test_workers_share_gpus_or_cores(
    workers: int | None, device: str, gpus: int, expected: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "count_gpus", lambda: gpus)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert supervisor.worker_environments(workers, device) == expected


def test_gpus_are_counted_where_a_driver_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("class cuda:\n    device_count = lambda: 3\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(supervisor, "GPU_DRIVERS", [str(tmp_path / "none")])
    assert supervisor.count_gpus() == 0
    monkeypatch.setattr(supervisor, "GPU_DRIVERS", [str(tmp_path / "none"), str(tmp_path)])
    assert supervisor.count_gpus() == 3


@pytest.mark.parametrize("workers", ["0", "65", "many"])
def test_other_numbers_of_workers_are_refused(command: Command, workers: str) -> None:
    code, _, err = command("all", "--workers", workers)
    assert code == 2
    assert "wanted auto, or 1 to 64" in err


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_everything_starts_works_and_ends(service: tuple[subprocess.Popen[str], str], how: signal.Signals) -> None:
    process, address = service
    parts = children(process.pid)
    assert len(parts) == 3
    body = {"labels": [["red cube"]], "steps": 2}
    assert httpx.post(f"{address}/generate", json=body, timeout=30).json()["status"] == "finished"
    long = {"labels": [["red cube"]] * 100, "steps": 1000}  # still in progress when it is stopped
    assert httpx.post(f"{address}/generate", json=long, headers={"prefer": "respond-async"}).status_code == 202
    for _ in range(20):  # an impatient Ctrl-C
        process.send_signal(how)
    assert process.wait(timeout=30) == (-how if how == signal.SIGKILL else 0)
    until(lambda: not any(is_alive(pid) for pid in parts), timeout_s=15)


def test_a_dead_process_is_restarted_and_none_is_left_behind(service: tuple[subprocess.Popen[str], str]) -> None:
    process, address = service
    before = children(process.pid)
    by_name = {(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[3:4] or [b"redis"])[0]: pid for pid in before}
    os.kill(by_name[b"worker"], signal.SIGKILL)
    body = {"labels": [["red cube"]], "steps": 2}
    until(lambda: len(children(process.pid) - before) == 1)
    until_it_answers(process, f"{address}/readyz", lambda answer: answer.json().get("workers") == 1)
    assert httpx.post(f"{address}/generate", json=body, timeout=120).json()["status"] == "finished"
    parts = before | children(process.pid)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0
    assert not any(is_alive(pid) for pid in parts)
