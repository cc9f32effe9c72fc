"""The client's command line against the real API, in this process and in another one."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import typer
from redis import Redis
from typer.testing import CliRunner

from iclevr.labels import ICLEVR
from service.api.access.api_keys import hash_of
from service.client import Client
from service.client.__main__ import app
from service.client.display import plain
from service.client.job_command import until_ctrl_c
from service.settings import Settings
from service.store import keys, workers
from service.store.jobs import JobStore
from service.worker.runner import Runner
from tests.conftest import serving
from tests.paths import ROOT
from tests.service.processes import until

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def url(client: httpx.Client) -> str:
    return str(client.base_url)


@pytest.fixture
def run(url: str) -> Command:
    def run(*arguments: str, stdin: str | None = None) -> tuple[int, str, str]:
        done = CliRunner().invoke(app, arguments, stdin, env={"COLUMNS": "200", "LABELGRID_URL": url})
        assert done.exception is None or isinstance(done.exception, SystemExit)
        return done.exit_code, done.stdout, done.stderr

    return run


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A test file of two lists."""
    path = tmp_path / "test.json"
    path.write_text('[["red cube"], ["red cube", "blue sphere"]]')
    return path


def process(url: str, *arguments: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "service.client", *arguments]
    variables = {**os.environ, "LABELGRID_URL": url, "COLUMNS": "200"}
    return subprocess.Popen(line, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_generate_as_in_the_readme(url: str, client: httpx.Client, working: Runner, tmp_path: Path) -> None:
    grid = tmp_path / "[red]\udcff.png"  # rich's markup, and a path that cannot be printed
    with process(url, "generate", "red cube, blue sphere", "gray cylinder", "-o", str(grid), "--steps", "2") as done:
        out, err = done.communicate(timeout=60)
    assert (done.returncode, err) == (0, "")
    assert "gray cylinder (0." in out
    assert "/[red]\N{REPLACEMENT CHARACTER}.png\n" in out
    job = client.get("/jobs").json()["jobs"][0]
    assert job["options"]["steps"] == 2
    assert grid.read_bytes() == client.get(f"/jobs/{job['id']}/grid.png").content


def test_selected_pictures_say_so(run: Command, working: Runner) -> None:
    """The toy evaluator finds nothing exact."""
    code, out, _ = run("generate", "red cube", "--steps", "2", "--until", "exact", "--attempts", "2")
    assert code == 0
    assert re.search("selected: attempt [12] of 2", out)
    assert "of selected pictures" in out


def test_score_saves_the_best_runs_pictures_in_the_files_order(
    run: Command, client: httpx.Client, working: Runner, file: Path, tmp_path: Path
) -> None:
    file.write_text(json.dumps([[label] for label in ICLEVR.names]))
    options = ["--repeats", "3", "--seed", "3", "--steps", "2"]  # of which the second run is the best
    code, out, err = run("score", str(file), "--images", str(tmp_path), "--json", *options)
    assert (code, err) == (0, "")
    job = json.loads(out)
    assert [one["seed"] for one in job["result"]["repeats"]] == [3, 4, 5]
    for i, picture in enumerate(job["result"]["pictures"]):
        assert (tmp_path / f"{i}.png").read_bytes() == client.get(picture["url"]).content
    table = run("score", str(file), *options)[1]
    assert "mean ± std" in table
    assert f"{job['result']['accuracy']['max']:.3f}" in table


def test_labels_come_from_a_file_or_standard_input(run: Command, working: Runner, file: Path) -> None:
    job = json.loads(run("generate", "--file", str(file), "--guidance-interval", "0", "0.5", "--clip-x0", "--json")[1])
    assert [one["labels"] for one in job["result"]["pictures"]] == [["red cube"], ["red cube", "blue sphere"]]
    assert (job["options"]["guidance_interval"], job["options"]["clip_x0"]) == ([0.0, 0.5], True)
    code, out, err = run("generate", "--file", "-", "--json", stdin='\ufeff[["gray cube"]]')
    assert (code, err, json.loads(out)["labels"]) == (0, "", [["gray cube"]])


def test_a_score_below_its_threshold_is_exit_code_3(run: Command, working: Runner, file: Path) -> None:
    # the toy draws noise, in which its evaluator always sees a gray cylinder, and never a gray cube
    file.write_text('[["gray cube"], ["gray cube", "gray cylinder"]]')
    options = ["score", str(file), "--repeats", "2", "--steps", "1", "--seed", "4", "--fail-under"]
    job = run(*options, "accuracy=0", "--json")[1]
    accuracy = json.loads(job)["result"]["accuracy"]["mean"]
    met = [f"accuracy={accuracy}", "--fail-under", "recall:gray cylinder=1"]
    assert run(*options, *met)[0] == 0
    code, out, err = run(*options, *met, "--fail-under", "exact_match=1", "--fail-under", "recall:gray cube=0.1")
    assert (code, "mean ± std" in out) == (3, True)
    assert err == "labelgrid: exact_match 0.0000 is below 1, recall:gray cube 0.0000 is below 0.1\n"
    code, _, err = run(*options, "recall:blue cube=0.5")
    assert (code, err) == (1, 'labelgrid: --fail-under: no picture asked for "blue cube"\n')


def test_jobs_are_detached_listed_cancelled_and_waited_for(run: Command, alive: JobStore) -> None:
    code, out, _ = run("generate", "red cube", "--detach")
    job_id = out.strip()
    assert code == 0
    assert job_id in run("jobs")[1]
    assert json.loads(run("jobs", "--json")[1])["jobs"][0]["id"] == job_id
    assert run("cancel", job_id)[:2] == (0, f"job {job_id} is cancelled\n")
    assert run("wait", job_id) == (1, "", f"labelgrid: job {job_id} cancelled\n")


def test_jobs_follows_pages_until_it_has_enough(run: Command, client: httpx.Client, alive: JobStore) -> None:
    ids = [run("generate", "red cube", "--detach")[1].strip() for _ in range(5)]
    for job_id in ids[2:]:  # as when it has expired, which leaves its place in the list
        alive.connection.delete(keys.job(job_id))
    for limit, expected, is_last in (("1", ids[1::-1][:1], False), ("101", ids[1::-1], True)):
        page = json.loads(run("jobs", "--limit", limit, "--json")[1])
        assert ([job["id"] for job in page["jobs"]], page["next"] is None) == (expected, is_last)


def test_models_are_listed_with_the_workers_that_have_loaded_them(run: Command, connection: Redis) -> None:
    assert "cpu" not in run("models")[1]
    for name, device in (("a", "cpu"), ("b", "cpu"), ("c", "cuda:0")):
        about = {"device": device, "models": [{"name": "toy", "digest": "9f2c"}]}
        workers.announce(connection, name, about, lease_s=60)
    toy, other = (line for line in run("models")[1].splitlines() if "toy" in line or "other" in line)
    assert "2 x cpu, cuda:0" in toy + other
    assert ("cpu" in toy) != ("cpu" in other)


def test_labels_and_models_are_listed(run: Command) -> None:
    assert run("labels")[1].splitlines()[:2] == ["gray cube", "red cube"]
    assert run("labels", "--model", "nobody")[0] == 1
    assert [model["name"] for model in json.loads(run("models", "--json")[1])["models"]] == ["other", "toy"]


def test_errors_are_one_line(run: Command, alive: JobStore, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("[[")
    (tmp_path / "null.json").write_text("null")
    for line, words in (
        (["generate", "red cube, blue sphare"], 'entry 0: unknown label "blue sphare"; did you mean "blue sphere"?'),
        (["score", str(tmp_path / "nothing.json")], f"{tmp_path}/nothing.json: No such file or directory"),
        (
            ["generate", "red cube", "--layouts", str(tmp_path / "null.json")],
            f"{tmp_path}/null.json: wanted a JSON list",
        ),
        (["generate", "red cube", "--layouts", str(tmp_path / "bad.json")], f"{tmp_path}/bad.json: not JSON: "),
        (["generate", "--file", str(tmp_path / "null.json")], f"{tmp_path}/null.json: wanted a JSON list"),
        (["labels", "--url", "localhost:8000"], "'localhost:8000' is not an address"),
    ):
        code, out, err = run(*line)
        assert (code, out, err.count("\n"), words in err) == (1, "", 1, True), err


@pytest.mark.parametrize(
    "line",
    [
        ["generate"],
        ["generate", "red cube", "--file", "-"],
        ["generate", "--file", "nowhere/lists.json"],
        ["generate", "red cube", "--sampler", "dpm"],
        ["generate", "red cube", "--detach", "-o", "grid.png"],  # with --detach there is nothing to save yet
        ["score", "test.json", "--detach", "--fail-under", "accuracy=0.9"],
        *(
            ["score", "test.json", "--fail-under", bad]
            for bad in ("f1", "f1=1.5", "speed=1", "f1=nan", "", "recall:=1")
        ),
        ["jobs", "--limit", "0"],
    ],
)
def test_wrong_usage_is_exit_code_2(run: Command, client: httpx.Client, alive: JobStore, line: list[str]) -> None:
    assert run(*line)[:2] == (2, "")
    assert client.get("/jobs").json()["jobs"] == []


def test_a_missing_key_is_named_by_its_variable(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LABELGRID_API_KEY", raising=False)
    with serving(settings.model_copy(update={"api_keys": f"alice:{hash_of('key')}"})) as client:
        done = CliRunner().invoke(app, ["labels", "--url", str(client.base_url)])
    assert done.exit_code == 1
    assert done.stderr.startswith("labelgrid: send your API key")
    assert done.stderr.endswith("(set LABELGRID_API_KEY)\n")


@pytest.mark.parametrize(
    ("option", "place", "code", "words"),
    [
        ("-o", "nowhere/grid.png", 1, "nowhere/grid.png: there is no folder "),
        ("-o", ".", 2, "' is a directory"),
        ("--images", "file/images", 1, "file/images: Not a directory"),
    ],
)
def test_files_that_cannot_be_written_are_refused_before_any_request(
    run: Command, tmp_path: Path, option: str, place: str, code: int, words: str
) -> None:
    (tmp_path / "file").touch()
    for command in ("wait", "nobody"), ("generate", "red cube"):
        refusal = run(*command, option, str(tmp_path / place))
        assert refusal[:2] == (code, "")
        assert words in refusal[2]


def test_a_recipe_is_reproduced_with_strips(
    run: Command, client: httpx.Client, working: Runner, tmp_path: Path
) -> None:
    grid, again = tmp_path / "grid.png", tmp_path / "again.png"
    assert run("generate", "red cube", "gray cube", "--steps", "3", "-o", str(grid))[0] == 0
    options = ("--trajectory", "3", "--images", str(tmp_path), "-o", str(again), "--json")
    code, out, _ = run("generate", "--recipe", str(grid), *options)
    assert (code, again.read_bytes()) == (0, grid.read_bytes())
    for i, picture in enumerate(json.loads(out)["result"]["pictures"]):
        assert (tmp_path / f"{i}.png").read_bytes() == client.get(picture["url"]).content
        assert (tmp_path / "strips" / f"{i}.png").read_bytes() == client.get(picture["trajectory_url"]).content


@pytest.mark.parametrize("command", ["generate", "wait"])
def test_ctrl_c_cancels_the_job_that_the_command_created(
    url: str, client: httpx.Client, alive: JobStore, command: str
) -> None:
    arguments = ["red cube"]
    if command == "wait":
        created = client.post("/generate", json={"labels": [["red cube"]]}, headers={"prefer": "respond-async"})
        arguments = [created.json()["id"]]
    # Tests that a shell starts in the background ignore Ctrl-C, and child processes inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with process(url, command, *arguments) as waiting:
        (job,) = until(lambda: client.get("/jobs").json()["jobs"])
        job_id = job["id"]
        until(lambda: alive.connection.exists(keys.watched(job_id)))  # it follows the events
        waiting.send_signal(signal.SIGINT)
        assert waiting.wait(timeout=30) == 130
        assert waiting.stderr is not None
        goes_on = command == "wait"
        outcome = f"goes on; `labelgrid cancel {job_id}` ends it" if goes_on else "is cancelled"
        assert waiting.stderr.read() == f"labelgrid: interrupted; job {job_id} {outcome}\n"
    assert client.get(f"/jobs/{job_id}").json()["status"] == ("queued" if goes_on else "cancelled")


@pytest.mark.parametrize("lost", ["request", "answer"])
def test_ctrl_c_before_the_answer_cancels_the_job_too(
    url: str, alive: JobStore, capsys: pytest.CaptureFixture[str], lost: str
) -> None:
    class Interrupted(httpx.HTTPTransport):
        """Ctrl-C is pressed while the first request is on its way, or its answer."""

        requests = 0

        def handle_request(self, request: httpx.Request) -> httpx.Response:
            self.requests += 1
            if self.requests > 1:
                return super().handle_request(request)
            if lost == "answer":
                super().handle_request(request).read()
            raise KeyboardInterrupt

    with Client(url, transport=Interrupted()) as client:
        with pytest.raises(typer.Exit) as end:
            until_ctrl_c(client, functools.partial(Client.generate, labels=[["red cube"]]), lambda _: None, wait=False)
        (job,) = client.jobs().jobs
    assert (end.value.exit_code, job.status) == (130, "cancelled")
    assert capsys.readouterr().err == f"labelgrid: interrupted; job {job.id} is cancelled\n"


def test_text_from_a_service_is_printed_as_text() -> None:
    assert plain("[red]\x1b[31mb\n") == "\\[red]\N{REPLACEMENT CHARACTER}[31mb\N{REPLACEMENT CHARACTER}"
