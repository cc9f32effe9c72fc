"""Packages of data sets: one that is absent or only a folder of data adds nothing; one that is broken says so."""

from pathlib import Path

import pytest

from trainer import plugins

REGISTERS = "def register(plugins):\n    plugins.renders = 'own.renders'\n"


@pytest.mark.parametrize(
    ("content", "renders"), [({}, None), ({"data/0.png": ""}, None), ({"__init__.py": REGISTERS}, "own.renders")]
)
def test_a_package_registers_what_it_has_if_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: dict[str, str], renders: str | None
) -> None:
    name = f"own_{len(str(content))}"
    for file, text in content.items():
        path = tmp_path / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(plugins, "PACKAGES", (name,))
    assert plugins.plugins.__wrapped__() == plugins.Plugins(renders=renders)


def test_a_package_that_lacks_something_is_not_taken_for_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_broken.py").write_text("import a_package_that_is_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(plugins, "PACKAGES", ("own_broken",))
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_installed"):
        plugins.plugins.__wrapped__()
