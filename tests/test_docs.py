"""The documentation: its links and anchors lead somewhere, and the site's navigation has every page."""

import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.docs_site import FENCED, links, pages
from tests.paths import ROOT

CODE = ("labelgrid", "service", "shared", "trainer", "iclevr")
CODE += ("benchmarks", "faults", "soak", "deploy", "examples", "tests")
SITE = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, by GitHub's rule."""
    found: Counter[str] = Counter()
    names = set()
    for heading in re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.MULTILINE):
        shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", shown).replace(" ", "-")
        names.add(f"{slug}-{found[slug]}" if found[slug] else slug)
        found[slug] += 1
    return names


def test_anchors_follow_githubs_rule() -> None:
    text = "# What a `job` is\n\n## 320x240: [why](x.md)?\n\n## Same\n\n```\n# no heading\n```\n\n## Same\n"
    assert anchors(text) == {"what-a-job-is", "320x240-why", "same", "same-1"}


@pytest.mark.parametrize("page", pages(), ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    for file, anchor in links(page):
        assert (ROOT / file).is_file(), f"{page} links to {file}"
        assert not anchor or anchor in anchors((ROOT / file).read_text()), f"{page} links to {file}#{anchor}"


@pytest.mark.parametrize("folder", ["docs", *CODE])
def test_modules_that_texts_name_exist(folder: str) -> None:
    """In backticks, with or without their folder, in pages, docstrings and comments."""
    modules = {"/" + path.relative_to(ROOT).as_posix() for name in CODE for path in (ROOT / name).rglob("*.py")}
    for path in [*(ROOT / folder).rglob("*.md"), *(ROOT / folder).rglob("*.py")]:
        for name in re.findall(r"`([\w/]+\.py)`", path.read_text()):
            assert any(module.endswith("/" + name) for module in modules), f"{path} names {name}"


def test_every_alert_leads_to_a_section_of_its_name() -> None:
    (group,) = yaml.safe_load((ROOT / "deploy/monitoring/alerts.yml").read_text())["groups"]
    for rule in group["rules"]:
        file, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        assert anchor == rule["alert"].lower()
        assert anchor in anchors((ROOT / file).read_text())


OTHERS_SAY = {  # pip, Python, the kernel, Redis and OpenSSL
    "No module named 'typer'",
    "No space left on device",
    "invalid username-password pair",
    "WRONGPASS",
    "NOAUTH",
    "certificate verify failed",
    "out of memory",
}


def messages() -> list[str]:
    """Return the messages in troubleshooting.md, without what varies in them."""
    lines = [line for line in (ROOT / "docs/troubleshooting.md").read_text().splitlines() if line.startswith("| ")]
    quoted = [message for line in lines for message in re.findall(r"`([^`]+)`", line.split(" | ")[0])]
    return [part.strip(" :,;") for message in quoted for part in message.split("...") if len(part.strip(" :,;")) > 3]


def sources() -> str:
    """Return the code, in which a text of several lines is one line."""
    files = [path for name in CODE[:5] for path in (ROOT / name).rglob("*.py")]
    return re.sub(r'"\s*\n\s*f?"', "", "".join(path.read_text() for path in [*files, ROOT / "Makefile"]))


def test_messages_of_troubleshooting_are_those_of_the_code() -> None:
    code = sources()
    assert len(messages()) > 50
    assert [part for part in messages() if part not in code and part not in OTHERS_SAY] == []


def test_every_message_of_a_service_that_does_not_start_and_of_the_client_is_in_troubleshooting() -> None:
    raised = re.findall(r'raise (?:StartError|ClientError|Unreachable)\(\s*f?"(.*?)"\)?[,) ]', sources())
    fixed = {message: re.sub(r"{[^}]*}", "", message) for message in raised}
    raised = [message for message, words in fixed.items() if re.search(r"[a-z ]{8}", words)]
    assert len(raised) > 15
    assert [message for message in raised if not any(part in message for part in messages())] == []


def test_links_are_seen() -> None:
    found = dict(links(Path("README.md")))
    assert Path("docs/api.md") in found
    assert Path("LICENSE") in found
    assert Path("docs/page-light.png") in found  # in HTML


def test_the_navigation_has_every_page_once() -> None:
    def files(entries: list[dict[str, Any]]) -> Iterator[str]:
        for entry in entries:
            for target in entry.values():
                yield from [target] if isinstance(target, str) else files(target)

    assert sorted(files(SITE["nav"])) == [str(page) for page in pages()]
