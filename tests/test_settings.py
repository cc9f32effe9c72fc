"""docs/settings.md lists every setting as the class has it, and the variables that it names work."""

import json
from pathlib import Path

import pytest

from service.settings import Settings
from service.settings_doc import comments, document, variables

ROOT = Path(__file__).parents[1]


def test_the_document_is_what_the_class_says() -> None:
    written = (ROOT / "docs/settings.md").read_text()
    assert written == document(), "python -m service.settings_doc > docs/settings.md"


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_has_its_meaning_and_its_variable(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert comments()[name].endswith((".", "?"))
    default = Settings.model_fields[name].get_default(call_default_factory=True)
    value = json.dumps(default) if isinstance(default, list | tuple | dict) else str(default or 1)
    for variable in variables(name):
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            assert name in Settings().model_fields_set
