"""The lock file: it covers pyproject.toml and all that is installed, names no index, and its hashes are checked."""

import hashlib
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.paths import ROOT
from tests.test_architecture import installed_with

LOCKS = [ROOT / "lock" / "requirements.txt", ROOT / "lock" / "uv.txt"]


def pins(lock: Path) -> list[tuple[Requirement, int]]:
    """Return the requirements of a lock file, each with the number of its hashes."""
    entries = re.split(r"\n(?=\S)", "\n".join(line for line in lock.read_text().splitlines() if "#" not in line))
    return [(Requirement(entry.partition("\\")[0]), entry.count("--hash=sha256:")) for entry in entries]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_every_entry_has_one_version_and_hashes(lock: Path) -> None:
    for requirement, hashes in pins(lock):
        assert re.fullmatch(r"==[^,*]+", str(requirement.specifier))
        assert hashes > 0


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_no_index_is_named(lock: Path) -> None:
    assert not re.search(r"https?://|--(extra-)?index|--find-links", lock.read_text())


def test_the_lock_fits_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    wanted += [one for extra in project["project"]["optional-dependencies"].values() for one in extra]
    locked = [requirement for requirement, _ in pins(LOCKS[0])]
    for requirement in (Requirement(one) for one in wanted if not one.startswith("labelgrid[")):
        versions = [
            next(iter(pin.specifier)).version
            for pin in locked
            if canonicalize_name(pin.name) == canonicalize_name(requirement.name)
        ]
        assert versions, f"{requirement} is not in the lock file: run `make lock`"
        assert all(requirement.specifier.contains(version) for version in versions), requirement


def test_everything_that_is_installed_is_locked() -> None:
    locked = {canonicalize_name(requirement.name) for requirement, _ in pins(LOCKS[0])}
    assert installed_with(["labelgrid[dev]"]) - {"labelgrid"} <= locked


def publish_wheel(folder: Path) -> str:
    """Write a wheel of a package `tiny` and return its hash."""
    wheel = folder / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny.py", "")
        archive.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        archive.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("tiny-1.0.dist-info/RECORD", "tiny.py,,\n")
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


@pytest.mark.parametrize("genuine", [True, False])
def test_uv_checks_the_hashes_of_constraints(tmp_path: Path, genuine: bool) -> None:
    """lock/install.sh hands the lock file to uv as constraints; pip would not check the hashes of those."""
    pytest.importorskip("uv")
    digest = publish_wheel(tmp_path)
    (tmp_path / "lock.txt").write_text(f"tiny==1.0 --hash=sha256:{digest if genuine else '0' * 64}\n")
    command = [sys.executable, "-m", "uv", "--no-cache", "pip", "install", "--target", str(tmp_path / "to"), "tiny"]
    command += ["--no-index", "--find-links", str(tmp_path), "--constraint", str(tmp_path / "lock.txt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode == 0) == genuine, done.stderr
    assert genuine or "Hash mismatch" in done.stderr
