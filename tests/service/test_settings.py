"""docs/settings.md equals the Settings class, every variable works, and a value that is not allowed is reported."""

import json
import os

import pytest

from service.settings import SettingError, Settings, read_settings, unknown_variables, variables
from tests.service.conftest import Command


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_has_a_meaning_and_a_variable(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (Settings.model_fields[name].description or "").endswith(".")
    default = Settings.model_fields[name].get_default(call_default_factory=True)
    value = json.dumps(default) if isinstance(default, list | tuple | dict) else str(default or 1)
    value = "*" if name == "cors_origins" else value
    for variable in variables(name):
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            assert name in Settings().model_fields_set


NOT_ALLOWED = [
    ("LABELGRID_DEVICE", "foo", "LABELGRID_DEVICE=foo: it should be auto, cpu, cuda, cuda:N or mps"),
    ("LABELGRID_REDIS_URL", "foo", "LABELGRID_REDIS_URL=foo: Redis URL must specify one of the following schemes"),
    ("REDIS_URL", "http://me:secret@host", "REDIS_URL=***@host: Redis URL must specify one of"),
    ("LABELGRID_WAIT_S", "abc", "LABELGRID_WAIT_S=abc: it should be a valid number"),
    ("LABELGRID_WAIT_S", "inf", "LABELGRID_WAIT_S=inf: it should be a finite number"),
    # pictures are removed by dates, which begin with the year 1
    ("LABELGRID_KEEP_DAYS", "1000000", "LABELGRID_KEEP_DAYS=1000000: it should be less than or equal to 36500"),
    *(
        ("REDIS_URL", f"redis://:{password}@h:6379/0", "REDIS_URL=***@h:6379/0: it cannot be read; in its user name")
        for password in ("two/parts", "12#parts")
    ),
    ("REDIS_URL", "redis://h/0?foo=1", "REDIS_URL=redis://h/0?foo=1: an option after its ? is unknown: 'foo'"),
    ("REDIS_URL", "redis://h?protocol=3", "REDIS_URL=redis://h?protocol=3: its option protocol is the service's own"),
    # redis-py takes database 0 instead, so two services would share their jobs
    ("REDIS_URL", "redis://h/staging", "REDIS_URL=redis://h/staging: its database should be a number, as in"),
    ("LABELGRID_ALLOW_NO_KEYS", "foo", "LABELGRID_ALLOW_NO_KEYS=foo: it should be true or false"),
]


@pytest.mark.parametrize(("variable", "value", "message"), NOT_ALLOWED)
def test_a_value_that_is_not_allowed_is_refused(
    variable: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LABELGRID_REDIS_URL", raising=False)
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingError) as error:
        read_settings()
    assert str(error.value).startswith(message)


def test_a_process_reports_it_in_one_line(command: Command) -> None:
    code, _, err = command("check", environment={"LABELGRID_DEVICE": "foo"})
    assert (code, err) == (1, "labelgrid: LABELGRID_DEVICE=foo: it should be auto, cpu, cuda, cuda:N or mps\n")


def test_unknown_variables_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("LABELGRID_")]:
        monkeypatch.delenv(name)
    for name in ("LABELGRID_DEVICE", "labelgrid_wait_s", "REDIS_URL", "LABELGRID_URL", "LABELGRID_API_KEY"):
        monkeypatch.setenv(name, "1")
    assert unknown_variables() == {}
    monkeypatch.setenv("LABELGRID_WAIT", "3")
    monkeypatch.setenv("LABELGRID_XYZZY", "3")
    assert unknown_variables() == {"LABELGRID_WAIT": "LABELGRID_WAIT_S", "LABELGRID_XYZZY": ""}
