"""examples/emoji_set.py: which emoji are taken, with which labels, without the download."""

import io
import json
import runpy
import tarfile
from pathlib import Path

import pytest

from tests.paths import ROOT

EXAMPLE = runpy.run_path(str(ROOT / "examples/emoji_set.py"))
ACTIVITIES = [f"job{i}" for i in range(6)]


def emoji(gender: str, activity: str, *, tones: bool = True) -> dict[str, object]:
    def form(code: str) -> dict[str, object]:
        return {"image": f"{gender}-{activity}-{code}.png", "has_img_twitter": True}

    one = {"name": f"{gender.upper()} {activity.upper()}", "short_name": f"{gender}-{activity}", **form("plain")}
    return one | ({"skin_variations": {code: form(code) for code in EXAMPLE["TONES"]}} if tones else {})


def package(members: list[dict[str, object]]) -> tarfile.TarFile:
    """An archive as npm's, each picture with its own name as content."""
    forms = [form for one in members for form in (one, *one.get("skin_variations", {}).values())]  # type: ignore[attr-defined]
    files = {f"img/twitter/64/{form['image']}": str(form["image"]).encode() for form in forms}
    files["emoji.json"] = json.dumps(members).encode()
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    data.seek(0)
    return tarfile.open(fileobj=data)


def test_takes_people_of_one_gender_in_all_tones_and_holds_a_fifth_out(tmp_path: Path) -> None:
    people = [emoji(gender, activity) for gender in ("woman", "man") for activity in ACTIVITIES]
    others = [emoji("woman", "hat", tones=False), emoji("cat", "sleeping"), emoji("man", "man")]
    with package(people + others) as archive:
        said = EXAMPLE["write"](tmp_path, archive, 1)
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert said == "72 pictures, 14 labels, 14 pictures to hold out"
    assert len({tuple(row["labels"]) for row in rows}) == len(rows) == 72
    row = next(row for row in rows if row["file_name"] == "pictures/woman-job3-1F3FD.png")
    assert row["labels"] == ["medium skin", "woman", "job3"]
    assert (tmp_path / row["file_name"]).read_text() == "woman-job3-1F3FD.png"
    held_out = (tmp_path / "held-out.txt").read_text().split()
    assert len(held_out) == 14
    assert set(held_out) < {row["file_name"] for row in rows}  # as `trainer import --held-out-files` wants them


def test_leaves_out_labels_with_too_few_pictures() -> None:
    people = [emoji(gender, activity) for gender in ("woman", "man") for activity in ACTIVITIES]
    rare = emoji("woman", "rare")  # six pictures
    assert not any("rare" in labels for labels in EXAMPLE["labelled"]([*people, rare]).values())


def test_refuses_another_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: io.BytesIO(b"other"))
    with pytest.raises(ValueError, match=r"has the SHA-256 .* expected"):
        EXAMPLE["download"]()
