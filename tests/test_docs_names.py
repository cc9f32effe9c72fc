"""What the pages name exists: commands, options, targets of make, settings and defaults, metrics, routes, paths."""

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from deploy.docs_site import pages
from labelgrid.__main__ import CLIENT, COMMANDS, SERVICE, TRAINER
from service.__main__ import app as service
from service.client.__main__ import app as client
from service.settings import Settings
from tests.conftest import application
from tests.paths import ROOT
from tests.service.telemetry.test_metrics import known_names
from trainer.__main__ import app as trainer

NEW = [page for page in pages() if page.name not in ("CHANGELOG.md",) and page.parts[0] != "models"]
APPS = {SERVICE: service, CLIENT: client, TRAINER: trainer}
PROGRAMS = {"service": SERVICE, "service.client": CLIENT, "trainer": TRAINER}
FOLDERS = (
    "benchmarks",
    "deploy",
    "docs",
    "examples",
    "faults",
    "iclevr",
    "labelgrid",
    "lock",
    "models",
    "service",
    "shared",
    "soak",
)
FOLDERS += ("tests", "tests_browser", "trainer")
OF_THE_CLIENT = {"LABELGRID_URL", "LABELGRID_API_KEY"}
UNITS = {"": 1, "s": 1, "GiB": 2**30}


def text_of(page: Path) -> str:
    return (ROOT / page).read_text()


def code_of(page: Path) -> Iterator[str]:
    """Yield each line of code of a page: inline, indented and fenced; a line that ends in a backslash with the next."""
    text = text_of(page).replace("\\\n", " ")
    yield from re.findall(r"`([^`\n]+)`", text)
    yield from (line.strip() for line in re.findall(r"^ {4}.*$", text, re.MULTILINE))
    yield from (
        line
        for block in re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
    )


@cache
def commands(module: str) -> Any:
    return get_command(APPS[module]).commands  # type: ignore[attr-defined]


def calls(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the module and the words of each call of our command lines in a page."""
    for line in code_of(page):
        for program, words in re.findall(
            r"((?:(?<=^)|(?<=&& )|(?<=/bin/))labelgrid|python -m [\w.]+) ([^|;&#>)]*)", line
        ):
            try:
                found = shlex.split(words)
            except ValueError:  # a quotation that ends beyond the match
                found = words.split()
            if not found or found[0].startswith(("-", "COMMAND", "/", "&")):
                continue
            if program == "labelgrid":
                modules = [module for module, own in COMMANDS.items() if found[0] in own]
                assert modules or not re.fullmatch(r"[a-z-]+", found[0]), f"{page}: labelgrid {found[0]}"
                if modules:
                    yield modules[0], found
            elif (name := program.removeprefix("python -m ")) in PROGRAMS:
                yield PROGRAMS[name], found


@pytest.mark.parametrize("page", NEW, ids=str)
def test_commands_and_their_options_exist(page: Path) -> None:
    for module, (name, *words) in calls(page):
        if not re.fullmatch(r"[a-z-]+", name):  # a placeholder
            continue
        assert name in commands(module), f"{page}: {name}"
        command = commands(module)[name]
        if hasattr(command, "commands"):
            objective = words[0] if words else ""
            if objective not in command.commands:
                assert not re.fullmatch(r"[a-z]+", objective), f"{page}: {name} {objective}"
                continue
            command = command.commands[objective]
        known = {option for parameter in command.params for option in [*parameter.opts, *parameter.secondary_opts]}
        given = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert given <= known | {"--help"}, f"{page}: {name} {words}"


@pytest.mark.parametrize("page", NEW, ids=str)
def test_targets_of_make_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {name for line in code_of(page) for name in re.findall(r"(?:^|&& )make ([a-z-]+)\b(?!/)", line)}
    assert named <= targets


@pytest.mark.parametrize("page", NEW, ids=str)
def test_settings_exist_and_have_the_defaults_that_are_named(page: Path) -> None:
    known = {f"LABELGRID_{name.upper()}": field for name, field in Settings.model_fields.items()}
    assert set(re.findall(r"\bLABELGRID_[A-Z_]*[A-Z]\b(?!_?\*)", text_of(page))) <= known.keys() | OF_THE_CLIENT
    for name, value, unit in re.findall(r"`(LABELGRID_[A-Z_]+)`,? \(([\d,.]+)(?: (s|GiB))?\)", text_of(page)):
        default = known[name].get_default(call_default_factory=True)
        assert float(value.replace(",", "")) * UNITS[unit] == default, f"{page}: {name}"
    for name, value, unit in re.findall(r"`([a-z]+(?:_[a-z]+)+)`,? \(([\d,.]+)(?: (s|GiB))?\)", text_of(page)):
        if name in Settings.model_fields:
            default = Settings.model_fields[name].get_default(call_default_factory=True)
            assert float(value.replace(",", "")) * UNITS[unit] == default, f"{page}: {name}"


@pytest.mark.parametrize("page", NEW, ids=str)
def test_metrics_exist(page: Path) -> None:
    named = set(re.findall(r"`(labelgrid_[a-z_]+)`", text_of(page)))
    assert {name for name in named if not any(one.startswith(name) for one in known_names())} == set()


@pytest.fixture(scope="module")
def routes() -> set[tuple[str, str]]:
    paths = application(Settings()).openapi()["paths"]
    shown = {(method.upper(), path) for path, item in paths.items() for method in item}
    return {(method, re.sub(r"\{\w+\}", "{}", path)) for method, path in shown} | {("GET", "/"), ("GET", "/docs")}


@pytest.mark.parametrize("page", NEW, ids=str)
def test_routes_exist(page: Path, routes: set[tuple[str, str]]) -> None:
    for method, path in re.findall(r"`(GET|POST|DELETE) (/[\w/{}.]*)", text_of(page)):
        assert (method, re.sub(r"\{\w+\}", "{}", path)) in routes, f"{page}: {method} {path}"


@pytest.mark.parametrize("page", NEW, ids=str)
def test_paths_exist(page: Path) -> None:
    for name in re.findall(r"`((?:[\w.-]+/)+[\w.-]*)`", text_of(page)):
        if name.partition("/")[0] in FOLDERS:
            assert (ROOT / name).exists(), f"{page}: {name}"


def test_the_checks_see_what_pages_name() -> None:
    seen = [(module, words[0]) for page in NEW for module, words in calls(page)]
    assert {(TRAINER, "train"), (SERVICE, "keys"), (CLIENT, "score")} <= set(seen)
    assert len(seen) > 80
