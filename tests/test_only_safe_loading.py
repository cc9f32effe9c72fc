"""The code loads files only in ways that cannot run their contents. ruff refuses most others: see pyproject.toml."""

import re

import pytest

from tests.paths import ROOT

# torch.load and numpy's are safe unless told otherwise; torch's other loaders run what they read
UNSAFE = re.compile(r"weights_only=(?!True\b)|allow_pickle|\b(?:jit|hub)\.load\b|PackageImporter|PickleSerializer")
UNPICKLES = re.compile(r"\b(?:Queue|SimpleWorker|RqJob\.fetch)\((?!.*serializer=JSONSerializer)")  # rq does by default


@pytest.mark.parametrize(
    ("folder", "pattern"),
    [*((one, UNSAFE) for one in ("shared", "trainer", "iclevr", "service", "benchmarks")), ("service", UNPICKLES)],
)
def test_only_safe_ways_of_loading_are_used(folder: str, pattern: re.Pattern[str]) -> None:
    sources = sorted((ROOT / folder).rglob("*.py"))
    assert sources
    found = {str(path.relative_to(ROOT)): pattern.findall(path.read_text()) for path in sources}
    assert {path: unsafe for path, unsafe in found.items() if unsafe} == {}


@pytest.mark.parametrize(
    ("line", "is_unsafe"),
    [
        ("torch.load(path, weights_only=False)", True),
        ("torch.load(path, weights_only=True)", False),
        ("torch.jit.load(path)", True),
        ("np.load(path, allow_pickle=True)", True),
        ("Queue(name, connection=connection)", True),
        ("Queue(name, serializer=JSONSerializer)", False),
    ],
)
def test_the_checks_see_what_is_unsafe(line: str, is_unsafe: bool) -> None:
    assert any(pattern.search(line) for pattern in (UNSAFE, UNPICKLES)) == is_unsafe
