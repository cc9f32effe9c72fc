"""`python -m tests.breakages` runs seldom, so its text could go out of date unseen: all of it applies to the code."""

import pytest

from tests.breakages import BREAKAGES, Breakage
from tests.paths import ROOT


@pytest.mark.parametrize("one", BREAKAGES, ids=lambda one: one.promise)
def test_what_a_breakage_replaces_stands_in_its_file_once(one: Breakage) -> None:
    assert (ROOT / one.file).read_text().count(one.old) == 1
    assert one.new != one.old
    assert (ROOT / one.tests).exists()
