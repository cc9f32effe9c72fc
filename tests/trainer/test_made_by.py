"""How a checkpoint was made follows from its header, and from those of the checkpoints that it starts from."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.checkpoint import publish, read_info
from tests.toy_checkpoint import publish_toys
from tests.trainer.command_line import TINY, Command, refused, succeeded
from tests.trainer.test_train import CONFIG, fit
from trainer import made_by
from trainer.commands import training
from trainer.made_by import Stage, commit_of, in_words, joined, stages_of
from trainer.studies.markdown import part_of


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_commit_is_that_of_the_code_and_says_whether_python_files_differ(tmp_path: Path) -> None:
    def found() -> str | None:
        commit_of.cache_clear()
        return commit_of(tmp_path / "code")

    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "__init__.py").write_text("")
    assert found() is None  # no git
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "commit", "--quiet", "--allow-empty", "-m", "a")
    assert found() is None  # the code of another checkout, or of none
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "b")
    head = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "notes.md").write_text("")
    assert (found(), len(head)) == (head, 40)
    (tmp_path / "other.py").write_text("")  # beside the folder of the code
    assert found() == f"{head}+changes"


def test_without_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    commit_of.cache_clear()
    assert made_by.this_stage().keys() == {"command"}
    commit_of.cache_clear()


def test_stages_that_several_checkpoints_have_in_common_count_once() -> None:
    a, b, c = ({"command": one} for one in "abc")
    assert joined([a, b], [a, c], [c]) == [a, b, c]


def test_commands_of_one_commit_stand_together() -> None:
    stages = [{"command": "a", "commit": "0" * 40}, {"command": "b", "commit": "0" * 40}, {"command": "c"}]
    stages.append({"command": "d 'x\ny'", "commit": "1" * 40 + "+changes"})
    assert in_words(stages) == (
        "Made at commit `000000000000` by\n\n    a\n    b\n\nThen by\n\n    c\n\n"
        "Then at commit `111111111111` (with changes) by\n\n    d 'x\n    y'"
    )
    assert in_words([]) == ""


@pytest.mark.parametrize("wrong", ["train", [1], [{"command": 1}]])
def test_a_header_with_something_else_is_refused(command: Command, data: Path, wrong: Any) -> None:
    publish(
        Path("models"), "m", {"w": torch.zeros(1)}, kind="denoiser", vocabulary=("a",), config={},
        training={"made_by": wrong},
    )  # fmt: skip
    start = ("train", "denoiser", "--data", data, "--steps", 1, "--start-from", "m", *TINY)
    refused(command(*start), "m: made_by is no list of commands")


def test_a_resumed_run_keeps_the_stages_of_before(tmp_path: Path) -> None:
    first, second = {"command": "train", "commit": "a"}, {"command": "train", "commit": "b"}
    fit(tmp_path, 1, CONFIG, made_by=[first])
    assert fit(tmp_path, 2, CONFIG, made_by=[second]).made_by == [first, second]
    assert fit(tmp_path, 3, CONFIG, made_by=[second]).made_by == [first, second]


def test_a_chain_of_stages_is_in_the_header_and_in_the_card(
    command: Command, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A denoiser; one that starts from it; its layouts; an adapter of the second. Each at its own commit."""
    publish_toys(Path("models"))
    names = list(json.loads((data / "train.json").read_text()))
    (data / "positions.json").write_text(json.dumps({name: [[0.25, 0.75]] for name in names}))
    commits = iter("abcd")
    typed: list[Stage] = []

    def this_stage() -> Stage:
        typed.append({**made_by.this_stage(), "commit": next(commits) * 40})
        return typed[-1]

    monkeypatch.setattr(training, "this_stage", this_stage)
    train, one = ("train", "denoiser", "--data", data, *TINY), ("--steps", 1)
    succeeded(command(*train, "--name", "first", *one, "--run", "first"))
    succeeded(command(*train, "--name", "second", *one, "--run", "second", "--start-from", "first"))
    succeeded(command("train", "layouts", "--name", "second", "--data", data, *one))
    distil = ("--guidance", 1, "--sampling-steps", 1, "--teacher-steps", 1, "--trajectories", 1, "--set", "batch=4")
    succeeded(command("train", "distilled", "--data", data, "--teacher", "second", "--name", "fast", *one, *distil))
    assert [stage["command"].split()[4] for stage in typed] == ["denoiser", "denoiser", "layouts", "distilled"]
    assert typed[1]["command"].endswith("--name second --steps 1 --run second --start-from first")
    stages = {name: stages_of(read_info(Path(f"models/{name}.safetensors"))) for name in ("first", "second", "fast")}
    assert stages == {"first": typed[:1], "second": typed[:3], "fast": typed}
    for name, found in stages.items():
        assert part_of(Path(f"models/{name}.md").read_text(), "made-by") == in_words(found)
