"""The worktree of an older commit: made anew where it is broken, and run with its own code."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.trees import Tree, checkout


def git(repository: Path, *arguments: str) -> str:
    who = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    return subprocess.run(
        ["git", *who, *arguments], cwd=repository, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> tuple[Path, str]:
    """A repository with two commits, in which `shared.WHEN` is "before" and "now"; and the first one's short name."""
    folder = tmp_path / "repository"
    (folder / "shared").mkdir(parents=True)
    git(folder, "init", "--quiet")
    (folder / ".gitignore").write_text("/build/\n__pycache__/\n")
    for when in ("before", "now"):
        (folder / "shared" / "__init__.py").write_text(f"WHEN = {when!r}\n")
        git(folder, "add", "--all")
        git(folder, "commit", "--quiet", "--message", when)
    return folder, git(folder, "rev-parse", "--short", "HEAD~1")


def when(tree: Tree) -> str:
    """Return what a process of a tree imports."""
    command = [sys.executable, "-P", "-c", "import shared; print(shared.WHEN)"]
    done = subprocess.run(command, env=tree.environment(), capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_each_tree_runs_its_own_code(repository: tuple[Path, str]) -> None:
    folder, commit = repository
    tree = checkout(commit, folder)
    assert tree is not None
    assert tree.folder == folder / "build" / f"commit-{commit}"
    assert tree.storage == tree.folder / "models"
    assert when(tree) == "before"
    assert when(Tree("now", folder)) == "now"
    assert git(folder, "status", "--porcelain") == ""


@pytest.mark.parametrize("broken", ["changed", "other commit", "no worktree"])
def test_a_broken_worktree_is_made_anew(repository: tuple[Path, str], broken: str) -> None:
    folder, commit = repository
    tree = checkout(commit, folder)
    assert tree is not None
    module = tree.folder / "shared" / "__init__.py"
    if broken == "changed":
        module.write_text("WHEN = 'changed'\n")
    elif broken == "other commit":
        git(tree.folder, "checkout", "--quiet", "--detach", git(folder, "rev-parse", "HEAD"))
    else:
        (tree.folder / ".git").unlink()  # now a plain folder of the repository around it
        module.write_text("WHEN = 'changed'\n")
    assert checkout(commit, folder) == tree
    assert when(tree) == "before"
