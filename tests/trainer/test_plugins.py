"""Packages of data sets: one that is absent or only a folder of data adds nothing; one that is broken says so."""

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from trainer import plugins

REGISTERS = "def register(plugins):\n    plugins.renders = 'own.renders'\n"


def installed(monkeypatch: pytest.MonkeyPatch, folder: Path, package: str) -> None:
    """Let an installed package of this name, whose files are in `folder`, be the only one."""
    monkeypatch.syspath_prepend(folder)
    points = [EntryPoint("own", f"{package}.plugin:register", plugins.GROUP)]
    monkeypatch.setattr(plugins, "entry_points", lambda group: points if group == plugins.GROUP else [])


@pytest.mark.parametrize(
    ("content", "renders"),
    [
        ({}, None),
        ({"data/0.png": ""}, None),
        ({"__init__.py": "", "plugin.py": REGISTERS}, "own.renders"),
    ],
)
def test_a_package_registers_what_it_has_if_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: dict[str, str], renders: str | None
) -> None:
    name = f"own_{len(str(content))}"
    for file, text in content.items():
        path = tmp_path / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    installed(monkeypatch, tmp_path, name)
    assert plugins.plugins.__wrapped__() == plugins.Plugins(renders=renders)


def test_a_package_that_lacks_something_is_not_taken_for_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_broken").mkdir()
    (tmp_path / "own_broken" / "plugin.py").write_text("import a_package_that_is_not_installed\n")
    installed(monkeypatch, tmp_path, "own_broken")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_installed"):
        plugins.plugins.__wrapped__()


def test_the_package_of_iclevr_is_one() -> None:
    assert "render" in plugins.plugins().commands
