"""Copies the documentation and the files that it links to into build/pages, which zensical.toml makes a site of.

The copy keeps the repository's folders, so links work on the site as they do in the repository.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("", "docs", "docs/dev", "docs/gallery", "models", "deploy/kubernetes")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]*`")
LINK = re.compile(r"""\]\(([^)\s]+)\)|\b(?:src|srcset|href)="([^"]+)\"""")


def pages() -> list[Path]:
    """Return the pages, relative to the repository."""
    return sorted(path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).glob("*.md"))


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """Yield file, relative to the repository, and anchor of each link of a page that leads into the repository."""
    text = CODE.sub("", FENCED.sub("", (ROOT / page).read_text()))
    for target in map("".join, LINK.findall(text)):
        if not re.match(r"[a-z]+:", target):
            file, _, anchor = target.partition("#")
            yield (ROOT / page.parent / file).resolve().relative_to(ROOT) if file else page, anchor


def main() -> None:
    out = ROOT / "build/pages"
    shutil.rmtree(out, ignore_errors=True)
    for file in {*pages(), *(file for page in pages() for file, _ in links(page))}:
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, out / file)


if __name__ == "__main__":
    main()
