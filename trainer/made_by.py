"""How a checkpoint was made: the commands of all its stages, in order, each with the commit of the code.

A checkpoint's header has them as `training.made_by`. A stage that starts from a checkpoint, or learns from one, extends
the list of that checkpoint.
"""

from __future__ import annotations

import functools
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from shared.checkpoint import CheckpointInfo
from trainer.errors import TrainerError

Stage = dict[str, str]  # `command` and, where the code is a git checkout, `commit`
_STAGES = TypeAdapter(list[Stage])


@functools.cache
def commit_of(folder: Path) -> str | None:
    """Return the commit of the code in `folder`, with `+changes` if *.py files differ from it; None without git."""
    try:
        if not git(folder, "ls-files", "__init__.py"):  # installed somewhere inside of another repository
            return None
        changes = git(folder, "--no-optional-locks", "status", "--porcelain", "--", ":/*.py")
        return git(folder, "rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def git(folder: Path, *arguments: str) -> str:
    line = ["git", *arguments]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def this_stage() -> Stage:
    """Return the command of this process, as it was typed, and the commit of its code."""
    commit = commit_of(Path(__file__).parent)
    return {"command": f"python -m trainer {shlex.join(sys.argv[1:])}", **({"commit": commit} if commit else {})}


def stages_of(info: CheckpointInfo) -> list[Stage]:
    """Return the stages that made a checkpoint and, after them, its layouts; none if the header has none.

    Raises TrainerError for a header with something else in their place.
    """
    layouts = info.training.get("layouts")
    parts = [info.training, layouts if isinstance(layouts, dict) else {}]
    try:
        return joined(*(_STAGES.validate_python(part.get("made_by", [])) for part in parts))
    except ValidationError as error:
        raise TrainerError(f"{info.name}: made_by is no list of commands") from error


def joined(*parts: Sequence[Stage]) -> list[Stage]:
    """Return the stages of all lists, each once: checkpoints that one is made from may have some in common."""
    found = list[Stage]()
    for part in parts:
        found += [stage for stage in part if stage not in found]
    return found


def in_words(stages: Sequence[Stage]) -> str:
    """Return the commands as Markdown, grouped by commit."""
    paragraphs, last = list[str](), object()
    for stage in stages:
        command = "    " + stage.get("command", "").replace("\n", "\n    ")
        if paragraphs and stage.get("commit") == last:
            paragraphs[-1] += f"\n{command}"
        else:
            commit, _, changes = stage.get("commit", "").partition("+")
            at = f" at commit `{commit[:12]}`{' (with changes)' if changes else ''}" if commit else ""
            paragraphs.append(f"{'Then' if paragraphs else 'Made'}{at} by\n\n{command}")
        last = stage.get("commit")
    return "\n\n".join(paragraphs)
