"""The code loads files only in ways that cannot run their contents. ruff refuses most others: see pyproject.toml."""

import re

import pytest

from tests.paths import ROOT

# torch.load and numpy's are safe unless told otherwise; torch's other loaders run what they read, as rq does by default
UNSAFE = re.compile(
    r"weights_only=(?!True\b)|allow_pickle|\b(?:jit|hub)\.load\b|PackageImporter|"
    r"PickleSerializer|\b(?:Queue|SimpleWorker|RqJob\.fetch)\((?!.*serializer=JSONSerializer)"
)


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
def test_the_check_sees_what_is_unsafe(line: str, is_unsafe: bool) -> None:
    assert bool(UNSAFE.search(line)) == is_unsafe


@pytest.mark.parametrize("folder", ["shared", "trainer", "service", "benchmarks"])
def test_only_safe_ways_of_loading_are_used(folder: str) -> None:
    sources = sorted((ROOT / folder).rglob("*.py"))
    assert sources
    found = {str(path.relative_to(ROOT)): UNSAFE.findall(path.read_text()) for path in sources}
    assert {path: unsafe for path, unsafe in found.items() if unsafe} == {}
