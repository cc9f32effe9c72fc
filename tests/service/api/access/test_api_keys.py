"""API keys: entries of settings and file, and a file that changes while the service runs."""

from pathlib import Path

import pytest

from service.api.access.api_keys import KeyRing, hash_of, new_key, parse
from service.settings import StartError
from tests.service.conftest import Command

ALICE, BOB = new_key(), new_key()


def entry(name: str, key: str) -> str:
    return f"{name}:{hash_of(key)}"


def test_entries_may_have_comments_commas_and_blank_lines_between_them() -> None:
    text = f"# keys\n{entry('a', ALICE)},{entry('b.c-d_1', BOB)}  # bob's\n\n{entry('a', BOB)}"
    assert list(parse(text, "x")) == [("a", hash_of(ALICE)), ("b.c-d_1", hash_of(BOB)), ("a", hash_of(BOB))]


@pytest.mark.parametrize("text", [f"alice:{ALICE}", f":{'0' * 64}", f"a:{'0' * 63}"], ids=["a key", "no name", "short"])
def test_a_bad_entry_is_refused_without_showing_it(text: str) -> None:
    with pytest.raises(StartError, match="entry 2 is not NAME:HASH") as caught:
        KeyRing(f"{entry('bob', BOB)} {text}", None)
    assert ALICE not in str(caught.value)


def test_a_setting_without_a_key_is_refused_rather_than_ignored() -> None:
    with pytest.raises(StartError, match="names no key"):
        KeyRing(" ,\n# alice\n", None)
    assert not KeyRing(" \n", None).enabled  # what compose passes on if it is not set


def test_a_file_is_read_again_when_it_changes_unless_it_is_bad(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    with pytest.raises(StartError, match="cannot be read"):
        KeyRing("", file)
    file.write_text("")
    ring = KeyRing("", file)
    assert ring.enabled  # a file without keys lets nobody in
    assert ring.owner_of(ALICE) is None
    file.write_text(entry("alice", ALICE))
    assert ring.owner_of(ALICE) == "alice"
    file.write_text("nonsense")
    assert ring.owner_of(ALICE) == "alice"
    file.write_text(f"{entry('bob', BOB)}\n")
    assert (ring.owner_of(ALICE), ring.owner_of(BOB)) == (None, "bob")
    (tmp_path / "new").write_text(f"{entry('bob', ALICE)}\n")  # of the same size
    (tmp_path / "new").replace(file)
    assert (ring.owner_of(ALICE), ring.owner_of(BOB)) == ("bob", None)
    file.unlink()
    assert (ring.owner_of(ALICE), ring.enabled) == (None, True)
    file.write_text(entry("alice", ALICE))
    assert ring.owner_of(ALICE) == "alice"


def test_the_command_prints_a_key_and_its_entry(command: Command) -> None:
    code, out, _ = command("keys", "alice")
    assert code == 0
    key, known = out.split()
    assert KeyRing(known, None).owner_of(key) == "alice"
    assert KeyRing(known, None).owner_of(key + "x") is None
    assert command("keys", "no name")[0] == 2
