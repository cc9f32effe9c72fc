"""The checkouts that are compared: this one, and an older commit in a git worktree under build/.

Processes of each import its own code, since its folder comes first on PYTHONPATH. Both use this checkout's packages.
"""

import compileall
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from benchmarks.results import ROOT

PACKAGES = "shared", "service"


@dataclass(frozen=True)
class Tree:
    """A checkout: its name in tables, and its folder."""

    name: str
    folder: Path

    @property
    def storage(self) -> Path:
        """The folder of the checkpoints that this commit ships."""
        return self.folder / "models"

    def environment(self, **variables: str) -> dict[str, str]:
        """Return the variables of its processes: those of this process, its own code, and `variables`."""
        return {**os.environ, "PYTHONPATH": str(self.folder), **variables}

    def compile(self) -> None:
        """Write the bytecode of its code, so that no start has to compile it."""
        for package in PACKAGES:
            compileall.compile_dir(self.folder / package, quiet=1)


HERE = Tree("this commit", ROOT)


def checkout(commit: str, repository: Path = ROOT) -> Tree | None:
    """Check a commit out under build/, or take the worktree that is there. None if the clone lacks the commit."""
    whole = _git(repository, "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}")
    if not whole:
        return None
    folder = repository / "build" / f"commit-{commit}"
    if not _is_checked_out(folder, whole):  # such as after an interrupted checkout
        shutil.rmtree(folder, ignore_errors=True)
        command = ["git", "worktree", "add", "--quiet", "--force", "--detach", str(folder), whole]
        subprocess.run(command, cwd=repository, check=True)
    return Tree(commit, folder)


def _is_checked_out(folder: Path, commit: str) -> bool:
    """Whether the folder is a worktree of its own at `commit`, with every file as committed."""
    if not folder.is_dir():
        return False
    # Git looks for a repository in the folders above, too
    at = _git(folder, "rev-parse", "--show-toplevel", "HEAD").splitlines()
    return at == [str(folder.resolve()), commit] and not _git(folder, "status", "--porcelain")


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
