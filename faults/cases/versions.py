"""Versions side by side: the release before this one, and a next one with one more option, each in a folder of its own.

Both run with this version's dependencies.
"""

import io
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from faults.harness import ROOT, until
from faults.trial import BODIES, OF_THE_RELEASE, SMALL, Trial

RELEASE = "2b44077"  # commit of the release before this one, at least the first whose queue has no pictures
PACKAGES = ("service", "shared")
# What the next version adds: file, line before it, new line.
ADDITIONS = (
    ("shared/options.py", "    clip_x0: bool = False\n", "    glow: Fraction = 0.0\n"),
    ("service/contract/schemas.py", "    clip_x0: bool | None = ", "    glow: Fraction | None = None\n"),
)


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="lg-version-") as folder:
        yield Path(folder)


@contextmanager
def release() -> Iterator[Path]:
    """The release before this one. RuntimeError if this clone does not have its commit."""
    packed = subprocess.run(["git", "archive", RELEASE, *PACKAGES], cwd=ROOT, capture_output=True)
    if packed.returncode:
        raise RuntimeError(f"commit {RELEASE} is not in this clone; `git fetch --unshallow` gets it")
    with _folder() as folder, tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        archive.extractall(folder, filter="data")
        yield folder


@contextmanager
def following() -> Iterator[Path]:
    """This version with one more option, `glow`."""
    with _folder() as folder:
        for package in PACKAGES:
            shutil.copytree(ROOT / package, folder / package)
        for name, before, line in ADDITIONS:
            lines = (folder / name).read_text().splitlines(keepends=True)
            (at,) = (i for i, one in enumerate(lines) if one.startswith(before))
            (folder / name).write_text("".join([*lines[:at], line, *lines[at:]]))
        yield folder


def _change(trial: Trial, before: Path, after: Path) -> None:
    """Replace every process, one after the other, while requests come in."""
    names = ["api", *trial.stack.workers()]
    for name in names:
        trial.stack.replace(name, before)
    trial.begin(OF_THE_RELEASE)

    def change() -> None:
        trial.stack.replace("worker 0", after)
        trial.submit(*OF_THE_RELEASE)
        trial.stack.replace("api", after)
        trial.submit(*OF_THE_RELEASE)
        trial.stack.replace("worker 1", after)

    trial.strike(change)
    trial.end()
    trial.recover()


def rolling_upgrade(trial: Trial) -> None:
    """every process of the release before is replaced by this version, in turn"""
    with release() as before:
        _change(trial, before, ROOT)


def rolling_downgrade(trial: Trial) -> None:
    """the same, back to the release before"""
    with release() as after:
        _change(trial, ROOT, after)


def option_of_the_next_version(trial: Trial) -> None:
    """the API is upgraded before its workers: a job with a new option fails and says so; once they are upgraded, it
    finishes"""
    with following() as newer:
        trial.stack.replace("api", newer)
        trial.begin()
        glowing = {**BODIES[SMALL], "glow": 0.5}

        def ask() -> None:
            job_id = trial.post(glowing, Prefer="respond-async")["id"]
            trial.jobs[job_id], trial.failing[job_id] = None, "upgrade the workers first"

        trial.strike(ask)
        trial.recover()
        for name in trial.stack.workers():
            trial.stack.replace(name, newer)
        retried = trial.post(glowing, Prefer="respond-async")["id"]
        trial.must_finish(retried)
        until(lambda: not trial.is_open(retried), "the job with the option")
